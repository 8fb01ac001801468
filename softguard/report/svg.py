"""Figures as SVG that stand alone: dots with intervals, points in a plane, curves. Text is escaped."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_LEFT, _RIGHT, _ROW, _TOP = 250, 130, 19, 34  # pixels
_WIDTH = 400  # of a pair of axes
_COLOURS = ("#0b62a4", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0e7490", "#a16207", "#be185d", "#4d7c0f", "#525252")


class Dot(NamedTuple):
    """One figure with its interval. A hollow one is not ours."""

    label: str
    value: float
    low: float
    high: float
    text: str
    hollow: bool = False


class Point(NamedTuple):
    """A named place in a plane. A ringed one belongs to the Pareto set."""

    label: str
    x: float
    y: float
    ringed: bool = False


class Curve(NamedTuple):
    """A named line through (x, y) points."""

    label: str
    points: tuple[tuple[float, float], ...]


def dots(title: str, groups: Sequence[tuple[str, Sequence[Dot]]], end: float = 0.0) -> str:
    """One row a dot under its group's name, on a common axis that holds 0, `end` and all intervals; 0 is marked."""
    ends = [0.0, end, *(value for _, group in groups for dot in group for value in (dot.low, dot.value, dot.high))]
    lowest, span = min(ends), max(ends) - min(ends) or 1.0
    parts, y = [_text(8, 20, title, weight="bold")], _TOP

    def x(value: float) -> float:
        return _LEFT + _WIDTH * (value - lowest) / span

    for name, group in groups:
        parts.append(_text(8, y + 13, name, weight="bold"))
        y += _ROW
        for dot in group:
            middle = y + _ROW / 2 - 2
            fill = "#fff" if dot.hollow else _COLOURS[0]
            parts.append(_line(_LEFT, middle, _LEFT + _WIDTH, middle, "#e5e5e5"))
            parts.append(_line(x(0), middle - 5, x(0), middle + 5, "#999"))
            if dot.high > dot.low:
                parts.append(_line(x(dot.low), middle, x(dot.high), middle, _COLOURS[0]))
            parts.append(f'<circle cx="{x(dot.value):.1f}" cy="{middle:.1f}" r="4" fill="{fill}" stroke="{_COLOURS[0]}"/>')
            parts.append(_text(_LEFT - 8, middle + 4, dot.label, anchor="end"))
            parts.append(_text(_LEFT + _WIDTH + 8, middle + 4, dot.text))
            y += _ROW
        y += 6
    return _page(_LEFT + _WIDTH + _RIGHT, y + 6, parts)


def plane(title: str, across: str, up: str, points: Sequence[Point]) -> str:
    """Points by two measures, numbered, with a legend beside."""
    frame = _Frame([p.x for p in points], [p.y for p in points])
    parts = [_text(8, 20, title, weight="bold"), *frame.axes(across, up)]
    for number, point in enumerate(points, 1):
        cx, cy = frame.place(point.x, point.y)
        if point.ringed:
            parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="7" fill="none" stroke="{_COLOURS[0]}"/>')
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3.5" fill="{_COLOURS[0]}"/>')
        parts.append(_text(cx + 9, cy + 4, str(number)))
        parts.append(_text(frame.right + 30, _TOP + 14 * number, f"{number}  {point.label}{' ○' if point.ringed else ''}"))
    return _page(frame.right + 330, max(frame.bottom + 44, _TOP + 14 * len(points) + 20), parts)


def curves(title: str, across: str, up: str, lines: Sequence[Curve]) -> str:
    """Lines over a common axis, with a legend beside."""
    places = [point for line in lines for point in line.points]
    frame = _Frame([x for x, _ in places], [y for _, y in places])
    parts = [_text(8, 20, title, weight="bold"), *frame.axes(across, up)]
    for number, line in enumerate(lines):
        colour, dash = _COLOURS[number % len(_COLOURS)], "" if number < len(_COLOURS) else ' stroke-dasharray="4 3"'
        path = " ".join("{:.1f},{:.1f}".format(*frame.place(*point)) for point in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        y = _TOP + 14 * (number + 1)
        parts.append(_line(frame.right + 30, y - 4, frame.right + 50, y - 4, colour, dash))
        parts.append(_text(frame.right + 56, y, line.label))
    return _page(frame.right + 330, max(frame.bottom + 44, _TOP + 14 * len(lines) + 20), parts)


class _Frame:
    """A pair of axes around some values, with a little room."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.left, self.right, self.top, self.bottom = 60, 60 + _WIDTH, _TOP + 6, _TOP + 286
        self.x, self.y = _ends(xs), _ends(ys)

    def place(self, x: float, y: float) -> tuple[float, float]:
        across, up = (x - self.x[0]) / (self.x[1] - self.x[0]), (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + (self.right - self.left) * across, self.bottom - (self.bottom - self.top) * up

    def axes(self, across: str, up: str) -> list[str]:
        parts = [
            _line(self.left, self.bottom, self.right, self.bottom, "#222"),
            _line(self.left, self.top, self.left, self.bottom, "#222"),
        ]
        for share in (0, 0.25, 0.5, 0.75, 1):
            value_x, value_y = (low + share * (high - low) for low, high in (self.x, self.y))
            x, y = self.place(value_x, value_y)
            parts += [
                _text(x, self.bottom + 15, f"{value_x:.3g}", anchor="middle"),
                _text(self.left - 6, y + 4, f"{value_y:.3g}", anchor="end"),
            ]
        parts.append(_text((self.left + self.right) / 2, self.bottom + 32, across, anchor="middle"))
        parts.append(
            f'<g transform="translate(14 {(self.top + self.bottom) / 2}) rotate(-90)">{_text(0, 0, up, anchor="middle")}</g>'
        )
        return parts


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{more}/>'


def _page(width: float, height: float, parts: Sequence[str]) -> str:
    style = 'font-family="sans-serif" font-size="11" fill="#222"'
    sheet = '<rect width="100%" height="100%" fill="#fff"/>'  # readable on dark pages too
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join([sheet, *parts]) + "\n</svg>\n"
