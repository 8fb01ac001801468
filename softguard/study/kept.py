"""What a study's folder holds of its bases and cells, as rows of its table.

    OUT/BASE/corpus/                 drawn once a base
    OUT/BASE/base/                   the base's and the system's figures, and the base's answers, which every cell takes over
    OUT/BASE/cells/ROW/LENGTH/CELL/  adapter, log.jsonl, answers/, results.json, outcomes.json, and cell.json, which seals it

A cell is trained, or measured, if its row can be made of what is there: a file that is lost or damaged counts as not made, so
that the study makes it again.
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from softguard.adapters import whole_weights
from softguard.config import Recipe, dump_recipe, fingerprint
from softguard.errors import SoftguardError
from softguard.evaluation import read_results
from softguard.files import locked, read_json
from softguard.judges import load_judges
from softguard.prompts import thin
from softguard.study.grid import Arm, Cell, Grid
from softguard.study.table import COST, LINE, METRIC, NAME, SCHEMA, write_rows
from softguard.suites import Suite, load_suites

Row = dict[str, Any]  # of the table; of a cell whose rate is too large it is empty
Asked = Mapping[str, str | None]
MEASURED = Path("base", "ground.json")
_LINES = 100  # of training kept of a log; all of validation are
# What reading files raises whose contents may be anything
_DAMAGED = (SoftguardError, OSError, LookupError, TypeError, ValueError, ArithmeticError, pa.ArrowException)


@dataclass(frozen=True)
class Ground:
    """What all cells of a base share: its recipe, whose seed is that of the corpus and of the evaluation, and its folder."""

    recipe: Recipe
    folder: Path

    def place(self, cell: Cell) -> Path:
        """The folder of one of its cells."""
        return self.folder.parent / cell.place

    @property
    def corpus(self) -> str | None:
        """Identity of its corpus; none before it is finished."""
        path = self.folder / "corpus" / "manifest.json"
        return read_json(path, "corpus").get("fingerprint") if path.is_file() else None

    @property
    def measuring(self) -> dict[str, str | None]:
        """Identity of what its cells are asked and how: of the recipe's names, of the prompts and judges behind them, and of
        the corpus, which is that of the model and the guard, too.
        """
        return {**self._asked, "corpus": self.corpus}

    @property
    def measured(self) -> dict[str, str | None]:
        """`measuring` when the base's own answers were measured; of the recipe's names before. No prompts are loaded for it."""
        found: Asked = {}
        with suppress(SoftguardError):
            found = read_json(self.folder / MEASURED, "figures")
        return {**found, "evaluation": _evaluation_of(self.recipe)}

    @cached_property
    def _asked(self) -> dict[str, str]:
        wanted = self.recipe.evaluate
        suites = [list(suite) for suite in load_suites(wanted.suites, wanted.split, wanted.limit)]
        judges = [judge.fingerprint for judge in load_judges(wanted)]
        return {"evaluation": _evaluation_of(self.recipe), "asked": fingerprint(suites, judges)}


def ground_of(arm: Arm, grid: Grid, out: Path) -> Ground:
    """The ground of an arm's base, in the study's folder `out`."""
    cell = arm.cells[0][0]
    return Ground(grid.grounds[cell.base], out / cell.place.parts[0])


def write_table(grid: Grid, out: Path) -> None:
    """Write `out/cells.parquet` of all cells that are trained; figures are shown of those measured as their base was."""
    with locked(out / ".lock"):  # another command may be at work on the same study
        rows: list[Row] = []
        for arm in grid.arms:
            ground = ground_of(arm, grid, out)
            rows += filter(None, rows_of(ground, arm, ground.measured).values())
        write_rows(rows, out / NAME)


def rows_of(ground: Ground, arm: Arm, asked: Asked) -> dict[Path, Row]:
    """What there is of an arm's cells, by their places; of those of the rate that all trials chose, measured as `asked`, with
    figures.
    """
    rows = tried(ground, arm)
    if any(cell.place not in rows for cell in arm.trials):
        return rows
    try:
        rate = chosen_rate(arm, rows)
    except SoftguardError:  # all its rates were too large
        return rows
    for cells in arm.cells:
        cell = cells[rate]
        if row := rows.get(cell.place) or trained_row(ground, cell):
            rows[cell.place] = with_figures(ground, cell, row, asked)
    return rows


def tried(ground: Ground, arm: Arm) -> dict[Path, Row]:
    """Of an arm's trials those that were made, by their places."""
    found = {cell.place: trained_row(ground, cell) for cell in arm.trials}
    return {place: row for place, row in found.items() if row is not None}


def is_finished(arm: Arm, number: int, rows: Mapping[Path, Row]) -> bool:
    """Whether `rows`, those of an arm's cells, have all its trials, and figures of its seed `number`."""
    return all(cell.place in rows for cell in arm.trials) and any(
        rows.get(cell.place, {}).get("metrics") is not None for cell in arm.cells[number]
    )


def chosen_rate(arm: Arm, rows: Mapping[Path, Row]) -> int:
    """Index of the arm's learning rate with the least validation loss at its first seed; of equals the first.

    `rows`: of its trials. Raises SoftguardError if none could be trained.
    """
    losses = [rows.get(cell.place, {}).get("validation_loss", math.inf) for cell in arm.trials] or [0.0]
    best = min(range(len(losses)), key=losses.__getitem__)
    if not math.isfinite(losses[best]):
        raise SoftguardError(
            f"{arm.cells[0][0].label}: no learning rate of this row could be trained; widen its range downwards"
        )
    return best


def trained_row(ground: Ground, cell: Cell) -> Row | None:
    """What there is of a cell, without figures; none of one that another recipe or corpus trained, or of which a file is lost
    or damaged.
    """
    folder, distil = ground.place(cell), cell.recipe.distil
    try:
        seal = read_json(folder / "cell.json", "cell")
        if not _agrees(seal, trained_by(ground, cell)):
            return None
        if "diverged" in seal:
            return {}
        adapter = _adapter(folder)
        row = {
            "base": cell.base, "row": cell.row, "adapter": distil.adapter, "objective": adapter["objective"],
            "n_soft": distil.n_soft, "learning_rate": distil.learning_rate, "seed": cell.recipe.seed,
            "chosen": False, "recipe": dump_recipe(cell.recipe), "model": adapter["model"],
            "base_fingerprint": adapter["base"], "guard": adapter["guard"], "corpus": adapter["corpus"],
            "settings": adapter["settings"], "steps": adapter["steps"],
            "train_seconds": seal["train_seconds"], "log": _shown(_log(folder / "log.jsonl", adapter["steps"])),
        }  # fmt: skip
        if "validation_loss" in adapter:
            row["validation_loss"] = adapter["validation_loss"]
        return _checked(row)
    except _DAMAGED:
        return None


def with_figures(ground: Ground, cell: Cell, row: Row, asked: Asked) -> Row:
    """The row of a cell of the chosen rate; with figures if it was measured as `asked` and they can be read."""
    folder, row = ground.place(cell), {**row, "chosen": True}
    try:
        seal = read_json(folder / "cell.json", "cell")
        if not _agrees(seal, asked):
            return row
        found = _figures(folder)
        sizes = {cost["system"]: cost["value"] for cost in found["cost"] if cost["metric"] == "parameters"}
        found["parameters"] = int(sizes["distilled"] - sizes["base"])
        found |= {name: seal[name] for name in ("flops_per_token", "evaluate_seconds")}
        # the model's file may have another name elsewhere: what is behind it, `base_fingerprint` says
        anywhere = replace(ground.recipe, model=replace(ground.recipe.model, name=""))
        return _checked(row | found | {"evaluation": _evaluation_of(anywhere)})
    except _DAMAGED:
        return row


def is_measured(ground: Ground, suites: Sequence[Suite]) -> bool:
    """Whether the base's own answers to `suites`, its recipe's, and the figures of them are there, as asked for now."""
    asked = {suite.name: len(suite.prompts) for suite in suites}
    asked |= {f"{suite.name}-in-words": len(suite.prompts) for suite in suites if suite.measure == "accuracy"}
    folder = ground.folder / "base"
    try:
        _checked(_figures(folder))
        kept = {name: read_json(folder / "answers" / f"base-{name}.json", "file of answers")["answers"] for name in asked}
        whole = asked == {name: len(answers) for name, answers in kept.items()}
        return whole and read_json(ground.folder / MEASURED, "figures") == ground.measuring
    except _DAMAGED:
        return False


def drop_damaged(folder: Path) -> None:
    """Remove an adapter or checkpoint of a cell's folder that cannot be read: `distil` would refuse to go on from it."""
    for name, check in (("softguard.json", _adapter), ("checkpoint", _checkpoint)):
        path = folder / name
        if path.exists():
            try:
                check(folder)
            except _DAMAGED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def trained_by(ground: Ground, cell: Cell) -> dict[str, str | None]:
    """Identity of a cell's training: of the recipe's names, and of the corpus behind them."""
    recipe = cell.recipe.deciding
    names = fingerprint(recipe.model, recipe.system, recipe.teach, recipe.distil, recipe.seed)
    return {"training": names, "corpus": ground.corpus}


def _evaluation_of(recipe: Recipe) -> str:
    """Identity of how a base's cells are measured, by the names in its recipe; `recipe` is the ground's."""
    return fingerprint(recipe.model, recipe.system, recipe.evaluate, recipe.seed)


def _agrees(seal: Mapping[str, Any], wanted: Asked) -> bool:
    return all(seal.get(key) == value for key, value in wanted.items())


def _checked(row: Row) -> Row:
    """The row. Raises what `_DAMAGED` lists if the table has other types."""
    pa.Table.from_pylist([row], SCHEMA)
    return row


def _figures(folder: Path) -> Row:
    """What an evaluation found. Raises what `_DAMAGED` lists."""
    results, found = read_results(folder / "results.json"), read_json(folder / "outcomes.json", "results")
    named = ("system", "suite", "metric")
    outcomes = {
        tuple(one[name] for name in named): {"prompts": one["prompts"], "outcomes": one["values"]}
        for one in _listed(found["outcomes"], (*named, "prompts", "values"))
    }
    of_none = {"prompts": None, "outcomes": None}  # of a figure that is no mean over prompts
    rows = _listed(results["rows"], METRIC)
    return {
        "judge": results["judge"], "versions": json.dumps(results["versions"], sort_keys=True),
        "metrics": [row | outcomes.get(tuple(row[name] for name in named), of_none) for row in rows],
        "cost": _listed(results["cost"], COST),
    }  # fmt: skip


def _listed(found: Any, names: Iterable[str]) -> list[Row]:
    """These fields of every object of a list. Raises what `_DAMAGED` lists if it is none, or one lacks a field."""
    if not isinstance(found, list):
        raise TypeError("not a list")
    return [{name: one[name] for name in names} for one in found]


def _adapter(folder: Path) -> dict[str, Any]:
    """What a cell's `softguard.json` says, its weights beside it. Raises what `_DAMAGED` lists."""
    facts = read_json(folder / "softguard.json", "adapter")
    whole_weights(folder, facts)
    return facts


def _log(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a log that goes on to `step` at least; of a run without steps there are none."""
    if not step:
        return []
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if lines[-1]["step"] < step:
        raise ValueError("cut short")
    return lines


def _shown(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All lines of validation, and as many of training as a curve needs."""
    shown = {id(line) for line in thin([line for line in lines if line["kind"] == "train"], _LINES)}
    return [{key: line.get(key) for key in LINE} for line in lines if line["kind"] != "train" or id(line) in shown]


def _checkpoint(folder: Path) -> None:
    """Raises what `_DAMAGED` lists if a part of a cell's checkpoint, to which its log belongs, is lost."""
    state = read_json(folder / "checkpoint" / "state.json", "checkpoint")
    (folder / "checkpoint" / state["tensors"]).stat()
    _log(folder / "log.jsonl", state["step"])
