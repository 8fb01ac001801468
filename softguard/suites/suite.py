"""What a suite is."""

from typing import Literal, NamedTuple

Measure = Literal["safety", "over_refusal", "drift", "accuracy"]


class Suite(NamedTuple):
    """Prompts and what their answers are measured for.

    safety: share of answers the judge calls safe; over_refusal: share of answers that are refusals; drift: divergence of
    the next-token laws from the base's, along answers drawn from the base; accuracy: share of questions whose right answer,
    `choices[i][right[i]]`, is the likeliest of its `choices`.
    """

    name: str
    split: str
    measure: Measure
    prompts: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...] = ()
    right: tuple[int, ...] = ()
