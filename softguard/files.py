"""Artefacts are written beside their place and renamed into it, so that none is ever half there."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from softguard.errors import SoftguardError


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a path beside `path`, flush what it wrote to disk and rename it into place, where a link leads.

    Raises SoftguardError, with nothing left behind, if something else than a file is there, the disk is full or the folder
    cannot be written, or another process is writing the same file.
    """
    check_file(path)
    path = Path(os.path.realpath(path))
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "ab") as held:
            _hold(held, beside, path)
            try:
                write(beside)
                with open(beside, "rb") as handle:
                    os.fsync(handle.fileno())
                os.replace(beside, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    beside.unlink()
                raise
    except OSError as error:
        raise SoftguardError(
            f"{path} could not be written ({error.strerror or error}); free space or choose another folder"
        ) from error


def check_file(path: Path) -> None:
    """Raises SoftguardError if something is there that no file may take the place of: a folder, a device, a pipe."""
    if not path.name or os.path.isdir(path):
        raise SoftguardError(f"{path} is a folder; name a file in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise SoftguardError(f"{path} is a device or a pipe, which a file would replace; name a file")


def _hold(handle: IO[bytes], beside: Path, path: Path) -> None:
    """Lock the open file `beside`, alone among processes, to write `path`.

    Raises SoftguardError if another has it, or has just put it in place.
    """
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(handle.fileno()), beside.stat())
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:
        raise SoftguardError(f"{path} is being written by another process; let that one end, or choose another folder")


def check_folder(folder: Path, option: str = "--out") -> None:
    """Raises SoftguardError unless `folder`, of a command's `option`, can be written, or made where it is missing.

    Nothing is made.
    """
    try:
        there = next(place for place in (folder, *folder.parents) if _is_there(place))
    except OSError as error:
        raise SoftguardError(f"{folder} cannot be written ({error.strerror}); choose another {option}") from error
    if not there.is_dir():
        raise SoftguardError(f"{there} is not a folder, so that nothing can be written to it; choose another {option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SoftguardError(f"{there} cannot be written; choose another {option}")


def _is_there(place: Path) -> bool:
    try:
        os.lstat(place)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all; half a character, such as of a file's odd name, with a backslash."""
    write_file(path, lambda beside: beside.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, alone among processes; waits for whoever holds it. A process that dies lets go of it."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock file `path`. Raises SoftguardError if another process does, or if it cannot be made."""
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = held.enter_context(open(path, "ab"))
        except OSError as error:
            raise SoftguardError(f"{path} could not be written ({error.strerror}); choose another folder") from error
        _hold(handle, path, path.parent)
        yield


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object that softguard wrote. Raises SoftguardError naming `what` if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SoftguardError(f"{path.parent} holds no {what}: {path.name} is missing; check the path") from error
    except (OSError, ValueError) as error:
        raise SoftguardError(f"{path} is damaged ({error}); make the {what} again") from error
    if not isinstance(value, dict):
        raise SoftguardError(f"{path} is damaged (not a JSON object); make the {what} again")
    return value
