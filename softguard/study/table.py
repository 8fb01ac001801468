"""One Parquet table of a study: a row a cell, in the order of the grid."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from softguard.errors import SoftguardError
from softguard.files import check_file, write_file

NAME = "cells.parquet"
TIMINGS = ("train_seconds", "evaluate_seconds", "cost")  # all else is the same when the same study is run again

METRIC = {"system": pa.string(), "suite": pa.string(), "split": pa.string(), "metric": pa.string()}
METRIC |= {"value": pa.float64(), "low": pa.float64(), "high": pa.float64(), "n": pa.int64()}
_OUTCOMES = {"prompts": pa.string(), "outcomes": pa.list_(pa.float32())}
LINE = {"step": pa.int64(), "kind": pa.string(), "safe": pa.float64(), "refusal": pa.float64()}
LINE |= {"token_tv": pa.float64(), "refuses": pa.float64(), "over_refuses": pa.float64()}
COST = {"system": pa.string(), "metric": pa.string(), "value": pa.float64(), "unit": pa.string()}
SCHEMA = pa.schema(
    {
        # what it is
        "base": pa.string(),
        "row": pa.string(),
        "adapter": pa.string(),
        "objective": pa.string(),  # "untrained" without steps
        "n_soft": pa.int64(),
        "learning_rate": pa.float64(),
        "seed": pa.int64(),
        "chosen": pa.bool_(),  # its rate is the arm's; cells of other rates are trained, not measured
        "recipe": pa.string(),  # YAML, whole
        # fingerprints
        "model": pa.string(),
        "base_fingerprint": pa.string(),
        "guard": pa.string(),
        "judge": pa.string(),
        "corpus": pa.string(),
        "settings": pa.string(),
        "evaluation": pa.string(),  # how it was measured, whatever the name of the model's file is there
        "versions": pa.string(),  # JSON
        # what came of it
        "steps": pa.int64(),
        "validation_loss": pa.float64(),  # none of what has no steps
        "parameters": pa.int64(),  # of the adapter
        "metrics": pa.list_(pa.struct([*METRIC.items(), *_OUTCOMES.items()])),
        "cost": pa.list_(pa.struct(list(COST.items()))),
        "flops_per_token": pa.struct([(name, pa.float64()) for name in ("base", "safe_system", "distilled")]),
        "log": pa.list_(pa.struct(list(LINE.items()))),
        "train_seconds": pa.float64(),  # none where the training was interrupted
        "evaluate_seconds": pa.float64(),  # likewise
    }
)


# Sections whose keys all seeds of a row share; of `teach` those which change the corpus whatever its files are called.
_SHARED: dict[str, tuple[str, ...]] = {
    "distil": (),
    "system": (),
    "teach": ("limit", "validation_limit", "responses", "max_new_tokens", "temperature"),
}
# Of these the rate is checked apart, the guard by name, and the others change no figure but by rounding
_OWN = ("distil.learning_rate", "distil.accumulate", "distil.checkpoint_every", "system.guard")


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write cells as a Parquet table."""
    write_file(path, partial(pq.write_table, pa.Table.from_pylist(list(rows), SCHEMA), compression="zstd"))


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a `cells.parquet`. Raises SoftguardError if it is missing, damaged or has other columns."""
    check_file(path)
    try:
        table = pq.read_table(path)
        if missing := [name for name in SCHEMA.names if name not in table.column_names]:
            raise SoftguardError(f"{path} lacks column {missing[0]}: another softguard wrote it; run the study again")
        rows: list[dict[str, Any]] = table.select(SCHEMA.names).cast(SCHEMA).to_pylist()
    except FileNotFoundError as error:
        raise SoftguardError(f"{path} does not exist; run the study first") from error
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text that is not UTF-8
        reason = " ".join(str(error).split())
        raise SoftguardError(f"{path} is damaged ({reason}); run the study again, which makes it from its cells") from error
    return rows


def join_tables(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The cells of several runs of a study, such as of several machines. A cell that several have is the first's to measure it.

    Raises SoftguardError as `read_table` does, or if two runs asked a base's cells different things, had another model behind
    its name, a guard or judge of another name, or trained a row otherwise: with another rate chosen, or by another recipe.
    """
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    asked: dict[tuple[str, ...], tuple[Any, Path]] = {}

    def check(path: Path, what: str, found: Any, *of: Any) -> None:
        wanted, first = asked.setdefault((what, *map(str, of)), (found, path))
        if found != wanted:
            raise SoftguardError(
                f"{path} has another {what} of {', '.join(map(str, of))} than {first}; join runs of one recipe"
            )

    for path in paths:
        for row in read_table(path):
            base = row["base"]
            if row["evaluation"] and row["metrics"] is not None:
                named = {"measuring": "evaluation", "model": "base_fingerprint", "guard": "guard", "judge": "judge"}
                for what, name in named.items():
                    check(path, what, row[name], base)
                check(path, "chosen learning rate", row["learning_rate"], base, row["row"], row["n_soft"])
                for name, value in _trained_by(row["recipe"]).items():
                    check(path, name, value, base, row["row"], row["n_soft"])
                for metric in row["metrics"]:
                    if metric["prompts"] is not None:
                        check(path, "set of prompts", metric["prompts"], base, metric["suite"])
            key = tuple(row[name] for name in ("base", "row", "n_soft", "learning_rate", "seed"))
            if key not in cells or not cells[key]["evaluation"]:
                cells[key] = row
    return list(cells.values())


def _trained_by(recipe: str) -> dict[str, Any]:
    """What of a cell's recipe its seeds must share; of a key that an older recipe lacks nothing is known."""
    values = yaml.safe_load(recipe) or {}
    return {
        f"{section}.{key}": value
        for section, names in _SHARED.items()
        for key, value in values.get(section, {}).items()
        if not names or key in names
        if f"{section}.{key}" not in _OWN
    }
