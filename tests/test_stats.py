"""Intervals against binomial tails, simulated coverage and cases worked by hand."""

import math

import numpy as np
import pytest

from softguard.stats import CONFIDENCE, change, gap_closed, holm, mcnemar, mean, pareto, share


def binomial_tail(n: int, hits: int, p: float) -> float:
    """P(at least `hits` of n) when each comes with probability p."""
    return math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(hits, n + 1))


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 20), (1, 20), (7, 20), (19, 20), (20, 20), (150, 322)])
def test_share_has_the_clopper_pearson_interval(hits: int, n: int) -> None:
    found = share([True] * hits + [False] * (n - hits))
    assert found.value == pytest.approx(hits / n)
    assert found.n == n
    tail = (1 - CONFIDENCE) / 2
    # The ends are the p at which so many hits, or so few, have probability 2.5 %; 0 and 1 where nothing can be excluded.
    if hits:
        assert binomial_tail(n, hits, found.low) == pytest.approx(tail, rel=1e-6)
    else:
        assert found.low == 0
    if hits < n:
        assert 1 - binomial_tail(n, hits + 1, found.high) == pytest.approx(tail, rel=1e-6)
    else:
        assert found.high == 1


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_clopper_pearson_covers_at_least_as_often_as_it_says(p: float) -> None:
    n = 30
    intervals = [share([True] * k + [False] * (n - k)) for k in range(n + 1)]
    covered = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k) for k, found in enumerate(intervals) if found.low <= p <= found.high
    )
    assert covered >= CONFIDENCE


def test_share_counts_numpy_booleans() -> None:
    assert share(np.array([True, False, True, True]).tolist()) == share([True, False, True, True])
    assert share([True, False, True, True]).value == 0.75


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="no prompts to count"):
        share([])
    with pytest.raises(ValueError, match="no prompts to average"):
        mean([])


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    found = [mean(rng.exponential(size=60).tolist(), seed=trial) for trial in range(150)]
    covered = sum(f.low <= 1 <= f.high for f in found) / len(found)
    assert 0.87 <= covered <= 0.99  # about 0.93 is known of the percentile interval at this size and skew


def test_bootstrap_interval_has_the_normal_width_on_many_values() -> None:
    values = np.random.default_rng(2).normal(3, 2, size=400)
    found = mean(values.tolist())
    assert found.value == pytest.approx(values.mean())
    width = 2 * 1.96 * values.std() / math.sqrt(400)
    assert found.high - found.low == pytest.approx(width, rel=0.05)
    assert found.n == 400


def test_equal_values_have_an_interval_without_width() -> None:
    assert mean([0.25] * 10) == pytest.approx((0.25, 0.25, 0.25, 10))
    assert mean([7.0]) == pytest.approx((7.0, 7.0, 7.0, 1))


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(3).uniform(size=50).tolist()
    assert mean(values, seed=4) == mean(values, seed=4)
    assert mean(values, seed=4) != mean(values, seed=5)


def flags(hits: int, n: int) -> list[bool]:
    return [i < hits for i in range(n)]


@pytest.mark.parametrize(
    ("base", "system", "student", "closed"),
    [(50, 90, 50, 0.0), (50, 90, 90, 1.0), (50, 90, 70, 0.5), (50, 90, 40, -0.25), (50, 90, 100, 1.25)],
)
def test_gap_closed_is_the_students_part_of_the_gap(base: int, system: int, student: int, closed: float) -> None:
    found = gap_closed(flags(base, 100), flags(system, 100), flags(student, 100))
    assert found is not None
    assert found.value == pytest.approx(closed)
    assert found.low <= closed <= found.high
    assert found.n == 100


@pytest.mark.parametrize(("gap", "closed"), [(1, 1), (6, 6), (6, 3), (40, 40), (40, 38), (6, 0)])
def test_the_interval_of_a_gap_of_few_answers_is_jeffreys(gap: int, closed: int) -> None:
    """The three are resampled together, or the interval would be far wider."""
    from scipy.stats import beta

    base, system, student = flags(50, 100), flags(50 + gap, 100), flags(50 + closed, 100)
    found = gap_closed(base, system, student)
    assert found is not None
    low, high = (float(beta(closed + 0.5, gap - closed + 0.5).ppf(end)) for end in (0.025, 0.975))
    low, high = low if closed else 0, high if closed < gap else 1
    assert low - 0.14 < found.low < low + 0.02  # how many answers make the gap is chance, too
    assert high - 0.02 < found.high < high + 0.14


def test_no_difference_seen_is_not_none_for_certain() -> None:
    """Of 0 of 300 prompts, each way, an exact test would leave up to 1.2 % (Clopper–Pearson)."""
    found = change([0.0] * 300)
    assert found.value == 0
    assert 0.004 < found.high < 0.012
    assert found.low == pytest.approx(-found.high, abs=0.001)
    many = np.repeat([0.0, 1.0, -1.0], [200, 60, 40])
    assert change(many.tolist())[:3] == pytest.approx(mean(many.tolist())[:3], abs=0.01)


def test_gap_closed_has_the_interval_of_a_share_when_base_and_system_are_sure() -> None:
    found = gap_closed([False] * 200, [True] * 200, flags(120, 200))
    assert found is not None
    width = 2 * 1.96 * math.sqrt(0.6 * 0.4 / 200)
    assert found.value == pytest.approx(0.6)
    assert found.high - found.low == pytest.approx(width, rel=0.05)


def test_no_gap_gives_none() -> None:
    assert gap_closed(flags(9, 10), flags(9, 10), flags(10, 10)) is None
    assert gap_closed(flags(9, 10), flags(8, 10), flags(10, 10)) is None


def test_an_interval_over_seeds_and_prompts_has_the_width_of_both() -> None:
    """Of effects of seeds and of prompts that add up, the variances of the mean add up too."""
    rng = np.random.default_rng(5)
    seeds, prompts = rng.normal(0, 1, size=30), rng.normal(0, 4, size=500)
    found = mean(seeds[:, None] + prompts)
    assert found.value == pytest.approx(seeds.mean() + prompts.mean())
    width = 2 * 1.96 * math.sqrt(seeds.var() / 30 + prompts.var() / 500)
    assert found.high - found.low == pytest.approx(width, rel=0.05)
    assert found.n == 500
    one = mean(prompts[None])
    assert one.high - one.low == pytest.approx(2 * 1.96 * prompts.std() / math.sqrt(500), rel=0.05)


def test_gap_closed_by_seeds_draws_prompts_of_all_systems_together() -> None:
    base, system = np.array(flags(50, 100), float), np.array(flags(90, 100), float)
    found = gap_closed(base, system, np.stack([system] * 3))
    assert found is not None
    assert found == gap_closed(base, system, system)
    found = gap_closed(base, system, np.stack([system, base]))  # a seed that learns all, and one that learns nothing
    assert found is not None
    assert found == pytest.approx((0.5, 0, 1, 100), abs=0.02)
    assert gap_closed(system, base, system[None]) is None


def test_a_gap_that_resamples_lose_still_has_finite_ends() -> None:
    found = gap_closed(flags(9, 10), flags(10, 10), flags(10, 10))
    assert found is not None
    assert found.value == pytest.approx(1)
    assert math.isfinite(found.low)
    assert math.isfinite(found.high)


def test_mcnemar_is_the_binomial_test_of_the_prompts_that_differ() -> None:
    first = [True] * 9 + [False] * 1 + [True] * 40
    second = [False] * 9 + [True] * 1 + [True] * 40
    assert mcnemar(first, second) == pytest.approx(22 / 1024)  # 2 · (1 + 10) / 2¹⁰
    assert mcnemar(first, first) == 1.0
    with pytest.raises(ValueError, match="zip"):
        mcnemar(first, second[1:])


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust(p, "holm")
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_pareto_set_is_what_nothing_beats() -> None:
    points = [(1.0, 0.0), (0.5, 0.5), (0.4, 0.5), (0.5, 0.5), (0.0, 0.9)]
    assert pareto(points) == [True, True, False, True, True]


def test_a_change_lies_within_its_interval() -> None:
    for values in ([1.0] * 20, [-1.0] * 20, [1.0] * 19 + [0.0]):
        found = change(values)
        assert found.low <= found.value <= found.high
