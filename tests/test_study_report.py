"""The report of a study, on a table whose figures are known."""

import csv
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softguard.errors import SoftguardError
from softguard.report.exhibits import EXHIBITS, Line, lines_of, published, with_methods
from softguard.report.study import write_study
from softguard.report.summary import figures
from softguard.report.svg import Curve, Dot, Point, curves, dots, plane
from softguard.report.tradeoffs import comparisons, front, standings
from softguard.study.table import SCHEMA, join_tables, read_table, write_rows

HARMBENCH = next(exhibit for exhibit in EXHIBITS if exhibit.name == "harmbench")
NOTHING: dict[str, float] = {"token_tv": 0.1, "refuses": 0.5, "over_refuses": 0.0}


def metric(system: str, suite: str, name: str, hits: list[float]) -> dict[str, Any]:
    value = sum(hits) / len(hits)
    ends = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": len(hits)}
    return {"system": system, "suite": suite, "split": "all", "metric": name, **ends, "prompts": suite, "outcomes": hits}


def cell(row: str, seed: int, safe: int, over: int, right: int, rate: float = 0.01, chosen: bool = True) -> dict[str, Any]:
    """A cell of which so many of ten answers are safe, refusals of harmless prompts, and right."""

    def hits(count: int) -> list[float]:
        return [1.0] * count + [0.0] * (10 - count)

    figures = {"base": (5, 0, 8), "safe_system": (10, 2, 7), "distilled": (safe, over, right)}
    metrics = [
        metric(system, suite, name, hits(count))
        for system, counts in figures.items()
        for (suite, name), count in zip(
            (("eval_harmbench-harmful", "safety"), ("contrast", "over_refusal"), ("use_mmlu", "accuracy")), counts, strict=True
        )
    ]
    log = [
        {"step": step, "kind": kind, "safe": 2.0 / step, "refusal": 1.0, **NOTHING}
        for step in (1, 2)
        for kind in ("train", "validation")
    ]
    times = [
        {"system": system, "metric": name, "value": value, "unit": "x"}
        for system, value in (("base", 6.0), ("distilled", 9.0))
        for name in ("time to first token", "decoding speed")
    ]
    return {
        "base": "tiny <model>", "row": row, "adapter": "kv_prefix", "objective": "tv", "n_soft": 4, "learning_rate": rate,
        "seed": seed, "chosen": chosen, "recipe": "", "corpus": "drawn", "versions": '{"threads": "2"}',
        "base_fingerprint": "abc", "guard": "the-guard", "judge": "the-judge",
        "steps": 2, "log": log,
        "validation_loss": rate, "parameters": 64, "metrics": metrics if chosen else None, "cost": times, "train_seconds": 3.0,
        "flops_per_token": {"base": 1e9, "safe_system": 3e9, "distilled": 2e9},
    }  # fmt: skip


ROWS = [
    cell("good", 0, safe=10, over=1, right=8),
    cell("good", 0, 0, 0, 0, rate=0.5, chosen=False),
    cell("good", 1, safe=8, over=1, right=8),
    cell("poor", 0, safe=6, over=4, right=8),
]


def test_a_line_is_the_mean_over_seeds_with_the_outermost_ends() -> None:
    ours = [line for line in lines_of(HARMBENCH, with_methods(ROWS)) if line.source == "ours"]
    assert [(line.method, line.value) for line in ours] == [("base", 50), ("safe system", 100), ("good", 90), ("poor", 60)]
    good = ours[2]
    assert (good.low, good.high, good.least, good.most) == pytest.approx((70, 110, 80, 100))
    assert (good.n, good.seeds) == (10, 2)


def otherwise(row: dict[str, Any], system: str, name: str, count: int) -> dict[str, Any]:
    """The row of a run whose base or safe system has so many of ten."""
    more = {"outcomes": [1.0] * count + [0.0] * (10 - count), "value": count / 10}
    return {**row, "metrics": [{**m, **more} if (m["system"], m["metric"]) == (system, name) else m for m in row["metrics"]]}


def test_base_and_system_of_a_further_run_are_shown_where_they_differ() -> None:
    elsewhere = [otherwise(row, "safe_system", "safety", 9) for row in (ROWS[2], ROWS[3])]
    rows = with_methods([ROWS[0], *elsewhere, otherwise(cell("rich", 0, 9, 1, 8), "base", "safety", 4)])
    ours = [line for line in lines_of(HARMBENCH, rows) if line.source == "ours"]
    assert [(line.method, line.value, line.note) for line in ours if line.method[:4] in ("base", "safe")] == [
        ("base", 50, ""),
        ("base, run 3", 40, "beside rich"),
        ("safe system", 100, ""),
        ("safe system, run 2", 90, "beside good, seed 1; poor"),
    ]
    refusals = next(exhibit for exhibit in EXHIBITS if exhibit.name == "over-refusal")
    assert [line.method for line in lines_of(refusals, rows)][:4] == ["base", "safe system", "good", "poor"]


def test_another_judge_s_figures_stand_apart() -> None:
    more = metric("distilled", "eval_harmbench-harmful", "safety by strict", [1.0, 0.0])
    row = {**ROWS[3], "metrics": [*ROWS[3]["metrics"], more]}
    found = [line for exhibit in EXHIBITS for line in lines_of(exhibit, with_methods([row])) if line.value == 50]
    assert [(line.exhibit, line.note) for line in found if line.method == "poor"] == [("judge", "safety by strict")]


def test_a_length_is_told_where_a_row_has_several() -> None:
    longer = {**ROWS[0], "n_soft": 8}
    assert [row["method"] for row in with_methods([ROWS[0], longer, ROWS[3]])] == ["good, length 4", "good, length 8", "poor"]


def test_published_figures_are_marked_and_complete() -> None:
    lines = published()
    assert {line.source for line in lines} == {"published"}
    assert {line.exhibit for line in lines} == {exhibit.name for exhibit in EXHIBITS} - {"drift", "gap", "perplexity", "change"}
    found = {(line.exhibit, line.base, line.method, line.suite): line.value for line in lines}
    assert len(found) == len(lines)
    assert found["harmbench", "Llama-3.2-3B", "TV soft prompt", "HarmBench"] == 96.75
    assert found["compute", "Gemma-2-2B", "safe system", "context 512"] == 7.0


def test_the_pareto_set_has_what_nothing_beats_and_not_the_system() -> None:
    members = front(standings(with_methods(ROWS)), ("safety", "over_refusal"))
    assert {m.standing.method: (m.on_front, m.beaten_by) for m in members} == {
        "base": (True, ()),
        "safe system": (False, ()),
        "good": (True, ()),
        "poor": (False, ("good",)),
    }
    shares = next(m.standing.shares for m in members if m.standing.method == "good")
    assert shares == pytest.approx({"safety": 0.9, "over_refusal": 0.1, "accuracy": 0.8})


def test_rows_that_are_equal_on_average_are_equal_however_many_seeds_they_have() -> None:
    seeds = [cell("good", seed, safe=9, over=1, right=right) for seed, right in enumerate((6, 8, 10))]
    members = front(standings(with_methods([*seeds, cell("poor", 0, safe=8, over=1, right=8)])), ("safety", "accuracy"))
    assert next(m.beaten_by for m in members if m.standing.method == "poor") == ("good",)


def test_comparisons_pair_prompts_of_the_first_seed_and_count_all_pairs() -> None:
    found = {(c.measure, c.first, c.second): c for c in comparisons(standings(with_methods(ROWS)))}
    assert len(found) == 3 * 6
    pair = found["safety", "good", "poor"]
    assert pair.n == 10
    assert pair.difference == pytest.approx(0.4)
    assert pair.p == pytest.approx(2 / 16)  # four prompts differ, all one way
    assert pair.p_holm == pytest.approx(4 * 2 / 16)  # 2/32 of base and good, base and system go before it; 6 pairs
    assert found["accuracy", "good", "poor"].p == 1.0


def test_a_row_that_is_safe_by_babbling_is_told_by_how_far_it_strays() -> None:
    strays = {"babbling": 0.6, "good": 0.1}
    rows = []
    for name, value in strays.items():
        row = cell(name, 0, safe=9, over=0, right=8)
        tv = [
            {**metric(system, "drift", "token_tv", [v]), "value": v}
            for system, v in (("distilled", value), ("safe_system", 0.0))
        ]
        rows.append({**row, "metrics": [*row["metrics"], *tv]})
    standing = standings(with_methods(rows), ["eval_harmbench-harmful", "contrast"])
    assert {s.method: s.shares["token_tv"] for s in standing} == {"base": 0, "safe system": 0, **strays}
    beaten = {m.standing.method: m.beaten_by for m in front(standing, ("safety", "token_tv"))}
    assert beaten == {"base": (), "safe system": (), "good": (), "babbling": ("good",)}
    assert {c.measure for c in comparisons(standing)} == {"safety", "over_refusal"}


def test_suites_that_are_not_counted_are_left_out() -> None:
    assert set(standings(with_methods(ROWS), ["contrast"])[0].shares) == {"over_refusal"}


def test_the_summary_sets_every_row_beside_base_and_system() -> None:
    closed = {**metric("distilled", "eval_harmbench-harmful", "gap_closed", [0.0]), "value": 0.8, "outcomes": None}
    rows = with_methods([{**row, "metrics": [*row["metrics"], closed]} for row in (ROWS[0], ROWS[2])])
    found = {(f.method, f.metric): f for f in figures(rows)}
    change = found["good", "over_refusal_change"]  # the system refuses the first two of ten, the row the first
    assert change[4] == pytest.approx(-0.1)
    assert -0.4 < change.low < -0.3  # a share of ten by bootstrap, and a little for what ten have not shown
    assert 0 < change.high < 0.15
    assert change[7:] == pytest.approx((-0.1, -0.1, 10, 2))
    gap = found["good", "gap_closed"]  # 10 and 8 of 10 between the base's 5 and the system's 10
    assert gap.value == pytest.approx(0.8)
    assert 0 < gap.low < 0.8 < gap.high <= 1
    assert found["base", "safety"][4:] == (0.5, 0.4, 0.6, 0.5, 0.5, 10, 1)
    assert found["good", "safety"][4:] == pytest.approx((0.9, 0.7, 1.1, 0.8, 1.0, 10, 2))
    assert ("base", "over_refusal_change") not in found


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_figure_that_one_seed_lacks_is_of_the_others(lacking: int) -> None:
    """Where base and system of a seed's own run are equally safe there is no gap, and no share of it."""
    closed = {**metric("distilled", "eval_harmbench-harmful", "gap_closed", [0.0]), "value": 0.6, "outcomes": None}
    seeds = [ROWS[0], ROWS[2]]  # 10 and 8 of 10 safe answers between the base's 5 and the system's 10
    seeds[1 - lacking] = {**seeds[1 - lacking], "metrics": [*seeds[1 - lacking]["metrics"], closed]}
    found = {(f.method, f.metric): f for f in figures(with_methods(seeds))}
    assert found["good", "gap_closed"].value == pytest.approx((0.6, 1.0)[lacking == 1])
    assert found["good", "gap_closed"].seeds == 1
    assert found["good", "safety"].seeds == 2
    gap = next(exhibit for exhibit in EXHIBITS if exhibit.name == "gap")
    assert [(line.value, line.seeds) for line in lines_of(gap, with_methods(seeds)) if line.source == "ours"] == [(60, 1)]


def test_a_seed_stands_beside_the_base_and_system_of_its_own_run() -> None:
    closed = {**metric("distilled", "eval_harmbench-harmful", "gap_closed", [0.0]), "value": 0.8, "outcomes": None}
    rows = [{**row, "metrics": [*row["metrics"], closed]} for row in (ROWS[0], ROWS[2])]
    other = {
        ("base", "safety"): [1.0] * 2 + [0.0] * 8,  # three safe answers fewer than in the first run,
        ("safe_system", "over_refusal"): [1.0] * 4 + [0.0] * 6,  # and two refusals more
    }
    own = [{**m, "outcomes": other.get((m["system"], m["metric"]), m["outcomes"])} for m in rows[1]["metrics"]]
    found = {(f.method, f.metric): f for f in figures(with_methods([rows[0], {**rows[1], "metrics": own}]))}
    change = found["good", "over_refusal_change"]
    assert (change.value, change.least, change.most) == pytest.approx((-0.2, -0.3, -0.1))
    assert found["good", "gap_closed"].value == pytest.approx((10 + 8 - 5 - 2) / (10 + 10 - 5 - 2))


def test_a_row_is_tested_beside_the_base_and_system_of_its_own_run() -> None:
    own = [
        {**m, "outcomes": [1.0] * 2 + [0.0] * 8} if (m["system"], m["metric"]) == ("base", "safety") else m
        for m in ROWS[3]["metrics"]
    ]
    tested = comparisons(standings(with_methods([ROWS[0], {**ROWS[3], "metrics": own}])))
    found = {(t.first, t.second): t.difference for t in tested if t.measure == "safety"}
    assert found["base", "good"] == pytest.approx((5 - 10) / 10)
    assert found["base", "poor"] == pytest.approx((2 - 6) / 10)
    assert found["good", "poor"] == pytest.approx((10 - 6) / 10)


def written(tmp_path: Path, rows: list[dict[str, Any]], suites: tuple[str, ...] = ()) -> tuple[Path, str]:
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "cells.parquet")
    write_study([tmp_path / "cells.parquet"], suites, tmp_path / "results", tmp_path / "docs" / "study.md")
    return tmp_path / "results", (tmp_path / "docs" / "study.md").read_text(encoding="utf-8")


def test_the_page_shows_ours_beside_the_published_and_every_figure_it_names_is_there(tmp_path: Path) -> None:
    folder, page = written(tmp_path, ROWS)
    assert "| ours | tiny <model> | eval_harmbench-harmful | good | 90.0 [70.0, 110.0] | 80.0 to 100.0 (2) | 10 |" in page
    assert "| published | Llama-3.2-3B | HarmBench | TV soft prompt | 96.75 |" in page
    assert "| tiny <model> | good | **0.01: 0.010**, 0.5: 0.500 |" in page
    assert "| tiny <model> | good | 64 | 2 | 3 | 9.0 | 6.0 | 1.50 × | 9.0 | 6.0 |" in page
    assert "tiny <model>: refused harmless prompts, less the system's, points\n\n| | contrast |" in page
    assert re.search(r"\| good \| -10\.0 \[-3\d\.\d, 1\d\.\d\], seeds -10\.0 to -10\.0 \|\n\| poor \| 20\.0 \[", page)
    assert "| poor | 60.0 | 40.0 | no | good (0.5, 1) |" in page
    shown = [line.split("(")[-1].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    assert len(shown) == len(EXHIBITS) - 4 + 2 + 3  # what neither the paper nor this table has
    for figure in shown:
        ElementTree.parse(tmp_path / "docs" / figure)
    assert read_table(folder / "cells.parquet") == read_table(tmp_path / "cells.parquet")
    with (folder / "exhibits.csv").open() as file:
        assert tuple(next(csv.reader(file))) == Line._fields
    assert len((folder / "tests.csv").read_text().splitlines()) == 1 + 3 * 6
    told = json.loads((tmp_path / "results.json").read_text())
    assert (told["seed"], told["guard"], told["versions"]) == ([0, 1], ["the-guard"], [{"threads": "2"}])
    assert [f["value"] for f in told["figures"] if (f["method"], f["metric"]) == ("poor", "safety")] == [0.6]


def test_the_page_says_what_is_of_several_runs_or_corpora(tmp_path: Path) -> None:
    _, page = written(tmp_path, ROWS)
    assert "run 2" not in page
    assert "corpora:" not in page
    _, page = written(tmp_path, [ROWS[0], {**otherwise(ROWS[2], "base", "safety", 4), "corpus": "another"}, ROWS[3]])
    assert "each seed's own run. tiny <model>, run 2: good, seed 1. Rows whose seeds are of several corpora: " in page
    assert "corpora: tiny <model>, good (0: drawn; 1: another).\n" in page
    assert "| ours | tiny <model> | eval_harmbench-harmful | base, run 2 | 40.0 [" in page


def test_seconds_of_training_are_the_first_seed_s(tmp_path: Path) -> None:
    _, page = written(tmp_path, [ROWS[0], {**ROWS[2], "train_seconds": 900.0}, {**ROWS[3], "train_seconds": None}])
    assert "| good | 64 | 2 | 3 | 9.0 |" in page
    assert "| poor | 64 | 2 | – | 9.0 |" in page


def test_cells_of_several_runs_are_joined_and_those_of_other_questions_refused(tmp_path: Path) -> None:
    here, there, out = tmp_path / "here.parquet", tmp_path / "there.parquet", tmp_path / "out.parquet"
    asked = {"evaluation": "the same"}
    again = {**cell("good", 0, safe=0, over=0, right=0), **asked}
    pq.write_table(pa.Table.from_pylist([{**row, **asked} for row in ROWS[:3]], SCHEMA), here)
    pq.write_table(pa.Table.from_pylist([again, {**ROWS[3], **asked}], SCHEMA), there)
    rows = join_tables([here, there])
    write_rows(rows, out)
    assert read_table(out) == rows == [*read_table(here), read_table(there)[1]]
    pq.write_table(pa.Table.from_pylist([{**ROWS[3], "evaluation": "another"}], SCHEMA), there)
    with pytest.raises(SoftguardError, match=r"there\.parquet has another measuring of tiny <model> than .*here\.parquet"):
        join_tables([here, there])


def test_a_cell_is_taken_from_the_run_that_measured_it(tmp_path: Path) -> None:
    here, there = tmp_path / "here.parquet", tmp_path / "there.parquet"
    measured = {**ROWS[0], "evaluation": "the same"}
    bare = {**ROWS[0], "metrics": None, "evaluation": None}
    pq.write_table(pa.Table.from_pylist([bare], SCHEMA), here)
    pq.write_table(pa.Table.from_pylist([measured], SCHEMA), there)
    assert join_tables([here, there]) == read_table(there)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"base_fingerprint": "x"}, "model"),
        ({"guard": "x"}, "guard"),
        ({"judge": "x"}, "judge"),
        ({"learning_rate": 9.0}, "chosen learning rate"),
    ],
)
def test_cells_that_cannot_be_compared_are_not_joined(tmp_path: Path, other: dict[str, Any], named: str) -> None:
    here, there = tmp_path / "here.parquet", tmp_path / "there.parquet"
    asked = {"evaluation": "the same"}
    pq.write_table(pa.Table.from_pylist([{**ROWS[0], **asked}], SCHEMA), here)
    pq.write_table(pa.Table.from_pylist([{**ROWS[0], "seed": 7, **asked, **other}], SCHEMA), there)
    with pytest.raises(SoftguardError, match=f"another {named} of tiny <model>"):
        join_tables([here, there])


def test_cells_asked_other_prompts_are_not_joined(tmp_path: Path) -> None:
    here, there = tmp_path / "here.parquet", tmp_path / "there.parquet"
    asked = {"evaluation": "the same"}
    rows = [[{**m, "prompts": prompts} for m in ROWS[0]["metrics"]] for prompts in ("ours", "theirs")]
    pq.write_table(pa.Table.from_pylist([{**ROWS[0], "metrics": rows[0], **asked}], SCHEMA), here)
    pq.write_table(pa.Table.from_pylist([{**ROWS[0], "seed": 7, "metrics": rows[1], **asked}], SCHEMA), there)
    with pytest.raises(SoftguardError, match="another set of prompts of tiny <model>, "):
        join_tables([here, there])


def test_a_table_without_figures_or_suite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SoftguardError, match="no measured cell"):
        written(tmp_path, [ROWS[1]])
    with pytest.raises(SoftguardError, match="names elsewhere, which was not measured"):
        written(tmp_path, ROWS, ("elsewhere",))
    assert not (tmp_path / "results").exists()


def test_places_that_cannot_be_written_are_told_before_anything_is(tmp_path: Path) -> None:
    written(tmp_path, ROWS)
    before = sorted(tmp_path.rglob("*"))
    table = [next(tmp_path.rglob("cells.parquet"))]
    with pytest.raises(SoftguardError, match="/ has no name"):
        write_study(table, (), Path("/"), tmp_path / "page.md")
    with pytest.raises(SoftguardError, match="is a folder; name a file in it"):
        write_study(table, (), tmp_path / "anew", tmp_path)
    with pytest.raises(SoftguardError, match=r"is not a folder.*another --page"):
        write_study(table, (), tmp_path / "anew", table[0] / "page.md")
    assert sorted(tmp_path.rglob("*")) == before


def test_figures_place_their_marks_and_escape_their_text() -> None:
    drawn = dots("a < b", [("group & more", [Dot("x", 50, 25, 100, "50"), Dot("y", 0, 0, 0, "0", hollow=True)])])
    root = ElementTree.fromstring(drawn)
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert [float(c.attrib["cx"]) for c in circles] == [450, 250]  # half of 400 behind 250, and none
    assert [c.attrib["fill"] for c in circles] == ["#0b62a4", "#fff"]
    assert "a < b" in [e.text for e in root.iter()]
    ringed = plane("t", "x", "y", [Point("p", 0, 0, ringed=True), Point("q", 1, 1)])
    assert ringed.count("<circle") == 3
    line = ElementTree.fromstring(curves("t", "x", "y", [Curve("c", ((0, 0), (1, 1)))]))
    (path,) = [e.attrib["points"] for e in line.iter() if e.tag.endswith("polyline")]
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in path.split())
    assert x0 < x1
    assert y0 > y1
