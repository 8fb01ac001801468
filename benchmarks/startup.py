"""How long the command and the package take to start.

python -m benchmarks.startup [--rounds 9]
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial

from benchmarks.record import alternate, arguments, keep, machine

SIDES = {
    "softguard --help": ["-m", "softguard.cli", "--help"],
    "import softguard": ["-c", "import softguard"],
    "python alone": ["-c", "pass"],
}


def main() -> None:
    options = arguments(__doc__, rounds=9).parse_args()
    before = machine()

    def run(command: list[str]) -> None:
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)

    sides: dict[str, Callable[[], None]] = {name: partial(run, command) for name, command in SIDES.items()}
    timings = alternate(sides, options.rounds)
    keep("startup", [{"side": name, **timing.row()} for name, timing in timings.items()], before)


if __name__ == "__main__":
    main()
