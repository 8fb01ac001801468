"""How long a command would take, from one small timed sample of its own work on this machine."""

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from softguard.adapters import Adapter
from softguard.config import Recipe
from softguard.corpus import Corpus, check_teaching
from softguard.distill import time_step
from softguard.engine import Engine
from softguard.evaluation import check_evaluation, engines_of
from softguard.judges import GuardJudge, Judge
from softguard.models import BaseModel
from softguard.prompts import read_prompts, thin
from softguard.suites import Suite
from softguard.system import SafeSystem

_SAMPLE = 16  # prompts


def teach_plan(recipe: Recipe, out: Path, base: BaseModel, system: SafeSystem) -> str:
    """What `teach` would draw and roughly how long it would take. Checks what `teach` does."""
    check_teaching(recipe, out, Engine(base), system)
    wanted = recipe.teach.sources.values()
    texts = [[prompt.text for prompt in read_prompts(source, limit)] for source, limit in wanted]
    seconds = teach_seconds(recipe, base, system, [text for part in texts for text in part])
    parts = " and ".join(f"{len(part):,} prompts of {source}" for part, (source, _) in zip(texts, wanted, strict=True))
    return (
        f"teach: draw {recipe.teach.responses} response(s) of up to {recipe.teach.max_new_tokens} tokens to {parts} from "
        f"{base.name}, score them with guard {recipe.system.guard} in {recipe.system.mode} mode; about {minutes(seconds)}"
    )


def teach_seconds(recipe: Recipe, base: BaseModel, system: SafeSystem, texts: list[str]) -> float:
    """Seconds to draw and judge responses to `texts`, and to keep their caches where they are kept."""
    engine, wanted = Engine(base), recipe.teach
    sample = thin(texts, _SAMPLE)
    begin = answered = end = 0.0
    for few, new in ((sample[:2], min(wanted.max_new_tokens, 2)), (sample, wanted.max_new_tokens)):  # the first is slower
        begin = time.perf_counter()
        drawn = engine.generate(few, new)
        system.judge(few, [response.text for response in drawn])
        answered = time.perf_counter()
        if wanted.keep_caches:
            engine.caches(few)
        end = time.perf_counter()
    return ((answered - begin) * wanted.responses + end - answered) / len(sample) * len(texts)


def distil_plan(recipe: Recipe, corpus: Corpus, out: Path, base: BaseModel) -> str:
    """What `distil` would train and roughly how long it would take. Checks what `distil` does."""
    steps = recipe.distil.taken_steps
    seconds = time_step(recipe, corpus, out, base) * steps
    return (
        f"distil: {steps} steps of {recipe.distil.batch_size} prompts from a corpus of "
        f"{corpus.size('train'):,}, objective {recipe.distil.objective}, {_adapter(recipe)}; about {minutes(seconds)}"
    )


def _adapter(recipe: Recipe) -> str:
    wanted = recipe.distil
    sizes = {
        "lora": f"of at most {wanted.budget:,} numbers",
        "steering": f"at depth {wanted.depth:g}",
        "text": "",
        "soft_prompt": f"of {wanted.n_soft} vectors in slot {wanted.slot}",
    }
    size = sizes.get(wanted.adapter, f"of {wanted.n_soft} vectors")
    return f"{wanted.adapter} {size}".strip()


def evaluate_plan(
    recipe: Recipe,
    out: Path,
    base: BaseModel,
    system: SafeSystem,
    adapter: Adapter | None,
    judges: Sequence[Judge | GuardJudge],
) -> str:
    """What `evaluate` would measure and roughly how long it would take. Raises SoftguardError as `check_evaluation` does."""
    suites = check_evaluation(recipe, out, system, adapter, engines_of(base, adapter).values(), judges)
    pace = pace_of(recipe, base, system, judges, suites)
    seconds = pace.seconds(suites, made=2, graded=3) if adapter else pace.seconds(suites, made=1, graded=2)
    systems = "base, safe system and distilled model" if adapter else "base and safe system"
    parts = ", ".join(f"{suite.name} ({len(suite.prompts):,})" for suite in suites)
    return f"evaluate: {systems} on {parts}; about {minutes(seconds)}"


class Pace(NamedTuple):
    """Seconds a prompt takes in an evaluation."""

    answer: float  # by one model
    guard: float  # what the system makes of the base's
    judge: float  # all judges' words on one answer

    def seconds(self, suites: Sequence[Suite], made: int, graded: int) -> float:
        """Of an evaluation in which `made` models answer, the others' answers being known, and `graded` systems are judged."""
        judged = sum(len(suite.prompts) for suite in suites if suite.measure == "safety")
        return sum(len(suite.prompts) for suite in suites) * (made * self.answer + self.guard) + judged * graded * self.judge


def pace_of(
    recipe: Recipe, base: BaseModel, system: SafeSystem, judges: Sequence[Judge | GuardJudge], suites: Sequence[Suite]
) -> Pace:
    """Timed on a sample spread over the suites' prompts."""
    engine = Engine(base)
    sample = thin([text for suite in suites for text in suite.prompts], _SAMPLE)
    marks: list[float] = []
    for few, new in ((sample[:2], 2), (sample, recipe.evaluate.max_new_tokens)):  # the first is slower
        marks = [time.perf_counter()]
        texts = [response.text for response in engine.generate(few, new)]
        marks.append(time.perf_counter())
        system.answer(few, texts, recipe.seed)
        marks.append(time.perf_counter())
        for judge in judges:
            judge.safe(few, texts)
        marks.append(time.perf_counter())
    return Pace(*((end - begin) / len(sample) for begin, end in pairwise(marks)))


def minutes(seconds: float) -> str:
    """A duration in words: seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
