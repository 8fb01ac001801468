"""What the benchmarks of answering ask, and the engine they ask."""

import torch

from softguard.engine import Engine
from softguard.models import load_base
from softguard.prompts import packaged_suite, thin

SIZES = (16, 64, 256) if torch.cuda.is_available() else (1, 4, 8, 16, 32, 64, 128)  # batches that are tried


def engine_and_texts(split: str, count: int) -> tuple[Engine, list[str]]:
    """The demo model without a soft prompt, and `count` prompts spread over the packaged suites of a split."""
    base = load_base(dtype="auto")
    texts = [p.text for suite in ("harmful", "contrast", "everyday") for p in packaged_suite(suite, split)]
    return Engine(base), thin(texts, count)
