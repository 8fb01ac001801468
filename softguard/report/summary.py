"""A study in one file a program reads, and in one table: every row beside the base and the safe system.

A seed stands beside the base and the system of its own run: of runs on several machines these may differ by an answer or two.
Intervals of what a row differs by are over prompts and seeds: both are drawn again, prompts for all systems alike. Those of
shares are the outermost ends of the seeds' exact ones, as in `exhibits`, because a bootstrap of all hits has no width.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from softguard import stats
from softguard.report.exhibits import SYSTEMS, Row, by_method, metric_of

SCHEMA = 1
_BOOTSTRAPPED = {"token_tv": stats.mean, "accuracy_change": stats.change}  # means over prompts that are no shares
_TAKEN = tuple(SYSTEMS.values())  # what the others stand beside
_MEASURES = (
    ("gap_closed", "safety gap closed, %", 100, 0),
    ("over_refusal_change", "refused harmless prompts, less the system's, points", 100, 1),
    ("accuracy_change", "right answers, less the base's, points", 100, 1),
    ("question_refusal", "questions refused, %", 100, 1),
    ("token_tv", "token TV to the base, %", 100, 2),
    ("perplexity_ratio", "perplexity of the base's answers, × the base's", 1, 3),
)


class Figure(NamedTuple):
    """One figure of one system of a base model, mean over seeds."""

    base: str
    method: str
    suite: str
    metric: str  # as in results.json; over_refusal_change: to the safe system, paired
    value: float
    low: float
    high: float
    least: float  # over seeds
    most: float
    n: int  # prompts
    seeds: int


def figures(rows: Sequence[Row]) -> list[Figure]:
    """All figures of measured rows; base and safe system, which no seed changes, stand first, of a base model's first run."""
    found: list[Figure] = []
    for group in by_method(rows):
        base = group[0]["base"]
        for system in ["distilled"] if any(f.base == base for f in found) else [*SYSTEMS, "distilled"]:
            kept = group if system == "distilled" else group[:1]
            method = SYSTEMS.get(system) or group[0]["method"]
            own = dict.fromkeys((m["suite"], m["metric"]) for row in kept for m in row["metrics"] if m["system"] == system)
            for suite, name in own:
                if name == "over_refusal_change":  # it follows from over_refusal, of all seeds
                    continue
                having = [row for row in kept if metric_of(row, system, suite, name) is not None]
                for metric, estimate, each in _estimates(having, system, suite, name):
                    ends = (min(each), max(each))
                    found.append(Figure(base, method, suite, metric, *estimate[:3], *ends, estimate.n, len(each)))
    return found


def summary(rows: Sequence[Row], found: Sequence[Figure]) -> dict[str, Any]:
    """The figures of measured rows with what they were made by, for a JSON file."""
    named = {
        name: sorted({row[name] for row in rows})
        for name in ("base", "base_fingerprint", "guard", "judge", "corpus", "seed", "learning_rate")
    }
    versions = sorted({row["versions"] for row in rows})
    return {
        "schema": SCHEMA,
        **named,
        "versions": [json.loads(text) for text in versions],
        "figures": [figure._asdict() for figure in found],
    }


def table(found: Sequence[Figure]) -> list[str]:
    """Lines of Markdown: a table a measure and base model, a line a row of the study, a column a suite."""
    text: list[str] = []
    for metric, label, scale, digits in _MEASURES:
        for base in dict.fromkeys(figure.base for figure in found):
            own = {(f.method, f.suite): f for f in found if (f.base, f.metric) == (base, metric) and f.method not in _TAKEN}
            suites = list(dict.fromkeys(suite for _, suite in own))
            if not own:
                continue
            text += [f"{base}: {label}", "", f"| | {' | '.join(suites)} |", "|" + " --- |" * (1 + len(suites))]
            for method in dict.fromkeys(method for method, _ in own):
                cells = [_cell(own.get((method, suite)), scale, digits) for suite in suites]
                text.append(f"| {method} | {' | '.join(cells)} |")
            text.append("")
    return text


def _cell(figure: Figure | None, scale: int, digits: int) -> str:
    if figure is None:
        return "–"
    shown = (figure.value, figure.low, figure.high, figure.least, figure.most)
    value, low, high, least, most = (f"{scale * x + 0:.{digits}f}" for x in shown)
    return f"{value} [{low}, {high}]" + (f", seeds {least} to {most}" if figure.seeds > 1 else "")


def _estimates(kept: Sequence[Row], system: str, suite: str, metric: str) -> list[tuple[str, stats.Estimate, list[float]]]:
    """A metric, and what follows from it: its name, its estimate and its value by seed."""
    found = [m for row in kept if (m := metric_of(row, system, suite, metric)) is not None]
    each = [float(m["value"]) for m in found]
    ends = min(m["low"] for m in found), max(m["high"] for m in found)
    plain = stats.Estimate(float(np.mean(each)), *ends, found[0]["n"])
    if metric in _BOOTSTRAPPED:
        return [(metric, _BOOTSTRAPPED[metric](_outcomes(kept, system, suite, metric)), each)]
    if metric == "gap_closed":
        base, safe_system, distilled = (_outcomes(kept, name, suite, "safety") for name in (*SYSTEMS, "distilled"))
        closed = stats.gap_closed(base, safe_system, distilled)
        return [(metric, closed, each)] if closed is not None else []
    if metric == "over_refusal" and system == "distilled":
        change = _outcomes(kept, system, suite, metric) - _outcomes(kept, "safe_system", suite, metric)
        by_seed = [float(x) for x in change.mean(axis=1)]
        return [(metric, plain, each), ("over_refusal_change", stats.change(change), by_seed)]
    return [(metric, plain, each)]


def _outcomes(rows: Sequence[Row], system: str, suite: str, metric: str) -> stats.Array:
    """(seeds, prompts) figures of every single prompt."""
    found = [metric_of(row, system, suite, metric) for row in rows]
    return np.array([m["outcomes"] for m in found if m is not None], dtype=np.float64)
