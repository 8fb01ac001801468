"""How far a model with an adapter strays from its base, along answers drawn from the base."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from softguard.adapted import changes_layers
from softguard.adapters import Adapter
from softguard.divergences import P_SAFE_RANGE, selected, token_kl, token_tv
from softguard.engine import Engine, Response
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
        odds = student.log_odds(prompts).clamp(*(torch.tensor(rate).logit().item() for rate in P_SAFE_RANGE))
        return mixture_drift(base, student.gate.refusal, odds, prompts, drawn, progress)
    runs = [(engine.base, constant_prefix(engine.base, engine.chat, a)) for engine, a in ((base, None), (student, adapter))]
    encoded = [base.chat.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    tv, kl, loss = np.zeros(len(prompts)), np.zeros(len(prompts)), np.zeros(len(prompts))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        ids = [list(drawn[i].ids) for i in batch]
        rows = [encoded[i] + r[:-1] for i, r in zip(batch, ids, strict=True)]
        wanted, inside = [len(r) for r in ids], changes_layers(adapter)  # then both by one code, as they are trained
        teacher, states = (torch.cat(packed_hidden(*run, rows, wanted, inside)) for run in runs)
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


@torch.inference_mode()
def mixture_drift(
    base: Engine,
    refusal: Sequence[int],
    log_odds: Tensor,
    prompts: Sequence[str],
    drawn: Sequence[Response],
    progress: Callable[[int], None] = lambda done: None,
) -> Drift:
    """The drift of q(r|x) = (1 − w)·p(r|x) + w·1[r = y_r], a gate or a system that reads prompts, along the base's answers.

    `refusal`: ids of y_r; `log_odds`: (prompts,), of w. While an answer runs as y_r does, the next-token law is
    q_t = (1 − w_t)·p_t + w_t·1[y_t], and w_t, the probability that the refusal is meant after so much of it, has log-odds
    log w − log(1 − w) − log p(y_<t|x). From where they part on q_t = p_t. With w = 1, KL and loss are of no use.
    """
    prefix = constant_prefix(base.base, base.chat, None)
    encoded = [base.chat.encode(prompt) for prompt in prompts]
    moved = [_moved(response.ids, refusal) for response in drawn]  # tokens an answer has whose law is not the base's
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    tv, kl, loss = np.zeros(len(prompts)), np.zeros(len(prompts)), np.zeros(len(prompts))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        counts = [moved[i] for i in batch]
        rows = [encoded[i] + list(drawn[i].ids[: moved[i] - 1]) for i in batch]
        law = log_law(torch.cat(packed_hidden(base.base, prefix, rows, counts)), base.base.head)
        ours = torch.tensor([token for i in batch for token in drawn[i].ids[: moved[i]]], device=law.device)
        theirs = torch.tensor([token for i in batch for token in refusal[: moved[i]]], device=law.device)
        before = torch.cat([p.cumsum(0) - p for p in torch.split(selected(law, theirs), counts)])  # log p(y_<t|x)
        odds = log_odds[batch].to(law).repeat_interleave(torch.tensor(counts, device=law.device)) - before
        kept = law + logsigmoid(-odds)[:, None]  # odds instead of w, which is 1 within rounding after a few tokens
        meant = torch.logaddexp(selected(kept, theirs), logsigmoid(odds))
        mixed = kept.scatter(-1, theirs[:, None], meant[:, None])
        lengths = np.array([len(drawn[i].ids) for i in batch])
        for values, tokens in (
            (tv, token_tv(law, mixed)),
            (kl, token_kl(law, mixed)),
            (loss, selected(law, ours) - selected(mixed, ours)),
        ):
            values[batch] = [part.sum().item() for part in torch.split(tokens, counts)] / lengths
        progress(len(batch))
    return Drift(tv.tolist(), kl.tolist(), loss.tolist())


def _moved(answer: Sequence[int], refusal: Sequence[int]) -> int:
    """How many tokens of an answer follow on nothing but the refusal's, the first among them."""
    pairs = list(zip(answer, refusal, strict=False))
    return next((t + 1 for t, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
