"""How long the command and the package take to start, and a GGUF file to load, beside transformers alone.

python -m benchmarks.startup [--rounds 9]
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.record import alternate, arguments, keep, machine
from softguard.models import load_base, locate

SIDES = {
    "softguard --help": ["-m", "softguard.cli", "--help"],
    "import softguard": ["-c", "import softguard"],
    "python alone": ["-c", "pass"],
}


def main() -> None:
    options = arguments(__doc__, rounds=9).parse_args()
    before = machine(options.threads)

    def run(command: list[str]) -> None:
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)

    sides: dict[str, Callable[[], None]] = {name: partial(run, command) for name, command in SIDES.items()}
    timings = alternate({**sides, "load_base": load_base, "transformers alone": by_transformers}, options.rounds)
    keep("startup", [{"side": name, **timing.row()} for name, timing in timings.items()], before)


def by_transformers() -> None:
    """The demo model's file, as `load_base` has it read."""
    source, extra = locate("smollm2")
    AutoTokenizer.from_pretrained(source, **extra)
    AutoModelForCausalLM.from_pretrained(source, dtype="float32", **extra)


if __name__ == "__main__":
    main()
