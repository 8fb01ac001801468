"""The grid of a study: which cells it has, each with the recipe it runs.

A study recipe is a recipe, the common ground of all cells, with one section more:

    study:
      bases: {NAME: [overrides]}            one corpus and one set of base answers each
      adapters: {NAME: {learning_rates: […], set: [overrides], objectives: […]}}
      objectives: {NAME: {set: [overrides]}}
      rows: {NAME: {set: [overrides], …}}   beside adapters × objectives, for instance a text, which has no objective
      lengths: […]                          n_soft; none: what the base's recipe says
      seeds: […]

Overrides read `section.key=value`, as on the command line. An adapter or objective called as the library calls it needs no
override to choose it. Adapter, objective and row may each name the `bases`, `lengths` and `seeds` they are confined to.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from softguard.config import Recipe, build, nearest, overridden, read_values
from softguard.errors import SoftguardError

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """What an adapter, an objective or a row changes, and where in the grid it stands; what is empty confines nothing."""

    set: tuple[str, ...] = ()  # overrides; distil.* alone, because the rest is one a base
    learning_rates: tuple[float, ...] = ()  # the range it is tuned over; an objective's goes before its adapter's
    bases: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class AdapterPart(Part):
    """An adapter, with the objectives it is trained by; none: all of the study."""

    objectives: tuple[str, ...] = ()


@dataclass(frozen=True)
class GridConfig:
    """The section `study` of a recipe."""

    bases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    adapters: dict[str, AdapterPart] = field(default_factory=dict)
    objectives: dict[str, Part] = field(default_factory=dict)
    rows: dict[str, Part] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()  # none: the base's own n_soft
    seeds: tuple[int, ...] = (0,)
    pareto: tuple[str, ...] = ()  # suites the Pareto sets and their tests count; none: all


@dataclass(frozen=True)
class StudyRecipe(Recipe):
    """A recipe with a grid."""

    study: GridConfig = field(default_factory=GridConfig)


@dataclass(frozen=True)
class Cell:
    """One adapter to be trained and measured."""

    base: str
    row: str
    recipe: Recipe

    @property
    def place(self) -> Path:
        """Its folder within the study's."""
        name = f"rate-{self.recipe.distil.learning_rate:g}-seed-{self.recipe.seed}"
        return Path(_slug(self.base), "cells", _slug(self.row), f"length-{self.recipe.distil.n_soft}", name)

    @property
    def label(self) -> str:
        """A name for people."""
        distil = self.recipe.distil
        return f"{self.base}, {self.row}, length {distil.n_soft}, rate {distil.learning_rate:g}, seed {self.recipe.seed}"


@dataclass(frozen=True)
class Arm:
    """The cells of one base, row and length: `cells[seed][rate]`. Its rate is chosen at the first seed, on validation."""

    cells: tuple[tuple[Cell, ...], ...]

    @property
    def trials(self) -> tuple[Cell, ...]:
        """The cells among which the learning rate is chosen; a single rate needs no trial."""
        return self.cells[0] if self.cells and len(self.cells[0]) > 1 else ()


@dataclass(frozen=True)
class Grid:
    """All arms of a study, and the common ground of every base."""

    grounds: dict[str, Recipe]
    arms: tuple[Arm, ...]
    pareto: tuple[str, ...]


def load_grid(path: Path, overrides: Sequence[str] = ()) -> Grid:
    """Read a study recipe. Raises SoftguardError for an unknown key or name, a wrong type, or a grid without cells."""
    from softguard.distill import check_objective

    values = overridden(read_values(path), overrides)
    study = build(StudyRecipe, values).study
    common = {key: value for key, value in values.items() if key != "study"}
    if not study.bases:
        raise SoftguardError(f"study.bases of {path} is empty; name a base, for instance smollm2: [model.name=smollm2]")
    _check_names(study)
    grounds = {name: _recipe(common, f"base {name}", given) for name, given in study.bases.items()}
    arms = []
    for base in study.bases:
        for row, parts, changes in _rows(study):
            if base not in _confined(tuple(study.bases), *(part.bases for part in parts)):
                continue
            seeds = _confined(study.seeds, *(part.seeds for part in parts))
            rates = next((part.learning_rates for part in reversed(parts) if part.learning_rates), ())
            tuned = [[f"distil.learning_rate={rate}"] for rate in rates] or [[]]
            lengths = study.lengths or (grounds[base].distil.n_soft,)
            for length in _confined(lengths, *(part.lengths for part in parts)):
                fixed = [*study.bases[base], f"distil.n_soft={length}", *changes]
                arm = Arm(
                    tuple(
                        tuple(Cell(base, row, _recipe(common, row, [*fixed, f"seed={seed}", *rate])) for rate in tuned)
                        for seed in seeds
                    )
                )
                if arm.trials and not arm.trials[0].recipe.distil.taken_steps:
                    raise SoftguardError(
                        f"{row}: a text, and with distil.steps 0 any adapter, has no learning rate to choose; leave "
                        "learning_rates out, or put it under study.rows"
                    )
                if arm.cells:
                    arms.append(arm)
    if not arms:
        raise SoftguardError(f"the grid of {path} has no cells; name study.adapters with study.objectives, or study.rows")
    for arm in arms:
        cell = arm.cells[0][0]
        try:
            check_objective(cell.recipe)
        except SoftguardError as error:
            raise SoftguardError(f"{cell.row}: {error}") from error
    _check_places(cell for arm in arms for cells in arm.cells for cell in cells)
    _check_lengths(arms)
    return Grid(grounds, tuple(arms), study.pareto)


def _rows(study: GridConfig) -> Iterable[tuple[str, list[Part], list[str]]]:
    """Name, parts and overrides of every row of the table."""
    for adapter, part in study.adapters.items():
        for objective in part.objectives or study.objectives:
            other = study.objectives[objective]
            chosen = [f"distil.adapter={adapter}"] if not _sets(part, "distil.adapter") else []
            chosen += [f"distil.objective={objective}"] if not _sets(other, "distil.objective") else []
            yield f"{objective}, {adapter}", [part, other], [*chosen, *part.set, *other.set]
    for name, row in study.rows.items():
        yield name, [row], list(row.set)


def _confined(values: tuple[T, ...], *to: tuple[T, ...]) -> tuple[T, ...]:
    """`values`, less those that one of `to`, unless it is empty, lacks."""
    return tuple(value for value in values if all(not some or value in some for some in to))


def _sets(part: Part, key: str) -> bool:
    return any(override.partition("=")[0].strip() == key for override in part.set)


def _recipe(common: dict[str, object], where: str, overrides: Sequence[str]) -> Recipe:
    try:
        return build(Recipe, overridden(common, overrides))  # type: ignore[no-any-return]
    except SoftguardError as error:
        raise SoftguardError(f"{where}: {error}") from error


def _check_names(study: GridConfig) -> None:
    """Raises SoftguardError for a part that names what the study does not have, or changes more than the training, and for
    bases of one folder, or rows of one name or of one that reports give to something else.
    """
    folders = [_slug(base) for base in study.bases]
    if twice := [base for base, folder in zip(study.bases, folders, strict=True) if folders.count(folder) > 1]:
        raise SoftguardError(f"study.bases {twice[0]!r} and {twice[1]!r} would share a folder; rename one")
    used = {objective for part in study.adapters.values() for objective in part.objectives or study.objectives}
    parts = {
        f"study.{section}.{name}": part
        for section in ("adapters", "objectives", "rows")
        for name, part in getattr(study, section).items()
        if section != "objectives" or name in used
    }
    known: dict[str, Sequence[object]] = {
        "bases": list(study.bases),
        "objectives": list(study.objectives),
        "seeds": study.seeds,
        "lengths": study.lengths,
    }
    for where, part in parts.items():
        for key, allowed in known.items():
            for value in getattr(part, key, ()):
                if value not in allowed:
                    if not allowed:
                        raise SoftguardError(f"{where}.{key} names {value}, but study.{key} is empty")
                    near = nearest(str(value), map(str, allowed))
                    raise SoftguardError(f"{where}.{key} names {value}, which study.{key} does not have; did you mean {near}?")
        for override in part.set:
            if not override.startswith("distil."):
                raise SoftguardError(
                    f"{where}.set has {override!r}; it may change distil alone, since the cells of a base share all else: "
                    "put it into the common sections, or make it a base of its own"
                )
    names = ["base", "safe system", *(row for row, _, _ in _rows(study))]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SoftguardError(f"reports would call two things {twice[0]!r}; rename that row of the study")


def _check_places(cells: Iterable[Cell]) -> None:
    seen: dict[Path | str, Cell] = {}
    for cell in cells:
        for name in (cell.place, cell.label):
            if name in seen:
                raise SoftguardError(
                    f"two cells of the grid are the same: {seen[name].label} in {seen[name].place} and {cell.label} in "
                    f"{cell.place}; rename one"
                )
            seen[name] = cell


def _check_lengths(arms: Sequence[Arm]) -> None:
    """Raises SoftguardError for a row that has the name by which reports tell another's lengths apart."""
    lengths: dict[str, set[int]] = {}
    for arm in arms:
        lengths.setdefault(arm.cells[0][0].row, set()).add(arm.cells[0][0].recipe.distil.n_soft)
    told = {f"{row}, length {length}" for row, several in lengths.items() if len(several) > 1 for length in several}
    if twice := told & lengths.keys():
        raise SoftguardError(f"reports would call two things {min(twice)!r}; rename that row of the study")


def _slug(name: str) -> str:
    """A name as a folder's."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "-"
