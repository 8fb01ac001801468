"""Reading prompts: formats, what is said of bad rows, streaming, thinning, data sets of the hub."""

import csv
import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from softguard.errors import SoftguardError
from softguard.prompts import Prompt, packaged_suite, read_prompts, read_rows, thin

ROWS = [
    {"prompt": 'Say "hi", please', "label": "benign", "suite": "mine", "category": "c", "topic": "t", "language": "en"},
    {"prompt": "¿Qué hora es?\nDime.", "label": "harmful"},
    {"prompt": "日本語", "label": ""},
]
EXPECTED = [
    Prompt('Say "hi", please', "benign", "mine", "c", "t", "en"),
    Prompt("¿Qué hora es?\nDime.", "harmful"),
    Prompt("日本語"),
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, str]], encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as handle:
        writer = csv.DictWriter(handle, ["prompt", "label", "suite", "category", "topic", "language"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1000)
    return path


def read(source: Path | str, limit: int = 0) -> list[Prompt]:
    return list(read_prompts(str(source), limit))


def told(source: Path | str, limit: int = 0) -> str:
    """The one line that reading `source` ends with."""
    with pytest.raises(SoftguardError) as caught:
        read(source, limit)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_jsonl_rows_are_read_with_their_fields(tmp_path: Path) -> None:
    assert read(write_jsonl(tmp_path / "a.jsonl", ROWS)) == EXPECTED


def test_csv_rows_are_read_with_their_fields(tmp_path: Path) -> None:
    assert read(write_csv(tmp_path / "a.csv", ROWS)) == EXPECTED


def test_csv_saved_by_excel_is_read(tmp_path: Path) -> None:
    assert read(write_csv(tmp_path / "a.csv", ROWS, encoding="utf-8-sig")) == EXPECTED


def test_parquet_rows_are_read_with_their_fields(tmp_path: Path) -> None:
    assert read(write_parquet(tmp_path / "a.parquet", ROWS)) == EXPECTED


def test_text_lines_are_prompts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n  two, with commas \n日本語", encoding="utf-8")
    assert read(path) == [Prompt("one"), Prompt("two, with commas"), Prompt("日本語")]


def test_blank_lines_of_jsonl_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n\n   \n{"prompt": "b"}')
    assert read(path) == [Prompt("a"), Prompt("b")]


def test_unknown_columns_are_passed_over(tmp_path: Path) -> None:
    assert read(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "id": 7}])) == [Prompt("a")]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt", "parquet"])
def test_missing_file_is_told(tmp_path: Path, ending: str) -> None:
    assert told(tmp_path / f"none.{ending}") == f"prompts file {tmp_path}/none.{ending} does not exist; check the path"


def test_unknown_ending_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    message = told(tmp_path / "a.json")
    assert "the ending '.json' is unknown; use .jsonl, .csv, .txt, .parquet" in message


def test_empty_files_hold_no_prompts(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", ""), ("a.csv", ""), ("b.csv", "prompt,label\n"), ("a.txt", "\n \n")):
        (tmp_path / name).write_text(content)
        assert f"{name} holds no prompts" in told(tmp_path / name)
        with pytest.raises(SoftguardError, match="holds no prompts"):
            list(read_rows(str(tmp_path / name)))
    import pyarrow

    schema = pyarrow.schema([("prompt", pyarrow.string())])
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "a.parquet")
    assert "a.parquet holds no prompts" in told(tmp_path / "a.parquet")


@pytest.mark.parametrize("empty", ["", "   ", "\n\t"])
def test_empty_prompt_names_the_row(tmp_path: Path, empty: str) -> None:
    rows = [{"prompt": "a"}, {"prompt": empty}]
    assert "a.jsonl:2: the prompt is empty" in told(write_jsonl(tmp_path / "a.jsonl", rows))
    assert "the prompt is empty" in told(write_csv(tmp_path / "a.csv", rows))
    assert "a.parquet row 2: the prompt is empty" in told(write_parquet(tmp_path / "a.parquet", rows))


def test_malformed_json_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"\n')
    assert "a.jsonl:3: not valid JSON" in told(path)


@pytest.mark.parametrize("line", ["[1]", '"text"', "3", "null"])
def test_json_that_is_no_object_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    assert "a.jsonl:1: must be a JSON object with a 'prompt'" in told(path)


@pytest.mark.parametrize("value", [3, 1.5, True, ["a"], {"a": "b"}])
def test_prompt_that_is_not_text_names_the_row(tmp_path: Path, value: object) -> None:
    assert "a.jsonl:1: field 'prompt' is not text" in told(write_jsonl(tmp_path / "a.jsonl", [{"prompt": value}]))


def test_prompt_with_half_a_character_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a \\ud83d b"}\n')  # half of a surrogate pair: no tokenizer and no file can take it
    assert "a.jsonl:1: field 'prompt'" in told(path)


@pytest.mark.parametrize("field", [{"tags": ["\ud800"]}, {"meta": {"a": "\ud800"}}, {"meta": [{"\ud800": 1}]}, {"\ud800": 1}])
def test_half_a_character_is_told_wherever_in_a_row_it_is(tmp_path: Path, field: dict[str, object]) -> None:
    (name,) = field
    assert f"a.jsonl:1: field {name!r} holds half" in told(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", **field}]))


def test_row_without_prompt_is_told(tmp_path: Path) -> None:
    assert "a.jsonl:2: field 'prompt' is missing" in told(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"text": "b"}]))
    (tmp_path / "a.csv").write_text("text,label\na,benign\n")
    assert "a.csv:2: field 'prompt' is missing" in told(tmp_path / "a.csv")
    assert "a.parquet row 1: field 'prompt' is missing" in told(write_parquet(tmp_path / "a.parquet", [{"text": "a"}]))


@pytest.mark.parametrize("label", ["unsafe", "Harmful", 1, 0, ["harmful"]])
def test_unknown_label_is_told(tmp_path: Path, label: object) -> None:
    message = told(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "label": label}]))
    assert f"a.jsonl:1: label {label!r} is unknown; use harmful, benign or none" in message


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_text_that_is_not_utf8_is_told(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes('prompt\n{"prompt": "Désolé"}\n'.encode("latin-1").removeprefix(b"prompt\n" if ending == "jsonl" else b""))
    assert f"a.{ending} is not UTF-8 text" in told(path)


def test_place_of_a_byte_that_is_not_utf8_holds_in_long_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a line of text\n" * 10_000 + b"D\xe9sol\xe9\n")
    assert "byte 150001" in told(path)


def test_what_is_no_parquet_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 this is not one")
    assert "a.parquet is not a Parquet file" in told(path)


def test_a_long_cell_of_csv_is_read_as_a_line_of_json_is(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt\n" + "x" * 200_000 + "\n")
    assert [len(prompt.text) for prompt in read(path)] == [200_000]


@pytest.mark.parametrize("limit", [1, 5])
def test_limit_takes_the_first_rows_of_a_file(tmp_path: Path, limit: int) -> None:
    rows = [{"prompt": f"prompt {i}"} for i in range(9)]
    assert [p.text for p in read(write_jsonl(tmp_path / "a.jsonl", rows), limit)] == [f"prompt {i}" for i in range(limit)]


def test_no_more_of_a_file_is_read_than_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"prompt": "prompt {i}"}}\n' for i in range(100_000)) + "not JSON\n")
    assert len(list(islice(read_prompts(str(path)), 5))) == 5
    assert len(read(path, limit=5)) == 5
    assert "a.jsonl:100001: not valid JSON" in told(path)


def test_parquet_is_streamed(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": f"prompt {i}" if i < 5000 else ""} for i in range(5001)])
    assert len(list(islice(read_prompts(str(path)), 5))) == 5
    assert "row 5001: the prompt is empty" in told(path)


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("limit", [0, 1, 3, 7, 99, 200])
def test_thinned_lists_are_spread_evenly(size: int, limit: int) -> None:
    kept = thin(list(range(size)), limit)
    if limit == 0 or limit >= size:
        assert kept == list(range(size))
    else:
        assert len(kept) == limit
        assert all(i * size // limit <= place < (i + 1) * size // limit for i, place in enumerate(kept))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_packaged_prompts_thinned_keep_suites_and_topics_in_proportion(split: str) -> None:
    whole = read(f"packaged:{split}")
    topics = {(p.category, p.topic) for p in whole}
    sizes, total = Counter(p.suite for p in whole), len(whole)
    for limit in (30, 100, total // 6, total // 4, total // 2):  # whole fractions find any period of the rows
        some = read(f"packaged:{split}", limit)
        found, held = Counter(p.suite for p in some), len({(p.category, p.topic) for p in some})
        distinct = len(set(some))
        assert distinct == found.total() == limit
        for suite, size in sizes.items():
            assert abs(found[suite] - limit * size / total) <= 2, (limit, suite, found)
        assert held > 0.6 * min(limit, len(topics))


def test_packaged_splits_are_whole_without_a_limit() -> None:
    folder = Path(__file__).parents[1] / "softguard" / "data" / "prompts"
    files = [folder / f"{suite}.jsonl" for suite in ("harmful", "contrast", "everyday")]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    for split in ("train", "validation", "test"):
        assert [p.text for p in read(f"packaged:{split}")] == [row["prompt"] for row in rows if row["split"] == split]
    assert [p.text for p in packaged_suite("contrast", "test")] == [
        row["prompt"] for row in rows if row["split"] == "test" and row["suite"] == "contrast"
    ]


def test_unknown_packaged_split_names_the_known_ones() -> None:
    assert "split 'dev' is unknown; use packaged:train, :validation or :test" in told("packaged:dev")


def test_hub_data_sets_are_streamed_with_their_splits(tmp_path: Path) -> None:
    folder = tmp_path / "set"  # `datasets` takes a folder for the name of a data set, which needs no network
    folder.mkdir()
    rows: list[dict[str, Any]] = [{**ROWS[0], "prompt": f"prompt {i}"} for i in range(20)]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", [{**ROWS[0], "prompt": ""}])
    assert [p.text for p in read(f"hub:{folder}", limit=3)] == ["prompt 0", "prompt 1", "prompt 2"]
    assert read(f"hub:{folder}:train")[0] == EXPECTED[0]._replace(text="prompt 0")
    assert f"hub:{folder}:test row 1: the prompt is empty" in told(f"hub:{folder}:test")


def test_hub_data_sets_have_configurations(tmp_path: Path) -> None:
    parts = {"plain": "a prompt", "wrapped": "another"}
    for name, prompt in parts.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{**ROWS[0], "prompt": prompt}])
    named = "".join(f"  - {{config_name: {name}, data_files: {name}.jsonl}}\n" for name in parts)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{named}---\n")
    for name, prompt in parts.items():
        assert [p.text for p in read(f"hub:{tmp_path}@{name}:train")] == [prompt]
    assert f"hub:{tmp_path}@third could not be loaded" in told(f"hub:{tmp_path}@third")


def test_hub_data_set_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    source = f"hub:{tmp_path / 'none'}"
    assert f"{source} could not be loaded" in told(source)


def test_hub_split_that_is_not_there_is_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [ROWS[0]])
    assert f"hub:{tmp_path}:dev could not be loaded" in told(f"hub:{tmp_path}:dev")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt\nHow do I kill, politely, a process?\n", r"csv:2: the row has more fields than the header"),
        ('prompt,label\n"unterminated,harmful\nb,benign\n', r"not valid CSV \(unexpected end of data\)"),
    ],
)
def test_csv_that_would_lose_text_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert re.search(said, told(tmp_path / "a.csv"))


@pytest.mark.parametrize(("name", "text"), [("a.txt", "Hello\n"), ("a.jsonl", '{"prompt": "Hello"}\n')])
def test_the_mark_some_editors_begin_a_file_with_is_no_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert [prompt.text for prompt in read(tmp_path / name)] == ["Hello"]


@pytest.mark.parametrize("field", ['"response": "\\ud800"', '"choices": ["a", "\\ud800"]'])
def test_half_a_character_in_any_field_is_told(tmp_path: Path, field: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a", {field}}}\n')
    assert re.search(r"jsonl:1: field '(response|choices)' holds half a character", told(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("key", ["prompt", "label", "response"])
def test_a_key_that_stands_twice_is_told(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a"}}\n{{"{key}": "benign", "prompt": "a", "{key}": "b"}}\n')
    assert told(tmp_path / "a.jsonl") == f"{tmp_path}/a.jsonl:2: the key {key!r} stands twice; remove one"


def test_a_key_within_a_field_may_stand_twice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "meta": {"prompt": "b", "prompt": "c"}}\n')
    assert read(tmp_path / "a.jsonl") == [Prompt("a")]


def test_a_column_that_stands_twice_is_told(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.csv").write_text("prompt,label,prompt\na,benign,b\n")
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["prompt", "prompt"]), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        assert told(tmp_path / name) == f"{tmp_path}/{name}: two columns are called 'prompt'; rename one"
    (tmp_path / "a.csv").write_text("prompt,,\na,,\n")  # as spreadsheets end their lines
    assert read(tmp_path / "a.csv") == [Prompt("a")]


def test_a_parquet_value_that_python_has_no_word_for_names_its_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    twice = pyarrow.StructArray.from_arrays([[1, 2], [3, 4]], names=["a", "a"], mask=pyarrow.array([True, False]))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "meta": twice}), tmp_path / "a.parquet")
    assert re.search(
        r"a\.parquet row 2 cannot be read \(.*duplicate.*\); mend .* leave out its column$", told(tmp_path / "a.parquet")
    )


def test_a_parquet_text_that_is_not_utf8_names_its_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([f"prompt {i}".encode() for i in range(2000)] + [b"D\xe9sol\xe9"] + [b"last"] * 9)
    bad = pyarrow.StringArray.from_buffers(len(texts), *texts.buffers()[1:])  # unchecked
    pyarrow.parquet.write_table(pyarrow.table({"prompt": bad}), tmp_path / "a.parquet")
    assert told(tmp_path / "a.parquet") == f"{tmp_path}/a.parquet row 2001 is not UTF-8 text; convert it"
    assert len(read(tmp_path / "a.parquet", limit=2000)) == 2000


def test_json_without_end_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "x": ' + "[" * 100_000 + "\n")
    assert "jsonl:1: not valid JSON" in told(tmp_path / "a.jsonl")
