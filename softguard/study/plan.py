"""What a study would run and roughly how long it would take; checks all that can be checked without a network."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from softguard.config import Recipe
from softguard.corpus import teach
from softguard.distill import time_step
from softguard.estimate import minutes, pace_of, teach_seconds
from softguard.judges import load_judges
from softguard.models import DEMO_MODEL, load_base
from softguard.prompts import read_prompts
from softguard.study.cells import ground_of, is_finished
from softguard.study.grid import Arm, Grid
from softguard.suites import Suite, load_suites
from softguard.system import SafeSystem

_PROMPTS = 16  # of the corpus that steps are timed on


def study_plan(grid: Grid, out: Path, workers: int) -> str:
    """The cells of every base; for those whose model, prompts and suites are on this machine an estimate, and what is done.

    Raises SoftguardError for prompts, suites or guards that cannot be used; what is on a hub is not looked up.
    """
    lines, total, done = [], 0.0, 0
    for base, recipe in grid.grounds.items():
        arms = [arm for arm in grid.arms if arm.cells[0][0].base == base]
        lines += [f"{base}: {recipe.model.name}", *(f"  {_line(arm)}" for arm in arms)]
        suites = [name for name in recipe.evaluate.suites if not name.startswith("hub:")]
        loaded = load_suites(suites, recipe.evaluate.split, recipe.evaluate.limit)
        away = [name for name in (recipe.teach.prompts, recipe.teach.validation) if name.startswith("hub:")]
        away += [name for name in recipe.evaluate.suites if name not in suites]
        if recipe.model.name != DEMO_MODEL and not Path(recipe.model.name).exists():
            away.append(recipe.model.name)
        if away:
            lines.append(f"  no estimate: {', '.join(dict.fromkeys(away))} of a hub would be looked up")
            continue
        done += sum(_done(arm, grid, out) for arm in arms)
        seconds = _seconds(recipe, arms, loaded)
        lines.append(f"  about {minutes(seconds)} of one worker")
        total += seconds
    measured = sum(len(arm.cells) for arm in grid.arms)
    trained = measured + sum(len(arm.trials) - 1 for arm in grid.arms if arm.trials)
    lines.append(f"study: {trained} cells to train, {measured} of them to measure, {done} are done")
    if total:
        lines[-1] += f"; about {minutes(total / workers)} with {workers} worker{'s'[: workers > 1]}, nothing done"
    return "\n".join(lines)


def _line(arm: Arm) -> str:
    first = arm.cells[0][0]
    rates = ", ".join(f"{cell.recipe.distil.learning_rate:g}" for cell in arm.cells[0])
    seeds = ", ".join(str(cells[0].recipe.seed) for cells in arm.cells)
    distil = first.recipe.distil
    if not distil.steps:
        return f"{first.row}, length {distil.n_soft}: not trained"
    return f"{first.row}, length {distil.n_soft}: {distil.steps} steps, rates {rates}, seeds {seeds}"


def _done(arm: Arm, grid: Grid, out: Path) -> int:
    ground = ground_of(arm, grid, out)
    return sum(is_finished(ground, arm, number, out) for number in range(len(arm.cells)))


def _seconds(recipe: Recipe, arms: list[Arm], suites: list[Suite]) -> float:
    """Seconds of all cells of a base, from a few prompts and two steps of every arm."""
    model = recipe.model
    base, system = load_base(model.name, model.dtype, model.device, model.quantize), SafeSystem.from_config(recipe.system)
    wanted = ((recipe.teach.prompts, recipe.teach.limit), (recipe.teach.validation, recipe.teach.validation_limit))
    texts = [prompt.text for source, limit in wanted for prompt in read_prompts(source, limit)]
    seconds = teach_seconds(recipe, base, system, texts)
    pace = pace_of(recipe, base, system, load_judges(recipe.evaluate), suites)
    seconds += pace.seconds(suites, made=1, graded=2)
    measuring = pace.seconds(suites, made=1, graded=3)  # the base's answers are kept
    with TemporaryDirectory() as folder:
        few = replace(recipe, teach=replace(recipe.teach, limit=_PROMPTS, validation_limit=_PROMPTS))
        corpus = teach(few, Path(folder) / "corpus", base, system)
        for arm in arms:
            cell = arm.cells[0][0].recipe
            step = time_step(cell, corpus, Path(folder) / "cell", base)
            seconds += (len(arm.cells) + max(len(arm.trials) - 1, 0)) * step * cell.distil.steps + len(arm.cells) * measuring
    return seconds
