"""Score a file of prompts, or of prompts and responses, with any guard."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from softguard.errors import SoftguardError
from softguard.files import check_file, check_folder, write_file
from softguard.guards import Guard, prompt_safety, response_safety
from softguard.prompts import read_rows

_BATCH = 256
_FEW = 4  # rows with a response, and as many without, that a guard is tried on


def score_file(guard: Guard, data: Path, out: Path) -> int:
    """Write every row of `data` to the JSONL file `out` with a field `p_safe`; returns the number of rows.

    Rows with a `response` get p(safe | prompt, response), the others p(safe | prompt).
    Raises SoftguardError as `check_scoring` does, before anything is written, or for a guard that fails later; `out` is written
    whole or not at all.
    """
    count = check_scoring(guard, data, out)

    def write(beside: Path) -> None:
        rows = read_rows(str(data))
        with beside.open("w", encoding="utf-8") as lines:
            while batch := list(islice(rows, _BATCH)):
                for row, p_safe in zip((r for _, r in batch), _scores(guard, batch), strict=True):
                    lines.write(_line({**row, "p_safe": round(p_safe, 6)}))

    write_file(out, write)
    return count


def check_scoring(guard: Guard, data: Path, out: Path) -> int:
    """How many rows `data` has; the guard is tried on a few of them.

    Raises SoftguardError for a bad row, if no file `out` can be written, or for a guard that fails.
    """
    check_file(out)
    check_folder(out.parent)
    if out.is_file() and data.is_file() and out.samefile(data):
        raise SoftguardError(f"{out} is the file that is read; choose another --out")
    count = 0
    tried: tuple[list[tuple[str, dict[str, Any]]], ...] = ([], [])
    for place, row in read_rows(str(data)):
        if not isinstance(row.get("response"), str | None):
            raise SoftguardError(f"{place}: field 'response' is not text")
        count += 1
        sort = tried[row.get("response") is None]
        if len(sort) < _FEW:
            sort.append((place, row))
    _scores(guard, [*tried[0], *tried[1]])
    return count


def _line(row: dict[str, Any]) -> str:
    """`row` as a line of JSON; of what JSON has no word for, times of a Parquet column become text, NaN and infinities null."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    return json.dumps(json.loads(text, parse_constant=lambda word: None), ensure_ascii=False) + "\n"


def _scores(guard: Guard, batch: list[tuple[str, dict[str, Any]]]) -> list[float]:
    scores = [0.0] * len(batch)
    answered = [i for i, (_, row) in enumerate(batch) if row.get("response") is not None]
    alone = [i for i, (_, row) in enumerate(batch) if row.get("response") is None]
    prompts = [row["prompt"] for _, row in batch]
    pairs = response_safety(guard, [prompts[i] for i in answered], [batch[i][1]["response"] for i in answered])
    for where, values in ((answered, pairs), (alone, prompt_safety(guard, [prompts[i] for i in alone]))):
        for i, value in zip(where, values, strict=True):
            scores[i] = float(value)
    return scores
