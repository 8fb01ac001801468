"""Fit an encoder guard on labelled rows: low-rank difference and heads first, then Platt scaling and thresholds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from softguard import prompts
from softguard.card import Card, Figure, Flags, auroc_figure, calibration_figure, figure_fields, sha256, share_figure
from softguard.config import GuardConfig
from softguard.errors import DivergedError, SoftguardError
from softguard.files import check_folder
from softguard.guards import Probabilities
from softguard.guards.encoder import (
    ENCODER_ID,
    FORMAT,
    MAX_BYTES,
    VERSION,
    EncoderGuard,
    Tokenizer,
    Weights,
    ends,
    find_encoder,
    linear_layers,
    load_encoder,
    load_tokenizer,
    pool,
)

_HEADS_AND_CARD = 16_384  # bytes, generously


class Row(NamedTuple):
    """One labelled example; `harmful` teaches the prompt question, `response` with `unsafe` the response question."""

    prompt: str
    harmful: bool | None
    response: str | None = None
    unsafe: bool | None = None
    weight: float = 1.0
    cut: bool = True  # whether a prefix of the response would bear the same label


class Dealt(NamedTuple):
    """The rows of labelled files by what they are for, and what is said of the files on the card."""

    training: list[Row]
    validation: list[Row]
    held_out: list[Row]
    sources: list[dict[str, Any]]


class _LowRank(nn.Module):
    """A frozen linear layer plus the low-rank difference that is being fitted."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features, generator=generator) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))  # zero: fitting starts from the encoder as it is

    def forward(self, x: Tensor) -> Tensor:
        difference = (x @ self.a.to(x.dtype).T) @ self.b.to(x.dtype).T
        return torch.add(self.base(x), difference)  # (batch, tokens, out)


def fit(
    rows: Sequence[Row],
    validation: Sequence[Row],
    settings: GuardConfig,
    name: str = "encoder-guard",
    told: Callable[[str], None] | None = None,
    seed: int = 0,
) -> EncoderGuard:
    """Fit a guard on `rows`; calibrate it and choose its thresholds on `validation`.

    The same rows, settings and thread count give the same weights, bit for bit. `told` receives progress lines.
    Raises SoftguardError if a question lacks one of its two classes in either set, or for too large a rank, and DivergedError
    if a fitted weight is not finite as it is stored.
    """
    _check_rows(rows, validation)
    answers = any(row.unsafe is not None for row in rows)
    folder, encoder_sha256 = find_encoder()
    tokenizer = load_tokenizer(folder)
    # bfloat16 and eager attention fit 2–3 times faster than float32 where the CPU has AMX; the merged guard is float32.
    encoder = load_encoder(folder, "eager").bfloat16()
    layers = linear_layers(encoder)
    _check_rank(settings.rank, layers)
    generator = torch.Generator().manual_seed(seed)
    low_rank = {}
    for path, layer in layers:
        low_rank[path] = _LowRank(layer, settings.rank, generator)
        parent, _, child = f"encoder.{path}".rpartition(".")
        setattr(encoder.get_submodule(parent), child, low_rank[path])
    hidden = low_rank[next(iter(low_rank))].base.in_features
    heads = nn.ParameterDict({"prompt": torch.zeros(hidden + 1)})  # the last entry is the bias
    if answers:
        heads["response"] = torch.zeros(2 * hidden + 1)
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to move
        torch.manual_seed(seed)
        _train(encoder.train(), tokenizer, low_rank, heads, rows, settings, seed, told or (lambda line: None))  # with dropout

    weights: Weights = {}
    for path, module in low_rank.items():
        weights[f"{path}.a"] = module.a.detach().half().contiguous()
        weights[f"{path}.b"] = module.b.detach().half().contiguous()
    for question, head in heads.items():
        weights[f"{question}.weight"] = head.detach()[:-1].clone()
        weights[f"{question}.bias"] = head.detach()[-1:].clone()
    if not all(bool(weight.isfinite().all()) for weight in weights.values()):
        raise DivergedError(
            "the fitted guard has weights that are not finite as stored; lower guard.learning_rate or guard.head_learning_rate"
        )
    card: Card = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "encoder": {"id": ENCODER_ID, "sha256": encoder_sha256},
        "settings": {**asdict(settings), "seed": seed},
        "rows": {"training": len(rows), "validation": len(validation)},
        "thresholds": {},
        "figures": [],
    }
    return _calibrated(weights, card, validation, settings.flagged_benign)


def _train(
    encoder: nn.Module,
    tokenizer: Tokenizer,
    low_rank: dict[str, _LowRank],
    heads: nn.ParameterDict,
    rows: Sequence[Row],
    settings: GuardConfig,
    seed: int,
    told: Callable[[str], None],
) -> None:
    rng = np.random.default_rng(seed)
    prompts = [ends(ids, settings.prompt_tokens) for ids in tokenizer.read([row.prompt for row in rows])[0]]
    responses, _ = tokenizer.read([row.response or "" for row in rows])
    examples: list[tuple[str, int]] = [("prompt", i) for i, row in enumerate(rows) if row.harmful is not None]
    examples += [("response", i) for i, row in enumerate(rows) if row.unsafe is not None]
    groups = [
        {"params": [p for m in low_rank.values() for p in (m.a, m.b)], "peak": settings.learning_rate},
        {"params": list(heads.values()), "peak": settings.head_learning_rate},
    ]
    optimiser = torch.optim.AdamW(groups, lr=0.0, weight_decay=settings.weight_decay)
    steps = settings.epochs * len(_batches(examples, [1] * len(examples), settings.batch, np.random.default_rng(0)))
    step, running = 0, 0.0
    for _ in range(settings.epochs):
        inputs = []
        for question, i in examples:
            if question == "prompt":
                inputs.append(tokenizer.prompt_input(prompts[i]))
            else:
                inputs.append(tokenizer.pair_input(prompts[i], _random_prefix(responses[i], rows[i].cut, settings, rng)))
        for batch in _batches(examples, [len(x.ids) for x in inputs], settings.batch, rng):
            question = examples[batch[0]][0]
            chosen = [rows[examples[i][1]] for i in batch]
            bad = torch.tensor([float(bool(r.harmful if question == "prompt" else r.unsafe)) for r in chosen])
            weight = torch.tensor([row.weight for row in chosen])  # (batch,)
            pooled = pool(encoder, [inputs[i] for i in batch])  # (batch, width)
            logits = pooled @ heads[question][:-1] + heads[question][-1]
            loss = nn.functional.binary_cross_entropy_with_logits(logits, bad, weight)
            loss.backward()  # type: ignore[no-untyped-call]
            pace = min((step + 1) / (0.05 * steps + 1), (steps - step) / (0.95 * steps))  # warm up, then fall to zero
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * pace
            optimiser.step()
            optimiser.zero_grad()
            step += 1
            running += (float(loss.detach()) - running) / min(step, 50)
            if step % 100 == 0 or step == steps:
                told(f"step {step}/{steps} loss {running:.3f}")


def _random_prefix(ids: list[int], cut: bool, settings: GuardConfig, rng: np.random.Generator) -> list[int]:
    longest = settings.response_tokens
    if rng.random() < settings.cut_share and cut:
        longest = int(rng.integers(min(8, longest), longest + 1))
    return ids[:longest]


def _batches(
    examples: Sequence[tuple[str, int]], lengths: Sequence[int], size: int, rng: np.random.Generator
) -> list[list[int]]:
    """Shuffled batches of example numbers: one question a batch, alike in length (within pools of 32 batches)."""
    batches: list[list[int]] = []
    for question in ("prompt", "response"):
        order = rng.permutation([i for i, (asked, _) in enumerate(examples) if asked == question]).tolist()
        for start in range(0, len(order), 32 * size):
            pool = sorted(order[start : start + 32 * size], key=lambda i: lengths[i])
            batches += [pool[k : k + size] for k in range(0, len(pool), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _calibrated(weights: Weights, card: Card, validation: Sequence[Row], flagged_benign: float) -> EncoderGuard:
    questions = [key.removesuffix(".weight") for key in weights if key.endswith(".weight") and key.count(".") == 1]
    guard = EncoderGuard(weights, card)
    for question in questions:
        safe, bad, _ = _scored(guard, question, validation)
        logit = np.log1p(-safe.clip(1e-9, 1 - 1e-9)) - np.log(safe.clip(1e-9))  # of being unsafe
        slope, offset = _platt(logit, bad)
        weights[f"{question}.weight"] = weights[f"{question}.weight"] * slope
        weights[f"{question}.bias"] = weights[f"{question}.bias"] * slope + offset
    for question in questions:
        safe, bad, _ = _scored(guard, question, validation)
        card["thresholds"][question] = round(float(np.quantile(safe[~bad], flagged_benign)), 4)
    return guard


def _scored(guard: EncoderGuard, question: str, rows: Sequence[Row]) -> tuple[Probabilities, Flags, list[str]]:
    """p(safe) of the rows that have an answer to the question, what it is, and their prompts."""
    if question == "prompt":
        asked = [row for row in rows if row.harmful is not None]
        prompts = [row.prompt for row in asked]
        return guard.prompt_safety(prompts), np.array([bool(row.harmful) for row in asked]), prompts
    asked = [row for row in rows if row.unsafe is not None]
    prompts = [row.prompt for row in asked]
    safe = guard.response_safety(prompts, [row.response or "" for row in asked])
    return safe, np.array([bool(row.unsafe) for row in asked]), prompts


def _platt(logit: np.ndarray[Any, Any], bad: Flags) -> tuple[float, float]:
    """Slope and offset of the logistic curve through (logit, bad), with Platt's softened targets."""
    from scipy.optimize import minimize

    positives = int(bad.sum())
    target = np.where(bad, (positives + 1) / (positives + 2), 1 / (len(bad) - positives + 2))

    def loss(parameters: np.ndarray[Any, Any]) -> float:
        z = parameters[0] * logit + parameters[1]
        return float(np.mean(np.logaddexp(0, z) - target * z))

    slope, offset = minimize(loss, np.array([1.0, 0.0]), bounds=[(1e-3, 1e3), (None, None)]).x
    return float(slope), float(offset)


def _check_rows(rows: Sequence[Row], validation: Sequence[Row]) -> None:
    for part, name in ((rows, "training rows"), (validation, "validation rows (a tenth of a file's prompts)")):
        labels, unsafe = {row.harmful for row in part}, {row.unsafe for row in part}
        wanted = [("label benign", False in labels), ("label harmful", True in labels)]
        if unsafe - {None}:
            wanted += [("unsafe 0", False in unsafe), ("unsafe 1", True in unsafe)]
        for what, is_there in wanted:
            if not is_there:
                raise SoftguardError(f"of the {len(part)} {name} none has {what}; both classes are needed, give more rows")
    if any(row.unsafe is not None for row in rows) and all(row.unsafe is None for row in validation):
        raise SoftguardError("the validation rows have no response with its unsafe, the training rows do; give more such rows")


def _check_rank(rank: int, layers: Sequence[tuple[str, nn.Linear]]) -> None:
    size = sum(2 * rank * (layer.in_features + layer.out_features) for _, layer in layers)  # as stored, in float16
    if size > MAX_BYTES - _HEADS_AND_CARD:
        raise SoftguardError(f"guard.rank {rank} takes {size:,} bytes, a guard at most {MAX_BYTES:,}; lower it")


def read_rows(path: Path | str) -> list[Row]:
    """Labelled rows of a file: `prompt`, `label` (harmful, benign), optionally `response` and `unsafe` (0, 1).

    Raises SoftguardError naming file and line of the first bad row.
    """
    if not Path(path).is_file():
        raise SoftguardError(f"{path} cannot be read, there is no such file; check the path")
    return [_row(place, fields) for place, fields in prompts.read_rows(str(path))]


def _row(place: str, fields: Mapping[str, Any]) -> Row:
    prompt: str = fields["prompt"]
    label, response, unsafe = (fields.get(key) for key in ("label", "response", "unsafe"))
    unsafe = {"0": 0, "1": 1, "": None}.get(unsafe, unsafe) if isinstance(unsafe, str) else unsafe  # of CSV
    if not isinstance(response, str | None):
        raise SoftguardError(f"{place}: field 'response' is not text")
    if label not in ("harmful", "benign"):
        raise SoftguardError(f"{place}: label is {label!r}; it must be harmful or benign")
    if unsafe is None:
        return Row(prompt, label == "harmful")
    if not isinstance(response, str) or unsafe not in (0, 1):
        raise SoftguardError(f"{place}: unsafe is {unsafe!r}; it must be 0 or 1 and stand beside a response text")
    return Row(prompt, label == "harmful", response, bool(unsafe))


def fit_guard(
    paths: Sequence[Path | str],
    out: Path | str,
    settings: GuardConfig | None = None,
    name: str = "encoder-guard",
    told: Callable[[str], None] | None = None,
    seed: int = 0,
) -> EncoderGuard:
    """Fit a guard on labelled files (see `read_rows`) and save it in the folder `out`.

    One prompt in five, by the sha256 of its text, is held out: half of those calibrate the guard and choose its
    thresholds, the other half give the card's figures. Deterministic for the same files, settings and thread count.
    Raises SoftguardError as `check_fit` does, before anything is fitted, and DivergedError as `fit` does.
    """
    settings = settings or GuardConfig()
    check_folder(Path(out))
    dealt = _dealt(paths)
    guard = fit(dealt.training, dealt.validation, settings, name, told, seed)
    guard.card["training"] = dealt.sources
    guard.card["limits"] = ["figures are from one tenth of the same files; texts of another kind may do worse"]
    for question in guard.card["thresholds"]:
        figures = question_figures(guard, question, "held-out tenth", *_scored(guard, question, dealt.held_out))
        guard.card["figures"] += [{"question": question, **figure_fields(figure)} for figure in figures]
    guard.save(out)
    return guard


def check_fit(paths: Sequence[Path | str], out: Path | str, settings: GuardConfig) -> Dealt:
    """What `fit_guard` would fit, calibrate and measure a guard with.

    Raises SoftguardError for a bad row (with file and line), a missing class, too large a rank, or an `out` that cannot be
    written.
    """
    check_folder(Path(out))
    dealt = _dealt(paths)
    _check_rows(dealt.training, dealt.validation)
    _check_rank(settings.rank, linear_layers(load_encoder(find_encoder()[0], "eager")))
    return dealt


def _dealt(paths: Sequence[Path | str]) -> Dealt:
    dealt = Dealt([], [], [], [])
    for path in paths:
        rows = read_rows(path)
        dealt.sources.append({"file": Path(path).name, "rows": len(rows), "sha256": sha256(Path(path).read_bytes())})
        for row in rows:
            tenth = int(sha256(row.prompt.strip().lower().encode())[:8], 16) % 10
            part = dealt.validation if tenth == 0 else dealt.held_out if tenth == 1 else dealt.training
            part.append(row)
    return dealt


def question_figures(
    guard: EncoderGuard, question: str, data: str, safe: Probabilities, bad: Flags, prompts: Sequence[str]
) -> list[Figure]:
    """What can be measured of one question's scores `safe` against `bad`, all (cases,): a class may be missing.

    Of several answers to one of the `prompts` intervals are over prompts, see `over_questions`.
    """
    asked = np.array(prompts)
    flagged = safe < (guard.prompt_threshold if question == "prompt" else guard.response_threshold)
    figures = []
    if bad.any():
        figures.append(share_figure("recall at threshold", data, flagged[bad], asked[bad]))
    if not bad.all():
        figures.append(share_figure("flagged at threshold though safe", data, flagged[~bad], asked[~bad]))
    if bad.any() and not bad.all():
        figures = [auroc_figure(data, safe, bad, asked), *figures, calibration_figure(data, safe, bad, asked)]
    return figures
