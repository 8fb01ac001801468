"""Log-likelihoods of given answers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from softguard.chat import Chat
from softguard.kernels import Head, selected_log_probs
from softguard.models import BaseModel
from softguard.packed import packed_hidden
from softguard.prefix import ConstantPrefix

_BATCH = 32  # rows of one pass


@torch.inference_mode()
def likeliest(
    base: BaseModel,
    chat: Chat,
    prefix: ConstantPrefix,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    progress: Callable[[int], None] = lambda done: None,
) -> list[int]:
    """For each prompt, which of its choices has the highest summed log-probability as the beginning of the response.

    Choices that differ in their last token only, as letters do, share one row. The end-of-turn token is not counted: models
    differ in how soon they end. `progress` is told how many prompts each pass finished.
    """
    encoded = [chat.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    best = [0] * len(prompts)
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        answers = {i: [chat.response_ids(choice) for choice in choices[i]] for i in part}
        stems = list(dict.fromkeys((i, tuple(ids[:-1])) for i in part for ids in answers[i]))
        states = packed_hidden(base, prefix, [encoded[i] + list(stem) for i, stem in stems], [len(s) + 1 for _, s in stems])
        at = dict(zip(stems, states, strict=True))
        for i in part:
            scores = [float(response_log_probs(at[i, tuple(ids[:-1])], ids, base.head).sum()) for ids in answers[i]]
            best[i] = max(range(len(scores)), key=scores.__getitem__)
        progress(len(part))
    return best


def response_log_probs(states: Tensor, ids: Sequence[int], head: Head) -> Tensor:
    """Log-probability of each of `ids` (tokens,) from the hidden states (tokens, hidden) that predict them."""
    return selected_log_probs(states, torch.tensor(ids, device=states.device), head)
