"""Run the command line as a user does, in a process of its own, and kill it half-way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def softguard(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `softguard ARGUMENTS` to its end."""
    return run_module("softguard.cli", *arguments, **options)


def run_module(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGUMENTS` to its end."""
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=_ENVIRONMENT, timeout=280, **options)  # type: ignore[call-overload,no-any-return]


def softguard_killed(*arguments: object, when: Callable[[], bool]) -> None:
    """Run `softguard ARGUMENTS` and kill it with SIGKILL as soon as `when()` holds."""
    command = [sys.executable, "-m", "softguard.cli", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_ENVIRONMENT) as process:
        deadline = time.monotonic() + 200
        while not when():
            assert process.poll() is None, "the command ended before it could be killed"
            assert time.monotonic() < deadline, "the moment to kill the command never came"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
