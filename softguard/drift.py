"""How far a model with an adapter strays from its base, along answers drawn from the base."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from softguard.adapters import Adapter
from softguard.divergences import token_kl, token_tv
from softguard.engine import Engine, Response
from softguard.kernels import per_token_between
from softguard.packed import packed_hidden
from softguard.prefix import constant_prefix
from softguard.scoring import response_log_probs

_BATCH = 32  # rows of one pass


class Drift(NamedTuple):
    """Means over each answer's tokens, one a prompt: TV and KL (nats) of the next-token laws, loss of log-probability."""

    token_tv: list[float]
    token_kl: list[float]
    loss: list[float]


@torch.inference_mode()
def measure_drift(
    base: Engine,
    student: Engine,
    adapter: Adapter,
    prompts: Sequence[str],
    drawn: Sequence[Response],
    progress: Callable[[int], None] = lambda done: None,
) -> Drift:
    """The drift of `student`, the base with `adapter`, along the base's answers `drawn`.

    `progress` is told how many prompts each pass finished.
    """
    runs = [(engine.base, constant_prefix(engine.base, engine.chat, a)) for engine, a in ((base, None), (student, adapter))]
    encoded = [base.chat.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    tv, kl, loss = np.zeros(len(prompts)), np.zeros(len(prompts)), np.zeros(len(prompts))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        ids = [list(drawn[i].ids) for i in batch]
        rows = [encoded[i] + r[:-1] for i, r in zip(batch, ids, strict=True)]
        teacher, states = (torch.cat(packed_hidden(*run, rows, [len(r) for r in ids])) for run in runs)
        head, flat = base.base.head, [i for response in ids for i in response]
        before, after = (response_log_probs(hidden, flat, head) for hidden in (teacher, states))
        for values, tokens in (
            (tv, per_token_between(token_tv, teacher, states, head)),
            (kl, per_token_between(token_kl, teacher, states, head)),
            (loss, before - after),
        ):
            values[batch] = [part.mean().item() for part in torch.split(tokens, [len(r) for r in ids])]
        progress(len(batch))
    return Drift(tv.tolist(), kl.tolist(), loss.tolist())
