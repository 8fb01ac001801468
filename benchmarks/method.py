"""The method beside the paper's objectives, on prompts no one trained on, over seeds.

    python -m benchmarks.method [--model smollm2=smollm2 …] [--methods tv …] [--seeds 0 1 2] [--limit 200] [--set KEY=VALUE …]

Every cell, a model × method × seed, is a folder under runs/method and is not made again; a killed run goes on where it was. A
method's learning rate is the one with the least validation loss of its own objective at seed 0, on the packaged validation
split; the reported prompts are the packaged test split, HarmBench, XSTest, HarmBench's requests in "Do Anything Now"
templates, MMLU and GSM8K questions (by log-likelihood). Writes benchmarks/results/method.json and docs/method.md.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.record import RESULTS, machine
from softguard import stats
from softguard.adapters import Adapter
from softguard.config import Recipe, load_recipe
from softguard.corpus import Corpus, teach
from softguard.distill import distil
from softguard.evaluation import evaluate, read_results
from softguard.files import read_json, write_json, write_text
from softguard.models import BaseModel, load_base
from softguard.progress import Bars, Steps
from softguard.system import SafeSystem

DATA = Path("../shared/data")
RECIPE = Path("softguard/data/demo.yaml")
DOCS = Path("docs/method.md")
SUITES = [
    "harmful", "contrast", "everyday", "drift", f"file:{DATA}/eval_harmbench.jsonl", f"file:{DATA}/eval_xstest.jsonl",
    f"wrapped:{DATA}/eval_dan_templates.jsonl:{DATA}/eval_harmbench.jsonl", f"choices:{DATA}/use_mmlu_mobileaibench.jsonl",
    f"choices:{DATA}/use_gsm8k_mobileaibench.jsonl",
]  # fmt: skip


class Method(NamedTuple):
    """What differs between rows of the table; all else is the demo's recipe."""

    overrides: tuple[str, ...]
    rates: tuple[float, ...]


_PAPER = ("distil.safe_weight=1", "distil.drift_weight=null", "distil.length=mean")
METHODS = {
    "tv": Method((), (1e-2, 2e-2)),
    "tv-paper": Method(("distil.objective=tv-paper", *_PAPER), (5e-3, 1e-2, 2e-2)),
    "kl-paper": Method(("distil.objective=kl-paper", *_PAPER), (5e-3, 1e-2, 2e-2)),
    "tv, soft prompt": Method(("distil.adapter=soft_prompt", "distil.n_soft=32"), (2.5e-3,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["smollm2=smollm2"], metavar="NAME=SPEC")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=200, help="prompts a suite at most; 0 takes all")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="for all cells")
    parser.add_argument("--out", type=Path, default=Path("runs/method"))
    options = parser.parse_args()
    for pair in options.model:
        name, _, spec = pair.partition("=")
        study = _Study(options.out / name, name, spec, options.limit, options.overrides)
        for seed in options.seeds:  # all methods first, so that a run cut short compares them
            for method in options.methods:
                study.cell(method, seed)
                _write(options.out)


class _Study:
    """All cells of one base model."""

    def __init__(self, folder: Path, name: str, spec: str, limit: int, overrides: list[str]) -> None:
        self.folder, self.name, self.spec, self.limit, self.overrides = folder, name, spec, limit, overrides
        recipe = self.recipe(())
        self.base: BaseModel = load_base(spec, recipe.model.dtype)
        self.system = SafeSystem.from_config(recipe.system)
        with Bars() as bars:
            self.corpus: Corpus = teach(recipe, folder / "corpus", self.base, self.system, bars)
            evaluate(recipe, folder / "base", self.base, self.system, progress=bars)  # its answers serve all cells

    def recipe(self, overrides: tuple[str, ...]) -> Recipe:
        suites = f"evaluate.suites=[{', '.join(SUITES)}]"
        return load_recipe(
            RECIPE, [f"model.name={self.spec}", f"evaluate.limit={self.limit}", suites, *self.overrides, *overrides]
        )

    def cell(self, method: str, seed: int) -> None:
        """Train and measure one cell; its learning rate is chosen at seed 0."""
        rates = METHODS[method].rates
        losses = {rate: self._trained(method, rate, 0) for rate in rates} if len(rates) > 1 else {}
        rate = min(losses, key=losses.__getitem__) if losses else rates[0]
        self._trained(method, rate, seed)
        folder, recipe = self._place(method, rate, seed), self._recipe(method, rate, seed)
        if (folder / "cell.json").is_file():
            return
        shutil.copytree(self.folder / "base" / "answers", folder / "answers", dirs_exist_ok=True)
        with Bars() as bars:
            evaluate(recipe, folder, self.base, self.system, Adapter.load(folder, self.base), progress=bars)
        kept = {"model": self.name, "method": method, "seed": seed, "learning_rate": rate, "limit": self.limit}
        kept |= {
            "overrides": self.overrides,
            "validation_loss_by_rate": {str(k): v for k, v in losses.items()},
            "machine": machine(),
        }
        write_json(folder / "cell.json", kept | {"results": read_results(folder / "results.json")})

    def _trained(self, method: str, rate: float, seed: int) -> float:
        """Train one cell unless it is trained, and give its validation loss."""
        folder = self._place(method, rate, seed)
        if not (folder / "softguard.json").is_file():
            recipe = self._recipe(method, rate, seed)
            with Steps(recipe.distil.steps) as steps:
                distil(recipe, self.corpus, folder, self.base, steps)
        return float(read_json(folder / "softguard.json", "adapter")["validation_loss"])

    def _recipe(self, method: str, rate: float, seed: int) -> Recipe:
        return self.recipe((*METHODS[method].overrides, f"distil.learning_rate={rate}", f"seed={seed}"))

    def _place(self, method: str, rate: float, seed: int) -> Path:
        return self.folder / f"{method.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"


def _write(out: Path) -> None:
    """The JSON of all finished cells, and the table of their means."""
    cells = [json.loads(path.read_text()) for path in sorted(out.glob("*/*/cell.json"))]
    write_json(RESULTS / "method.json", {"command": "python -m benchmarks.method", "cells": cells})
    write_text(DOCS, _page(cells))


_ROWS = [
    ("harmful", "gap_closed", "safety gap closed, packaged test"),
    ("eval_harmbench-harmful", "gap_closed", "safety gap closed, HarmBench"),
    ("eval_dan_templates-eval_harmbench", "gap_closed", "safety gap closed, DAN-wrapped HarmBench"),
    ("eval_xstest-harmful", "gap_closed", "safety gap closed, XSTest unsafe"),
    ("everyday", "over_refusal", "over-refusal, everyday"),
    ("contrast", "over_refusal", "over-refusal, contrast"),
    ("eval_xstest-benign", "over_refusal", "over-refusal, XSTest safe"),
    ("drift", "token_tv", "token TV to the base"),
    ("drift", "perplexity_ratio", "perplexity of the base's answers, ratio"),
    ("use_mmlu_mobileaibench", "accuracy", "MMLU questions, accuracy"),
    ("use_mmlu_mobileaibench", "accuracy_change", "MMLU questions, change"),
    ("use_gsm8k_mobileaibench", "accuracy", "GSM8K questions, accuracy"),
    ("use_gsm8k_mobileaibench", "accuracy_change", "GSM8K questions, change"),
]


def _page(cells: list[dict[str, Any]]) -> str:
    """The table of every model: base, system, and the methods' means over seeds with the least and the most."""
    lines = [
        "# The method beside the paper's objectives",
        "",
        "Written by `python -m benchmarks.method`; every cell with its intervals over prompts is in",
        "`benchmarks/results/method.json`. Methods: mean over seeds [least, most]; base and system are the same for all.",
        "",
    ]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        mine = [cell for cell in cells if cell["model"] == model]
        methods = [method for method in METHODS if any(cell["method"] == method for cell in mine)]
        lines += [f"## {model}", ""]
        for method in methods:
            seeds = sorted(cell["seed"] for cell in mine if cell["method"] == method)
            rate = next(cell["learning_rate"] for cell in mine if cell["method"] == method)
            lines.append(f"- `{method}`: seeds {', '.join(map(str, seeds))}, learning rate {rate:g}")
        lines.append("")
        lines += ["| measure | n | base | safe system | " + " | ".join(methods) + " |", "|" + " --- |" * (4 + len(methods))]
        for suite, metric, title in _ROWS:
            values = {
                (system, method): _values(mine, system, method, suite, metric)
                for system, method in [("base", None), ("safe_system", None), *(("distilled", m) for m in methods)]
            }
            count = next((v.n for found in values.values() for v in found), 0)
            lines.append(f"| {title} | {count} | " + " | ".join(_shown(found) for found in values.values()) + " |")
        lines.append("")
    return "\n".join(lines)


def _values(cells: list[dict[str, Any]], system: str, method: str | None, suite: str, metric: str) -> list[stats.Estimate]:
    found = []
    for cell in cells:
        for row in cell["results"]["rows"]:
            if (row["system"], row["suite"], row["metric"]) == (system, suite, metric) and method in (None, cell["method"]):
                found.append(stats.Estimate(row["value"], row["low"], row["high"], row["n"]))
    return found[:1] if method is None else found


def _shown(found: list[stats.Estimate]) -> str:
    if not found:
        return "–"
    values = [v.value for v in found]
    if len(values) == 1:
        return f"{values[0]:.3f} ({found[0].low:.3f}–{found[0].high:.3f})"
    return f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


if __name__ == "__main__":
    main()
