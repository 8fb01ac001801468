"""Train, measure and package a released adapter.

    python recipes/build_adapter.py recipes/released/smollm2.yaml [--set model.name=PATH] [--data ../shared/data]

Works in runs/released/<name>, where a killed run goes on; writes softguard/data/adapters/<name>: the adapter, its recipe and
`card.json` with its figures on prompts it was not trained on. With `--measure` the packaged adapter is not trained again, only
its recipe and card are written.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from softguard.adapters import Adapter
from softguard.config import dump_recipe, load_recipe
from softguard.corpus import teach
from softguard.distill import distil
from softguard.errors import SoftguardError
from softguard.evaluation import evaluate
from softguard.files import write_json, write_text
from softguard.models import base_of
from softguard.progress import Bars, Steps
from softguard.released import FOLDER
from softguard.suites import load_suites
from softguard.system import SafeSystem

_LIMIT = 200_000  # bytes of all files of one adapter together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--measure", action="store_true", help="measure the packaged adapter again instead of training one")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with HarmBench, XSTest and DAN")
    options = parser.parse_args()
    dan, harmbench, xstest = (f"{options.data}/eval_{name}.jsonl" for name in ("dan_templates", "harmbench", "xstest"))
    public = [f"file:{harmbench}", f"file:{xstest}", f"wrapped:{dan}:{harmbench}"]
    recipe = load_recipe(options.recipe, options.overrides)
    asked = load_recipe(options.recipe, [*options.overrides, f"evaluate.suites={[*recipe.evaluate.suites, *public]}"])
    work, name = Path("runs/released") / options.recipe.stem, options.recipe.stem
    load_suites(asked.evaluate.suites, asked.evaluate.split, asked.evaluate.limit)  # before anything is trained for nothing
    base, system = base_of(recipe.model), SafeSystem.from_config(recipe.system)
    if not options.measure:
        with Bars() as bars:
            corpus = teach(recipe, work / "corpus", base, system, bars)
        with Steps(recipe.distil.taken_steps) as steps:
            distil(recipe, corpus, work / "adapter", base, steps)
    adapter = Adapter.load(FOLDER / name if options.measure else work / "adapter", base)
    with Bars() as bars:
        results = evaluate(asked, work / "results", base, system, adapter, progress=bars)
    if not options.measure:
        package(work / "adapter", FOLDER / name)
    changed = [change for change in options.overrides if not change.startswith("model.name=")]  # a path of this machine
    kept = load_recipe(options.recipe, changed)
    write_text(FOLDER / name / "recipe.yaml", dump_recipe(kept))
    how = ["--measure"] if options.measure else []
    command = " ".join(
        ["python recipes/build_adapter.py", str(options.recipe), *how, *(f"--set {change}" for change in changed)]
    )
    write_json(FOLDER / name / "card.json", rounded({"command": command, **results.contract(), "model": kept.model.name}))
    size = sum(path.stat().st_size for path in (FOLDER / name).iterdir())
    if size > _LIMIT:
        raise SystemExit(f"{FOLDER / name} holds {size:,} bytes, more than {_LIMIT:,}; lower distil.n_soft")
    print(f"{FOLDER / name}: {size:,} bytes")


def rounded(value: Any) -> Any:
    """JSON with six digits of every figure, more than any has a meaning of: a card counts among the adapter's bytes."""
    return json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.6g}"))


def package(trained: Path, out: Path) -> None:
    """Copy a gate's files; the seal comes last, so that a half-copied adapter is refused."""
    shutil.rmtree(out, ignore_errors=True)  # files of an adapter of another kind among them
    out.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "softguard.json"):
        shutil.copyfile(trained / name, out / name)


if __name__ == "__main__":
    try:
        main()
    except SoftguardError as error:
        print(f"build_adapter: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
