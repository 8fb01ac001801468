"""The constant prefix: the template's fixed text with the soft prompt in it, run once and shared by every row."""

from typing import Any

import torch
from torch import Tensor

from softguard.chat import Chat, Rows
from softguard.models import BaseModel


def prefix_embeddings(base: BaseModel, chat: Chat, soft_prompt: Tensor | None) -> Tensor:
    """Embeddings of the constant prefix, (1, tokens, hidden), with `soft_prompt` (n_soft, hidden) in its slot, or none."""
    embed = base.model.get_input_embeddings()
    before = embed(torch.tensor([chat.prefix.before], dtype=torch.long, device=base.device))  # (1, before, hidden)
    after = embed(torch.tensor([chat.prefix.after], dtype=torch.long, device=base.device))  # (1, after, hidden)
    if soft_prompt is None:
        return torch.cat([before, after], dim=1)
    return torch.cat([before, soft_prompt[None].to(before.dtype), after], dim=1)


def run_prefix(base: BaseModel, chat: Chat, soft_prompt: Tensor | None) -> Any:
    """Keys and values of the constant prefix for one row, as a cache. Gradients reach `soft_prompt` where enabled."""
    embeddings = prefix_embeddings(base, chat, soft_prompt)
    cache = _empty_cache(base)
    base.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def share(base: BaseModel, cache: Any, rows: int) -> Any:
    """A cache for `rows` rows that all begin with the one-row `cache`; the original stays as it was."""
    shared = _empty_cache(base)
    for index, layer in enumerate(cache.layers):
        shared.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index)
    return shared


def continuation_logits(base: BaseModel, cache: Any, rows: Rows, keep: int) -> Tensor:
    """Logits, (rows, keep, vocabulary) float32, that predict the tokens at and after the last `keep` columns of `rows`.

    `cache` is the one-row cache of the constant prefix.
    """
    length = cache.get_seq_length()
    output = base.model(
        input_ids=rows.ids,
        attention_mask=rows.full_mask(length),
        position_ids=rows.positions(length),
        past_key_values=share(base, cache, len(rows.ids)),
        use_cache=True,
        logits_to_keep=keep,
    )
    return output.logits.float()  # type: ignore[no-any-return]


def _empty_cache(base: BaseModel) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=base.model.config)
