"""Files are whole or not there: failing writers, full disks, damaged artefacts."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from softguard.errors import SoftguardError
from softguard.files import alone, check_folder, locked, read_json, write_file, write_json, write_text
from tests.commands import ROOT


def test_written_files_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, {"text": "naïve 日本", "n": 1.5})
    assert read_json(path, "thing") == {"text": "naïve 日本", "n": 1.5}
    assert "日本" in path.read_text(encoding="utf-8")
    write_text(path, "other\n")
    assert path.read_bytes() == b"other\n"
    assert os.listdir(path.parent) == ["a.json"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def write(beside: Path) -> None:
        assert beside.parent == path.parent  # else the rename could not be atomic
        beside.write_text("new")
        assert path.read_text() == "old"

    write_file(path, write)
    assert path.read_text() == "new"


@pytest.mark.parametrize("failure", [OSError("the disk broke"), ValueError("bad value"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_alone_and_nothing_beside(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def write(beside: Path) -> None:
        beside.write_text("half")
        raise failure

    with pytest.raises(SoftguardError if isinstance(failure, OSError) else type(failure)):
        write_file(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_is_told_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    script = """
import resource, sys
from pathlib import Path
from softguard.errors import SoftguardError
from softguard.files import write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text(Path(sys.argv[1]), "x" * 5000)
except SoftguardError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, timeout=60)
    assert "a.txt could not be written (File too large)" in told.stdout
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_name_that_is_not_utf_8_is_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": os.fsdecode(b"caf\xe9")})
    assert os.fsencode(read_json(tmp_path / "a.json", "note")["name"]) == b"caf\xe9"


def test_a_folder_in_the_files_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(SoftguardError, match="a is a folder; name a file in it"):
        write_text(tmp_path / "a", "text")
    assert os.listdir(tmp_path) == ["a"]


def test_a_pipe_or_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(SoftguardError, match=f"{name} is a device or a pipe"):
            write_text(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    for text in ("made", "made again"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "there" / "file").read_text() == text
    assert (tmp_path / "link").is_symlink()


def test_a_file_in_the_folders_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("in the way")
    with pytest.raises(SoftguardError, match="could not be written"):
        write_text(tmp_path / "a" / "b.txt", "text")


def test_a_folder_is_checked_before_it_is_needed_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "folder", tmp_path / "link"):
        with pytest.raises(SoftguardError, match=r"(file|link) is not a folder.*choose another --out"):
            check_folder(path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # permissions do not bind those who may do all
    with pytest.raises(SoftguardError, match=rf"^{tmp_path} cannot be written"):
        check_folder(tmp_path / "new")


def test_a_name_too_long_is_told(tmp_path: Path) -> None:
    with pytest.raises(SoftguardError, match="could not be written"):
        write_text(tmp_path / ("x" * 300), "text")
    with pytest.raises(SoftguardError, match=r"cannot be written .*; choose another --out"):
        check_folder(tmp_path / ("x" * 300))


def test_numbers_json_does_not_have_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_missing_json_names_what_and_where(tmp_path: Path) -> None:
    with pytest.raises(SoftguardError, match=rf"{tmp_path} holds no corpus: manifest.json is missing"):
        read_json(tmp_path / "manifest.json", "corpus")


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{}", b"[1, 2]", b'"text"', b"null"])
def test_damaged_json_names_the_file_and_the_mend(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(SoftguardError, match=r"manifest\.json is damaged .*; make the corpus again"):
        read_json(path, "corpus")


def test_json_in_a_file_for_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").write_text(json.dumps({}))
    with pytest.raises(SoftguardError, match="corpus"):
        read_json(tmp_path / "run" / "manifest.json", "corpus")


def test_a_lock_is_held_alone_and_let_go_by_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "folder" / ".lock"
    code = (
        "import sys, time; from pathlib import Path; from softguard.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(100)"
    )
    entered = threading.Event()

    def enter() -> None:
        with locked(path):
            entered.set()

    with subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        waiter = threading.Thread(target=enter, daemon=True)
        waiter.start()
        assert not entered.wait(0.5)
        holder.kill()
    assert entered.wait(10)


def test_two_processes_do_not_write_one_file_into_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a"
    started, go_on = threading.Event(), threading.Event()

    def slowly(beside: Path) -> None:
        with beside.open("w") as file:
            file.write("first half, ")
            file.flush()
            started.set()
            go_on.wait(20)
            file.write("second half")

    first = threading.Thread(target=write_file, args=(path, slowly))
    first.start()
    assert started.wait(20)
    with pytest.raises(SoftguardError, match="a is being written by another process"):
        write_text(path, "other")
    go_on.set()
    first.join()
    assert path.read_text() == "first half, second half"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_without_a_name_is_no_file() -> None:
    with pytest.raises(SoftguardError, match=r"\. is a folder; name a file in it"):
        write_text(Path("."), "text")


def test_a_lock_is_held_by_one_alone(tmp_path: Path) -> None:
    lock, told = tmp_path / "made" / ".lock", "made is being written by another process"
    with alone(lock), pytest.raises(SoftguardError, match=told), alone(lock):
        pass
    with alone(lock):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(SoftguardError, match="could not be written"), alone(tmp_path / "file" / ".lock"):
        pass
