"""The whole way on the installed demo model: teach, distil, evaluate, report."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from softguard.config import Recipe, dump_recipe, load_recipe
from softguard.corpus import teach
from softguard.distill import distil
from softguard.evaluation import evaluate
from softguard.files import write_text
from softguard.models import BaseModel
from softguard.progress import Bars, Steps
from softguard.report import examples, table, write_report
from softguard.system import SafeSystem


def demo_recipe(path: Path | None, overrides: Sequence[str]) -> Recipe:
    """The packaged demo recipe, or the one at `path`, with overrides."""
    return load_recipe(path or Path(str(resources.files("softguard") / "data" / "demo.yaml")), overrides)


def demo_plan(recipe: Recipe) -> str:
    """What the demo would do."""
    return (
        f"demo: teach on {recipe.teach.limit or 'all'} prompts of {recipe.teach.prompts}, distil {recipe.distil.steps} steps, "
        f"evaluate {', '.join(recipe.evaluate.suites)} on {recipe.evaluate.limit or 'all'} test prompts "
        "each; about 20 minutes on two cores, less where they multiply bfloat16; up to 5 GB of caches on disk"
    )


def demo(recipe: Recipe, out: Path, base: BaseModel, system: SafeSystem) -> str:
    """Run every stage into `out` and return what to print: the table and a few answers side by side.

    Leaves corpus/, adapter/, answers/, results.json, report.html, recipe.yaml and log.jsonl. Goes on where it was stopped.
    """
    write_text(out / "recipe.yaml", dump_recipe(recipe))
    with Bars() as bars:
        corpus = teach(recipe, out / "corpus", base, system, bars)
    with Steps(recipe.distil.steps) as steps:
        adapter = distil(recipe, corpus, out / "adapter", base, steps)
    log = (out / "adapter" / "log.jsonl").read_text(encoding="utf-8")
    write_text(out / "log.jsonl", log)
    with Bars() as bars:
        results = evaluate(recipe, out, base, system, adapter, progress=bars)
    contract = results.contract()
    prompts = {suite.name: list(suite.prompts) for suite in results.suites}
    answers = {str(name): texts for name, texts in results.answers.items()}
    lines = [json.loads(line) for line in log.splitlines()]
    write_report(contract, answers, prompts, lines, dump_recipe(recipe), out / "report.html")
    return f"{table(contract)}\n\n{examples(contract, answers, prompts)}\n\nreport: {out / 'report.html'}"
