"""The constant prefix: the template's fixed text with the soft prompt in it."""

import torch
from torch import Tensor

from softguard.chat import Chat
from softguard.models import BaseModel


def prefix_embeddings(base: BaseModel, chat: Chat, soft_prompt: Tensor | None) -> Tensor:
    """Embeddings of the constant prefix, (1, tokens, hidden), with `soft_prompt` (n_soft, hidden) in its slot, or none."""
    embed = base.model.get_input_embeddings()
    before = embed(torch.tensor([chat.prefix.before], dtype=torch.long, device=base.device))  # (1, before, hidden)
    after = embed(torch.tensor([chat.prefix.after], dtype=torch.long, device=base.device))  # (1, after, hidden)
    if soft_prompt is None:
        return torch.cat([before, after], dim=1)
    return torch.cat([before, soft_prompt[None].to(before.dtype), after], dim=1)
