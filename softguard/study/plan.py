"""What a study would run and roughly how long it would take; checks all that can be checked without a network."""

import json
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from softguard.corpus import check_teaching, teach
from softguard.distill import check_distil, time_step
from softguard.engine import Engine
from softguard.errors import SoftguardError
from softguard.estimate import minutes, pace_of, teach_seconds
from softguard.evaluation import check_evaluation
from softguard.files import check_folder
from softguard.judges import load_judges
from softguard.models import DEMO_MODEL, base_of
from softguard.prompts import read_prompts, thin
from softguard.study.grid import Arm, Grid
from softguard.study.kept import Ground, ground_of, is_finished, rows_of
from softguard.study.workers import load_ray
from softguard.suites import Suite, load_suites
from softguard.system import SafeSystem

_PROMPTS = 16  # of the corpus that steps are timed on


def study_plan(grid: Grid, out: Path, workers: int, ray_address: str | None = None) -> str:
    """The cells of every base; for those whose model, prompts and suites are on this machine an estimate, and what is done.

    Raises SoftguardError for prompts, suites, judges, guards, folders or workers that cannot be used, or another recipe's
    corpus in `out`; what is on a hub is not looked up.
    """
    check_folder(out)
    if ray_address is not None:
        load_ray()
    lines, total, done = [], 0.0, 0
    for base, recipe in grid.grounds.items():
        arms = [arm for arm in grid.arms if arm.cells[0][0].base == base]
        if not arms:
            continue
        ground = ground_of(arms[0], grid, out)
        lines += [f"{base}: {recipe.model.name}", *(f"  {_line(arm)}" for arm in arms)]
        evaluate = recipe.evaluate
        suites = [name for name in evaluate.suites if not name.startswith("hub:")]
        loaded = load_suites(suites, evaluate.split, evaluate.limit)
        asked = [name for name in evaluate.suites if name not in suites]
        asked += [name for judge in (evaluate.judge, *evaluate.other_judges) for name in _models_of_hub(judge)]
        if not asked:
            for arm in arms:
                rows = rows_of(ground, arm, ground.measuring)
                done += sum(is_finished(arm, number, rows) for number in range(len(arm.cells)))
        away = [name for name in (recipe.teach.prompts, recipe.teach.validation) if name.startswith("hub:")]
        away += [*asked, *_models_of_hub(recipe.system.guard), *([recipe.model.name] if _is_of_hub(recipe.model.name) else [])]
        if away:
            lines.append(f"  no estimate: {', '.join(dict.fromkeys(away))} of a hub would be looked up")
            continue
        seconds, notes = _seconds(ground, arms, loaded)
        lines += [*notes, f"  about {minutes(seconds)} of one worker"]
        total += seconds
    measured = sum(len(arm.cells) for arm in grid.arms)
    trained = measured + sum(len(arm.trials) - 1 for arm in grid.arms if arm.trials)
    lines.append(f"study: {trained} cells to train, {measured} of them to measure, {done} are done")
    if total:
        lines[-1] += f"; about {minutes(total / workers)} with {workers} worker{'s'[: workers > 1]}, nothing done"
    return "\n".join(lines)


def _is_of_hub(model: str) -> bool:
    return model != DEMO_MODEL and not Path(model).exists()


def _models_of_hub(guard: str) -> list[str]:
    """The models of a hub that a guard's name has in it."""
    return [model for model in re.findall(r"generative:[^:,()]+:([^,()\s]+)", guard) if _is_of_hub(model)]


def _line(arm: Arm) -> str:
    first = arm.cells[0][0]
    rates = ", ".join(f"{cell.recipe.distil.learning_rate:g}" for cell in arm.cells[0])
    seeds = ", ".join(str(cells[0].recipe.seed) for cells in arm.cells)
    distil = first.recipe.distil
    if not distil.taken_steps:
        return f"{first.row}, length {distil.n_soft}: not trained"
    return f"{first.row}, length {distil.n_soft}: {distil.taken_steps} steps, rates {rates}, seeds {seeds}"


def _seconds(ground: Ground, arms: list[Arm], suites: list[Suite]) -> tuple[float, list[str]]:
    """Seconds of all cells of a base, from a few prompts and two steps of every arm, and which arms they leave out.

    Raises SoftguardError as `check_teaching` and `check_evaluation` do, or for an adapter that cannot be trained whatever the
    prompts.
    """
    recipe = ground.recipe
    base, system, judges = base_of(recipe.model), SafeSystem.from_config(recipe.system), load_judges(recipe.evaluate)
    engine = Engine(base)
    check_evaluation(recipe, ground.folder / "base", system, None, [engine], judges)
    check_teaching(recipe, ground.folder / "corpus", engine, system)
    texts = [prompt.text for source, limit in recipe.teach.sources.values() for prompt in read_prompts(source, limit)]
    seconds = teach_seconds(recipe, base, system, texts)
    pace = pace_of(recipe, base, system, judges, suites)
    seconds += pace.seconds(suites, made=1, graded=2)
    measuring = pace.seconds(suites, made=1, graded=3)  # the base's answers are kept
    notes = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        sample = folder / "prompts.jsonl"
        sample.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in thin(texts, _PROMPTS)), encoding="utf-8")
        few = replace(recipe.teach, prompts=str(sample), validation=str(sample), limit=0, validation_limit=0)
        corpus = teach(replace(recipe, teach=few), folder / "corpus", base, system)
        for arm in arms:
            cell = arm.cells[0][0].recipe
            check_distil(cell, folder / "cell", base)
            seconds += len(arm.cells) * measuring
            try:
                step = time_step(cell, corpus, folder / "cell", base)
            except SoftguardError as error:  # of these few prompts, such as that the system refuses none of them
                notes.append(f"  without the training of {arm.cells[0][0].row}: {error}")
                continue
            seconds += (len(arm.cells) + max(len(arm.trials) - 1, 0)) * step * cell.distil.taken_steps
    return seconds, notes
