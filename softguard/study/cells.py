"""Run one cell of a study, or the ground its base's cells share; a killed run goes on where it was.

    OUT/BASE/corpus/                 drawn once a base
    OUT/BASE/base/                   the base's and the system's figures, and the base's answers, which every cell takes over
    OUT/BASE/cells/ROW/LENGTH/CELL/  adapter, log.jsonl, answers/, results.json, outcomes.json, and cell.json, which seals it

Whoever works in a folder holds its lock, so that no two processes ever do the same cell: the second waits, and then finds it
done.
"""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from softguard.adapters import Adapter
from softguard.config import Recipe, SystemConfig, fingerprint
from softguard.corpus import Corpus, teach
from softguard.cost import flops_per_token
from softguard.distill import check_distil, distil
from softguard.engine import Engine
from softguard.errors import DivergedError, SoftguardError
from softguard.evaluation import check_evaluation, evaluate, read_results
from softguard.files import locked, read_json, write_json
from softguard.judges import load_judges
from softguard.models import base_of
from softguard.study.grid import Arm, Cell, Grid
from softguard.suites import load_suites
from softguard.system import SafeSystem

_MEASURED = Path("base", "ground.json")
CONTEXT = 512  # tokens before the one whose FLOPs are counted, as in the paper


@dataclass(frozen=True)
class Ground:
    """What all cells of a base share: its recipe, whose seed is that of the corpus and of the evaluation, and its folder."""

    recipe: Recipe
    folder: Path

    @property
    def measuring(self) -> dict[str, str | None]:
        """Identity of what its cells are asked and how: of the recipe's names, of the prompts and judges behind them, and of
        the corpus, which is that of the model and the guard, too.
        """
        return {**self._asked, "corpus": _corpus(self.folder)}

    @cached_property
    def _asked(self) -> dict[str, str]:
        wanted = self.recipe.evaluate
        suites = [list(suite) for suite in load_suites(wanted.suites, wanted.split, wanted.limit)]
        judges = [judge.fingerprint for judge in load_judges(wanted)]
        return {"evaluation": evaluation_of(self.recipe), "asked": fingerprint(suites, judges)}


def ground_of(arm: Arm, grid: Grid, out: Path) -> Ground:
    """The ground of an arm's base, in the study's folder `out`."""
    cell = arm.cells[0][0]
    return Ground(grid.grounds[cell.base], out / cell.place.parts[0])


def prepare(ground: Ground, recipes: Sequence[Recipe], unfinished: bool) -> None:
    """Draw the corpus of a base and its own answers, once all that its cells will need is checked; `recipes`: one a row.

    A corpus that is there is compared with the model, guard and prompts now behind the recipe's names. `unfinished`: whether
    cells are left to do; no caches are kept for those that are done.
    Raises SoftguardError as `check_distil`, `teach` and `evaluate` do, or if the corpus has become another under its cells.
    """
    with locked(ground.folder / ".lock"):
        base, system = _loaded(ground.recipe.model), _system(ground.recipe.system)
        engines, judges = [Engine(base)], load_judges(ground.recipe.evaluate)
        check_evaluation(ground.recipe, ground.folder / "base", system, None, engines, judges)
        for recipe in recipes:
            check_distil(recipe, ground.folder, base)
        known = _corpus(ground.folder)
        corpus = teach(ground.recipe if unfinished else ground.recipe.deciding, ground.folder / "corpus", base, system)
        cells = ground.folder / "cells"
        if known not in (None, corpus.fingerprint) and cells.is_dir():  # of a shard more or less, which `teach` allows
            raise SoftguardError(
                f"{corpus.folder} is no longer what {cells} were trained on: prompts were added, taken away or drawn anew; "
                "choose another --out, or remove those cells to train them again"
            )
        if _base_measured(ground) != ground.measuring:
            evaluate(ground.recipe, ground.folder / "base", base, system, None, judges)
            write_json(ground.folder / _MEASURED, ground.measuring)


def attempt(ground: Ground, cell: Cell, folder: Path) -> None:
    """Train the adapter of a cell unless it was tried; that its rate is too large is sealed, too.

    Raises SoftguardError as `distil` does of all else.
    """
    with locked(folder / ".lock"):
        try:
            _train(ground, cell, folder)
        except DivergedError as error:
            write_json(folder / "cell.json", {**_trained_by(cell, folder), "diverged": str(error)})


def finish(ground: Ground, arm: Arm, number: int, out: Path) -> None:
    """Train and measure the cell of an arm's seed `number` at the rate that its trials chose.

    Raises SoftguardError as `distil` and `evaluate` do, or if no rate could be trained.
    """
    cell = arm.cells[number][chosen_rate(arm, out)]
    folder = out / cell.place
    with locked(folder / ".lock"):
        _train(ground, cell, folder)
        if _is_measured(ground.measuring, folder):
            return
        base, system = _loaded(ground.recipe.model), _system(ground.recipe.system)
        adapter = Adapter.load(folder, base)
        begun = (folder / "answers").is_dir()
        shutil.copytree(ground.folder / "base" / "answers", folder / "answers", dirs_exist_ok=True)
        begin = time.perf_counter()
        # The seed of the ground, not of the cell: all cells are asked, and refused by the system, alike.
        evaluate(replace(cell.recipe, seed=ground.recipe.seed), folder, base, system, adapter)
        seconds = None if begun else time.perf_counter() - begin
        flops = flops_per_token(base, system, adapter, CONTEXT)
        done = {**ground.measuring, "evaluate_seconds": seconds, "flops_per_token": flops}
        write_json(folder / "cell.json", {**_read(folder / "cell.json"), **done})


def chosen_rate(arm: Arm, out: Path) -> int:
    """Index of the arm's learning rate with the least validation loss at its first seed; of equals the first.

    Raises SoftguardError if none could be trained.
    """
    losses = [validation_loss(cell, out) for cell in arm.trials] or [0.0]
    best = min(range(len(losses)), key=losses.__getitem__)
    if not math.isfinite(losses[best]):
        raise SoftguardError(
            f"{arm.cells[0][0].label}: no learning rate of this row could be trained; widen its range downwards"
        )
    return best


def validation_loss(cell: Cell, out: Path) -> float:
    """The least validation loss of a trained cell by its own objective; infinite if it is not trained, or has no steps."""
    folder = out / cell.place
    if not is_trained(cell, folder):
        return math.inf
    return float(read_json(folder / "softguard.json", "adapter").get("validation_loss", math.inf))


def is_trained(cell: Cell, folder: Path) -> bool:
    """Whether `folder` holds the cell's adapter, and no other recipe's or corpus's."""
    return is_tried(cell, folder) and "diverged" not in _read(folder / "cell.json")


def is_tried(cell: Cell, folder: Path) -> bool:
    """Whether `folder` holds the cell's adapter, or that its rate is too large for one."""
    seal = _read(folder / "cell.json")
    if any(seal.get(key) != value for key, value in _trained_by(cell, folder).items()):
        return False
    return "diverged" in seal or bool(_read(folder / "softguard.json"))


def is_finished(ground: Ground, arm: Arm, number: int, out: Path) -> bool:
    """Whether the cell of an arm's seed `number` is trained at the chosen rate, and measured."""
    if any(not is_tried(cell, out / cell.place) for cell in arm.trials):
        return False
    try:
        cell = arm.cells[number][chosen_rate(arm, out)]
    except SoftguardError:  # all its rates were too large
        return False
    folder = out / cell.place
    return is_trained(cell, folder) and _is_measured(ground.measuring, folder)


def is_like_base(ground: Ground, folder: Path) -> bool:
    """Whether the cell in `folder` was measured by the ground's recipe, and as the base's own answers were.

    Neither prompts nor judges are loaded for it.
    """
    return _is_measured({**_base_measured(ground), "evaluation": evaluation_of(ground.recipe)}, folder)


def _base_measured(ground: Ground) -> dict[str, str | None]:
    """`Ground.measuring` when the base's own answers were measured; empty before."""
    return _read(ground.folder / _MEASURED)


def evaluation_of(recipe: Recipe) -> str:
    """Identity of how a base's cells are measured, by the names in its recipe; `recipe` is the ground's."""
    return fingerprint(recipe.model, recipe.system, recipe.evaluate, recipe.seed)


def _is_measured(asked: dict[str, str | None], folder: Path) -> bool:
    """Whether a cell's seal says that it was measured so, and what was found can be read."""
    seal = _read(folder / "cell.json")
    if any(seal.get(key) != value for key, value in asked.items()):
        return False
    try:
        read_results(folder / "results.json")
    except SoftguardError:
        return False
    return "outcomes" in _read(folder / "outcomes.json")


def _read(path: Path) -> dict[str, Any]:
    """What a file of a cell holds; nothing of one that is lost or damaged, for it is made again."""
    try:
        return read_json(path, "cell")
    except SoftguardError:
        return {}


def _train(ground: Ground, cell: Cell, folder: Path) -> None:
    if is_trained(cell, folder):
        return
    base = _loaded(cell.recipe.model)
    if not _read(folder / "softguard.json"):
        (folder / "softguard.json").unlink(missing_ok=True)  # a damaged one would be refused
    resumed = (folder / "checkpoint").is_dir()
    begin = time.perf_counter()
    distil(cell.recipe, Corpus.open(ground.folder / "corpus", base), folder, base)
    seconds = None if resumed else time.perf_counter() - begin  # of a part of the steps it would mislead
    seal = {**_trained_by(cell, folder), "train_seconds": seconds, "evaluation": None}
    write_json(folder / "cell.json", seal)


def _trained_by(cell: Cell, folder: Path) -> dict[str, str | None]:
    """Identity of a cell's training: of the recipe's names, and of the corpus behind them; `folder` is in its base's."""
    recipe = cell.recipe.deciding
    names = fingerprint(recipe.model, recipe.system, recipe.teach, recipe.distil, recipe.seed)
    return {"training": names, "corpus": _corpus(folder.parents[len(cell.place.parts) - 2])}


def _corpus(folder: Path) -> str | None:
    """Identity of the corpus of a base's folder; none before it is finished."""
    path = folder / "corpus" / "manifest.json"
    return read_json(path, "corpus").get("fingerprint") if path.is_file() else None


_loaded = lru_cache(maxsize=1)(base_of)  # a worker's cells come base by base


def _system(config: SystemConfig) -> SafeSystem:
    key = fingerprint(config)  # a configuration with a policy has no hash
    if key not in _SYSTEM:
        _SYSTEM.clear()
        _SYSTEM[key] = SafeSystem.from_config(config)
    return _SYSTEM[key]


_SYSTEM: dict[str, SafeSystem] = {}
