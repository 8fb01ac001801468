"""The constant prefix: the template's fixed text, with the adapter in it or before it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softguard.adapters import Adapter
from softguard.chat import Chat
from softguard.errors import SoftguardError
from softguard.models import BaseModel


class ConstantPrefix(NamedTuple):
    """What stands before every row, ready for the model's layers."""

    embeddings: Tensor  # (tokens, hidden)
    keys_values: list[tuple[Tensor, Tensor]] | None = None  # before the tokens, by layer, (key heads, n_soft, width) each

    @property
    def length(self) -> int:
        """Positions it takes."""
        return len(self.embeddings) + (self.keys_values[0][0].shape[1] if self.keys_values else 0)


def constant_prefix(base: BaseModel, chat: Chat, adapter: Adapter | None) -> ConstantPrefix:
    """The constant prefix with `adapter` in its place, or without; gradients reach the adapter's vectors.

    `base`: as `adapted` gives it, for an adapter that changes its layers.
    """

    def embed(ids: Sequence[int]) -> Tensor:
        return base.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long, device=base.device))  # type: ignore[no-any-return]

    before, after = embed(chat.prefix.before), embed(chat.prefix.after)
    if not len(before) + len(after):
        raise SoftguardError(
            "the chat template has no text before the user's, which rows could stand behind; use another model"
        )
    if adapter is None:
        return ConstantPrefix(torch.cat([before, after]))
    if adapter.kind == "text":
        return ConstantPrefix(embed(chat.with_system(adapter.text)))
    if adapter.kind in ("lora", "steering", "gate"):
        return ConstantPrefix(torch.cat([before, after]))
    vectors = adapter.vectors.to(before.dtype)
    if adapter.kind == "soft_prompt":
        return ConstantPrefix(torch.cat([before, vectors, after]))
    heads, width = base.key_heads
    layers = vectors.view(len(vectors), -1, 2, heads, width).permute(1, 2, 3, 0, 4)  # (layers, 2, key heads, n_soft, width)
    return ConstantPrefix(torch.cat([before, after]), [(pair[0], pair[1]) for pair in layers])
