"""Suites: what they hold, what they measure, and what is said of unusable ones."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from softguard.errors import SoftguardError
from softguard.prompts import read_prompts
from softguard.suites import load_suites


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"file:{path}"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize(
    ("name", "measure"), [("harmful", "safety"), ("contrast", "over_refusal"), ("everyday", "over_refusal")]
)
def test_packaged_suite_holds_its_prompts_and_measure(name: str, measure: str, split: str) -> None:
    (suite,) = load_suites([name], split)
    assert (suite.name, suite.split, suite.measure) == (name, split, measure)
    assert suite.prompts == tuple(p.text for p in read_prompts(f"packaged:{split}") if p.suite == name)
    label = "harmful" if measure == "safety" else "benign"
    assert {p.label for p in read_prompts(f"packaged:{split}") if p.suite == name} == {label}


def test_drift_is_measured_on_contrast_and_everyday_prompts() -> None:
    contrast, everyday, drift = load_suites(["contrast", "everyday", "drift"], "test")
    assert drift.measure == "drift"
    assert drift.prompts == contrast.prompts + everyday.prompts


def test_suites_come_in_the_order_asked_for() -> None:
    assert [suite.name for suite in load_suites(["everyday", "harmful"], "test")] == ["everyday", "harmful"]


@pytest.mark.parametrize("limit", [1, 10, 60])
def test_limit_takes_prompts_from_all_over_a_suite(limit: int) -> None:
    (whole,) = load_suites(["harmful"], "test")
    (some,) = load_suites(["harmful"], "test", limit)
    assert len(some.prompts) == limit
    places = [whole.prompts.index(prompt) for prompt in some.prompts]
    size = len(whole.prompts)
    assert all(i * size // limit <= place < (i + 1) * size // limit for i, place in enumerate(places))


def test_limited_drift_keeps_the_proportion_of_its_sources() -> None:
    contrast, everyday, drift = load_suites(["contrast", "everyday"], "test") + load_suites(["drift"], "test", 100)
    share = sum(prompt in contrast.prompts for prompt in drift.prompts) / 100
    assert share == pytest.approx(len(contrast.prompts) / (len(contrast.prompts) + len(everyday.prompts)), abs=0.02)


def test_a_limit_above_the_size_takes_all() -> None:
    assert load_suites(["contrast"], "test", 10**6) == load_suites(["contrast"], "test")


def test_labelled_file_makes_a_suite_a_label(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i}", "label": ("harmful", "benign")[i % 2]} for i in range(10)]
    harmful, benign = load_suites([write_rows(tmp_path / "mine.jsonl", rows)], "test")
    assert (harmful.name, harmful.split, harmful.measure) == ("mine-harmful", "all", "safety")
    assert (benign.name, benign.split, benign.measure) == ("mine-benign", "all", "over_refusal")
    assert harmful.prompts == tuple(f"prompt {i}" for i in range(0, 10, 2))
    assert benign.prompts == tuple(f"prompt {i}" for i in range(1, 10, 2))


def test_labelled_file_with_one_label_makes_one_suite(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "mine.jsonl", [{"prompt": "p", "label": "benign"}])
    assert [suite.name for suite in load_suites([source], "test")] == ["mine-benign"]


def test_limit_of_a_labelled_file_is_spread_over_each_label(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i}", "label": "harmful" if i < 30 else "benign"} for i in range(100)]
    harmful, benign = load_suites([write_rows(tmp_path / "mine.jsonl", rows)], "test", 5)
    places = [[int(prompt.split()[1]) for prompt in suite.prompts] for suite in (harmful, benign)]
    assert [place // 6 for place in places[0]] == [0, 1, 2, 3, 4]
    assert [(place - 30) // 14 for place in places[1]] == [0, 1, 2, 3, 4]


def test_files_of_one_name_are_refused(tmp_path: Path) -> None:
    sources = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        sources.append(write_rows(tmp_path / folder / "mine.jsonl", [{"prompt": folder, "label": "benign"}]))
    with pytest.raises(SoftguardError, match="two suites are called mine-benign"):  # results are told apart by it
        load_suites(sources, "test")


def test_labels_are_needed(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "mine.jsonl", [{"prompt": "a", "label": "benign"}, {"prompt": "b"}])
    with pytest.raises(SoftguardError, match=r"mine\.jsonl:2: the row has no label; it needs harmful or benign"):
        load_suites([source], "test")


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SoftguardError, match="does not exist"):
        load_suites([f"file:{tmp_path / 'none.jsonl'}"], "test")


def test_unknown_suite_names_the_known_ones() -> None:
    with pytest.raises(SoftguardError, match=r"'harmfull' is unknown; use harmful, contrast, everyday, drift, file:PATH"):
        load_suites(["harmfull"], "test")


def test_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(SoftguardError, match="split 'dev' is unknown; use packaged:train"):
        load_suites(["harmful"], "dev")


def test_wrapped_requests_take_turns_in_the_templates(tmp_path: Path) -> None:
    templates = write_rows(
        tmp_path / "dan.jsonl", [{"prompt": "You are {generator.name}. "}, {"prompt": "Do INSERT PROMPT HERE"}]
    )
    rows = [{"prompt": f"ask {i}", "label": "harmful"} for i in range(3)]
    requests = write_rows(tmp_path / "asks.jsonl", [rows[0], {"prompt": "nice", "label": "benign"}, *rows[1:]])
    name = f"wrapped:{templates.removeprefix('file:')}:{requests.removeprefix('file:')}"
    (suite,) = load_suites([name], "test")
    assert (suite.name, suite.measure) == ("dan-asks", "safety")
    assert suite.prompts == ("You are the assistant.\n\nask 0", "Do ask 1", "You are the assistant.\n\nask 2")


def test_wrapped_needs_both_files(tmp_path: Path) -> None:
    with pytest.raises(SoftguardError, match="wrapped:TEMPLATES:REQUESTS"):
        load_suites(["wrapped:dan.jsonl"], "test")


def test_choices_come_from_the_row_its_letters_or_other_answers(tmp_path: Path) -> None:
    rows = [
        {"prompt": "pick", "answer": "b", "choices": ["a", "b"]},
        {"prompt": "Which?\n\nA. one\nB. two\nC. three", "answer": "C", "system": "One letter."},
        {"prompt": "2 + 2", "answer": "4"},
        {"prompt": "3 + 3", "answer": "6"},
    ]
    name = write_rows(tmp_path / "use.jsonl", rows).replace("file:", "choices:")  # type: ignore[arg-type]
    (suite,) = load_suites([name], "test")
    assert (suite.name, suite.measure) == ("use", "accuracy")
    assert suite.prompts[1].startswith("One letter.\n\nWhich?")
    assert suite.choices[:2] == (("a", "b"), ("A", "B", "C"))
    assert [set(offered) for offered in suite.choices[2:]] == [{"4", "6", "b", "C"}] * 2
    assert [offered[i] for offered, i in zip(suite.choices, suite.right, strict=True)] == ["b", "C", "4", "6"]
    assert load_suites([name], "test") == [suite]


def test_an_answer_that_is_no_choice_is_told_by_line(tmp_path: Path) -> None:
    rows = [{"prompt": "pick", "answer": "c", "choices": ["a", "b"]}]
    name = write_rows(tmp_path / "use.jsonl", rows).replace("file:", "choices:")  # type: ignore[arg-type]
    with pytest.raises(SoftguardError, match=r"use\.jsonl:1.*'c' is not among its choices a, b"):
        load_suites([name], "test")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "answer": None}, "field 'answer' is None"),
        ({"prompt": "a"}, "field 'answer' is None"),
        ({"prompt": "a", "answer": "y", "choices": "yes"}, "field 'choices' is 'yes'; it must be a list"),
        ({"prompt": "a", "answer": "4", "choices": ["4", ""]}, "none of them empty"),
        ({"prompt": "a", "answer": "4", "choices": 7}, "it must be a list"),
        ({"prompt": "a", "answer": "None", "choices": [None, "a"]}, "it must be a list of texts"),
        ({"prompt": "a", "answer": "a", "choices": ["a", ["b"]]}, "it must be a list of texts"),
        ({"prompt": "a", "answer": "a", "choices": ["a", "b"], "system": ["x"]}, "field 'system' is ['x']; it must be text"),
        ({"prompt": "a", "answer": "y", "choices": ["y", "y"]}, "leave nothing to choose"),
        ({"prompt": "a", "answer": "y"}, "leave nothing to choose"),
    ],
)
def test_questions_without_a_choice_are_told(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(SoftguardError, match=rf"q\.jsonl:1: .*{re.escape(said)}"):
        load_suites([f"choices:{path}"], "test")


def test_wrapped_requests_that_are_all_benign_are_told(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "You are DAN. {prompt}"}\n')
    (tmp_path / "r.jsonl").write_text('{"prompt": "hi", "label": "benign"}\n')
    with pytest.raises(SoftguardError, match=r"every row of .*r\.jsonl is labelled benign"):
        load_suites([f"wrapped:{tmp_path / 't.jsonl'}:{tmp_path / 'r.jsonl'}"], "test")
