"""How time and memory grow: corpus from 1,000 to 100,000 prompts, training with length of the rows, with that of one row among
short ones, and with their number.

    python -m benchmarks.growth [--rounds 3] [--threads 2]

The corpus is drawn from a two-layer random model and scored by a function, so that what is measured is the corpus's own
work, each size in a process of its own; training steps are SmolLM2-135M-Instruct's. Also draws docs/growth.svg, with the
ending of the results' files.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

from benchmarks.record import alternate, arguments, keep, machine, of_machine

CORPUS = (1_000, 3_000, 10_000, 30_000, 100_000)
LENGTHS = (128, 256, 512, 1_024, 2_048)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--corpus", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    before = machine(options.threads)
    if options.corpus:
        print(json.dumps(_corpus(options.corpus)))
        return
    rows: list[dict[str, Any]] = []
    for prompts in CORPUS:
        command = [sys.executable, "-m", "benchmarks.growth", "--corpus", str(prompts), "--threads", str(options.threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    rows += _steps(options.rounds)
    keep("growth", rows, before)
    Path("docs", f"{of_machine('growth', before)}.svg").write_text(_figure(rows), encoding="utf-8")


def _corpus(prompts: int) -> dict[str, Any]:
    """Teach and read back a corpus of so many prompts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from softguard.config import load_recipe
    from softguard.corpus import teach
    from softguard.guards import load_guard
    from softguard.models import BaseModel, fingerprint, load_base
    from softguard.system import SafeSystem

    real = load_base(dtype="auto")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(real.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    base = BaseModel("two random layers", model, real.tokenizer, fingerprint(model, real.tokenizer))
    del real
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "prompts.txt"
        with source.open("w") as file:
            file.writelines(f"How many boats of size {i} fit a harbour of {i % 97} berths?\n" for i in range(prompts))
        wanted = load_recipe(
            None, [f"teach.prompts={source}", "teach.validation_limit=1", "teach.max_new_tokens=2",
                   "system.guard=benchmarks.growth:even"],
        )  # fmt: skip
        system = SafeSystem.from_config(wanted.system, load_guard(wanted.system.guard))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        begin = time.perf_counter()
        corpus = teach(wanted, Path(folder) / "corpus", base, system)
        taught = time.perf_counter() - begin
        some = range(0, prompts, max(1, prompts // 800))
        begin = time.perf_counter()
        for number in some:
            corpus.examples("train", [number])
        read = (time.perf_counter() - begin) / len(some)
        size = sum(f.stat().st_size for f in (Path(folder) / "corpus").rglob("*") if f.is_file())
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - memory
    return {
        "what": "corpus", "size": prompts, "seconds_median": round(taught, 2), "extra_memory_mb": round(extra, 1),
        "milliseconds_an_example_read": round(1000 * read, 3), "megabytes_on_disk": round(size / 1e6, 2),
    }  # fmt: skip


def even(prompts: list[str], responses: list[str] | None) -> list[float]:
    """A guard that looks at a prompt's length alone."""
    return [1.0 if len(prompt) % 2 else 0.0 for prompt in prompts]


def _steps(rounds: int) -> list[dict[str, Any]]:
    from benchmarks.step import Answers, Shape, our_trainer
    from softguard.models import load_base

    base = load_base(dtype="auto")
    rows = []
    shorts = Shape(15, 60, 64)
    shapes = [("row length, batch 4", n, [Shape(4, n // 2, n // 2)]) for n in LENGTHS]
    shapes += [("batch, 60 + 64 tokens", n, [Shape(n, 60, 64)]) for n in BATCHES]
    shapes += [("tokens, one long row among 15 of 124", 15 * 124 + n, [Shape(1, n - 64, 64), shorts]) for n in LENGTHS]
    for what, size, together in shapes:
        trainer, *others = (our_trainer(base, shape, keep_hidden=False) for shape in together)
        answers = cast(Answers, trainer.corpus).all
        answers += [example for other in others for example in cast(Answers, other.corpus).all]
        timing = alternate({"step": partial(trainer._train_step, list(range(len(answers))), 0)}, rounds)["step"]
        rows.append({"what": what, "size": size, **timing.row()})
        print(rows[-1], flush=True)
    return rows


def _figure(rows: list[dict[str, Any]]) -> str:
    """Seconds over size on logarithmic axes, one panel for each of `what`, with a line of slope one through the first point."""
    panels = list(dict.fromkeys(row["what"] for row in rows))
    parts = []
    for number, what in enumerate(panels):
        points = [(row["size"], row["seconds_median"]) for row in rows if row["what"] == what]
        xs, ys = [math.log10(x) for x, _ in points], [math.log10(y) for _, y in points]
        low, span_x = min(ys[0], min(ys)), xs[-1] - xs[0]
        span_y = max(max(ys) - low, span_x)

        def place(x: float, y: float, left: float = 60 + 250 * number, x0: float = xs[0], sx: float = span_x,
                  y0: float = low, sy: float = span_y) -> str:  # fmt: skip
            return f"{left + 170 * (x - x0) / sx:.1f},{200 - 150 * (y - y0) / sy:.1f}"

        slope = f"{place(xs[0], ys[0])} {place(xs[-1], ys[0] + span_x)}"
        parts.append(f'<polyline points="{slope}" stroke="#999" stroke-dasharray="4 4" fill="none"/>')
        curve = " ".join(place(x, y) for x, y in zip(xs, ys, strict=True))
        parts.append(f'<polyline points="{curve}" stroke="#0b62a4" stroke-width="2" fill="none"/>')
        for x, y, (size, seconds) in zip(xs, ys, points, strict=True):
            cx, cy = place(x, y).split(",")
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="3" fill="#0b62a4"/>')
            parts.append(f'<text x="{cx}" y="{float(cy) - 8:.1f}" text-anchor="end">{seconds:.3g} s</text>')
            parts.append(f'<text x="{cx}" y="222" text-anchor="middle">{size:,}</text>')
        parts.append(f'<text x="{60 + 250 * number}" y="24" font-weight="bold">{what}</text>')
    style = "font-family='sans-serif' font-size='10' fill='#222'"
    body = "".join(parts)
    return f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {60 + 250 * len(panels)} 240' {style}>{body}</svg>\n"


if __name__ == "__main__":
    main()
