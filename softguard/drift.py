"""How far a model with an adapter strays from its base, along answers drawn from the base."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from softguard.adapters import Adapter
from softguard.divergences import P_SAFE_RANGE, refusal_mixture, selected, token_kl, token_tv
from softguard.engine import Engine, Response
from softguard.gate import Gate
from softguard.kernels import log_law, per_token_between
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
    if student.gate is not None:
        return _of_gate(base, student, student.gate, prompts, drawn, progress)
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


def _of_gate(
    base: Engine,
    student: Engine,
    gate: Gate,
    prompts: Sequence[str],
    drawn: Sequence[Response],
    progress: Callable[[int], None],
) -> Drift:
    """A gate moves the law of the first token alone: q = (1 − g)·p + g·1[r₁], r₁ the refusal's first token."""
    odds = student.log_odds(prompts)
    prefix = constant_prefix(base.base, base.chat, None)
    encoded = [base.chat.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    tv, kl, loss = np.zeros(len(prompts)), np.zeros(len(prompts)), np.zeros(len(prompts))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        states = torch.cat(packed_hidden(base.base, prefix, [encoded[i] for i in batch], [1] * len(batch)))
        law = log_law(states, base.base.head)
        rate = odds[batch].to(law).sigmoid().clamp(*P_SAFE_RANGE)
        moved = refusal_mixture(law, rate, torch.full_like(rate, gate.refusal[0], dtype=torch.long))
        first = torch.tensor([drawn[i].ids[0] for i in batch], device=law.device)
        lengths = torch.tensor([len(drawn[i].ids) for i in batch], device=law.device)
        for values, tokens in (
            (tv, token_tv(law, moved)),
            (kl, token_kl(law, moved)),
            (loss, selected(law, first) - selected(moved, first)),
        ):
            values[batch] = (tokens / lengths).tolist()
        progress(len(batch))
    return Drift(tv.tolist(), kl.tolist(), loss.tolist())
