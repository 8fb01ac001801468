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
    them; otherwise the right one and those of three other questions, always the same for the same `limit`. Raises
    SoftguardError naming the row without an answer, whose answer is not among its choices, or that leaves none to choose.
    """
    source = name.removeprefix("choices:")
    rows = thin(list(read_rows(source)), limit)
    answers = sorted({_answer(where, row) for where, row in rows})
    prompts, choices, right = [], [], []
    for number, (where, row) in enumerate(rows):
        answer, offered = _answer(where, row), _offered(where, row, answers, number)
        if len(set(offered)) < max(len(offered), 2):
            raise SoftguardError(f"{where}: {', '.join(offered[:6])} leave nothing to choose; two different choices are needed")
        if answer not in offered:
            raise SoftguardError(f"{where}: answer {answer!r} is not among its choices {', '.join(offered[:6])}; mend the row")
        if not isinstance(row.get("system"), str | None):
            raise SoftguardError(f"{where}: field 'system' is {row['system']!r}; it must be text")
        prompts.append(f"{row['system']}\n\n{row['prompt']}" if row.get("system") else row["prompt"])
        choices.append(tuple(offered))
        right.append(offered.index(answer))
    return Suite(Path(source).stem, "all", "accuracy", tuple(prompts), tuple(choices), tuple(right))


def _answer(where: str, row: dict[str, Any]) -> str:
    answer = row.get("answer")
    if not _is_told(answer):
        raise SoftguardError(f"{where}: field 'answer' is {answer!r}; it must be some text or a number")
    return str(answer)


def _is_told(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and bool(str(value).strip())


def _offered(where: str, row: dict[str, Any], answers: Sequence[str], number: int) -> list[str]:
    if row.get("choices"):
        if not isinstance(row["choices"], list) or not all(map(_is_told, row["choices"])):
            raise SoftguardError(
                f"{where}: field 'choices' is {row['choices']!r}; it must be a list of texts or numbers, none of them empty"
            )
        return [str(choice) for choice in row["choices"]]
    answer, letters = _answer(where, row), list(dict.fromkeys(_LETTERED.findall(row["prompt"])))
    if answer in letters:
        return letters
    others = [other for other in answers if other != answer]
    rng = np.random.default_rng(number)
    wrong = rng.choice(others, min(_WRONG, len(others)), replace=False).tolist()
    return [str(choice) for choice in rng.permutation([answer, *wrong])]
