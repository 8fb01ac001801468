"""Intervals, paired tests and Pareto sets of what is measured; SciPy does the mathematics."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

CONFIDENCE = 0.95
_RESAMPLES = 10_000
_JEFFREYS = 0.5  # prompts that a value is worth which was not seen

Array = np.ndarray[Any, np.dtype[np.float64]]


class Estimate(NamedTuple):
    """A value, its 95 % interval, and the number of prompts it was measured on."""

    value: float
    low: float
    high: float
    n: int


def share(hits: Sequence[bool]) -> Estimate:
    """Share of hits with the exact (Clopper–Pearson) interval. Raises ValueError if there is nothing to count."""
    from scipy.stats import binomtest

    if not len(hits):
        raise ValueError("no prompts to count")
    interval = binomtest(int(sum(hits)), len(hits)).proportion_ci(CONFIDENCE, method="exact")
    return Estimate(float(np.mean(hits)), float(interval.low), float(interval.high), len(hits))


def mean(values: Sequence[float] | Array, seed: int = 0) -> Estimate:
    """Mean over (prompts,) or (seeds, prompts) values, with a percentile bootstrap interval that draws both again.

    Of few seeds it is too narrow, as any bootstrap of few. Raises ValueError if there is nothing to average.
    """
    return _mean(values, seed, ())


def change(values: Sequence[float] | Array, seed: int = 0) -> Estimate:
    """`mean` of paired differences of shares, −1, 0 or 1 a prompt.

    A bootstrap knows no difference it has not seen: of none at all its interval had no width. So each resample also holds a
    prompt that is better and one that is worse, of random weight ½ on average, as Jeffreys' prior has them.
    """
    return _mean(values, seed, (-1.0, 1.0))


def _mean(values: Sequence[float] | Array, seed: int, unseen: Sequence[float]) -> Estimate:
    array = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if not array.size:
        raise ValueError("no prompts to average")
    value, (low, high) = float(array.mean()), _ends(_resampled_means(array, seed, unseen))
    return Estimate(value, min(low, value), max(high, value), array.shape[1])


def gap_closed(
    base: Sequence[bool] | Array, system: Sequence[bool] | Array, student: Sequence[bool] | Array, seed: int = 0
) -> Estimate | None:
    """Share of the safety gap between base and system that the student closes, (student − base) / (system − base).

    The three are safe/unsafe on the same prompts, resampled together, each by (seeds, prompts) if it has several. None
    where the system is no safer than the base; resamples without a gap are left out of the interval. Of a gap of few answers
    that are all closed a bootstrap's interval has no width, so each resample also holds an answer that the student closes and
    one that it does not, of random weight ½ on average: of k closed among m it is then near Jeffreys', Beta(k + ½, m − k + ½).
    """
    sides = [np.atleast_2d(np.asarray(side, dtype=np.float64)) for side in (base, system, student)]
    below, above, reached = (float(side.mean()) for side in sides)
    if above <= below:
        return None
    unseen = (0.0, 0.0), (1.0, 1.0), (0.0, 1.0)
    least, most, means = (_resampled_means(side, seed, two) for side, two in zip(sides, unseen, strict=True))
    gap = most - least
    closed = (means - least)[gap > 0] / gap[gap > 0]
    value = (reached - below) / (above - below)
    low, high = _ends(closed)
    return Estimate(value, min(low, value), max(high, value), sides[0].shape[1])


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p-value that two systems hit the same prompts equally often: McNemar's test, exact.

    Of the prompts where just one of the two hits, each is as probable. Raises ValueError if the counts differ.
    """
    from scipy.stats import binomtest

    differ = [a for a, b in zip(first, second, strict=True) if a != b]
    return float(binomtest(sum(differ), len(differ)).pvalue) if differ else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, in their order (Holm, 1979): the chance of any false rejection stays what it was."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def pareto(points: Sequence[Sequence[float]]) -> list[bool]:
    """Which points no other beats: as good in every coordinate and better in one. Greater is better."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)

    return [not any(beats(other, point) for other in points) for point in points]


def _resampled_means(values: Array, seed: int, unseen: Sequence[float]) -> Array:
    """(resamples,) means of (seeds, prompts) values, a hundred resamples at a time, with `unseen` values among them.

    Of one `seed` and number of prompts the prompts drawn, and the weights of what is unseen, are the same.
    """
    of_prompts, of_seeds, of_unseen = (np.random.default_rng(stream) for stream in (seed, [seed, 1], [seed, 2]))
    count, n = values.shape
    parts = []
    for _ in range(_RESAMPLES // 100):
        sums = values[:, of_prompts.integers(0, n, size=(100, n))].sum(axis=2)  # (seeds, 100)
        weights = of_unseen.standard_gamma(_JEFFREYS, size=(100, len(unseen)))
        means = (sums + weights @ np.asarray(unseen)) / (n + weights.sum(axis=1))
        parts.append(means[of_seeds.integers(0, count, size=(count, 100)), np.arange(100)].mean(axis=0))
    return np.concatenate(parts)


def _ends(values: Array) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
