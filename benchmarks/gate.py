"""One training step of a gate, the default adapter: written out, from kept caches, by transformers, and its own products.

    python -m benchmarks.gate [--rounds 5] [--threads 2] [--batch 16]

SmolLM2-135M-Instruct, 8 positions, packaged prompts of unlike lengths, a new batch every round and the same for all sides;
backward and optimiser step included. "from kept caches" has the base's keys and values of the prompts in memory, as
`teach.keep_caches` has them on disk, and runs the closings alone. "by transformers" is the way of models that `frozen` does
not know: rows padded in groups of like length, a pass of closings for each group. "products" replays the matrix products of
the written-out step on the first batch, in its precision, alone.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

from benchmarks.record import alternate, arguments, keep, machine
from benchmarks.step import Answers, products
from softguard import frozen
from softguard.config import load_recipe
from softguard.corpus import Corpus, Draw, Example
from softguard.distill import _Trainer
from softguard.engine import Engine
from softguard.models import BaseModel, load_base
from softguard.prompts import packaged_suite, thin

N_SOFT = 8


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    before = machine(options.threads)
    base = load_base(dtype="auto")
    timings = alternate(sides(base, options.batch), options.rounds)
    ours = timings["softguard"]
    rows = [
        {"side": name, **timing.row(), "over_softguard": round(timing.median / ours.median, 2)}
        for name, timing in timings.items()
    ]
    keep("gate", rows, before, batch=options.batch, n_soft=N_SOFT, dtype=str(base.model.dtype))


def sides(base: BaseModel, batch: int) -> dict[str, Callable[[], Any]]:
    """What takes turns; the n-th call of every side trains on the n-th batch."""
    ours, theirs, cached = our_trainer(base, batch), our_trainer(base, batch), our_trainer(base, batch)
    examples = cast(Answers, cached.corpus).all
    caches = Engine(base).caches([e.prompt for e in examples])
    examples[:] = [e._replace(cache=cache) for e, cache in zip(examples, caches, strict=True)]
    with patch.object(frozen, "is_plain", lambda decoder: False):
        theirs.passes._resident  # noqa: B018  # is kept once it is made

    def step(trainer: _Trainer) -> Callable[[], Any]:
        numbers = count()

        def one() -> Any:
            start = next(numbers) * batch % (trainer.corpus.size("train") - batch)
            return trainer._train_step(list(range(start, start + batch)), 0)

        return one

    return {
        "softguard": step(ours),
        "from kept caches": step(cached),
        "by transformers": step(theirs),
        "products of softguard": products(base, lambda: ours._train_step(list(range(batch)), 0)),
    }


def our_trainer(base: BaseModel, batch: int) -> _Trainer:
    """A trainer of a gate on packaged prompts, harmful and harmless in turn."""
    recipe = load_recipe(None, ["distil.adapter=gate", f"distil.n_soft={N_SOFT}", f"distil.batch_size={batch}"])
    trainer = _Trainer(recipe, cast(Corpus, Answers([], base.precision)), Path("unused"), base)
    suites = [(suite, float(suite == "harmful")) for suite in ("harmful", "contrast", "everyday")]
    sorts = [[(p.text, rate) for p in thin(packaged_suite(suite, "train"), 400)] for suite, rate in suites]
    draw = Draw((), 0.5, 0.5)
    examples = [Example(text, "", rate, (draw,)) for sort in zip(*sorts, strict=True) for text, rate in sort]
    trainer.corpus = cast(Corpus, Answers(examples, base.precision))
    return trainer


if __name__ == "__main__":
    main()
