"""Functions of next-token laws at a frozen output head, in memory that does not grow with vocabulary × tokens.

Tokens are taken a tile at a time: their logits are made, the function and its gradient down to the hidden states are
finished, and the logits dropped. What is kept for the backward pass is one vector a token. A tile is large enough for its
matrix products to be worth the reading of the head; within it, laws are made of a few tokens at a time, which stay in cache.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softguard import products

_TILE = 2**25  # bytes of logits held at once …
_LEAST = 256  # … but those of so many tokens at least
_BLOCK = 2**18  # logits of which laws are made at once


class Head(NamedTuple):
    """A frozen output head: logits z = s·W·h of a hidden state h and, where it has a cap c, c·tanh(z/c)."""

    weight: Tensor  # (vocabulary, hidden)
    scale: float = 1.0
    cap: float = 0.0  # none

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, hidden) to (tokens, vocabulary), in the head's precision."""
        logits = products.logits(hidden.to(self.weight.dtype), self.weight)
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits.div_(self.cap).tanh_() * self.cap if self.cap else logits

    def into_hidden(self, slope: Tensor) -> Tensor:
        """The gradient (tokens, hidden) from that at the logits before the cap, (tokens, vocabulary)."""
        gradient = products.into_input(slope, self.weight)
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


_Terms = Callable[[Tensor, list[Tensor], slice, bool], tuple[Tensor, Tensor | None]]


def log_law(hidden: Tensor, head: Head) -> Tensor:
    """Next-token log-probabilities, (tokens, vocabulary), of hidden states (tokens, hidden).

    Products are made in the head's precision, probabilities in float32 at least.
    """
    return law_of(head.logits(hidden))


def per_token(function: Callable[..., Tensor], hidden: Tensor, head: Head, *others: Tensor) -> Tensor:
    """`function` of each token's logits, (tokens,), with a gradient to `hidden` (tokens, hidden).

    `function` gets the logits (n, vocabulary), in float32 at least, of some neighbouring tokens, then their logits by each of
    the `others` (tokens, hidden), and which tokens they are, a slice; its values must each depend on their own token alone.
    Nothing flows to the others, nor to what else it reads.
    """

    def terms(logits: Tensor, fixed: list[Tensor], at: slice, sloped: bool) -> tuple[Tensor, Tensor | None]:
        fixed = [x.to(logits.dtype) for x in fixed]
        if not sloped:
            return function(logits, *fixed, at), None
        with torch.enable_grad():
            leaf = logits.requires_grad_()
            values = function(leaf, *fixed, at)
            return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]

    return _PerToken.apply(hidden, head, terms, *others)  # type: ignore[no-any-return,no-untyped-call]


def per_token_between(divergence: Callable[[Tensor, Tensor], Tensor], teacher: Tensor, student: Tensor, head: Head) -> Tensor:
    """`divergence` of each token's two laws, (tokens,), with a gradient to the `student`'s hidden states (tokens, hidden)."""
    return per_token(lambda z_q, z_p, at: divergence(z_p, z_q), student, head, teacher)


def selected_log_probs(hidden: Tensor, ids: Tensor, head: Head) -> Tensor:
    """Log-probabilities of `ids` (tokens,), with a gradient to `hidden` (tokens, hidden): 1[v = id] − q(v) at the logits."""

    def terms(logits: Tensor, fixed: list[Tensor], at: slice, sloped: bool) -> tuple[Tensor, Tensor | None]:
        chosen = ids[at, None]
        top = logits.amax(-1, keepdim=True)
        at_chosen = logits.gather(-1, chosen) - top
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        slope = weights.div_(-total).scatter_add_(-1, chosen, torch.ones_like(total)) if sloped else None
        return (at_chosen - total.log()).squeeze(-1), slope

    return _PerToken.apply(hidden, head, terms)  # type: ignore[no-any-return,no-untyped-call]


class _PerToken(torch.autograd.Function):
    """`terms` gets the logits of a few tokens, those by the others, which tokens, and whether to give slopes at the logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, terms: _Terms, *others: Tensor) -> Tensor:
        sloped, weight = ctx.needs_input_grad[0], head.weight
        values = hidden.new_zeros(len(hidden), dtype=torch.promote_types(weight.dtype, torch.float32))
        gradient = torch.zeros_like(hidden) if sloped else None
        most = max(_LEAST, _TILE // (weight.element_size() * len(weight)))
        tiles = math.ceil(len(hidden) / most) or 1
        tile = math.ceil(len(hidden) / tiles) or 1  # all alike: the largest is what is held
        block = max(torch.get_num_threads(), _BLOCK // len(weight)) if weight.device.type == "cpu" else tile  # a row a thread
        for start in range(0, len(hidden), tile):
            end = min(start + tile, len(hidden))
            logits, *fixed = (head.logits(x[start:end]) for x in (hidden, *others))
            for first in range(0, end - start, block):
                part, at = slice(first, first + block), slice(start + first, min(start + first + block, end))
                values[at], slope = terms(logits[part].to(values.dtype, copy=True), [x[part] for x in fixed], at, sloped)
                if slope is not None:
                    logits[part] = slope if not head.cap else slope * (1 - (logits[part].to(slope) / head.cap).square())
            if gradient is not None:
                gradient[start:end] = head.into_hidden(logits)
            del logits, fixed  # before the next are made
        ctx.save_for_backward(gradient)
        ctx.others = len(others)
        return values

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return outer[:, None].to(gradient.dtype) * gradient, None, None, *[None] * ctx.others


def law_of(logits: Tensor) -> Tensor:
    """Log-probabilities, like the logits (tokens, vocabulary), in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
