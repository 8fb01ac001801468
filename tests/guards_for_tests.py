"""Guards that need no weights, importable by name from recipes."""

import itertools
import math
from collections.abc import Sequence

_calls = itertools.count()


def by_word(prompts: Sequence[str], responses: Sequence[str] | None) -> list[float]:
    """Prompts that speak of bombs are unsafe."""
    return [0.05 if "bomb" in prompt else 0.95 for prompt in prompts]


class ByCategory:
    """`by_word`, which names a category: questions of medicine are unsafe too, of a category of their own."""

    name = fingerprint = "by category"

    def prompt_safety(self, prompts: Sequence[str]) -> list[float]:
        return [0.05 if self._category(prompt) else 0.95 for prompt in prompts]

    def response_safety(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return self.prompt_safety(responses)

    def prompt_categories(self, prompts: Sequence[str]) -> list[str]:
        return [self._category(prompt) for prompt in prompts]

    def response_categories(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        return self.prompt_categories(responses)

    def _category(self, text: str) -> str:
        words = {"bomb": "weapons", "pill": "medicine", "@": "privacy", "spam": "advertising", "odd": "other"}
        return next((category for word, category in words.items() if word in text), "")


by_category = ByCategory()


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
