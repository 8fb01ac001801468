"""Model cards: `card.json` beside fitted weights, and the measured figures, with intervals, that it holds."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from softguard.errors import SoftguardError
from softguard.files import read_json, write_file, write_json

Card = dict[str, Any]
Values = np.ndarray[Any, np.dtype[np.float64]]
Scores = Sequence[float] | Values
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Index = np.ndarray[Any, np.dtype[np.intp]]
Questions = Sequence[str] | np.ndarray[Any, Any]


def sha256(blob: bytes) -> str:
    """Hex digest of a file's content."""
    return hashlib.sha256(blob).hexdigest()


def read_card(folder: Path, form: str, version: int) -> tuple[Card, bytes]:
    """The `card.json` of `folder` and the weights beside it, which are the card's.

    Raises SoftguardError if a file is missing or of another format or version, or if the weights are not the card's.
    """
    card = read_json(folder / "card.json", "guard or judge")
    try:
        blob = (folder / "weights.safetensors").read_bytes()
    except OSError as error:
        raise SoftguardError(f"{folder}/weights.safetensors cannot be read ({error.strerror}); restore or refit it") from error
    found = (card.get("format"), card.get("version"))
    if found != (form, version):
        raise SoftguardError(f"{folder}/card.json says format and version {found}, this softguard reads {(form, version)}")
    if card.get("weights_sha256") != sha256(blob):
        raise SoftguardError(f"{folder}/weights.safetensors is not the file its card.json describes; restore or refit it")
    return card, blob


def write_with_card(folder: Path, card: Card, weights: bytes, limit: int) -> Card:
    """Write weights and card into `folder`, each beside its place and then renamed; returns the card as written.

    Raises SoftguardError if together they pass `limit` bytes.
    """
    card = {**card, "weights_sha256": sha256(weights)}
    size = len(weights) + len(json.dumps(card, indent=2, ensure_ascii=False).encode()) + 1
    if size > limit:
        raise SoftguardError(f"{folder} would hold {size:,} bytes, more than {limit:,}; make it smaller")
    write_file(folder / "weights.safetensors", lambda beside: beside.write_bytes(weights))
    write_json(folder / "card.json", card)  # last: until it is there, the weights beside an older card are refused
    return card


class Figure(NamedTuple):
    """A measured number: on `n` cases of `data`, with its 95 % interval."""

    figure: str
    data: str
    n: int
    value: float
    low: float
    high: float
    questions: int = 0  # to which the cases are answers, so that those to one are no independent cases; 0: they all are


def over_questions(figure: Figure, questions: Questions, value: Callable[[Index], float]) -> Figure:
    """`figure` with an interval that also stands if its cases are answers to a few `questions`, (cases,).

    Percentile bootstrap in which questions are drawn, each with all its cases (a cluster bootstrap: Davison and Hinkley, 1997,
    §3.8), or the figure's own ends where those are farther out. Of a score of questions it is a little too narrow.
    `value`: of the cases at an index, NaN where there is none.
    """
    names, which = np.unique(np.asarray(questions), return_inverse=True)
    if len(names) == len(which):
        return figure
    cases = [np.flatnonzero(which == number) for number in range(len(names))]
    rng = np.random.default_rng(0)
    draws = [value(np.concatenate([cases[i] for i in rng.integers(0, len(cases), len(cases))])) for _ in range(1000)]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return figure._replace(low=min(figure.low, float(low)), high=max(figure.high, float(high)), questions=len(names))


def auroc_figure(data: str, safe: Scores, bad: Sequence[bool] | Flags, questions: Questions | None = None) -> Figure:
    """AUROC of p(safe) against `bad`, interval after DeLong et al. (1988) on the logit scale.

    `safe` and `bad` are (cases,); `questions` as in `over_questions`. Raises ValueError unless both classes are there.
    """
    scores, labels = -np.asarray(safe, float), np.asarray(bad, bool)
    if labels.all() or not labels.any():
        raise ValueError(f"{data}: AUROC needs both classes")
    found = Figure("auroc", data, len(labels), *_area(scores[labels], scores[~labels]))
    if questions is None:
        return found

    def area(index: Index) -> float:
        some = labels[index]
        return _area(scores[index][some], scores[index][~some])[0] if 0 < some.sum() < len(some) else math.nan

    return over_questions(found, questions, area)


def _area(high: Values, low: Values) -> tuple[float, float, float]:
    """AUROC of scores that should be high and low, and its interval.

    Classes that do not overlap have no variance to go by; but of m independent pairs, m the cases of the rarer one, all are in
    order then, whose probability is at most AUROC^m: hence a bound of 0.025^(1/m).
    """
    order, reverse = np.sort(low), np.sort(high)
    above = (np.searchsorted(order, high, "left") + np.searchsorted(order, high, "right")) / (2 * len(low))
    below = (np.searchsorted(reverse, low, "left") + np.searchsorted(reverse, low, "right")) / (2 * len(high))
    area = float(above.mean())
    rarer = min(len(high), len(low))
    if area in (0, 1):
        bound = float(0.025 ** (1 / rarer))
        return (area, bound, 1.0) if area else (area, 0.0, 1 - bound)
    if rarer < 2:
        return area, 0.0, 1.0
    variance = above.var(ddof=1) / len(high) + below.var(ddof=1) / len(low)
    logit, spread = np.log(area / (1 - area)), 1.959964 * np.sqrt(variance) / (area * (1 - area))
    return area, float(1 / (1 + np.exp(spread - logit))), float(1 / (1 + np.exp(-spread - logit)))


def share_figure(figure: str, data: str, hits: Sequence[bool] | Flags, questions: Questions | None = None) -> Figure:
    """Share of true values in `hits` (cases,), with Wilson's interval (1927); `questions` as in `over_questions`."""
    from scipy.stats import binomtest

    true = np.asarray(hits, bool)
    count = int(true.sum())
    interval = binomtest(count, len(true)).proportion_ci(method="wilson")
    found = Figure(figure, data, len(true), count / len(true), float(interval.low), float(interval.high))
    return found if questions is None else over_questions(found, questions, lambda index: float(true[index].mean()))


def calibration_figure(data: str, safe: Scores, bad: Sequence[bool] | Flags, questions: Questions | None = None) -> Figure:
    """Expected calibration error of p(safe), ten equal-width bins (Guo et al., 2017), with a bootstrap interval.

    Chance makes the error larger, never smaller, and a resample adds as much again: the low end is the basic bootstrap's, which
    takes the excess back, or what is left without the error that labels drawn from p(safe) itself have in one of forty draws,
    if that is less; the high end is the percentile bootstrap's, which takes nothing back. `safe` and `bad` are (cases,);
    `questions` as in `over_questions`: over few it holds less often.
    """
    probability, labels = np.asarray(safe, float), ~np.asarray(bad, bool)
    bins = np.minimum((probability * 10).astype(int), 9)

    def error(index: Index, of: Flags = labels) -> float:
        return float(np.abs(np.bincount(bins[index], probability[index] - of[index], 10)).sum() / len(index))

    rng, every = np.random.default_rng(0), np.arange(len(labels))
    draws = [error(rng.integers(0, len(labels), len(labels))) for _ in range(500)]
    chance = [error(every, rng.random(len(labels)) < probability) for _ in range(500)]
    value, high = error(every), float(np.quantile(draws, 0.975))
    low = min(2 * value - high, value - float(np.quantile(chance, 0.975)))
    found = Figure("ece", data, len(labels), value, low, high)
    if questions is not None:
        found = over_questions(found, questions, error)
    return found._replace(low=max(0.0, min(found.low, 2 * value - found.high)))


def figure_fields(figure: Figure) -> dict[str, Any]:
    """The figure as a card holds it: plain fields, four decimals, and of questions only where there are any."""
    fields = {key: round(value, 4) if isinstance(value, float) else value for key, value in figure._asdict().items()}
    return {key: value for key, value in fields.items() if value or key != "questions"}
