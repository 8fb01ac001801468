"""Drawing answers beside transformers `generate`, each at its best batch size: tokens a second, up to 64 tokens a prompt.

    python -m benchmarks.draw [--rounds 5] [--threads 2] [--prompts 256] [--peer-prompts 64]

Both sample at temperature 1 from SmolLM2-135M-Instruct in bfloat16 where the processor multiplies it, on packaged prompts.
"products" replays the matrix products of ours alone, as `benchmarks.step` does: what would be left if all else were free.
`generate` gets a share of the prompts, at least one batch, whose speed a prompt does not depend on how many there are; its
batch size is chosen by a trial of one batch each. On a GPU it also takes its static cache, with the step compiled, all its
prompts in one batch, since every other shape is compiled anew.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.record import alternate, arguments, keep, machine
from benchmarks.sample import SIZES, engine_and_texts
from benchmarks.step import products
from softguard.chat import Chat, align
from softguard.engine import Engine
from softguard.models import BaseModel
from softguard.prompts import thin

TOKENS = 64


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--peer-prompts", type=int, default=64)
    options = parser.parse_args()
    before = machine(options.threads)
    engine, texts = engine_and_texts("train", options.prompts)
    base = engine.base
    ours, our_trials = _best(lambda size, some: draw(engine, some, size), texts)
    peer, peer_trials = _best(lambda size, some: generate(base, engine.chat, some, size), texts)
    some = thin(texts, max(options.peer_prompts, peer))
    sides: dict[str, Callable[[], int]] = {
        "softguard": lambda: draw(engine, texts, ours),
        "transformers generate": lambda: generate(base, engine.chat, some, peer),
    }
    if base.device.type == "cuda":
        sides["transformers generate, static cache"] = lambda: generate(base, engine.chat, some, len(some), "static")
    made: dict[str, list[int]] = {name: [] for name in sides}
    noted = {name: partial(_noted, made[name], side) for name, side in sides.items()}
    alone = products(base, noted["softguard"])
    made["products of softguard"] = made["softguard"][:]  # of the very call that is replayed
    timings = alternate({**noted, "products of softguard": alone}, options.rounds)
    tokens = {name: statistics.median(counts) for name, counts in made.items()}
    speed = {name: tokens[name] / timing.median for name, timing in timings.items()}
    rows = [
        {
            "side": name,
            "batch": {"transformers generate": peer, "transformers generate, static cache": len(some)}.get(name, ours),
            "tokens": round(tokens[name]),
            **timing.row(),
            "tokens_per_second": round(speed[name], 1),
            "over_generate": round(speed[name] / speed["transformers generate"], 2),
        }
        for name, timing in timings.items()
    ]
    keep("draw", rows, before, prompts=len(texts), trials={"softguard": our_trials, "transformers generate": peer_trials})


def draw(engine: Engine, texts: list[str], size: int) -> int:
    """Tokens drawn by the engine."""
    return sum(len(r.ids) for r in engine.generate(texts, TOKENS, size, temperature=1.0))


@torch.inference_mode()
def generate(base: BaseModel, chat: Chat, texts: list[str], size: int, cache: str | None = None) -> int:
    """Tokens drawn by transformers, up to and with each answer's end; like lengths run together.

    `cache`: transformers' name of one, or none for its own choice.
    """
    whole = sorted((list(chat.prefix.before + chat.prefix.after) + chat.encode(t) for t in texts), key=len)
    made = 0
    for start in range(0, len(whole), size):
        batch = whole[start : start + size]
        rows = align(batch, base.pad_id, base.device)
        out: Any = base.model.generate(
            input_ids=rows.ids,
            attention_mask=rows.mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=TOKENS,
            pad_token_id=base.pad_id,
            cache_implementation=cache,
        )
        for row in out[:, rows.ids.shape[1] :].tolist():
            ends = [i for i, token in enumerate(row) if token in base.stop_ids]
            made += ends[0] + 1 if ends else len(row)
    return made


def _noted(made: list[int], side: Callable[[], int]) -> None:
    made.append(side())


def _best(run: Callable[[int, list[str]], int], texts: list[str]) -> tuple[int, dict[int, float]]:
    """The batch size with the most tokens a second, and those of all."""
    speeds = {}
    for size in SIZES:
        some = thin(texts, size)
        begin = time.perf_counter()
        speeds[size] = round(run(size, some) / (time.perf_counter() - begin), 1)
    return max(speeds, key=lambda s: speeds[s]), speeds


if __name__ == "__main__":
    main()
