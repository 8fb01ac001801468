"""Run the demo as a user does, or its adapter on the whole test split, and keep the figures with what they were measured on.

    python -m benchmarks.demo [--out runs/demo] [--whole]

Writes benchmarks/results/demo.json, or with --whole, after a demo, demo-full-test.json, with the machine's ending
(`record.of_machine`): the results.json, wall-clock seconds, peak memory, load and processor.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import RESULTS, cpu_flags, of_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--whole", action="store_true", help="evaluate the finished demo's adapter on the whole test split")
    options = parser.parse_args()
    if (options.out / "results.json").exists() != options.whole:
        sys.exit(f"{options.out} must hold a finished demo for --whole, and none without; choose another --out")
    if options.whole:
        recipe = ["--recipe", str(options.out / "recipe.yaml"), "--set", "evaluate.limit=0"]
        out = options.out / "whole"
        _keep("demo-full-test", ["evaluate", *recipe, "--adapter", str(options.out / "adapter"), "--out", str(out)], out)
    else:
        _keep("demo", ["demo", "--out", str(options.out)], options.out)


def _keep(name: str, arguments: list[str], out: Path) -> None:
    """Run a softguard command and keep the results it writes to `out`."""
    load = os.getloadavg()
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "softguard.cli", *arguments], check=True)
    seconds = time.perf_counter() - begin
    kept = {
        "command": "softguard " + " ".join(arguments),
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "cores": os.cpu_count(),
        "cpu_flags": cpu_flags(),
        "load_before": load,
        "load_after": os.getloadavg(),
        "results": json.loads((out / "results.json").read_text()),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{of_machine(name, kept)}.json"
    path.write_text(json.dumps(kept, indent=2) + "\n")
    print(f"{seconds:.0f} s, {kept['peak_memory_gb']} GB; kept in {path}")


if __name__ == "__main__":
    main()
