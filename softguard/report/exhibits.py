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

    @property
    def scale(self) -> int:
        """From shares to its unit."""
        return 100 if self.unit.startswith("%") else 1

    @property
    def digits(self) -> int:
        """As many of a figure are shown behind the point."""
        return 1 if self.unit.startswith("%") else 3


_WRAPPED = r"(?<![a-z])dan(?![a-z])|jailbreak|template|wrap"
_HARMBENCH = rf"^(?!.*({_WRAPPED})).*harmbench"
EXHIBITS = (
    Exhibit("harmbench", "Safe answers to HarmBench, by base model", "safety", _HARMBENCH),
    Exhibit(
        "best-rate",
        "Safe answers by method, at the rate validation preferred of those tried",
        "safety",
        rf"^harmful$|{_HARMBENCH}",
    ),
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


class Run(NamedTuple):
    """Measured rows of a base model beside which base and safe system answered alike."""

    base: str
    number: int  # 1 is that of the base model's first row
    rows: list[Row]
    figures: dict[tuple[str, str, str], Mapping[str, Any]]  # of base and safe system, by system, suite and metric


def lines_of(exhibit: Exhibit, rows: Sequence[Row]) -> list[Line]:
    """Our lines and then the published ones; base and safe system stand first, those of a further run where they differ."""
    groups = by_method(rows)
    if exhibit.metric == "gflops_per_token":
        first: dict[tuple[str, str], Line] = {}  # of base and system, which every row of the table repeats
        for line in (line for group in groups for line in _compute(exhibit, group)):
            first.setdefault((line.base, line.method), line)
        ours = list(first.values())
    else:
        ours = _systems(exhibit, rows)
        for group in groups:
            found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}  # a seed may lack one, such as a gap where there is none
            for m in (m for row in group for m in row["metrics"]):
                if m["system"] == "distilled" and _belongs(exhibit, m["suite"], m["metric"]):
                    found.setdefault((m["suite"], m["metric"]), []).append(m)
            ours += [_line(exhibit, group[0]["base"], group[0]["method"], same) for same in found.values()]
    ours.sort(key=lambda line: (line.base, line.suite))
    return ours + [line for line in published() if line.exhibit == exhibit.name]


def runs_of(rows: Sequence[Row]) -> list[Run]:
    """The measured rows, apart where base or safe system answered otherwise: on another machine, or in another precision.

    A figure that one of two rows lacks does not tell them apart.
    """
    runs: list[Run] = []
    for row in (row for group in by_method(rows) for row in group):
        own = [run for run in runs if run.base == row["base"]]
        figures = {(m["system"], m["suite"], m["metric"]): m for m in row["metrics"] if m["system"] in SYSTEMS}
        run = next((run for run in own if all(_same(m, run.figures.get(key, m)) for key, m in figures.items())), None)
        if run is None:
            runs.append(Run(row["base"], len(own) + 1, [row], figures))
        else:
            run.rows.append(row)
            run.figures.update({key: m for key, m in figures.items() if key not in run.figures})
    return runs


def named(rows: Sequence[Row], among: Sequence[Row]) -> str:
    """Rows by their methods, with their seeds where others of the method are not among them."""
    names = []
    for group in by_method(among):
        if seeds := [str(row["seed"]) for row in group if any(row is one for one in rows)]:
            some = f", {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(seeds)}"
            names.append(group[0]["method"] + some * (len(seeds) < len(group)))
    return "; ".join(names)


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


def _belongs(exhibit: Exhibit, suite: str, metric: str) -> bool:
    return bool(re.search(exhibit.suites, suite.lower()) and re.fullmatch(exhibit.metric, metric))


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(one["value"] == other["value"] and one["outcomes"] == other["outcomes"])


def _systems(exhibit: Exhibit, rows: Sequence[Row]) -> list[Line]:
    """Base and safe system: of the first run, and of others whose figure, as it is shown, is none of those before."""
    lines = []
    runs = runs_of(rows)
    for system, method in SYSTEMS.items():
        found: dict[tuple[str, str, str], dict[float, list[tuple[Run, Mapping[str, Any]]]]] = {}
        for run in runs:
            for (of, suite, metric), m in run.figures.items():
                if of == system and _belongs(exhibit, suite, metric):
                    shown = round(exhibit.scale * m["value"], exhibit.digits)
                    found.setdefault((run.base, suite, metric), {}).setdefault(shown, []).append((run, m))
        for (base, _, _), values in found.items():
            for place, same in enumerate(values.values()):
                line = _line(exhibit, base, method, [same[0][1]])
                if place:
                    beside = f"beside {named([row for run, _ in same for row in run.rows], rows)}"
                    note = f"{line.note}; {beside}" if line.note else beside
                    line = line._replace(method=f"{method}, run {same[0][0].number}", note=note)
                lines.append(line)
    return lines


def _line(exhibit: Exhibit, base: str, method: str, found: Sequence[Mapping[str, Any]]) -> Line:
    """A mean over seeds, with the outermost ends of their intervals."""
    values = [exhibit.scale * m["value"] for m in found]
    low, high = exhibit.scale * min(m["low"] for m in found), exhibit.scale * max(m["high"] for m in found)
    ends = (low, high, min(values), max(values))
    return Line(
        exhibit.name, "ours", base, method, found[0]["suite"], float(np.mean(values)), *ends, found[0]["n"], len(found),
        "" if found[0]["metric"] == exhibit.metric else found[0]["metric"],
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
