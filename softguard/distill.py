"""The one training loop: corpus in, adapter out.

Batches are a function of (seed, step) alone and checkpoints hold the optimiser's whole state, so that a killed run goes on and
ends with the weights of an undisturbed one.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softguard import gate
from softguard.adapters import Adapter, as_stored
from softguard.chat import Chat
from softguard.config import Recipe, fingerprint
from softguard.corpus import Corpus, Example
from softguard.divergences import P_SAFE_RANGE
from softguard.engine import Engine
from softguard.errors import DivergedError, SoftguardError
from softguard.files import alone, check_folder, read_json, write_file, write_json, write_text
from softguard.guards import Guard, load_guard
from softguard.initial import initial_adapter
from softguard.models import BaseModel
from softguard.objectives import PAIRED, Batch, Losses, find_objective
from softguard.passes import Passes, Probe, token_scale
from softguard.prompts import thin
from softguard.rollouts import ON_POLICY, Rollouts, draw, losses, shortfall

_CONTRAST = 64  # prompts of each sort whose difference a steering vector starts from
_VALUE_RATE = 1e-3  # learning rate of ppo's value head


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
    recipe: Recipe,
    corpus: Corpus,
    out: Path | str,
    base: BaseModel,
    progress: Callable[[Step], None] = lambda step: None,
    guard: Guard | None = None,
) -> Adapter:
    """Train the adapter a recipe describes and save it under `out`; resumes from `out/checkpoint` where one is.

    Every line of `out/log.jsonl` is also given to `progress`. `guard`: instead of the recipe's, for objectives that ask it
    while they train. Under `accelerate launch` every process takes a share of each batch. A text, and with distil.steps 0 any
    adapter, is saved as it starts.
    Raises SoftguardError as `check_run` does, or if the corpus is another model's or the guard fails, and DivergedError if the
    loss is no longer finite.
    """
    out, corpus = Path(out), Corpus.open(corpus.folder, base)
    check_run(recipe, corpus, out, base)
    if recipe.distil.taken_steps:
        return _Trainer(recipe, corpus, out, base, guard).run(progress)
    from accelerate import PartialState

    facts = {**_facts(recipe, corpus, base), "objective": "untrained", "steps": 0}
    process = PartialState(cpu=base.device.type == "cpu")
    if process.is_main_process:
        replace(_start(recipe, corpus, base), facts=facts).save(out, base)
    process.wait_for_everyone()
    return Adapter.load(out, base)


def check_distil(recipe: Recipe, out: Path, base: BaseModel) -> Engine:
    """What can be told before there is a corpus; returns the model with the adapter before its first step.

    That of a steering vector, which starts from the corpus, is the model alone.
    Raises SoftguardError as `check_objective` does, for an adapter that the model cannot start or run, or a folder that cannot
    be written.
    """
    check_folder(out)
    if (out / "config.json").is_file():
        raise SoftguardError(f"{out} holds a model, which an adapter beside it would change; choose another --out")
    check_objective(recipe)
    wanted = recipe.distil
    if wanted.n_soft >= base.context and wanted.adapter in ("soft_prompt", "kv_prefix", "gate"):
        raise SoftguardError(f"distil.n_soft is {wanted.n_soft}; {base.name!r} reads {base.context} tokens in all, lower it")
    if wanted.adapter == "steering":
        return Engine(base)
    facts = {"refusal": recipe.system.refusal, "members": wanted.members}  # which a gate needs
    return Engine(base, replace(initial_adapter(base, wanted, [], []), facts=facts))


def check_objective(recipe: Recipe) -> None:
    """Raises SoftguardError for an unknown objective, or one that a gate cannot learn. Without steps there is none."""
    wanted = recipe.distil
    if wanted.taken_steps:
        if wanted.objective not in ON_POLICY:
            find_objective(wanted.objective, ON_POLICY)
        if wanted.adapter == "gate":
            _check_gate(recipe)


def check_run(recipe: Recipe, corpus: Corpus, out: Path, base: BaseModel) -> None:
    """What can be told before anything is trained.

    Raises SoftguardError as `check_distil` does, for a corpus that lacks the responses the adapter learns from, or if `out`
    holds a run of other settings.
    """
    engine = check_distil(recipe, out, base)
    taught = corpus.manifest["system"]
    own_threshold = corpus.manifest["threshold"] if taught["threshold"] is None else None
    recipe.system.check_taught(taught, f"corpus {corpus.folder}", own_threshold)
    _check_lengths(recipe, corpus, engine)
    adapter, cut = recipe.distil.adapter, corpus.manifest["threshold"]
    if recipe.distil.taken_steps and adapter == "gate" and cut is not None and not P_SAFE_RANGE[0] <= cut <= P_SAFE_RANGE[1]:
        raise SoftguardError(
            f"the system of corpus {corpus.folder} cuts p(safe) at {cut}, so near an end that a gate cannot tell the two sides "
            f"apart; teach with a system.threshold from {P_SAFE_RANGE[0]} to {P_SAFE_RANGE[1]}"
        )
    if recipe.distil.taken_steps and adapter != "gate" and not corpus.examples("train", [0])[0].responses[0].ids:
        raise SoftguardError(
            f"corpus {corpus.folder} holds no responses, which a {adapter} learns from; teach again with teach.max_new_tokens "
            "above 0"
        )
    _check_own(out, _settings(recipe, corpus, base))


def _check_own(out: Path, settings: str) -> None:
    """Raises SoftguardError if `out` holds a run of other settings."""
    for name, what in (("softguard.json", "adapter"), ("checkpoint/state.json", "checkpoint")):
        if (out / name).is_file() and read_json(out / name, what).get("settings") != settings:
            raise SoftguardError(
                f"{out} holds a run with other settings, model, precision or corpus; choose another --out or remove it"
            )


def _check_lengths(recipe: Recipe, corpus: Corpus, engine: Engine) -> None:
    """Raises SoftguardError if the adapter leaves a prompt of the corpus too little room for what is learned of it."""
    refusals = [len(engine.chat.encode_response(text)) for text in corpus.manifest["refusals"]]
    drawn = [recipe.teach.max_new_tokens] if recipe.distil.objective in ON_POLICY else []  # of the student's own answers
    wanted, window = recipe.distil, engine.base.window
    if wanted.taken_steps and wanted.adapter != "gate":
        drawn.append(corpus.longest_response)
    before, longest, new = engine.prefix.length, corpus.manifest["longest"], max(refusals + drawn)
    if before + longest + new > engine.base.context:
        raise SoftguardError(
            f"the longest prompt of corpus {corpus.folder} has {longest} tokens; with {before} of prefix and {new} new ones it "
            f"exceeds the model's context of {engine.base.context}; take a shorter adapter, or teach without that prompt"
        )
    beside = wanted.n_soft // wanted.members if wanted.adapter == "gate" else new - 1  # the last is not fed
    if wanted.taken_steps and window is not None and before + longest + beside > window:
        raise SoftguardError(
            f"the longest prompt of corpus {corpus.folder} has {longest} tokens; with {before + beside} others it exceeds the "
            f"window of {window} tokens that the model's attention has, and that must hold all that is learned at once; teach "
            "without that prompt"
        )


def time_step(recipe: Recipe, corpus: Corpus, out: Path, base: BaseModel) -> float:
    """Seconds one training step takes, measured on the second of two; 0 where there are none. Nothing is written.

    Raises SoftguardError as `distil` does.
    """
    check_run(recipe, corpus, out, base)
    if not recipe.distil.taken_steps:
        return 0.0
    trainer = _Trainer(recipe, corpus, out, base)
    batches = _batches(corpus.refusal_rates("train"), recipe.distil.batch_size, recipe.seed)
    trainer._train_step(*next(batches))
    begin = time.perf_counter()
    trainer._train_step(*next(batches))
    return time.perf_counter() - begin


def _silent(step: Step) -> None:
    """Other processes than the first tell nothing."""


def _start(recipe: Recipe, corpus: Corpus, base: BaseModel) -> Adapter:
    """The adapter before its first step."""
    refused: list[str] = []
    kept: list[str] = []
    if recipe.distil.adapter == "steering":
        rates = corpus.refusal_rates("train")
        chosen = [thin(np.flatnonzero(group).tolist(), _CONTRAST) for group in (rates > 0.5, rates <= 0.5)]
        refused, kept = ([e.prompt for e in corpus.examples("train", indices)] for indices in chosen)
    return initial_adapter(base, recipe.distil, refused, kept, recipe.seed)


def _settings(recipe: Recipe, corpus: Corpus, base: BaseModel) -> str:
    drawn = [recipe.teach.max_new_tokens] if recipe.distil.objective in ON_POLICY else []  # of the student's own answers
    known = (base.fingerprint, corpus.fingerprint, recipe.deciding.distil, recipe.system, recipe.seed, base.precision)
    return fingerprint(*known, *drawn)


def _facts(recipe: Recipe, corpus: Corpus, base: BaseModel) -> dict[str, Any]:
    return {
        "objective": recipe.distil.objective,
        "length": recipe.distil.length,
        "refusal": corpus.manifest["refusals"][0],
        "template": Chat(base.tokenizer, extra_stops=base.stop_ids).fingerprint,
        **({"members": recipe.distil.members} if recipe.distil.adapter == "gate" else {}),
        "guard": corpus.manifest["guard"],
        "guard_fingerprint": corpus.manifest["guard_fingerprint"],
        "system": corpus.manifest["system"],
        "corpus": corpus.fingerprint,
        "settings": _settings(recipe, corpus, base),
        "seed": recipe.seed,
    }


def _check_gate(recipe: Recipe) -> None:
    """Raises SoftguardError for what a gate cannot learn."""
    objective, drift_weight = recipe.distil.objective, recipe.distil.drift_weight
    if objective != "tv" or drift_weight is not None:
        raise SoftguardError(
            f"distil.objective is {objective} and distil.drift_weight {drift_weight}; a gate is |U − g| away from the system "
            "by any divergence: leave both out, or choose another distil.adapter, such as kv_prefix"
        )
    if recipe.system.policy:
        told = "system.policy is set and a gate says one refusal; choose another distil.adapter, such as kv_prefix"
        raise SoftguardError(told)


class _Trainer:
    def __init__(self, recipe: Recipe, corpus: Corpus, out: Path, base: BaseModel, guard: Guard | None = None) -> None:
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin
        from transformers import get_cosine_schedule_with_warmup

        self.recipe, self.config, self.corpus, self.out, self.base = recipe, recipe.distil, corpus, out, base
        self.on_policy = self.config.objective in ON_POLICY
        if self.on_policy:
            self.guard = guard or load_guard(recipe.system.guard)
            if self.guard.fingerprint != corpus.manifest["guard_fingerprint"]:
                taught, mine = corpus.manifest["guard_fingerprint"][:16], self.guard.fingerprint[:16]
                raise SoftguardError(
                    f"the corpus is of guard {corpus.manifest['guard']!r} ({taught}), not {self.guard.name!r} ({mine}): "
                    "give that one as system.guard"
                )
        else:
            self.objective = find_objective(self.config.objective, ON_POLICY)
        self.safe_weight, self.drift_weight = self.config.weights
        once = GradientAccumulationPlugin(num_steps=1)  # whatever a launcher says: we weigh micro-batches ourselves
        self.accelerator = Accelerator(cpu=base.device.type == "cpu", gradient_accumulation_plugin=once)
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        if self.on_policy and self.processes > 1:
            raise SoftguardError(f"objective {self.config.objective} draws its own answers; run it in one process")
        start = _start(recipe, corpus, base)
        tensors = {k: torch.nn.Parameter(v) for k, v in start.tensors.items()}
        self.student = replace(start, tensors=tensors, facts=_facts(recipe, corpus, base))
        self.passes = Passes(base, self.student, corpus.manifest["refusals"])
        self.value_head = torch.nn.Parameter(torch.zeros(base.hidden + 1, device=base.device))
        groups: list[dict[str, Any]] = [{"params": list(self.student.tensors.values())}]
        if self.config.objective == "ppo":
            groups.append({"params": [self.value_head], "lr": _VALUE_RATE})
        optimiser = torch.optim.Adam(groups, lr=self.config.learning_rate, betas=(0.9, 0.98), eps=1e-7)
        # The schedule is not prepared: accelerate would step it once a process.
        self.schedule = get_cosine_schedule_with_warmup(optimiser, self.config.warmup, self.config.steps)
        self.optimiser = self.accelerator.prepare(optimiser)
        self.best = self._now()
        self.best_loss, self.since_best, self.step = float("inf"), 0, 0
        self.settings = _settings(recipe, corpus, base)
        self.log: list[str] = []

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """All that the optimiser moves, in its order."""
        head = {"value_head": self.value_head} if self.config.objective == "ppo" else {}
        return {**self.student.tensors, **head}  # type: ignore[dict-item]  # parameters, see __init__

    def run(self, progress: Callable[[Step], None]) -> Adapter:
        with nullcontext() if self.rank else alone(self.out / "checkpoint" / ".lock"):
            _check_own(self.out, self.settings)  # another run may have begun and ended here since that was asked
            return self._run(progress)

    def _run(self, progress: Callable[[Step], None]) -> Adapter:
        self._resume()
        if self.rank:
            progress = _silent
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
            if self.rank == 0 and (last or len(entries) > 1 or self.step % self.config.checkpoint_every == 0):
                self._checkpoint()
        facts = {**_facts(self.recipe, self.corpus, self.base), "steps": self.step, "validation_loss": self.best_loss}
        if self.student.kind == "gate":
            facts["bias"] = self._bias()
        if self.rank == 0:
            replace(self.student, tensors=self.best, facts=facts).save(self.out, self.base)
        self.accelerator.wait_for_everyone()
        return Adapter.load(self.out, self.base)  # as stored

    def _now(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.student.tensors.items()}

    def _examples(self, split: str, indices: list[int]) -> list[Example]:
        """Caches and states that were kept in another precision are not this base's."""
        if self.corpus.manifest["precision"] == self.base.precision:
            return self.corpus.examples(split, indices, caches=self.student.kind == "gate")
        examples = self.corpus.examples(split, indices)
        return [e._replace(responses=tuple(draw._replace(hidden=None) for draw in e.responses)) for e in examples]

    def _train_step(self, indices: list[int], epoch: int) -> Step:
        examples = sorted(self._examples("train", indices), key=lambda e: len(e.prompt))
        safe = refusal = 0.0
        if self.on_policy:
            rollouts = self._draw(examples, self.step + 1)
            for loss in losses(self.config.objective, self.passes, rollouts, self.value_head, self.config.beta):
                self.optimiser.zero_grad()
                total = loss()
                self._backward(total)
                self._move()
            safe = float(self._shortfall(rollouts).mean())
        else:
            self.optimiser.zero_grad()
            mine, scale = examples[self.rank :: self.processes], token_scale(examples, epoch)
            for where in np.array_split(np.arange(len(mine)), min(self.config.accumulate, len(mine)) or 1):
                if not len(where):
                    continue
                part = [mine[i] for i in where]  # neighbours in length, so that attention pads little
                branch = self._branches(part, epoch, len(examples), scale)
                self._backward(self.safe_weight * branch.safe + self.config.refusal_weight * branch.refusal)
                safe, refusal = safe + branch.safe.item(), refusal + branch.refusal.item()
            safe, refusal = self._sum_over_processes(safe, refusal)
            self._move()
        self.schedule.step()
        return Step(0, "train", safe, refusal)

    def _branches(self, examples: Sequence[Example], epoch: int, prompts: int, scale: float) -> Losses:
        if self.student.kind == "gate":
            return self._gate_losses(self.passes.log_odds(examples), examples, prompts)
        return self.objective(self._batch(examples, epoch, prompts)[0]._replace(scale=scale), self.config.length)

    def _gate_losses(self, log_odds: Tensor, examples: Sequence[Example], prompts: int) -> Losses:
        """Mean over the columns of (examples, …) log-odds, so that members learn each by itself."""
        rates = [[e.soft_refusal_rate(self.corpus.manifest["threshold"])] for e in examples]
        return gate.losses(log_odds, torch.tensor(rates, device=log_odds.device), prompts * log_odds.shape[1])

    def _backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:  # an objective may learn nothing of prompts that the system refuses
            return
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss.item()} at step {self.step + 1}; lower distil.learning_rate, it is "
                f"{self.config.learning_rate}"
            )
        self.accelerator.backward(loss)

    def _move(self) -> None:
        parameters = list(self.trained.values())
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            # losses are shares of the whole batch's mean
            parameter.grad = self.accelerator.reduce(gradient, "sum") if self.processes > 1 else gradient
        self.accelerator.clip_grad_norm_(parameters, self.config.clip)
        self.optimiser.step()

    def _sum_over_processes(self, *values: float) -> list[float]:
        if self.processes == 1:
            return list(values)
        return self.accelerator.reduce(torch.tensor(values, device=self.base.device), "sum").tolist()  # type: ignore[no-any-return]

    def _draw(self, examples: Sequence[Example], stream: int) -> Rollouts:
        seed = 1_000_003 * self.recipe.seed + stream
        return draw(self.passes, examples, self.guard, self.recipe.teach.max_new_tokens, seed)

    def _shortfall(self, rollouts: Rollouts) -> Tensor:
        return shortfall(self.config.objective, rollouts, self.config.beta)

    def _batch(self, examples: Sequence[Example], epoch: int, prompts: int, pairs: bool | None = None) -> tuple[Batch, Tensor]:
        pairs = self.config.objective in PAIRED if pairs is None else pairs
        batch, first = self.passes.batch(examples, epoch, prompts, self.drift_weight, pairs)
        return batch._replace(beta=self.config.beta), first

    def _validation_indices(self) -> list[int]:
        return thin(list(range(self.corpus.size("validation"))), self.config.validation_prompts)

    @cached_property
    def _validation_scale(self) -> float:
        return token_scale(self.corpus.examples("validation", self._validation_indices()), 0)

    @torch.no_grad()
    def _validate(self) -> Step:
        shown, size = self._validation_indices(), self.config.batch_size
        take = len(shown)
        safe = refusal = 0.0
        probes = []
        for start in range(0, take, size):
            examples = self._examples("validation", shown[start : start + size])
            if self.student.kind == "gate":
                log_odds = self.passes.log_odds(examples).mean(-1)
                probes.append(self.passes.gate_probe(examples, log_odds))
                branch = self._gate_losses(log_odds[:, None], examples, take)
                safe, refusal = safe + branch.safe.item(), refusal + branch.refusal.item()
                continue
            batch, first = self._batch(examples, 0, take, pairs=False)
            probes.append(self.passes.probe(examples, batch, first))
            if self.on_policy:
                safe += float(self._shortfall(self._draw(examples, 0)).sum()) / take
                continue
            if self.config.objective in PAIRED:
                batch, _ = self._batch(examples, 0, take)
            branch = self.objective(batch._replace(scale=self._validation_scale), self.config.length)
            safe, refusal = safe + branch.safe.item(), refusal + branch.refusal.item()
        sums = Probe(*map(sum, zip(*probes, strict=True)))
        entry = Step(
            self.step,
            "validation",
            safe,
            refusal,
            sums.token_tv / max(sums.tokens, 1),
            sums.refuses / max(sums.refused, 1),
            sums.over_refuses / max(sums.answered, 1),
        )
        loss = self.safe_weight * safe + self.config.refusal_weight * refusal
        if not np.isfinite(loss):
            raise DivergedError(
                f"the loss on validation is {loss} at step {self.step}; lower distil.learning_rate, it is "
                f"{self.config.learning_rate}"
            )
        self.since_best += 1
        if loss < self.best_loss:
            as_stored(self.student.tensors)  # fails for what could not be saved
            self.best_loss, self.since_best, self.best = loss, 0, self._now()
        return entry

    def _bias(self) -> float:
        """Of the best gate, see `gate.bias`: of the vectors as they are stored, by the pass that refuses."""
        stored = {name: tensor.to(self.base.device).float() for name, tensor in as_stored(self.best).items()}
        examples = self.corpus.examples("validation", self._validation_indices())
        engine = Engine(self.base, replace(self.student, tensors=stored))
        log_odds = engine.log_odds([e.prompt for e in examples])
        return gate.bias(log_odds, torch.tensor([e.refusal_rate > 0.5 for e in examples]))

    def _resume(self) -> None:
        """Take up the checkpoint, if there is one, and drop log lines written after it."""
        from safetensors.torch import load

        folder = self.out / "checkpoint"
        if not (folder / "state.json").is_file():
            return
        state = read_json(folder / "state.json", "checkpoint")
        try:
            blob = (folder / state["tensors"]).read_bytes()
            lines = (self.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
            self.log = [line for line in lines if json.loads(line)["step"] <= state["step"]]
            if state.pop("seal") != _seal(state, blob, self.log):
                raise ValueError("not as it was written")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise SoftguardError(f"{folder} or the log beside it is damaged ({error}); remove it to train anew") from error
        tensors = load(blob)
        self.step, self.best_loss, self.since_best = state["step"], float(state["best_loss"]), state["since_best"]
        current = self.optimiser.state_dict()
        for number, (name, parameter) in enumerate(self.trained.items()):
            parameter.data.copy_(tensors[f"now/{name}"])
            adam = f"adam/{name}/"
            current["state"][number] = {k.removeprefix(adam): v for k, v in tensors.items() if k.startswith(adam)}
        self.best = {name: tensors[f"best/{name}"].to(self.base.device) for name in self.best}
        self.optimiser.load_state_dict(current)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "schedule stepped before optimiser": the optimiser's steps are in the checkpoint
            for _ in range(self.step):  # the schedule is a function of the number of its steps
                self.schedule.step()
        self._drop_tensors(but=state["tensors"])  # which a kill may have left

    def _checkpoint(self) -> None:
        """Write log and tensors under new names or whole, then the state that points to them, then drop the old tensors."""
        from safetensors.torch import save

        folder = self.out / "checkpoint"
        adam = self.optimiser.state_dict()["state"]
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for number, (name, parameter) in enumerate(self.trained.items()):
            tensors[f"now/{name}"] = parameter.detach()
            tensors |= {f"adam/{name}/{k}": v for k, v in adam[number].items()}
        name = f"step-{self.step}.safetensors"
        blob = save({k: v.cpu().contiguous() for k, v in tensors.items()})
        write_text(self.out / "log.jsonl", "".join(line + "\n" for line in self.log))
        write_file(folder / name, lambda beside: beside.write_bytes(blob))
        state = {
            "settings": self.settings,
            "step": self.step,
            "tensors": name,
            "best_loss": self.best_loss if np.isfinite(self.best_loss) else "inf",  # before the first validation
            "since_best": self.since_best,
        }
        write_json(folder / "state.json", {**state, "seal": _seal(state, blob, self.log)})
        self._drop_tensors(but=name)

    def _drop_tensors(self, but: str) -> None:
        for old in (self.out / "checkpoint").glob("step-*.safetensors"):
            if old.name != but:
                old.unlink(missing_ok=True)


def _seal(state: dict[str, Any], tensors: bytes, log: Sequence[str]) -> str:
    """Identity of a checkpoint."""
    return hashlib.sha256(json.dumps([state, list(log)], sort_keys=True).encode() + tensors).hexdigest()


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
