import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker

from softguard.config import Recipe
from softguard.distill import Step
from softguard.errors import SoftguardError
from softguard.tracking import Tracker


class Notes(GeneralTracker):  # type: ignore[misc]  # untyped
    """A tracker that remembers."""

    name = "notes"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}
        self.lines: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.lines.append((step, values))


def test_every_line_of_the_log_reaches_the_tracker(tmp_path: Path) -> None:
    notes = Notes()
    with Tracker(notes, tmp_path, Recipe(seed=7)) as tracker:
        tracker(Step(1, "train", 0.5, 2.0))
        tracker(Step(1, "validation", 0.4, 1.5, 0.1, 0.9, 0.05))
    assert notes.lines[0] == (1, {"train/safe": 0.5, "train/refusal": 2.0})
    assert notes.lines[1][1]["validation/over_refuses"] == 0.05
    assert (notes.settings["seed.seed"], notes.settings["distil.objective"]) == ("7", "tv")


def test_a_tracker_that_is_not_installed_is_told_before_anything_else_is_begun() -> None:
    code = (
        "from pathlib import Path; from accelerate import tracking; from softguard.tracking import check_tracker\n"
        "tracking.get_available_trackers = lambda: []\n"
        "check_tracker(NAME, Path('.'))"
    )
    for name in ("'tensorboard'", "'all'"):
        command = [sys.executable, "-c", code.replace("NAME", name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # of no state yet
        assert f"tracker {name} cannot be used (it is not installed)" in done.stderr


def test_a_tracker_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SoftguardError, match=r"tracker 'aim' cannot be used .*; install it, or leave --track out"):
        Tracker("aim", tmp_path, Recipe())
