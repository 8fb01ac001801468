"""Run one cell of a study, or the ground its base's cells share; a killed run goes on where it was.

Whoever works in a folder holds its lock, so that no two processes ever do the same cell: the second waits, and then finds it
done.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from softguard.adapters import Adapter
from softguard.config import Recipe, SystemConfig, fingerprint
from softguard.corpus import Corpus, teach
from softguard.cost import flops_per_token
from softguard.distill import check_distil, distil
from softguard.engine import Engine
from softguard.errors import DivergedError, SoftguardError
from softguard.evaluation import check_evaluation, evaluate
from softguard.files import check_folder, locked, read_json, write_json
from softguard.judges import load_judges
from softguard.models import base_of
from softguard.study.grid import Arm, Cell
from softguard.study.kept import (
    MEASURED,
    Ground,
    chosen_rate,
    drop_damaged,
    is_measured,
    trained_by,
    trained_row,
    tried,
    with_figures,
)
from softguard.system import SafeSystem

CONTEXT = 512  # tokens before the one whose FLOPs are counted, as in the paper


def prepare(ground: Ground, recipes: Sequence[Recipe], unfinished: bool) -> None:
    """Draw the corpus of a base and its own answers, once all that its cells will need is checked; `recipes`: one a row.

    A corpus that is there is compared with the model, guard and prompts now behind the recipe's names. `unfinished`: whether
    cells are left to do; no caches are kept for those that are done.
    Raises SoftguardError as `check_distil`, `teach` and `evaluate` do, or if the corpus has become another under its cells.
    """
    with _held(ground.folder):
        base, system = _loaded(ground.recipe.model), _system(ground.recipe.system)
        engines, judges = [Engine(base)], load_judges(ground.recipe.evaluate)
        suites = check_evaluation(ground.recipe, ground.folder / "base", system, None, engines, judges)
        for recipe in recipes:
            check_distil(recipe, ground.folder, base)
        known = ground.corpus
        corpus = teach(ground.recipe if unfinished else ground.recipe.deciding, ground.folder / "corpus", base, system)
        cells = ground.folder / "cells"
        if known not in (None, corpus.fingerprint) and cells.is_dir():  # of a shard more or less, which `teach` allows
            raise SoftguardError(
                f"{corpus.folder} is no longer what {cells} were trained on: prompts were added, taken away or drawn anew; "
                "choose another --out, or remove those cells to train them again"
            )
        if not is_measured(ground, suites):
            evaluate(ground.recipe, ground.folder / "base", base, system, None, judges)
            write_json(ground.folder / MEASURED, ground.measuring)


def attempt(ground: Ground, cell: Cell) -> None:
    """Train the adapter of a cell unless it was tried; that its rate is too large is sealed, too.

    Raises SoftguardError as `distil` does of all else.
    """
    folder = ground.place(cell)
    with _held(folder):
        if trained_row(ground, cell) is not None:  # by another worker meanwhile, maybe to find its rate too large
            return
        try:
            _train(ground, cell)
        except DivergedError as error:
            write_json(folder / "cell.json", {**trained_by(ground, cell), "diverged": str(error)})


def finish(ground: Ground, arm: Arm, number: int) -> None:
    """Train and measure the cell of an arm's seed `number` at the rate that its trials chose.

    Raises SoftguardError as `distil` and `evaluate` do, or if no rate could be trained.
    """
    cell = arm.cells[number][chosen_rate(arm, tried(ground, arm))]
    folder = ground.place(cell)
    with _held(folder):
        _train(ground, cell)
        if with_figures(ground, cell, {}, ground.measuring).get("metrics") is not None:
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
        write_json(folder / "cell.json", {**read_json(folder / "cell.json", "cell"), **done})


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The lock of a folder. Raises SoftguardError if a file is in its place."""
    check_folder(folder)
    with locked(folder / ".lock"):
        yield


def _train(ground: Ground, cell: Cell) -> None:
    if trained_row(ground, cell):
        return
    folder, base = ground.place(cell), _loaded(cell.recipe.model)
    drop_damaged(folder)
    resumed = (folder / "checkpoint").is_dir()
    begin = time.perf_counter()
    distil(cell.recipe, Corpus.open(ground.folder / "corpus", base), folder, base)
    seconds = None if resumed else time.perf_counter() - begin  # of a part of the steps it would mislead
    seal = {**trained_by(ground, cell), "train_seconds": seconds, "evaluation": None}
    write_json(folder / "cell.json", seal)


_loaded = lru_cache(maxsize=1)(base_of)  # a worker's cells come base by base


def _system(config: SystemConfig) -> SafeSystem:
    key = fingerprint(config)  # a configuration with a policy has no hash
    if key not in _SYSTEM:
        _SYSTEM.clear()
        _SYSTEM[key] = SafeSystem.from_config(config)
    return _SYSTEM[key]


_SYSTEM: dict[str, SafeSystem] = {}
