"""Run the demo as a user does and keep its figures with what they were measured on.

    python -m benchmarks.demo [--out runs/demo] [--set section.key=value]

Writes benchmarks/results/demo.json: the demo's results.json, wall-clock seconds, peak memory, load and processor.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import RESULTS, cpu_flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    if (options.out / "results.json").exists():
        sys.exit(f"{options.out} holds a finished demo, whose time would not count; remove it or choose another --out")
    overrides = [item for o in options.overrides for item in ("--set", o)]
    load = os.getloadavg()
    begin = time.perf_counter()
    command = [sys.executable, "-m", "softguard.cli", "demo", "--out", str(options.out), *overrides]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - begin
    kept = {
        "command": "python -m benchmarks.demo" + "".join(f" --set {o}" for o in options.overrides),
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "cores": os.cpu_count(),
        "cpu_flags": cpu_flags(),
        "load_before": load,
        "load_after": os.getloadavg(),
        "results": json.loads((options.out / "results.json").read_text()),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "demo.json").write_text(json.dumps(kept, indent=2) + "\n")
    print(f"{seconds:.0f} s, {kept['peak_memory_gb']} GB; kept in {RESULTS / 'demo.json'}")


if __name__ == "__main__":
    main()
