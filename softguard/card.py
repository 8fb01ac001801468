"""Model cards: `card.json` beside fitted weights, and the measured figures, with intervals, that it holds."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from softguard.errors import SoftguardError
from softguard.files import read_json, write_file, write_json

Card = dict[str, Any]
Scores = Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def sha256(blob: bytes) -> str:
    """Hex digest of a file's content."""
    return hashlib.sha256(blob).hexdigest()


def read_card(folder: Path, form: str, version: int) -> Card:
    """The `card.json` of `folder`, checked against the weights beside it.

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
    return card


def write_with_card(folder: Path, card: Card, weights: bytes, limit: int) -> Card:
    """Write weights and card into `folder`, each beside its place and then renamed; returns the card as written.

    Raises SoftguardError if together they pass `limit` bytes.
    """
    card = {**card, "weights_sha256": sha256(weights)}
    size = len(weights) + len(json.dumps(card, indent=2, ensure_ascii=False).encode()) + 1
    if size > limit:
        raise SoftguardError(f"{folder} would hold {size:,} bytes, more than {limit:,}; lower the rank")
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


def auroc_figure(data: str, safe: Scores, bad: Sequence[bool] | Flags) -> Figure:
    """AUROC of p(safe) against `bad`, interval after DeLong et al. (1988) on the logit scale.

    `safe` and `bad` are (cases,). Classes that do not overlap have no variance to go by; but of m independent pairs, m the
    cases of the rarer one, all are in order then, whose probability is at most AUROC^m: hence a bound of 0.025^(1/m). Raises
    ValueError unless both classes are there.
    """
    scores, labels = -np.asarray(safe, float), np.asarray(bad, bool)
    high, low = scores[labels], scores[~labels]
    if not len(high) or not len(low):
        raise ValueError(f"{data}: AUROC needs both classes")
    order, reverse = np.sort(low), np.sort(high)
    above = (np.searchsorted(order, high, "left") + np.searchsorted(order, high, "right")) / (2 * len(low))
    below = (np.searchsorted(reverse, low, "left") + np.searchsorted(reverse, low, "right")) / (2 * len(high))
    area = float(above.mean())
    rarer = min(len(high), len(low))
    if area in (0, 1):
        bound = float(0.025 ** (1 / rarer))
        return Figure("auroc", data, len(labels), area, *((bound, 1.0) if area else (0.0, 1 - bound)))
    if rarer < 2:
        return Figure("auroc", data, len(labels), area, 0.0, 1.0)
    variance = above.var(ddof=1) / len(high) + below.var(ddof=1) / len(low)
    logit, spread = np.log(area / (1 - area)), 1.959964 * np.sqrt(variance) / (area * (1 - area))
    return Figure("auroc", data, len(labels), area, *(float(1 / (1 + np.exp(-logit - s * spread))) for s in (-1, 1)))


def share_figure(figure: str, data: str, hits: Sequence[bool] | Flags) -> Figure:
    """Share of true values in `hits` (cases,), with Wilson's interval (1927)."""
    from scipy.stats import binomtest

    count = int(np.sum(hits))
    interval = binomtest(count, len(hits)).proportion_ci(method="wilson")
    return Figure(figure, data, len(hits), count / len(hits), float(interval.low), float(interval.high))


def calibration_figure(data: str, safe: Scores, bad: Sequence[bool] | Flags, seed: int = 0) -> Figure:
    """Expected calibration error of p(safe), ten equal-width bins (Guo et al., 2017), percentile bootstrap interval.

    `safe` and `bad` are (cases,).
    """
    probability, labels = np.asarray(safe, float), ~np.asarray(bad, bool)

    def error(index: np.ndarray[Any, Any]) -> float:
        bins = np.minimum((probability[index] * 10).astype(int), 9)
        gaps = np.bincount(bins, probability[index] - labels[index], 10)
        return float(np.abs(gaps).sum() / len(index))

    rng = np.random.default_rng(seed)
    draws = [error(rng.integers(0, len(labels), len(labels))) for _ in range(500)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Figure("ece", data, len(labels), error(np.arange(len(labels))), float(low), float(high))


def figure_fields(figure: Figure) -> dict[str, Any]:
    """The figure as a card holds it: plain fields, four decimals."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in figure._asdict().items()}
