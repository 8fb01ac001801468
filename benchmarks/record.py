"""Time sides of a comparison in one run, alternating, and keep the figures with what they were measured on."""

import argparse
import csv
import ctypes
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "peft", "trl", "liger-kernel", "lm_eval")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")

Side = Callable[[], Any]


class Timing(NamedTuple):
    """Seconds of one side over the rounds, and the most memory one call took beyond what was there, in MB."""

    seconds: list[float]
    memory: float

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def row(self) -> dict[str, float]:
        """Median, least and most seconds, rounds and memory, as columns."""
        return {
            "seconds_median": round(self.median, 5),
            "seconds_min": round(min(self.seconds), 5),
            "seconds_max": round(max(self.seconds), 5),
            "rounds": len(self.seconds),
            "extra_memory_mb": round(self.memory, 1),
        }


def alternate(sides: Mapping[str, Side], rounds: int) -> dict[str, Timing]:
    """Run every side once untimed, where its memory is measured, then all of them in turn, `rounds` times.

    A side has ended when the GPU, where there is one, has done what it asked for, and memory is the GPU's.
    """
    from torch import cuda

    memory = {name: _extra_memory(side) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            if cuda.is_available():
                cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return {name: Timing(seconds[name], memory[name]) for name in sides}


def arguments(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def keep(name: str, rows: Sequence[Mapping[str, Any]], before: Mapping[str, Any], **more: Any) -> None:
    """Write `results/<name>.csv` and `.json`: the rows, and the machine as `before`, from `machine()`, and now."""
    RESULTS.mkdir(exist_ok=True)
    name = of_machine(name, before)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    kept = {**before, "load_after": os.getloadavg(), **more, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(f"kept in {RESULTS / name}.csv and .json")


def machine(threads: int = 0) -> dict[str, Any]:
    """Versions, threads, processor, GPU if there is one, and load; sets the number of threads if one is given."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    return {
        "versions": versions,
        **gpu,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu_flags": cpu_flags(),
        "load_before": os.getloadavg(),
    }


def of_machine(name: str, before: Mapping[str, Any]) -> str:
    """The name of a file of results, with an ending for machines whose figures stand beside the others: `-gpu`, `-plain` for a
    processor that does not multiply bfloat16, and `-vector` for one that does, but by vectors (AVX-512), not by tiles (AMX).
    """
    if "gpu" in before:
        return f"{name}-gpu"
    if not multiplies_bfloat16(before):
        return f"{name}-plain"
    return name if "amx_bf16" in before["cpu_flags"] else f"{name}-vector"


def multiplies_bfloat16(before: Mapping[str, Any]) -> bool:
    """Whether the machine `before`, from `machine()`, does; one that does not is timed in float32 alone."""
    return "gpu" in before or any(flag.endswith("bf16") for flag in before["cpu_flags"])


def cpu_flags() -> list[str]:
    """Which of the instruction sets that matter here the processor has."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in _FLAGS if flag in flags]


def _extra_memory(side: Side) -> float:
    """MB by which one call's peak passed what was held before it: of the GPU, or of the process, whose peak Linux resets."""
    from torch import cuda

    gc.collect()
    if cuda.is_available():
        side()  # what is made once, by the first call, is not this one's
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        held = cuda.memory_allocated()
        side()
        cuda.synchronize()
        return (cuda.max_memory_allocated() - held) / 1e6
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    side()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
