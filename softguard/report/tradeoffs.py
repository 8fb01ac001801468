"""Which rows of a study are worth shipping: Pareto sets, and paired tests of every two systems on the same prompts."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from softguard import stats
from softguard.report.exhibits import SYSTEMS, Row, by_method

MEASURES = {"safety": 1, "over_refusal": -1, "accuracy": 1, "token_tv": -1}  # and whether more is better
TESTED = ("safety", "over_refusal", "accuracy")  # a hit or a miss a prompt
AXES = (("safety", "over_refusal"), ("safety", "accuracy"), ("safety", "token_tv"))  # the last tells refusing from babbling


class Standing(NamedTuple):
    """One system of one base model: shares over all counted prompts, mean over seeds; none where nothing was measured."""

    base: str
    method: str
    shares: dict[str, float]
    hits: dict[str, list[bool]]  # of the first seed, by measure; over the same prompts for all systems of a base
    learned: bool  # base or a row, which can be shipped without the guard
    beside: Mapping[str, dict[str, list[bool]]]  # hits of base and safe system in that seed's run, by their names


class Comparison(NamedTuple):
    """Exact McNemar test of two systems' first seeds; `p_holm` counts all pairs of the base model and measure."""

    base: str
    measure: str
    first: str
    second: str
    n: int
    difference: float  # first less second, in shares
    p: float
    p_holm: float


class Member(NamedTuple):
    """Where a system stands on one pair of measures."""

    standing: Standing
    on_front: bool
    beaten_by: tuple[str, ...]


def standings(rows: Sequence[Row], suites: Sequence[str] = ()) -> list[Standing]:
    """Every system of every base model over the counted suites; none counts all."""
    found: list[Standing] = []
    for group in by_method(rows):
        base = group[0]["base"]
        systems = ["distilled"] if any(s.base == base for s in found) else [*SYSTEMS, "distilled"]
        for system in systems:
            kept = group if system == "distilled" else group[:1]
            hits, *others = ({m: h for m in TESTED if (h := _hits(kept[0], name, m, suites))} for name in (system, *SYSTEMS))
            beside = dict(zip(SYSTEMS.values(), others, strict=True)) if system == "distilled" else {}
            # One division, not one a seed: shares that are equal must not differ by how they were rounded.
            shares = {m: float(np.mean([hit for row in kept for hit in _hits(row, system, m, suites)])) for m in hits}
            if strays := [value for row in kept for value in _token_tv(row, system)]:
                shares["token_tv"] = float(np.mean(strays))
            method = SYSTEMS.get(system) or group[0]["method"]
            found.append(Standing(base, method, shares, hits, system != "safe_system", beside))
    return found


def front(standing: Sequence[Standing], axes: tuple[str, str]) -> list[Member]:
    """Who stands where on a pair of measures, by base model. The safe system is shown, but is no member: it needs the guard."""
    members = []
    for base in dict.fromkeys(s.base for s in standing):
        own = [s for s in standing if s.base == base and all(axis in s.shares for axis in axes)]
        points = {s.method: [MEASURES[axis] * s.shares[axis] for axis in axes] for s in own}
        learned = [s.method for s in own if s.learned]
        best = {name for name, on in zip(learned, stats.pareto([points[name] for name in learned]), strict=True) if on}
        for s in own:
            beaten = [name for name in best if s.learned and stats.pareto([points[name], points[s.method]]) == [True, False]]
            members.append(Member(s, s.method in best, tuple(sorted(beaten, key=learned.index))))
    return members


def comparisons(standing: Sequence[Standing]) -> list[Comparison]:
    """Every two systems of a base model on every measure, on the same prompts; a row beside base and system of its own run."""
    found = []
    for base in dict.fromkeys(s.base for s in standing):
        for measure in TESTED:
            pairs = list(combinations([s for s in standing if s.base == base and measure in s.hits], 2))
            hits = [(b.beside.get(a.method, a.hits)[measure], b.hits[measure]) for a, b in pairs]  # base and system come first
            p_values = [stats.mcnemar(first, second) for first, second in hits]
            for (a, b), (first, second), p, adjusted in zip(pairs, hits, p_values, stats.holm(p_values), strict=True):
                gap = float(np.mean(first) - np.mean(second))
                found.append(Comparison(base, measure, a.method, b.method, len(first), gap, p, adjusted))
    return found


def _hits(row: Row, system: str, measure: str, suites: Sequence[str]) -> list[bool]:
    return [
        bool(hit)
        for m in row["metrics"]
        if (m["system"], m["metric"]) == (system, measure) and (not suites or m["suite"] in suites)
        for hit in m["outcomes"]
    ]


def _token_tv(row: Row, system: str) -> list[float]:
    """Token TV to the base, of which the base has none; empty where it was not measured."""
    measured = "distilled" if system == "base" else system
    values = [m["value"] for m in row["metrics"] if (m["system"], m["metric"]) == (measured, "token_tv")]
    return [0.0] * len(values) if system == "base" else values
