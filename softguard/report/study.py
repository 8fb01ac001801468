"""The report of a study: figures and tables as files, and a page about them."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from softguard.errors import SoftguardError
from softguard.files import check_file, check_folder, write_json, write_text
from softguard.report.exhibits import EXHIBITS, SOURCE, Exhibit, Line, Row, by_method, lines_of, named, runs_of, with_methods
from softguard.report.summary import Figure, figures, summary, table
from softguard.report.svg import Curve, Dot, Point, curves, dots, plane
from softguard.report.tradeoffs import AXES, TESTED, Comparison, Member, comparisons, front, standings
from softguard.study.table import NAME, join_tables, write_rows

_WORDS = {
    "safety": "safe answers",
    "over_refusal": "refusals of harmless prompts",
    "accuracy": "right answers",
    "token_tv": "token TV to the base",
}
_SHARES = ("harmbench", "best-rate", "trained-kind", "jailbreak", "judge", "over-refusal", "mmlu", "reasoning")  # of 100 %
_TIMES = ("time to first token", "decoding speed")
_PANELS = (
    ("loss", "Training loss, its two branches unweighted", "loss"),
    ("refuses", "Begins a refusal where the system refuses, validation", "share"),
    ("token_tv", "Token TV to the base, validation", "TV"),
)


class _Made(NamedTuple):
    """A part of the page, and the file of its figure."""

    title: str
    figure: str
    text: list[str]


def write_study(tables: Sequence[Path], suites: Sequence[str], folder: Path, page: Path) -> None:
    """Write figures (SVG), tables (CSV) and all cells as one Parquet table to `folder`, a summary beside it as
    `folder`.json, and `page` in Markdown.

    `tables`: of one run of the study, or of several that are joined. `suites`: those the Pareto sets count; none counts all.
    Raises SoftguardError if no cell is measured, or a suite was not, the tables do not belong together, or a path cannot be
    written.
    """
    folder, page = _places(folder, page)
    cells = join_tables(tables)
    rows = with_methods(cells)
    measured = [row for row in rows if row["metrics"] is not None]
    if not measured:
        raise SoftguardError(f"{tables[0]} has no measured cell yet; run the study further")
    known = {m["suite"] for row in measured for m in row["metrics"]}
    if missing := [suite for suite in suites if suite not in known]:
        raise SoftguardError(f"study.pareto names {missing[0]}, which was not measured; use some of {', '.join(sorted(known))}")
    write_rows(cells, folder / NAME)
    found = {exhibit: lines_of(exhibit, measured) for exhibit in EXHIBITS}
    write_text(folder / "exhibits.csv", _csv(Line._fields, (line for lines in found.values() for line in lines)))
    standing = standings(measured, suites)
    tested = comparisons(standing)
    write_text(folder / "tests.csv", _csv(Comparison._fields, tested))
    beside = figures(measured)
    write_json(folder.with_name(f"{folder.name}.json"), summary(measured, beside))

    parts = [made for axes in AXES for made in _front(axes, front(standing, axes), tested, folder)]
    parts += [_exhibit(exhibit, lines, folder) for exhibit, lines in found.items() if lines]
    parts += _curves(measured, folder)
    where, whole = (os.path.relpath(path, page.parent) for path in (folder, folder.with_name(f"{folder.name}.json")))
    text = [*_head(measured, suites, folder.name, where), *_beside(beside, whole)]
    for part in parts:
        text += [
            f"## {part.title}",
            "",
            f"![{part.title}]({where}/{part.figure})",
            "",
            *part.text,
            *([""] if part.text else []),
        ]
    text += [*_rates(rows), *_costs(measured)]
    write_text(page, "\n".join(text).rstrip() + "\n")


def report_plan(tables: Sequence[Path], suites: Sequence[str], folder: Path, page: Path) -> str:
    """What `write_study` would write; it is written elsewhere, and dropped.

    Raises SoftguardError as `write_study` does.
    """
    _places(folder, page)
    with TemporaryDirectory() as name:
        write_study(tables, suites, Path(name) / "report", Path(name) / "page.md")
    return f"study: would write figures and tables of {', '.join(map(str, tables))} to {folder} and {page}"


def _places(folder: Path, page: Path) -> tuple[Path, Path]:
    """Both paths, whole. Raises SoftguardError for one that cannot be written."""
    folder, page = folder.resolve(), page.resolve()
    if not folder.name:
        raise SoftguardError(f"{folder} has no name, by which the summary beside it is called; choose another --report")
    check_folder(folder, "--report")
    check_folder(folder.parent, "--report")
    check_folder(page.parent, "--page")
    check_file(folder.with_name(f"{folder.name}.json"))
    check_file(page)
    return folder, page


def _head(rows: Sequence[Row], suites: Sequence[str], name: str, where: str) -> list[str]:
    seeds = sorted({row["seed"] for row in rows})
    return [
        f"# Study: {name}",
        "",
        f"Written by `softguard study RECIPE --out … --report …` from [cells.parquet]({where}/cells.parquet), a row a cell. "
        f"Bases: {_listed(row['base'] for row in rows)}. Guard: {_listed(row['guard'] for row in rows)}. Judge: "
        f"{_listed(row['judge'] for row in rows)}. Seeds: {', '.join(map(str, seeds))}. Corpora drawn: "
        f"{_listed(row['corpus'] for row in rows)}.",
        "",
        "Ours: mean over seeds, with the outermost ends of the seeds' 95 % intervals over prompts and, of several seeds, the "
        f"least and the most. Published: {SOURCE}. They are of other models, guard and judge unless the names agree: compare "
        f"orders and gaps, not levels. All figures are in [exhibits.csv]({where}/exhibits.csv), all paired tests in "
        f"[tests.csv]({where}/tests.csv). The Pareto sets count {', '.join(suites) if suites else 'all suites of a measure'}. "
        "Right answers are those of likeliest choices; what the system or a gate refuses is wrong, but what another adapter "
        "refuses in words is not seen there.",
        "",
        *_runs(rows),
    ]


def _runs(rows: Sequence[Row]) -> list[str]:
    """What of several runs stands beside each other; nothing of one."""
    text = []
    if further := [run for run in runs_of(rows) if run.number > 1]:
        listed = ". ".join(f"{run.base}, run {run.number}: {named(run.rows, rows)}" for run in further)
        text.append(
            "Base and safe system are those of a base model's first run. In others, on another machine or in another "
            "precision, they answered some prompts otherwise; where that changes a figure of theirs, both are shown. Gaps, "
            f"changes and tests are taken beside each seed's own run. {listed}."
        )
    drawn = []
    for group in by_method(rows):
        by_corpus: dict[str, list[str]] = {}
        for row in group:
            by_corpus.setdefault(row["corpus"], []).append(str(row["seed"]))
        if len(by_corpus) > 1:
            seeds = "; ".join(f"{', '.join(seeds)}: {corpus}" for corpus, seeds in by_corpus.items())
            drawn.append(f"{group[0]['base']}, {group[0]['method']} ({seeds})")
    if drawn:
        text.append(f"Rows whose seeds are of several corpora: {'; '.join(drawn)}.")
    return [" ".join(text), ""] if text else []


def _beside(found: Sequence[Figure], whole: str) -> list[str]:
    return [
        "## Every row beside base and safe system",
        "",
        "Mean over seeds, with 95 % intervals over prompts and seeds (bootstrap of both; perplexity: the outermost ends of "
        f"the seeds'). These and all others, for programs: [{os.path.basename(whole)}]({whole}).",
        "",
        *table(found),
    ]


def _rates(rows: Sequence[Row]) -> list[str]:
    """Validation losses by learning rate at the first seed."""
    text = [
        "## Learning rates",
        "",
        "Validation loss of the row's own objective at its first seed; where several rates were tried, the one chosen in bold.",
        "",
    ]
    text += ["| base | row | validation loss by rate |", "| --- | --- | --- |"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["base"], row["method"]), []).append(row)
    for (base, method), group in groups.items():
        tried = [row for row in group if row["seed"] == group[0]["seed"] and row["validation_loss"] is not None]
        shown = [f"{row['learning_rate']:g}: {row['validation_loss']:.3f}" for row in tried]
        shown = [f"**{text}**" if row["chosen"] and len(tried) > 1 else text for row, text in zip(tried, shown, strict=True)]
        text.append(f"| {base} | {method} | {', '.join(shown)} |")
    return [*text, ""]


def _costs(rows: Sequence[Row]) -> list[str]:
    """What every row trains, and what it takes beside its base in the same run; runs may be of different machines."""
    text = [
        "## Cost",
        "",
        "Seconds of training (– where it was interrupted), milliseconds to the first token and tokens a second are of the "
        "first seed's run, the last two beside those of its base there. Runs are of different machines, which may have done "
        "other work: compare what a row takes over its base, not rows with each other, nor seconds of training.",
        "",
        "| base | row | numbers | steps | seconds of training | first token, ms | base's | over it | tokens/s | base's |",
        "|" + " --- |" * 10,
    ]
    for group in by_method(rows):
        trained = group[0]["train_seconds"]
        taken = {(c["system"], c["metric"]): c["value"] for c in group[0]["cost"]}
        first, speed = ([taken[name, metric] for name in ("distilled", "base")] for metric in _TIMES)
        text.append(
            f"| {group[0]['base']} | {group[0]['method']} | {group[0]['parameters']:,} | {group[0]['steps']} | "
            f"{'–' if trained is None else f'{trained:.0f}'} | {first[0]:.1f} | {first[1]:.1f} | {first[0] / first[1]:.2f} × | "
            f"{speed[0]:.1f} | {speed[1]:.1f} |"
        )
    return [*text, ""]


def _exhibit(exhibit: Exhibit, lines: Sequence[Line], folder: Path) -> _Made:
    digits = exhibit.digits
    groups: dict[str, list[Dot]] = {}
    text = [f"| | base | suite | method | {exhibit.unit} | over seeds | n | |", "|" + " --- |" * 8]
    for line in lines:
        ours = line.source == "ours"
        value = f"{line.value:.{digits}f}" if ours else f"{line.value:g}"
        group = groups.setdefault(f"{'' if ours else 'published: '}{line.base}, {line.suite}", [])
        group.append(Dot(line.method, line.value, line.low, line.high, value, not ours))
        interval = f" [{line.low:.{digits}f}, {line.high:.{digits}f}]" if line.n else ""
        spread = f"{line.least:.{digits}f} to {line.most:.{digits}f} ({line.seeds})" if line.seeds > 1 else ""
        text.append(
            f"| {line.source} | {line.base} | {line.suite} | {line.method} | {value}{interval} | {spread} | "
            f"{line.n or ''} | {line.note} |"
        )
    if not any(line.source == "ours" for line in lines):
        text = ["Not measured by this study.", "", *text]
    name = f"{exhibit.name}.svg"
    write_text(
        folder / name,
        dots(f"{exhibit.title} ({exhibit.unit})", list(groups.items()), 100 * (exhibit.name in _SHARES)),
    )
    return _Made(exhibit.title, name, text)


def _front(axes: tuple[str, str], members: Sequence[Member], tested: Sequence[Comparison], folder: Path) -> list[_Made]:
    """One figure a base model: who is on the Pareto set of a pair of measures, and by what the others are beaten."""
    p_values = {(t.base, t.measure, *pair): t.p_holm for t in tested for pair in ((t.first, t.second), (t.second, t.first))}
    made = []
    for base in dict.fromkeys(member.standing.base for member in members):
        own = [member for member in members if member.standing.base == base]
        title = f"{base}: {_WORDS[axes[0]]} and {_WORDS[axes[1]]}"
        name = f"pareto-{axes[1].replace('_', '-')}-{_file(base)}.svg"
        up, across = axes
        places = [
            Point(m.standing.method, 100 * m.standing.shares[across], 100 * m.standing.shares[up], m.on_front) for m in own
        ]
        write_text(folder / name, plane(title, f"{_WORDS[axes[1]]}, %", f"{_WORDS[axes[0]]}, %", places))
        text = [
            "Ringed: no other row is as good on both and better on one. The safe system is shown, but needs the guard. In "
            "brackets Holm-adjusted p-values of exact McNemar tests at the first seeds, of the measures in this order"
            f"{'' if across in TESTED else ' that are a hit or a miss a prompt'}.",
            "",
            f"| | {_WORDS[axes[0]]}, % | {_WORDS[axes[1]]}, % | on the Pareto set | beaten by |",
            "|" + " --- |" * 5,
        ]
        for member in own:
            method, shares = member.standing.method, [100 * member.standing.shares[axis] for axis in axes]
            beaten = [
                f"{other} ({', '.join(f'{p_values[base, axis, other, method]:.2g}' for axis in axes if axis in TESTED)})"
                for other in member.beaten_by
            ]
            on = "yes" if member.on_front else "no" if member.standing.learned else "–"
            text.append(f"| {method} | {shares[0]:.1f} | {shares[1]:.1f} | {on} | {'; '.join(beaten)} |")
        made.append(_Made(title, name, text))
    return made


def _curves(rows: Sequence[Row], folder: Path) -> list[_Made]:
    """Training of every row's first seed, by base model."""
    made = []
    for base in dict.fromkeys(row["base"] for row in rows):
        for field, title, unit in _PANELS:
            lines = [Curve(g[0]["method"], _course(g[0], field)) for g in by_method(rows) if g[0]["base"] == base]
            lines = [line for line in lines if line.points]
            if lines:
                name = f"training-{field.replace('_', '-')}-{_file(base)}.svg"
                write_text(folder / name, curves(f"{base}: {title}", "step", unit, lines))
                said = ["Published: from about 2.6 to about 0.5, with token-mean log-probabilities."] if field == "loss" else []
                made.append(_Made(f"{base}: {title}", name, said))
    return made


def _course(row: Row, field: str) -> tuple[tuple[float, float], ...]:
    kind = "train" if field == "loss" else "validation"
    values = [(e["step"], e["safe"] + e["refusal"] if field == "loss" else e[field]) for e in row["log"] if e["kind"] == kind]
    return tuple((float(step), float(value)) for step, value in values if value is not None and np.isfinite(value))


def _csv(fields: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)
    return text.getvalue()


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())
