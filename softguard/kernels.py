"""Functions of next-token laws at a frozen output head, in memory that does not grow with vocabulary × tokens.

Tokens are taken a tile at a time: their logits are made, the function and its gradient down to the hidden states are
finished, and the logits dropped. What is kept for the backward pass is one vector a token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_TILE = 2**22  # logits held at once


def log_law(hidden: Tensor, head: Tensor) -> Tensor:
    """Next-token log-probabilities: hidden states (tokens, hidden) and head (vocabulary, hidden) to (tokens, vocabulary).

    Products are made in the head's precision, probabilities in float32 at least.
    """
    logits = hidden.to(head.dtype) @ head.mT
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def per_token(function: Callable[[Tensor, slice], Tensor], hidden: Tensor, head: Tensor) -> Tensor:
    """`function` of each token's law, (tokens,), with a gradient to `hidden` (tokens, hidden).

    `function` gets the log-laws (n, vocabulary) of some neighbouring tokens, and which ones they are; its values must each
    depend on their own token alone. Nothing flows to what else it reads.
    """
    return _PerToken.apply(hidden, head, function)  # type: ignore[no-any-return,no-untyped-call]


def per_token_between(divergence: Callable[[Tensor, Tensor], Tensor], teacher: Tensor, student: Tensor, head: Tensor) -> Tensor:
    """`divergence` of each token's two laws, (tokens,), with a gradient to the `student`'s hidden states (tokens, hidden)."""
    return per_token(lambda log_q, at: divergence(log_law(teacher[at], head), log_q), student, head)


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        values = hidden.new_zeros(len(hidden), dtype=torch.promote_types(head.dtype, torch.float32))
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        tile = max(1, _TILE // len(head))
        for start in range(0, len(hidden), tile):
            at = slice(start, min(start + tile, len(hidden)))
            if gradient is None:
                values[at] = function(log_law(hidden[at], head), at)
                continue
            with torch.enable_grad():
                part = hidden[at].detach().requires_grad_()
                value = function(log_law(part, head), at)
                (gradient[at],) = torch.autograd.grad(value.sum(), part)
            values[at] = value.detach()
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[:, None].to(gradient.dtype) * gradient, None, None
