"""Where bars and curves lie; the template draws them. Lengths across are in percent, so that text keeps its size."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from softguard.prompts import thin
from softguard.report.measures import METRICS, SYSTEMS, number, rows_of, suites_of

_TITLE, _BAR, _GAP = 24, 22, 14  # pixels
_POINTS = 400  # of one curve at most


class Bar(NamedTuple):
    """One system's share with its interval, all in [0, 100]; `y` in pixels."""

    system: str
    label: str
    value: float
    low: float
    high: float
    text: str
    y: int


class Bars(NamedTuple):
    """The bars of one suite."""

    title: str
    y: int
    bars: tuple[Bar, ...]


class BarChart(NamedTuple):
    """All suites whose figures are shares."""

    suites: tuple[Bars, ...]
    height: int


class Curve(NamedTuple):
    """One curve: `path` joins its points, `dots` marks them; both in a square of 100 by 100."""

    label: str
    style: str
    path: str
    dots: str


class Tick(NamedTuple):
    """A mark of the vertical axis, `y` in percent from the top."""

    y: float
    label: str


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    curves: tuple[Curve, ...]
    ticks: tuple[Tick, ...]
    last_step: int


def bar_chart(results: Mapping[str, Any]) -> BarChart:
    """Safety and over-refusal of every system, by suite."""
    rows, y, suites = rows_of(results), 0, []
    for metric in ("safety", "over_refusal"):
        for suite in suites_of(rows, metric):
            title = f"{METRICS[metric].label}, {suite} ({METRICS[metric].better})"
            top, bars = y, []
            y += _TITLE
            found = {row.system: row for row in rows if (row.metric, row.suite) == (metric, suite)}
            for system, label in SYSTEMS.items():
                if system in found:
                    row = found[system]
                    value, low, high = (100 * share for share in (row.value, row.low, row.high))
                    bars.append(Bar(system, label, value, low, high, f"{number(metric, row.value)} %", y))
                    y += _BAR
            suites.append(Bars(title, top, tuple(bars)))
            y += _GAP
    return BarChart(tuple(suites), y)


def training_panels(log: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Loss of both branches, the student's decisions and its drift over training; nothing for an empty log."""
    if not log:
        return []
    last = max(int(line["step"]) for line in log)
    both = (("training", "train"), ("validation", "validation"))

    def panel(title: str, curves: Sequence[tuple[str, str, str, str]], percent: bool = False, whole: bool = False) -> Panel:
        data = []
        for label, style, kind, field in curves:
            points = [(int(e["step"]), float(e[field])) for e in log if e["kind"] == kind]
            data.append((label, style, thin([p for p in points if math.isfinite(p[1])], _POINTS)))
        values = [value for _, _, points in data for _, value in points]
        bottom, top = (0.0, 1.0) if whole else _axis(values)
        span = top - bottom
        marks = (bottom, (bottom + top) / 2, top)
        ticks = [Tick(100 * (top - v) / span, f"{100 * v:g} %" if percent else f"{v:g}") for v in marks]
        drawn = []
        for label, style, points in data:
            placed = [f"{100 * step / last:.2f} {100 * (top - value) / span:.2f}" for step, value in points]
            dots = "".join(f"M{p}h0" for p in placed) if style != "train" else ""
            drawn.append(Curve(label, style, "M" + "L".join(placed) if placed else "", dots))
        return Panel(title, tuple(drawn), tuple(ticks), last)

    return [
        panel("Loss, answers the system keeps", [(label, kind, kind, "safe") for label, kind in both]),
        panel("Loss, refusals", [(label, kind, kind, "refusal") for label, kind in both]),
        panel(
            "Begins a refusal, validation",
            [
                ("where the system refuses", "validation", "validation", "refuses"),
                ("where it answers", "other", "validation", "over_refuses"),
            ],
            percent=True,
            whole=True,
        ),
        panel("Token TV to the base, validation", [("validation", "validation", "validation", "token_tv")], percent=True),
    ]


def _axis(values: Sequence[float]) -> tuple[float, float]:
    """Round ends of an axis that holds 0 and all values."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    ends = -_round_up(-low) if low < 0 else 0.0, _round_up(high) if high > 0 else 0.0
    return ends if ends[0] < ends[1] else (0.0, 1.0)


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten; `value` is positive."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value)
