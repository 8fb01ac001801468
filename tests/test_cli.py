import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from softguard.cli import main
from softguard.conversation import converse
from softguard.engine import Engine
from softguard.errors import SoftguardError
from softguard.models import BaseModel
from tests.commands import ROOT, softguard
from tests.references import random_adapter

GUARD = "system.guard=tests.guards_for_tests:by_word"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail; returns its one line."""
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("softguard: ") for line in lines) == 1
    assert lines[-1].startswith("softguard: ")  # nothing of it spills over into another line
    return lines[-1]


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "asked.txt"
    path.write_text("How do I build a boat?\nHow do I build a bomb?\nWhat is a comet?\nSing me a song.\n")
    return path


def options(asked: Path, model: Path, *more: str) -> list[str]:
    settings = [
        f"model.name={model}", GUARD, f"teach.prompts={asked}", f"teach.validation={asked}", "teach.max_new_tokens=4",
        "distil.steps=3", "distil.n_soft=4", "distil.batch_size=4", "distil.validation_prompts=4", *more,
    ]  # fmt: skip
    return [item for setting in settings for item in ("--set", setting)]


def test_help_names_every_command_and_is_quick() -> None:
    begin = time.perf_counter()
    done = softguard("--help")
    seconds = time.perf_counter() - begin
    assert all(name in done.stdout for name in ("teach", "distil", "evaluate", "study", "chat", "guard", "demo"))
    assert seconds < 3  # a loose bound for loaded machines; importing torch alone takes longer


@pytest.mark.parametrize(
    "arguments",
    [
        ("teach", "--out", ""),
        ("study", "grid.yaml", "--out", " "),
        ("chat", "--adapter", ""),
        ("guard", "score", "", "--out", "x"),
    ],
)
def test_a_path_that_is_empty_is_not_the_current_folder(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "is empty; name a file or a folder" in capsys.readouterr().err


def test_help_and_import_do_not_load_torch() -> None:
    code = "import sys, softguard.cli; softguard.cli._parser(); print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("pages", "given", "asked"), [(".", {}, "1"), (".", {"THP_MEM_ALLOC_ENABLE": "0"}, "0"), ("no such folder", {}, "None")]
)
def test_a_command_asks_for_large_pages_before_torch_is_loaded(
    pages: str, given: dict[str, str], asked: str, tmp_path: Path
) -> None:
    code = """
import os, pathlib, sys
from softguard import cli
cli._LARGE_PAGES = pathlib.Path(sys.argv[1])
cli._teach = lambda options: print("torch" in sys.modules, os.environ.get("THP_MEM_ALLOC_ENABLE"))
cli.main(["teach", "--out", "unused"])
"""
    own = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", code, str(tmp_path / pages)]
    done = subprocess.run(command, env=own | given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", asked]


def test_teach_distil_evaluate_and_chat_work_together(asked: Path, small_folder: Path, tmp_path: Path) -> None:
    corpus, adapter, out = tmp_path / "corpus", tmp_path / "adapter", tmp_path / "out"
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text('{"prompt": "build a bomb", "label": "harmful"}\n{"prompt": "build a boat", "label": "benign"}\n')
    common = options(asked, small_folder, f"evaluate.suites=['file:{labelled}']", "evaluate.max_new_tokens=4")
    assert main(["teach", "--out", str(corpus), *common]) == 0
    assert main(["distil", "--corpus", str(corpus), "--out", str(adapter), *common]) == 0
    assert main(["evaluate", "--adapter", str(adapter), "--out", str(out), *common]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["system"] for row in rows} == {"base", "safe_system", "distilled"}
    chat = softguard("chat", "--adapter", adapter, "--compare", "--max-new-tokens", 3, *common, input="hello\n\n")
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.index("base>") < chat.stdout.index("distilled>")


def test_the_readme_s_python_does_the_same(
    asked: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [shown] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    given = options(asked, small_folder, "evaluate.suites=[contrast]", "evaluate.limit=2", "evaluate.max_new_tokens=2")[1::2]
    small = shown.replace('["teach.limit=500"]', repr(given)).replace('"smollm2"', repr(str(small_folder)))
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(small, found)
    assert json.loads((tmp_path / "results" / "results.json").read_text()) == found["results"].contract()
    assert (tmp_path / "adapter" / "softguard.json").is_file()


def test_dry_runs_say_what_would_run_and_write_nothing(
    asked: Path, small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = options(asked, small_folder)
    out = tmp_path / "corpus"
    assert main(["teach", "--dry-run", "--out", str(out), *common]) == 0
    told = capsys.readouterr().out
    assert told.count("prompts of") == 2  # of one file, each split counts its own
    assert not out.exists()
    assert main(["teach", "--out", str(out), *common]) == 0
    assert main(["distil", "--dry-run", "--corpus", str(out), "--out", str(tmp_path / "adapter"), *common]) == 0
    told = capsys.readouterr().out
    assert "3 steps of 4 prompts" in told
    assert "gate of 4 vectors; about" in told  # which has no slot
    assert not (tmp_path / "adapter").exists()
    limited = ["--set", "evaluate.limit=2", "--set", "evaluate.max_new_tokens=2"]
    assert main(["evaluate", "--dry-run", "--out", str(tmp_path / "results"), *limited, *common]) == 0
    assert "harmful (2)" in capsys.readouterr().out
    assert main(["demo", "--dry-run"]) == 0
    assert "15 to 20 minutes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.name=./no-such-folder", "does not exist"),
        ("system.guard=no.such.module:guard", "cannot be imported"),
        ("system.guard=tests.guards_for_tests:not_a_number", "nothing was taken as safe"),
        ("system.guard=tests.guards_for_tests:throws", "server is gone"),
        ("teach.prompts=missing.jsonl", "does not exist"),
        ("distil.stepz=3", "did you mean distil.steps"),
        ("distil.batch_size=0", "greater than 0"),
        ("teach.max_new_tokens=600", "exceeds the model's context of 512"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    setting: str, words: str, asked: Path, small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "teach", "--out", tmp_path / "corpus", *options(asked, small_folder, setting))
    assert words in line


def test_an_adapter_of_another_model_is_refused(
    asked: Path, small_folder: Path, base: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conftest import save_small

    corpus, adapter = tmp_path / "corpus", tmp_path / "adapter"
    common = options(asked, small_folder)
    assert main(["teach", "--out", str(corpus), *common]) == 0
    assert main(["distil", "--corpus", str(corpus), "--out", str(adapter), *common]) == 0
    other = save_small(base, tmp_path / "other", seed=1)  # type: ignore[arg-type]
    assert "belongs to model" in refused(capsys, "chat", "--adapter", adapter, *options(asked, other))
    assert "was drawn from model" in refused(
        capsys, "distil", "--corpus", corpus, "--out", tmp_path / "new", *options(asked, other)
    )


@pytest.mark.parametrize(
    ("setting", "size", "file"), [("teach.shard_size=100", 2_000, ""), ("teach.keep_caches=true", 200_000, ".safetensors")]
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_later(
    setting: str, size: int, file: str, asked: Path, small_folder: Path, tmp_path: Path
) -> None:
    asked.write_text("".join(f"How do I build boat {i}?\n" for i in range(200)))
    corpus = tmp_path / "corpus"
    command = ["teach", "--out", str(corpus), *options(asked, small_folder, setting)]
    code = (
        "import resource, sys; from softguard.cli import main; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); sys.exit(main(sys.argv[1:]))"
    )
    full = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert full.returncode == 2, full.stderr
    assert f"{file} could not be written" in full.stderr.splitlines()[-1]
    assert not list(corpus.rglob("*.part"))
    assert main(command) == 0


def test_guard_fit_and_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "how to build a bomb"}\n{"prompt": "how to build a boat", "response": "Take wood."}\n')
    out = tmp_path / "scored.jsonl"
    assert main(["guard", "score", str(data), "--set", GUARD, "--out", str(out)]) == 0
    assert [json.loads(line)["p_safe"] for line in out.read_text().splitlines()] == [0.05, 0.95]
    capsys.readouterr()
    assert main(["guard", "score", str(data), "--set", GUARD, "--out", str(tmp_path / "dry"), "--dry-run"]) == 0
    assert "would write 2 rows" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()
    data.write_text('{"prompt": "x"}\n{"prompt": 3}\n')
    assert "data.jsonl:2" in refused(capsys, "guard", "score", data, "--set", GUARD, "--out", out)
    data.write_text('{"prompt": "x"}\n{"prompt": "x", "response": 3}\n')
    broken = "system.guard=tests.guards_for_tests:throws"  # it would tell if it were asked
    assert "data.jsonl:2: field 'response' is not text" in refused(
        capsys, "guard", "score", data, "--set", broken, "--out", out
    )
    data.write_text('{"prompt": "x"}\n')
    for dry in ([], ["--dry-run"]):
        line = refused(capsys, "guard", "score", data, "--set", broken, "--out", tmp_path, *dry)
        assert f"{tmp_path} is a folder; name a file in it" in line
    data.write_text("\n")
    for dry in ([], ["--dry-run"]):
        assert "data.jsonl holds no prompts" in refused(capsys, "guard", "score", data, "--set", GUARD, "--out", out, *dry)
    assert len(out.read_text().splitlines()) == 2
    data.write_text('{"prompt": "x"}\n')
    assert "data.jsonl:1" in refused(capsys, "guard", "fit", data, "--out", tmp_path / "guard")
    data.write_text("".join(f'{{"prompt": "{i}", "label": "{("benign", "harmful")[i % 2]}"}}\n' for i in range(99)))
    assert main(["guard", "fit", str(data), "--out", str(tmp_path / "guard"), "--dry-run"]) == 0
    assert f"would train on {data} (99 rows) and write" in capsys.readouterr().out
    assert "data.jsonl is not a folder" in refused(capsys, "guard", "fit", data, "--out", data / "guard", "--dry-run")
    assert not (tmp_path / "guard").exists()


class JudgesPrompts:
    """A guard of prompts alone."""

    name = fingerprint = "of prompts"

    def prompt_safety(self, prompts: list[str]) -> list[float]:
        return [1.0] * len(prompts)

    def response_safety(self, prompts: list[str], responses: list[str]) -> list[float]:
        raise SoftguardError("it only judges prompts")


judges_prompts = JudgesPrompts()


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        ("tests.test_cli:judges_prompts", "it only judges prompts"),
        ("tests.guards_for_tests:not_a_number", "gave nan for text 0"),
        ("tests.guards_for_tests:throws", "the guard's server is gone"),
    ],
)
def test_a_guard_that_cannot_score_a_file_is_told_by_the_dry_run(
    guard: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"prompt": "x"}\n' * 300 + '{"prompt": "x", "response": "y"}\n')
    for dry in (["--dry-run"], []):
        assert words in refused(capsys, "guard", "score", data, "--out", out, "--set", f"system.guard={guard}", *dry)
    assert not out.exists()


LABELLED = [{"label": ("benign", "harmful")[i % 2]} for i in range(60)]


@pytest.mark.parametrize(
    ("rows", "rank", "words"),
    [
        ([{"label": "benign"}] * 60, 1, "training rows none has label harmful; both classes are needed, give more rows"),
        ([], 1, "data.jsonl holds no prompts; give at least one"),
        (LABELLED[:3], 1, "of the 1 validation rows (a tenth of a file's prompts) none has label harmful"),
        ([{**row, "response": "y", "unsafe": 0} for row in LABELLED], 1, "training rows none has unsafe 1"),
        (LABELLED, 64, "guard.rank 64 takes"),
    ],
)
def test_a_dry_run_of_guard_fit_checks_everything(
    rows: list[dict[str, object]], rank: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "guard"
    data.write_text("".join(json.dumps({"prompt": f"prompt {i}", **row}) + "\n" for i, row in enumerate(rows)))
    for dry in (["--dry-run"], []):
        assert words in refused(capsys, "guard", "fit", data, "--out", out, "--set", f"guard.rank={rank}", *dry)
    assert not out.exists()


def test_a_score_file_is_json_whatever_a_row_holds(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    data, out = tmp_path / "data.parquet", tmp_path / "out.jsonl"
    rows = [{"prompt": "hello", "x": float("nan"), "y": [1.5, float("inf")], "at": datetime(2024, 7, 26)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    assert main(["guard", "score", str(data), "--out", str(out), "--set", GUARD]) == 0
    (line,) = out.read_text().splitlines()
    told = {"prompt": "hello", "x": None, "y": [1.5, None], "at": "2024-07-26 00:00:00", "p_safe": 0.95}
    assert json.loads(line, parse_constant=pytest.fail) == told


def test_the_recipe_of_a_released_adapter_tells_a_mistake_in_one_line(tmp_path: Path) -> None:
    script, recipe = ROOT / "recipes" / "build_adapter.py", tmp_path / "none.yaml"
    done = subprocess.run([sys.executable, script, recipe], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert re.fullmatch(r"build_adapter: .*none\.yaml.*\n", done.stderr)


def test_an_empty_cell_of_a_csv_is_no_response(tmp_path: Path) -> None:
    data, out = tmp_path / "data.csv", tmp_path / "scored.jsonl"
    data.write_text("prompt,response\nhow to build a boat,\nhow to build a boat,(\n")
    guard = "system.guard=tests.guards_for_tests:by_bracket"  # one half for a prompt alone
    assert main(["guard", "score", str(data), "--set", guard, "--out", str(out)]) == 0
    assert [json.loads(line)["p_safe"] for line in out.read_text().splitlines()] == [0.5, 0.05]


def test_guard_fit_takes_its_settings_from_the_recipe(tmp_path: Path) -> None:
    words = ["bomb", "poison", "murder", "theft"]
    rows = [{"prompt": f"{'plan a' if i % 2 else 'a film about'} {words[i // 2 % 4]} {i}"} for i in range(80)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**row, "label": ("benign", "harmful")[i % 2]}) + "\n" for i, row in enumerate(rows)))
    settings = ["--set", "guard.rank=1", "--set", "guard.epochs=1", "--set", "seed=3"]
    assert main(["guard", "fit", str(data), "--out", str(tmp_path / "guard"), *settings]) == 0
    made = json.loads((tmp_path / "guard" / "card.json").read_text())["settings"]
    assert (made["rank"], made["epochs"], made["seed"]) == (1, 1, 3)


def test_a_guard_in_the_folder_of_the_command_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine_of_this_test.py").write_text("def guard(prompts, responses):\n    return [0.25] * len(prompts)\n")
    (tmp_path / "data.jsonl").write_text('{"prompt": "hello"}\n')
    script = Path(sys.executable).with_name("softguard")  # unlike `python -m`, it does not look there by itself
    setting = "system.guard=mine_of_this_test:guard"
    command = [str(script), "guard", "score", "data.jsonl", "--out", "out.jsonl", "--set", setting]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=200)
    assert json.loads((tmp_path / "out.jsonl").read_text())["p_safe"] == 0.25


def test_a_name_that_is_not_utf8_is_printed_all_the_same(tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    data.write_text('{"prompt": "hello"}\n')
    command = [sys.executable, "-m", "softguard.cli", "guard", "score", str(data), "--set", GUARD, "--out", str(out)]
    strict = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, env=strict, cwd=ROOT, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"/caf\\udce9.jsonl\n")
    assert out.is_file()


def test_chat_that_compares_needs_an_adapter(small_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--adapter" in refused(capsys, "chat", "--compare", "--set", f"model.name={small_folder}")


def test_chat_takes_the_packaged_adapter_unless_told_otherwise(small_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, engines in (
        (["--compare"], "base and distilled"),
        ([], "distilled"),
        (["--adapter", "none"], "base"),
        (["--set", f"model.name={small_folder}"], "base"),
    ):
        assert main(["chat", "--dry-run", *arguments]) == 0
        shown = capsys.readouterr()
        assert shown.out == f"chat: would talk to {engines} until an empty line\n"
        assert ("no adapter is packaged" in shown.err) == (str(small_folder) in str(arguments))


def test_chat_has_room_for_an_answer(small_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["chat", "--set", f"model.name={small_folder}", "--dry-run", "--max-new-tokens"]
    line = refused(capsys, *command, 600)
    said = re.search(r"--max-new-tokens is 600; .* has room for (\d+) at most, lower it$", line)
    assert said is not None
    assert main([*command, said[1]]) == 0
    refused(capsys, *command, int(said[1]) + 1)


def test_chat_goes_on_behind_a_line_that_is_too_long(
    small: BaseModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hello\n{'boat ' * 600}\nhello again\n\n"))
    converse({"base": Engine(small)}, 3)
    first, told, second, *_ = re.split("you> ", capsys.readouterr().out)[1:]
    assert "base> " in first
    assert "base> " not in told
    assert "shorten it, or begin anew" in told
    assert "base> " in second


def test_chat_ends_where_there_is_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it for `<&-`
    converse({}, 2)


def exits(prompts: list[str], responses: list[str] | None) -> list[float]:
    sys.exit(0)


def tells_in_lines(prompts: list[str], responses: list[str] | None) -> list[float]:
    raise ValueError("line one\nline two")


@pytest.mark.parametrize("guard", ["exits", "tells_in_lines"])
def test_whatever_a_guard_does_is_one_line_and_exit_code_2(
    guard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"prompt": "hello"}\n')
    line = refused(capsys, "guard", "score", data, "--set", f"system.guard=tests.test_cli:{guard}", "--out", out)
    assert line.endswith("nothing was taken as safe")
    assert not out.exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("system.guard=no.such:guard", "cannot be imported"),
        ("teach.prompts=missing.jsonl", "does not exist"),
        ("model.name=./nope", "does not exist"),
        ("model.device=banana", "model.device is 'banana'"),
        ("evaluate.suites=[bogus]", "suite 'bogus' is unknown"),
        ("evaluate.judge=no.such:judge", "cannot be imported"),
        ("evaluate.other_judges=[bundled]", "two judges are called"),
        ("distil.objective=bogus", "objective 'bogus' is unknown"),
        ("distil.objective=kl", "distil.objective is kl"),
        ("distil.init_text=''", "init_text is empty"),
    ],
)
def test_the_demo_checks_everything_before_its_first_stage(
    setting: str, words: str, small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for how in (["--dry-run"], []):
        settings = ["--set", f"model.name={small_folder}", "--set", setting]
        assert words in refused(capsys, "demo", *how, "--out", tmp_path / "demo", *settings)
        assert not (tmp_path / "demo").exists()


def test_the_demo_does_not_take_a_file_for_its_folder(
    small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").touch()
    settings = ["--set", f"model.name={small_folder}"]
    assert "a.txt is not a folder" in refused(capsys, "demo", "--dry-run", "--out", tmp_path / "a.txt", *settings)


def test_a_dry_run_of_evaluate_checks_everything(
    small: BaseModel, small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: object, out: str = "out") -> str:
        common = ["--set", f"model.name={small_folder}", "--set", GUARD]
        return refused(capsys, "evaluate", "--dry-run", "--out", tmp_path / out, *common, *arguments)

    assert "cannot be imported" in told("--set", "evaluate.judge=no.such:judge")
    assert "two judges are called" in told("--set", "evaluate.other_judges=[bundled]")
    (tmp_path / "file").touch()
    assert "file is not a folder" in told(out="file")
    for facts, words in (
        ({"guard": "another", "guard_fingerprint": "0"}, "was distilled from a system with guard 'another'"),
        ({"template": "0"}, "another chat template"),
    ):
        replace(random_adapter(small, "soft_prompt"), facts=facts).save(tmp_path / "adapter", small)
        assert words in told("--adapter", tmp_path / "adapter")
    long = "evaluate.suites=[everyday]", "evaluate.limit=2", "evaluate.max_new_tokens=511"
    assert "prompt 1 of suite everyday has" in told(*(word for value in long for word in ("--set", value)))


def test_a_dry_run_of_teach_checks_everything(
    asked: Path, small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*settings: str, out: str = "out") -> str:
        return refused(capsys, "teach", "--dry-run", "--out", tmp_path / out, *options(asked, small_folder, *settings))

    assert "names no categories" in told("system.policy={S1: {action: keep}}", "distil.adapter=kv_prefix")
    assert "objective 'tw' is unknown" in told("distil.objective=tw", "distil.adapter=kv_prefix")
    assert "init_text is empty" in told("distil.init_text=''")
    assert "does not exist" in told("teach.prompts=missing.jsonl")
    (tmp_path / "file").touch()
    assert "file is not a folder" in told(out="file")
    assert main(["teach", "--out", str(tmp_path / "out"), *options(asked, small_folder)]) == 0
    assert "other settings" in told("seed=1")


def test_a_dry_run_of_distil_checks_everything_and_so_does_a_run_before_its_tracker_begins(
    asked: Path, small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, adapter = tmp_path / "corpus", tmp_path / "adapter"
    assert main(["teach", "--out", str(corpus), *options(asked, small_folder)]) == 0
    assert main(["distil", "--corpus", str(corpus), "--out", str(adapter), *options(asked, small_folder)]) == 0
    (tmp_path / "file").touch()
    for out, changes, words in (
        (adapter, ["distil.steps=4"], "other settings"),
        (tmp_path / "file", [], "file is not a folder"),
        (tmp_path / "new", ["distil.steps=0", "distil.init_text=''"], "init_text is empty"),
    ):
        command = ("distil", "--corpus", corpus, "--out", out, *options(asked, small_folder, *changes))
        assert words in refused(capsys, *command, "--dry-run")
        assert words in refused(capsys, *command, "--track", "no such tracker")
    command = ("distil", "--corpus", corpus, "--out", adapter, *options(asked, small_folder))
    assert "tracker 'no such tracker' cannot be used" in refused(capsys, *command, "--track", "no such tracker", "--dry-run")


def test_a_demo_of_other_settings_leaves_the_first_alone(
    asked: Path, small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text('{"prompt": "build a bomb", "label": "harmful"}\n')
    common = options(asked, small_folder, f"evaluate.suites=['file:{labelled}']", "evaluate.max_new_tokens=2")
    common += ["--set", "distil.steps=0", "--set", "teach.keep_caches=false", "--set", "teach.limit=4"]
    assert main(["demo", "--out", str(tmp_path / "demo"), *common]) == 0  # nothing trained: no log
    before = (tmp_path / "demo" / "recipe.yaml").read_bytes()
    assert "other settings" in refused(capsys, "demo", "--out", tmp_path / "demo", *common, "--set", "seed=1")
    for dry in ([], ["--dry-run"]):  # the corpus stays, the adapter does not
        line = refused(capsys, "demo", "--out", tmp_path / "demo", *common, "--set", "distil.n_soft=5", *dry)
        assert "adapter holds a run with other settings" in line
    assert (tmp_path / "demo" / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_chat_takes_utf8_alone(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n\n"), encoding="utf-8", errors=errors))
    with pytest.raises(SoftguardError, match="the input is not UTF-8 text; convert it"):
        converse({}, 2)
