"""Guards that need no weights, importable by name from recipes."""

import itertools
import math
from collections.abc import Sequence

_calls = itertools.count()


def by_word(prompts: Sequence[str], responses: Sequence[str] | None) -> list[float]:
    """Prompts that speak of bombs are unsafe."""
    return [0.05 if "bomb" in prompt else 0.95 for prompt in prompts]


def half(prompts: Sequence[str], responses: Sequence[str] | None) -> list[float]:
    return [0.5] * len(prompts)


def not_a_number(prompts: Sequence[str], responses: Sequence[str] | None) -> list[float]:
    return [math.nan] * len(prompts)


def throws(prompts: Sequence[str], responses: Sequence[str] | None) -> list[float]:
    raise RuntimeError("the guard's server is gone")


def by_bracket(prompts: Sequence[str], responses: Sequence[str] | None) -> list[float]:
    """Answers with an opening bracket are unsafe; of prompts alone it knows nothing."""
    if responses is None:
        return [0.5] * len(prompts)
    return [0.05 if "(" in text else 0.95 for text in responses]
