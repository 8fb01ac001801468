"""Questions with answers to choose from: what usefulness is left, by log-likelihood, where small models' own text is noise."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softguard.errors import SoftguardError
from softguard.prompts import read_rows, thin
from softguard.suites.suite import Suite

_LETTERED = re.compile(r"^([A-Z])\. ", re.MULTILINE)
_WRONG = 3  # answers of other questions beside the right one, where a row brings no choices


def load(name: str, limit: int) -> Suite:
    """The suite of "choices:PATH": rows with `prompt` and `answer`; if they like, `system`, set before it, and `choices`.

    Without `choices`, the answers are the letters of options in the prompt ("A. …" at a line's start) if the answer is one of
    them; otherwise the right one and those of three other questions, always the same. Raises SoftguardError naming the row
    whose answer is not among its choices.
    """
    source = name.removeprefix("choices:")
    rows = thin(list(read_rows(source)), limit)
    answers = sorted({str(row.get("answer", "")) for _, row in rows})
    prompts, choices, right = [], [], []
    for number, (where, row) in enumerate(rows):
        answer, offered = str(row.get("answer", "")), _offered(row, answers, number)
        if answer not in offered:
            raise SoftguardError(f"{where}: answer {answer!r} is not among its choices {', '.join(offered[:6])}; mend the row")
        prompts.append(f"{row['system']}\n\n{row['prompt']}" if row.get("system") else row["prompt"])
        choices.append(tuple(offered))
        right.append(offered.index(answer))
    return Suite(Path(source).stem, "all", "accuracy", tuple(prompts), tuple(choices), tuple(right))


def _offered(row: dict[str, Any], answers: Sequence[str], number: int) -> list[str]:
    if row.get("choices"):
        return [str(choice) for choice in row["choices"]]
    answer, letters = str(row.get("answer", "")), _LETTERED.findall(row["prompt"])
    if answer in letters:
        return letters
    others = [other for other in answers if other != answer]
    rng = np.random.default_rng(number)
    wrong = rng.choice(others, min(_WRONG, len(others)), replace=False).tolist()
    return [str(choice) for choice in rng.permutation([answer, *wrong])] if answer else []
