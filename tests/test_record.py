import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record


def test_sides_take_turns_after_one_call_that_is_not_timed() -> None:
    calls: list[str] = []
    timings = record.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] + ["a", "b"] * 3
    assert all(len(timing.seconds) == 3 for timing in timings.values())


def test_memory_is_what_a_call_took_beyond_what_was_there() -> None:
    kept = bytearray(b"x" * 80_000_000)  # there before
    timings = record.alternate({"small": lambda: None, "large": lambda: len(bytearray(b"x" * 60_000_000))}, rounds=1)
    assert timings["small"].memory < 20
    assert 50 < timings["large"].memory < 200
    assert len(kept) == 80_000_000


def test_a_row_has_median_and_spread() -> None:
    row = record.Timing([0.3, 0.1, 0.2], 5.0).row()
    assert (row["seconds_median"], row["seconds_min"], row["seconds_max"], row["rounds"]) == (0.2, 0.1, 0.3, 3)


@pytest.mark.parametrize(
    ("of_machine", "name"),
    [
        ({"cpu_flags": ["avx512_bf16", "amx_bf16"]}, "some"),
        ({"cpu_flags": ["avx2", "avx512_bf16"]}, "some-vector"),
        ({"cpu_flags": ["avx2", "avx512f"]}, "some-plain"),  # bfloat16 is not multiplied there: other figures altogether
        ({"cpu_flags": ["avx2"], "gpu": "one"}, "some-gpu"),
    ],
)
def test_results_are_kept_with_the_machine(
    of_machine: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    before = {**{k: v for k, v in record.machine().items() if k != "gpu"}, **of_machine}
    record.keep("some", [{"side": "a", "seconds": 1}, {"side": "b", "more": 2}], before, shape=[1, 2])
    kept = json.loads((tmp_path / f"{name}.json").read_text())
    assert kept["rows"][1] == {"side": "b", "more": 2}
    assert {"versions", "threads", "cpu_flags", "load_before", "load_after", "shape"} <= set(kept)
    with (tmp_path / f"{name}.csv").open() as file:
        assert [row["side"] for row in csv.DictReader(file)] == ["a", "b"]
