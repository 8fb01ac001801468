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


def score_file(guard: Guard, data: Path, out: Path) -> int:
    """Write every row of `data` to the JSONL file `out` with a field `p_safe`; returns the number of rows.

    Rows with a `response` get p(safe | prompt, response), the others p(safe | prompt).
    Raises SoftguardError as `check_scoring` does before the guard is asked, or for a failing guard; `out` is written whole or
    not at all.
    """
    count = check_scoring(data, out)

    def write(beside: Path) -> None:
        rows = read_rows(str(data))
        with beside.open("w", encoding="utf-8") as lines:
            while batch := list(islice(rows, _BATCH)):
                for row, p_safe in zip((r for _, r in batch), _scores(guard, batch), strict=True):
                    # a Parquet column may hold what JSON has no word for, such as a time
                    lines.write(json.dumps({**row, "p_safe": round(p_safe, 6)}, ensure_ascii=False, default=str) + "\n")

    write_file(out, write)
    return count


def check_scoring(data: Path, out: Path) -> int:
    """How many rows `data` has. Raises SoftguardError for a bad one, or if no file `out` can be written."""
    check_file(out)
    check_folder(out.parent)
    count = 0
    for place, row in read_rows(str(data)):
        if not isinstance(row.get("response"), str | None):
            raise SoftguardError(f"{place}: field 'response' is not text")
        count += 1
    return count


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
