"""The whole way on the installed demo model: teach, distil, evaluate, report."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from softguard.config import Recipe, dump_recipe, load_recipe
from softguard.corpus import Corpus, check_teaching, teach
from softguard.distill import check_distil, check_run, distil
from softguard.engine import Engine
from softguard.evaluation import check_evaluation, evaluate
from softguard.files import read_json, write_text
from softguard.judges import load_judges
from softguard.models import BaseModel
from softguard.progress import Bars, Steps
from softguard.report import examples, table, write_report
from softguard.system import SafeSystem


def demo_recipe(path: Path | None, overrides: Sequence[str]) -> Recipe:
    """The packaged demo recipe, or the one at `path`, with overrides."""
    return load_recipe(path or Path(str(resources.files("softguard") / "data" / "demo.yaml")), overrides)


def demo_plan(recipe: Recipe, out: Path, base: BaseModel, system: SafeSystem) -> str:
    """What the demo would do. Raises SoftguardError for all that its stages can tell before the first begins."""
    engine = Engine(base)
    suites = check_evaluation(recipe, out, system, None, [engine], load_judges(recipe.evaluate))
    check_distil(recipe, out / "adapter", base)
    counts = check_teaching(recipe, out / "corpus", engine, system)
    manifest = out / "corpus" / "manifest.json"
    if manifest.is_file() and read_json(manifest, "corpus").get("fingerprint"):  # taught already
        check_run(recipe, Corpus.open(out / "corpus", base), out / "adapter", base)
    return (
        f"demo: teach on {counts['train']:,} prompts of {recipe.teach.prompts}, distil {recipe.distil.taken_steps} steps, "
        f"evaluate {', '.join(f'{suite.name} ({len(suite.prompts):,})' for suite in suites)} "
        "each; 15 to 20 minutes on two cores, about 6 where they multiply bfloat16; up to 5 GB of caches on disk"
    )


def demo(recipe: Recipe, out: Path, base: BaseModel, system: SafeSystem) -> str:
    """Run every stage into `out` and return what to print: the table and a few answers side by side.

    Leaves corpus/, adapter/, answers/, results.json, report.html, recipe.yaml and log.jsonl. Goes on where it was stopped.
    Raises SoftguardError as `demo_plan` does, before anything is made, and as `teach`, `distil` and `evaluate` do.
    """
    demo_plan(recipe, out, base, system)  # for what it raises
    with Bars() as bars:
        corpus = teach(recipe, out / "corpus", base, system, bars)
    with Steps(recipe.distil.taken_steps) as steps:
        adapter = distil(recipe, corpus, out / "adapter", base, steps)
    write_text(out / "recipe.yaml", dump_recipe(recipe))  # now that the folder is known to be this recipe's
    path = out / "adapter" / "log.jsonl"
    log = path.read_text(encoding="utf-8") if path.is_file() else ""  # nothing was trained
    write_text(out / "log.jsonl", log)
    with Bars() as bars:
        results = evaluate(recipe, out, base, system, adapter, progress=bars)
    contract = results.contract()
    prompts = {suite.name: list(suite.prompts) for suite in results.suites}
    answers = {str(name): texts for name, texts in results.answers.items()}
    lines = [json.loads(line) for line in log.splitlines()]
    write_report(contract, answers, prompts, results.refusals, lines, dump_recipe(recipe), out / "report.html")
    return f"{table(contract)}\n\n{examples(contract, answers, prompts, results.refusals)}\n\nreport: {out / 'report.html'}"
