"""The command line: every subcommand reads a recipe, calls one public function and prints what came of it."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from softguard import __version__
from softguard.errors import SoftguardError

if TYPE_CHECKING:
    from softguard.config import Recipe
    from softguard.models import BaseModel
    from softguard.system import SafeSystem

_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for an error told in one line, 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a name that is not UTF-8 must not end work that is done
    options = _parser().parse_args(arguments)
    _ask_for_large_pages()
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        sys.path.append(os.getcwd())  # "mine:guard" is found beside the recipe; last, so that it hides no installed package
        run(options)
    except SoftguardError as error:
        print(f"softguard: {' '.join(str(error).split())}", file=sys.stderr)  # one line, whatever was told of the cause
        return 2
    except OSError as error:  # a full disk, a file that vanished
        print(f"softguard: {error.filename or 'the system'}: {' '.join(str(error.strerror or error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = run in (_teach, _distil, _evaluate, _study, _demo)
        told = "the same command goes on where it was" if goes_on else "nothing was kept"
        print(f"softguard: interrupted; {told}", file=sys.stderr)
        return 130
    return 0


def _ask_for_large_pages() -> None:
    """Where Linux has them, PyTorch's memory comes in pages of 2 MB, unless the environment says otherwise.

    Up to a sixth of a command's time is the kernel's, handing out small ones. PyTorch reads this once, when it is first used.
    """
    if _LARGE_PAGES.is_dir():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _path(text: str) -> Path:
    if not text.strip():  # as of a shell's variable that is not set; it would be the current folder
        raise argparse.ArgumentTypeError("is empty; name a file or a folder")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softguard",
        description="Distil a language model and its guard into a few vectors beside the same frozen model.",
        epilog="Set any recipe value with --set section.key=value, for example --set model.name=path/to/model.gguf.",
    )
    parser.add_argument("--version", action="version", version=f"softguard {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    teach = _command(commands, "teach", _teach, "prompts to corpus: draw responses from the base and score them with the guard")
    teach.add_argument("--out", type=_path, required=True, help="folder of the corpus")

    distil = _command(commands, "distil", _distil, "corpus to adapter: train it")
    distil.add_argument("--corpus", type=_path, required=True, help="folder that `teach` made")
    distil.add_argument("--out", type=_path, required=True, help="folder of the adapter; holds the checkpoint while it trains")
    distil.add_argument("--track", metavar="NAME", help="also log to tensorboard, wandb, trackio, …, if installed")

    evaluate = _command(commands, "evaluate", _evaluate, "measure base, safe system and, given an adapter, base + adapter")
    evaluate.add_argument("--adapter", type=_path, help="folder that `distil` made")
    evaluate.add_argument("--out", type=_path, required=True, help="folder of results.json and the answers")

    study = _command(commands, "study", _study, "run a grid of cells, or make figures and tables of those that are done", _GRID)
    study.add_argument("--out", type=_path, required=True, help="folder of the study; of the same folder a killed run goes on")
    study.add_argument("--workers", type=int, default=1, help="processes of this machine that take cells (default 1)")
    study.add_argument("--ray-address", metavar="ADDRESS", help="Ray cluster that takes cells: HOST:PORT, auto or local")
    study.add_argument("--report", type=_path, metavar="FOLDER", help="run nothing; write figures and tables to this folder")
    study.add_argument("--page", type=_path, help="the page about them (default FOLDER/study.md)")
    also = "cells.parquet of a run elsewhere, to join in the report"
    study.add_argument("--also", type=_path, action="append", default=[], metavar="TABLE", help=also)

    chat = _command(commands, "chat", _chat, "talk to the base with the adapter; an empty line ends the conversation")
    chat.add_argument(
        "--adapter",
        type=_path,
        help="folder that `distil` made, or none for the base alone; left out: the one packaged for this model, if any",
    )
    chat.add_argument("--compare", action="store_true", help="show the base's answer before the adapter's")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="tokens an answer may have (default 256)")

    guard = commands.add_parser(
        "guard", help="fit or use a guard", description="Fit a guard of the bundled kind, or score a file."
    )
    guards = guard.add_subparsers(metavar="action", required=True)
    fit = _command(guards, "fit", _guard_fit, "train a guard of the bundled kind on labelled rows", _FIT)
    fit.add_argument("data", type=_path, nargs="+", help="JSONL, CSV or Parquet files")
    fit.add_argument("--out", type=_path, required=True, help="folder of the guard")
    score = _command(guards, "score", _guard_score, "write p(safe) of every row of a file, by the guard of the recipe")
    score.add_argument("data", type=_path, help="rows with `prompt` and, for the response question, `response`")
    score.add_argument("--out", type=_path, required=True, help="JSONL to write")

    demo = _command(commands, "demo", _demo, "the whole way on the installed demo model, with a report")
    demo.add_argument("--out", type=_path, default=Path("runs/demo"), help="folder of everything it makes (default runs/demo)")
    return parser


_GRID = (
    "The recipe is an ordinary one with a section `study`, see softguard.study.grid and recipes/study-small.yaml. The cells "
    "become rows of cells.parquet."
)
_FIT = (
    "Rows are JSON objects with `prompt`, `label` (harmful or benign) and, optionally, `response` with `unsafe` (0 or 1). "
    "A fifth of the prompts is held out for calibration and for the figures on the guard's card."
)


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
    more: str = "",
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}")
    if name == "study":
        command.add_argument("recipe", type=_path, help="YAML recipe with a section `study`")
    else:
        command.add_argument("--recipe", type=_path, help="YAML recipe; defaults are used for what it leaves out")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one recipe value; may be repeated",
    )
    command.add_argument("--dry-run", action="store_true", help="check everything, say what would run and roughly how long")
    command.set_defaults(run=run)
    return command


def _recipe(options: argparse.Namespace) -> "Recipe":
    from softguard.config import load_recipe

    return load_recipe(options.recipe, options.overrides)


def _base(recipe: "Recipe") -> "BaseModel":
    from softguard.models import base_of

    print(f"loading {recipe.model.name} …", file=sys.stderr)
    return base_of(recipe.model)


def _system(recipe: "Recipe") -> "SafeSystem":
    from softguard.system import SafeSystem

    return SafeSystem.from_config(recipe.system)


def _teach(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from softguard.corpus import teach
    from softguard.distill import check_distil
    from softguard.estimate import teach_plan
    from softguard.progress import Bars

    system, base = _system(recipe), _base(recipe)
    check_distil(recipe, options.out, base)  # what cannot be distilled need not be taught
    if options.dry_run:
        print(teach_plan(recipe, options.out, base, system))
        return
    with Bars() as bars:
        corpus = teach(recipe, options.out, base, system, bars)
    print(f"corpus {corpus.fingerprint} with {corpus.size('train'):,} + {corpus.size('validation'):,} prompts in {options.out}")


def _distil(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from softguard.corpus import Corpus
    from softguard.distill import Step, check_run, distil
    from softguard.estimate import distil_plan
    from softguard.progress import Steps
    from softguard.tracking import Tracker, check_tracker

    Corpus.open(options.corpus)  # before the model is loaded for nothing
    base = _base(recipe)
    corpus = Corpus.open(options.corpus, base)
    if options.dry_run:
        plan = distil_plan(recipe, corpus, options.out, base)
        if options.track:
            check_tracker(options.track, options.out)
        print(plan)
        return
    check_run(recipe, corpus, options.out, base)  # before a tracker begins a run
    with ExitStack() as open_:
        listeners: list[Callable[[Step], None]] = [open_.enter_context(Steps(recipe.distil.taken_steps))]
        if options.track:
            listeners.append(open_.enter_context(Tracker(options.track, options.out, recipe)))

        def told(step: Step) -> None:
            for listen in listeners:
                listen(step)

        adapter = distil(recipe, corpus, options.out, base, told)
    print(f"{adapter.description}, in {options.out}")


def _evaluate(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from softguard.adapters import Adapter
    from softguard.estimate import evaluate_plan
    from softguard.evaluation import evaluate
    from softguard.judges import load_judges
    from softguard.progress import Bars
    from softguard.report import table
    from softguard.suites import load_suites

    load_suites(recipe.evaluate.suites, recipe.evaluate.split, recipe.evaluate.limit)  # before the model is loaded for nothing
    judges = load_judges(recipe.evaluate)
    system, base = _system(recipe), _base(recipe)
    adapter = Adapter.load(options.adapter, base) if options.adapter else None
    if options.dry_run:
        print(evaluate_plan(recipe, options.out, base, system, adapter, judges))
        return
    with Bars() as bars:
        results = evaluate(recipe, options.out, base, system, adapter, judges, bars)
    print(table(results.contract()))
    print(f"written to {options.out / 'results.json'}")


def _study(options: argparse.Namespace) -> None:
    from softguard.study import NAME, load_grid, run_study

    if options.workers < 1:
        raise SoftguardError(f"--workers is {options.workers}; it must be at least 1")
    if options.ray_address and options.workers > 1:
        raise SoftguardError("--workers counts processes of this machine; leave it out with --ray-address")
    for name in ("page", "also"):
        if getattr(options, name) and not options.report:
            raise SoftguardError(f"--{name} belongs to a report; give --report FOLDER too")
    grid = load_grid(options.recipe, options.overrides)
    if options.report:
        from softguard.report.study import report_plan, write_study

        tables, page = [options.out / NAME, *options.also], options.page or options.report / "study.md"
        if options.dry_run:
            print(report_plan(tables, grid.pareto, options.report, page))
            return
        write_study(tables, grid.pareto, options.report, page)
        print(f"written to {options.report} and {page}")
    elif options.dry_run:
        from softguard.study.plan import study_plan

        print(study_plan(grid, options.out, options.workers, options.ray_address))
    else:
        print(
            f"written to {run_study(grid, options.out, options.workers, options.ray_address, partial(print, file=sys.stderr))}"
        )


def _chat(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from softguard.adapters import Adapter
    from softguard.conversation import check_conversation, converse
    from softguard.engine import Engine
    from softguard.released import released_adapter

    if options.max_new_tokens < 1:
        raise SoftguardError(f"--max-new-tokens is {options.max_new_tokens}; it must be at least 1")
    base = _base(recipe)
    if options.adapter == Path("none"):
        adapter = None
    else:
        adapter = Adapter.load(options.adapter, base) if options.adapter else released_adapter(base)
        if adapter is None:
            print(f"no adapter is packaged for {base.name}: this is the base alone; distil one for --adapter", file=sys.stderr)
    if options.compare and adapter is None:
        raise SoftguardError("--compare needs --adapter, the folder that `distil` made")
    engines = {}
    if options.compare or adapter is None:
        engines["base"] = Engine(base)
    if adapter is not None:
        engines["distilled"] = Engine(base, adapter)
    check_conversation(engines, options.max_new_tokens)
    if options.dry_run:
        print(f"chat: would talk to {' and '.join(engines)} until an empty line")
        return
    converse(engines, options.max_new_tokens)


def _guard_fit(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from softguard.guards.fit import check_fit, fit_guard

    if options.dry_run:
        sources = check_fit(options.data, options.out, recipe.guard).sources
        counts = ", ".join(f"{path} ({source['rows']:,} rows)" for path, source in zip(options.data, sources, strict=True))
        print(f"guard fit: would train on {counts} and write {options.out}; minutes for some thousand rows")
        return
    told = partial(print, file=sys.stderr)
    guard = fit_guard(options.data, options.out, recipe.guard, told=told, seed=recipe.seed)
    print(f"guard {guard.name} ({guard.fingerprint}) in {options.out}; its figures are in card.json")


def _guard_score(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from softguard.guards import load_guard
    from softguard.guards.score import check_scoring, score_file

    guard = load_guard(recipe.system.guard)
    if options.dry_run:
        count = check_scoring(guard, options.data, options.out)
        print(f"guard score: would write {count:,} rows with p_safe by {guard.name} to {options.out}")
        return
    count = score_file(guard, options.data, options.out)
    print(f"{count:,} rows with p_safe in {options.out}")


def _demo(options: argparse.Namespace) -> None:
    from softguard.demo import demo, demo_plan, demo_recipe

    recipe = demo_recipe(options.recipe, options.overrides)
    system, base = _system(recipe), _base(recipe)
    if options.dry_run:
        print(demo_plan(recipe, options.out, base, system))
        return
    print(demo(recipe, options.out, base, system))


if __name__ == "__main__":
    sys.exit(main())
