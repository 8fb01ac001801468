"""The one training loop: corpus in, adapter out.

The constant prefix is run once for all rows of a pass (`packed`), not once a row. Batches are a function of (seed, step)
alone and checkpoints hold the optimiser's whole state, so that a killed run goes on and ends with the weights of an
undisturbed one.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softguard.adapters import Adapter, initial_vectors
from softguard.chat import Chat
from softguard.config import Recipe, fingerprint
from softguard.corpus import Corpus, Example
from softguard.divergences import selected, token_tv
from softguard.errors import SoftguardError
from softguard.files import read_json, write_file, write_json, write_text
from softguard.kernels import log_law, per_token
from softguard.models import BaseModel
from softguard.objectives import Batch, divergences, find_objective
from softguard.packed import packed_hidden
from softguard.prefix import constant_prefix
from softguard.prompts import thin

_NO_WEIGHT = 1e-3  # branches the system takes less often than this are left out


class Step(NamedTuple):
    """What one line of `log.jsonl` says."""

    step: int
    kind: str  # "train" or "validation"
    safe: float  # loss of the safe branch
    refusal: float  # loss of the refusal branch
    # of validation alone:
    token_tv: float | None = None  # to the base, mean over tokens of answers the system keeps
    refuses: float | None = None  # share of prompts the system refuses whose likeliest first token is the refusal's
    over_refuses: float | None = None  # the same share of prompts the system answers


def distil(
    recipe: Recipe, corpus: Corpus, out: Path, base: BaseModel, progress: Callable[[Step], None] = lambda step: None
) -> Adapter:
    """Train the adapter a recipe describes and save it under `out`; resumes from `out/checkpoint` where one is.

    Every line of `out/log.jsonl` is also given to `progress`. Raises SoftguardError if the corpus is another model's, `out`
    holds another recipe's run, or the loss is no longer finite.
    """
    trainer = _Trainer(recipe, Corpus.open(corpus.folder, base), out, base)
    return trainer.run(progress)


def time_step(recipe: Recipe, corpus: Corpus, out: Path, base: BaseModel) -> float:
    """Seconds one training step takes, measured on the second of two; nothing is written."""
    trainer = _Trainer(recipe, corpus, out, base)
    batches = _batches(corpus.refusal_rates("train"), recipe.distil.batch_size, recipe.seed)
    trainer._train_step(*next(batches))
    begin = time.perf_counter()
    trainer._train_step(*next(batches))
    return time.perf_counter() - begin


class _Trainer:
    def __init__(self, recipe: Recipe, corpus: Corpus, out: Path, base: BaseModel) -> None:
        from accelerate import Accelerator
        from transformers import get_cosine_schedule_with_warmup

        self.recipe, self.config, self.corpus, self.out, self.base = recipe, recipe.distil, corpus, out, base
        self.objective = find_objective(self.config.objective)
        self.safe_weight, self.drift_weight = self.config.weights
        self.chat = Chat(base.tokenizer, self.config.slot, base.stop_ids)
        self.begins = [self.chat.encode_response(text)[0] for text in corpus.manifest["refusals"]]  # the default's comes first
        self.accelerator = Accelerator(cpu=base.device.type == "cpu")
        self.vectors = torch.nn.Parameter(initial_vectors(base, self.config.adapter, self.config.init_text, self.config.n_soft))
        optimiser = torch.optim.Adam([self.vectors], lr=self.config.learning_rate, betas=(0.9, 0.98), eps=1e-7)
        schedule = get_cosine_schedule_with_warmup(optimiser, self.config.warmup, self.config.steps)
        self.optimiser, self.schedule = self.accelerator.prepare(optimiser, schedule)
        self.teacher_prefix = constant_prefix(base, self.chat, None)
        self.student = Adapter(self.config.adapter, self.vectors, self.config.slot, {})
        self.best = self.vectors.detach().clone()
        self.best_loss, self.since_best, self.step = float("inf"), 0, 0
        self.settings = fingerprint(
            base.fingerprint, corpus.fingerprint, recipe.distil, recipe.system, recipe.seed, recipe.model.dtype
        )
        self.log: list[str] = []

    def run(self, progress: Callable[[Step], None]) -> Adapter:
        self._resume()
        for line in self.log:
            progress(Step(**json.loads(line)))
        batches = _batches(self.corpus.refusal_rates("train"), self.config.batch_size, self.recipe.seed)
        for _ in range(self.step):
            next(batches)
        while self.step < self.config.steps and self.since_best < self.config.patience:
            entry = self._train_step(*next(batches))
            self.step += 1
            entries = [entry._replace(step=self.step)]
            last = self.step == self.config.steps
            if last or self.step % self.config.validate_every == 0:
                entries.append(self._validate())
            for e in entries:
                self.log.append(json.dumps(e._asdict()))
                progress(e)
            if last or len(entries) > 1 or self.step % self.config.checkpoint_every == 0:
                self._checkpoint()
        Adapter(self.config.adapter, self.best, self.config.slot, self._facts()).save(self.out, self.base)
        return Adapter.load(self.out, self.base)  # as stored

    def _facts(self) -> dict[str, Any]:
        return {
            "objective": self.config.objective,
            "length": self.config.length,
            "refusal": self.corpus.manifest["refusals"][0],
            "guard": self.corpus.manifest["guard"],
            "corpus": self.corpus.fingerprint,
            "settings": self.settings,
            "seed": self.recipe.seed,
            "steps": self.step,
            "validation_loss": self.best_loss,
        }

    def _train_step(self, indices: list[int], epoch: int) -> Step:
        examples = sorted(self.corpus.examples("train", indices), key=lambda e: len(e.prompt))
        self.optimiser.zero_grad()
        safe = refusal = 0.0
        for where in np.array_split(np.arange(len(examples)), min(self.config.accumulate, len(examples))):
            part = [examples[i] for i in where]  # neighbours in length, so that attention pads little
            batch, _, _ = self._batch(part, epoch, len(examples))
            losses = self.objective(batch, self.config.length)
            total = self.safe_weight * losses.safe + self.config.refusal_weight * losses.refusal
            if not torch.isfinite(total):
                raise SoftguardError(
                    f"the loss is {total.item()} at step {self.step + 1}; lower distil.learning_rate, it is "
                    f"{self.config.learning_rate}"
                )
            self.accelerator.backward(total)
            safe, refusal = safe + losses.safe.item(), refusal + losses.refusal.item()
        self.accelerator.clip_grad_norm_([self.vectors], self.config.clip)
        self.optimiser.step()
        self.schedule.step()
        return Step(0, "train", safe, refusal)

    @torch.no_grad()
    def _validate(self) -> Step:
        indices = thin(list(range(self.corpus.size("validation"))), self.config.validation_prompts)
        take = len(indices)
        losses, probes = [], []
        for start in range(0, take, self.config.batch_size):
            examples = self.corpus.examples("validation", indices[start : start + self.config.batch_size])
            batch, first, begin = self._batch(examples, 0, take)
            losses.append(self.objective(batch, self.config.length))
            probes.append(_probe(batch, first, begin))
        probe = _Probe(*map(sum, zip(*probes, strict=True)))
        entry = Step(
            self.step,
            "validation",
            sum(part.safe.item() for part in losses),
            sum(part.refusal.item() for part in losses),
            probe.token_tv / max(probe.tokens, 1),
            probe.refuses / max(probe.refused, 1),
            probe.over_refuses / max(probe.answered, 1),
        )
        loss = self.safe_weight * entry.safe + self.config.refusal_weight * entry.refusal
        self.since_best += 1
        if loss < self.best_loss:
            self.best_loss, self.since_best = loss, 0
            self.best = self.vectors.detach().clone()
        return entry

    def _batch(self, examples: Sequence[Example], epoch: int, prompts: int) -> tuple[Batch, Tensor, Tensor]:
        """Both branches of some examples, by one pass of the student and, unless the corpus kept its states, one of the base.

        Also returns the student's last hidden states that predict the rows' first tokens, (S + R, hidden), and the first tokens
        of the refusals, (R,).
        """
        encoded = [self.chat.encode(e.prompt) for e in examples]
        drawn = [e.responses[epoch % len(e.responses)] for e in examples]
        safe = [i for i, draw in enumerate(drawn) if draw.keep > _NO_WEIGHT]
        refused = [(i, ids, rate) for i, e in enumerate(examples) for ids, rate in e.refusals.items() if rate > _NO_WEIGHT]
        refusals = [list(ids) for _, ids, _ in refused]
        responses = [list(drawn[i].ids) for i in safe]
        answers = responses + refusals
        rows = [encoded[i] + answer[:-1] for i, answer in zip([*safe, *(i for i, *_ in refused)], answers, strict=True)]
        wanted = [len(answer) for answer in answers]
        prefix = constant_prefix(self.base, self.chat, self.student)
        hidden = packed_hidden(self.base, prefix, rows, wanted)
        head = self.base.head
        student = _padded(hidden[: len(safe)], hidden[0])
        teacher = [draw.hidden.to(head) for draw in (drawn[i] for i in safe) if draw.hidden is not None]
        if len(teacher) < len(safe):
            with torch.no_grad():
                teacher = packed_hidden(self.base, self.teacher_prefix, rows[: len(safe)], wanted[: len(safe)])
        device, width = student.device, student.shape[1]
        response = torch.zeros(len(safe), width, dtype=torch.long, device=device)
        mask = torch.zeros(len(safe), width, device=device)
        for row, ids in enumerate(responses):
            response[row, : len(ids)] = torch.tensor(ids, device=device)
            mask[row, : len(ids)] = 1

        def numbers(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        target = torch.tensor([i for ids in refusals for i in ids], device=device, dtype=torch.long)
        log_probs = per_token(
            lambda log_q, at: selected(log_q, target[at]), torch.cat([hidden[0][:0], *hidden[len(safe) :]]), head
        )
        said = _padded([part[:, None] for part in torch.split(log_probs, list(map(len, refusals)))], log_probs[:, None])[..., 0]
        # Of several things said instead of one prompt's responses, the most frequent stands for all in the first token's law.
        first = [max(e.refusals, key=e.refusals.__getitem__, default=tuple(self.begins))[0] for e in examples]
        batch = Batch(
            student=student,
            teacher=_padded(teacher, hidden[0]),
            head=head,
            response=response,
            mask=mask,
            p_safe=numbers([drawn[i].keep for i in safe]),
            first_rate=numbers([examples[i].refusal_rate for i in safe]),
            refusal=said,
            refusal_rate=numbers([rate for *_, rate in refused]),
            refusal_token=torch.tensor([first[i] for i in safe], dtype=torch.long, device=device),
            prompts=prompts,
            drift_weight=self.drift_weight,
            begins=torch.tensor(sorted(set(self.begins)), device=device),
            refusal_mask=_padded([torch.ones(len(ids), 1, device=device) for ids in refusals], said[..., None])[..., 0],
        )
        return batch, torch.stack([row[0] for row in hidden]), torch.tensor([ids[0] for ids in refusals], device=device)

    def _resume(self) -> None:
        """Take up the checkpoint, if there is one, and drop log lines written after it."""
        from safetensors.torch import load

        folder = self.out / "checkpoint"
        if not (folder / "state.json").is_file():
            return
        state = read_json(folder / "state.json", "checkpoint")
        if state["settings"] != self.settings:
            raise SoftguardError(
                f"{self.out} holds a run with other settings, model or corpus; choose another --out or remove it"
            )
        tensors = load((folder / state["tensors"]).read_bytes())
        self.step, self.best_loss, self.since_best = state["step"], float(state["best_loss"]), state["since_best"]
        self.vectors.data.copy_(tensors["vectors"])
        self.best = tensors["best"].to(self.base.device)
        current = self.optimiser.state_dict()
        current["state"] = {0: {k.removeprefix("adam."): v for k, v in tensors.items() if k.startswith("adam.")}}
        self.optimiser.load_state_dict(current)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "schedule stepped before optimiser": the optimiser's steps are in the checkpoint
            for _ in range(self.step):  # the schedule is a function of the number of its steps
                self.schedule.step()
        lines = (self.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        self.log = [line for line in lines if json.loads(line)["step"] <= self.step]

    def _checkpoint(self) -> None:
        """Write log and tensors under new names or whole, then the state that points to them, then drop the old tensors."""
        from safetensors.torch import save

        folder = self.out / "checkpoint"
        adam = self.optimiser.state_dict()["state"][0]
        tensors = {"vectors": self.vectors.detach(), "best": self.best, **{f"adam.{k}": v for k, v in adam.items()}}
        name = f"step-{self.step}.safetensors"
        blob = save({k: v.cpu().contiguous() for k, v in tensors.items()})
        write_text(self.out / "log.jsonl", "".join(line + "\n" for line in self.log))
        write_file(folder / name, lambda beside: beside.write_bytes(blob))
        write_json(
            folder / "state.json",
            {
                "settings": self.settings,
                "step": self.step,
                "tensors": name,
                "best_loss": self.best_loss if np.isfinite(self.best_loss) else "inf",
                "since_best": self.since_best,
            },
        )
        for old in folder.glob("step-*.safetensors"):
            if old.name != name:
                old.unlink()


class _Probe(NamedTuple):
    """Sums over some rows, from which a line of validation is made."""

    token_tv: float
    tokens: int
    refuses: int
    refused: int
    over_refuses: int
    answered: int


def _probe(batch: Batch, first: Tensor, begin: Tensor) -> _Probe:
    assert batch.begins is not None
    likeliest = log_law(first, batch.head).argmax(-1)
    safe, kept, refused = len(batch.p_safe), batch.p_safe > 0.5, batch.refusal_rate > 0.5
    drift = divergences(token_tv, batch)[kept]
    return _Probe(
        float(drift.sum()),
        int(batch.mask[kept].sum()),
        int(((likeliest[safe:] == begin) & refused).sum()),
        int(refused.sum()),
        int((torch.isin(likeliest[:safe], batch.begins) & kept).sum()),
        int(kept.sum()),
    )


def _padded(rows: list[Tensor], like: Tensor) -> Tensor:
    """(rows, longest row, hidden) hidden states, padded with 0."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else like.new_zeros(0, 1, like.shape[-1])


def _batches(refusal_rates: np.ndarray[Any, np.dtype[np.float64]], size: int, seed: int) -> Iterator[tuple[list[int], int]]:
    """Endless (indices, epoch); every epoch visits all prompts once, in an order of its own.

    Prompts the system refuses are spread evenly over the epoch: a chance surplus of them in one batch would move the
    student's refusals as a whole, and drown what tells one prompt from another.
    """
    refused = refusal_rates > 0.5
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        place = np.empty(len(refused))
        for group in (np.flatnonzero(refused), np.flatnonzero(~refused)):
            place[rng.permutation(group)] = (np.arange(len(group)) + rng.random(len(group))) / max(len(group), 1)
        order = np.argsort(place)
        for start in range(0, len(order), size):
            yield order[start : start + size].tolist(), epoch
        epoch += 1
