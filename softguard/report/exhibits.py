"""What the paper shows in its figures and tables, as our rows beside the published ones.

The published figures lie in `data/published.csv`. They are of other models, guards and judges than ours unless the study's
recipe says otherwise: orders and gaps compare, levels do not.
"""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

SOURCE = "Alfarra et al., UAI 2026, arXiv 2606.09388; what the paper shows in plots is read off them, ±0.3"
SYSTEMS = {"base": "base", "safe_system": "safe system"}  # the others are called by their row
Row = Mapping[str, Any]  # of cells.parquet


class Exhibit(NamedTuple):
    """One figure or table; ours are those whose metric and suite match."""

    name: str
    title: str
    metric: str  # regular expression, of the whole
    suites: str  # regular expression, of a part
    unit: str = "%"


_WRAPPED = r"(?<![a-z])dan(?![a-z])|jailbreak|template|wrap"
_HARMBENCH = rf"^(?!.*({_WRAPPED})).*harmbench"
EXHIBITS = (
    Exhibit("harmbench", "Safe answers to HarmBench, by base model", "safety", _HARMBENCH),
    Exhibit("best-rate", "Safe answers by method, each at its own learning rate", "safety", rf"^harmful$|{_HARMBENCH}"),
    Exhibit("trained-kind", "Safe answers to held-out prompts of the kind trained on", "safety", r"^harmful$|beavertails"),
    Exhibit("jailbreak", "Safe answers to jailbreaks", "safety", _WRAPPED),
    Exhibit("judge", "Safe answers by another judge", r"safety by .*", rf"^harmful$|{_HARMBENCH}"),
    Exhibit("over-refusal", "Refusals of harmless prompts", "over_refusal", r""),
    Exhibit("mmlu", "MMLU", "accuracy", r"mmlu"),
    Exhibit("reasoning", "GSM8K and IFEval", "accuracy", r"gsm8k|ifeval"),
    Exhibit("compute", "Operations a token behind 512 others", "gflops_per_token", r"", "GFLOPs"),
    Exhibit("gap", "Safety gap between base and safe system that is closed", "gap_closed", r""),
    Exhibit("drift", "Distance from the base along its own answers, token TV", "token_tv", r""),
    Exhibit("perplexity", "Perplexity of the base's own answers", "perplexity_ratio", r"", "× the base's"),
    Exhibit("change", "Right answers, change from the base", "accuracy_change", r"", "% points"),
)


class Line(NamedTuple):
    """One figure of an exhibit, in its unit."""

    exhibit: str
    source: str  # "ours" or "published"
    base: str
    method: str
    suite: str
    value: float
    low: float  # outermost ends of the seeds' 95 % intervals over prompts; the value itself where none is known
    high: float
    least: float  # over seeds
    most: float
    n: int  # prompts; 0 for published figures
    seeds: int
    note: str = ""


def lines_of(exhibit: Exhibit, rows: Sequence[Row]) -> list[Line]:
    """Our lines and then the published ones; base and safe system stand first, once a base model."""
    lines = []
    for group in by_method(rows):
        if exhibit.metric == "gflops_per_token":
            lines += _compute(exhibit, group)
            continue
        for system in (*SYSTEMS, "distilled"):
            own = [m for m in group[0]["metrics"] if m["system"] == system and re.search(exhibit.suites, m["suite"].lower())]
            for m in own:
                if re.fullmatch(exhibit.metric, m["metric"]):
                    lines.append(_line(exhibit, group, system, m["suite"], m["metric"]))
    first: dict[tuple[str, ...], Line] = {}  # of base and system, which every row of the table repeats
    for line in lines:
        first.setdefault((line.base, line.suite, line.method, line.note), line)
    order = {method: place for place, method in enumerate(SYSTEMS.values())}
    ours = sorted(first.values(), key=lambda line: (line.base, line.suite, order.get(line.method, len(order))))
    return ours + [line for line in published() if line.exhibit == exhibit.name]


def by_method(rows: Iterable[Row]) -> list[list[Row]]:
    """The measured rows, those that differ in their seed alone together, by seed."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["metrics"] is not None:
            groups.setdefault((row["base"], row["row"], row["n_soft"]), []).append(row)
    return [sorted(group, key=lambda row: int(row["seed"])) for group in groups.values()]


def with_methods(rows: Sequence[Row]) -> list[Row]:
    """The rows with a field `method`: the row's name, and its length where the study has several."""
    lengths: dict[str, set[int]] = {}
    for row in rows:
        lengths.setdefault(row["row"], set()).add(row["n_soft"])
    return [
        {**row, "method": f"{row['row']}, length {row['n_soft']}" if len(lengths[row["row"]]) > 1 else row["row"]}
        for row in rows
    ]


def published() -> list[Line]:
    """The published figures."""
    text = (resources.files("softguard") / "data" / "published.csv").read_text(encoding="utf-8")
    return [
        _plain(r["exhibit"], "published", r["base"], r["method"], r["suite"], float(r["value"]), r["note"])
        for r in csv.DictReader(text.splitlines())
    ]


def metric_of(row: Row, system: str, suite: str, metric: str) -> Mapping[str, Any] | None:
    """One measured figure of a row of the table."""
    found: Mapping[str, Any] | None = next(
        (m for m in row["metrics"] if (m["system"], m["suite"], m["metric"]) == (system, suite, metric)), None
    )
    return found


def _line(exhibit: Exhibit, group: Sequence[Row], system: str, suite: str, metric: str) -> Line:
    """A mean over seeds, with the outermost ends of their intervals."""
    kept = group if system == "distilled" else group[:1]  # base and system do not depend on the seed
    found = [m for row in kept if (m := metric_of(row, system, suite, metric)) is not None]
    scale = 100 if exhibit.unit.startswith("%") else 1
    values = [scale * m["value"] for m in found]
    low, high = scale * min(m["low"] for m in found), scale * max(m["high"] for m in found)
    method = SYSTEMS.get(system) or group[0]["method"]
    ends = (low, high, min(values), max(values))
    return Line(
        exhibit.name, "ours", group[0]["base"], method, suite, float(np.mean(values)), *ends, found[0]["n"], len(found),
        "" if metric == exhibit.metric else metric,
    )  # fmt: skip


def _compute(exhibit: Exhibit, group: Sequence[Row]) -> list[Line]:
    lines = []
    for system, flops in group[0]["flops_per_token"].items():
        method = SYSTEMS.get(system) or group[0]["method"]
        lines.append(_plain(exhibit.name, "ours", group[0]["base"], method, "context 512", flops / 1e9))
    return lines


def _plain(exhibit: str, source: str, base: str, method: str, suite: str, value: float, note: str = "") -> Line:
    """A figure without prompts behind it."""
    return Line(exhibit, source, base, method, suite, value, value, value, value, value, 0, 1, note)
