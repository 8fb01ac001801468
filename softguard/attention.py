"""Attention over one flat sequence: a prefix, then rows that all continue it and do not see each other. No row is padded
outside of it, and the prefix's keys and values are there once. Before the prefix may stand keys and values that belong to no
token, those of a key/value prefix.

Attention's weights are small beside its inputs in training, so they are kept for the backward pass, which is written out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout:
    """Where the tokens of P prefix positions and B rows of at most T tokens stand in the flat sequence.

    Attention's own order is (key heads, B, queries' heads a key head, T), rows padded on the right.
    own: (B, 1, T, T) added to scores within a row; causal: (P, before + P) added to scores of the prefix.
    """

    def __init__(self, prefix: int, lengths: Sequence[int], like: Tensor, before: int = 0) -> None:
        """For rows of `lengths` tokens, and tensors of the dtype and on the device of `like`.

        `before`: keys and values that stand before the prefix and are no token's.
        """
        self.prefix, self.rows, self.width, self.before = prefix, len(lengths), max(lengths), before
        position, size = torch.arange(self.width), torch.tensor(lengths)
        there = position < size[:, None]  # (B, T)
        hidden = (position > position[:, None]) | ~there[:, None]  # (B, T, T)
        low = torch.finfo(like.dtype).min

        def scores(hidden: Tensor) -> Tensor:
            return torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, low).to(like.device)

        self.own, self.causal = scores(hidden)[:, None], scores(torch.ones(prefix, before + prefix).triu(1 + before).bool())
        self.tokens = prefix + int(size.sum())
        self._device = like.device
        self._token = prefix + torch.where(there, (size.cumsum(0) - size)[:, None] + position, 0)  # (B, T)
        self._there = there.flatten()  # (B·T,), False on padding
        self._orders: dict[tuple[int, int], _Order] = {}

    def order(self, heads: int, groups: int) -> "_Order":
        """Indices for tensors of so many heads that share `groups` key heads."""
        if (heads, groups) not in self._orders:
            head = torch.arange(heads).view(groups, 1, -1, 1)
            spread = self._token[:, None] * heads + head  # (groups, B, heads a group, T)
            place = torch.arange(spread.numel()).view(spread.shape).permute(1, 3, 0, 2).flatten(0, 1)  # (B·T, groups, …)
            indices = spread, place[self._there], place[~self._there]
            self._orders[heads, groups] = _Order(*(i.flatten().to(self._device) for i in indices))
        return self._orders[heads, groups]


class _Order(NamedTuple):
    spread: Tensor  # of attention's order, into (tokens, heads)
    gather: Tensor  # of (tokens of rows, heads), into attention's order
    pads: Tensor  # of the padding, in attention's order


def attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, at: Layout, before: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Softmax attention in a `Layout`: (tokens, heads, width) queries, (tokens, key heads, width) keys and values.

    `before`: keys and values (key heads, at.before, width) that every token sees. Returns (tokens, heads, width) and what
    `attend_backward` needs.
    """
    groups = k.shape[1]
    q = q * scaling
    qp, kp, vp = (_prefix(x, groups, at) for x in (q, k, v))
    qr, kr, vr = (rows_of(x, groups, at) for x in (q, k, v))
    if before is not None:
        kp, vp = (torch.cat([x, own], dim=1) for x, own in zip(before, (kp, vp), strict=True))
    scores = (qp @ kp.mT).view(groups, -1, at.prefix, kp.shape[1]) + at.causal
    wp = scores.softmax(-1).flatten(1, 2)  # sums are float32 whatever goes in and out
    qr, kr, vr = qr.flatten(0, 1).flatten(1, 2), _seen(kp, kr), _seen(vp, vr)
    scores = (qr @ kr.mT).view(groups, at.rows, -1, at.width, kr.shape[1])
    scores[..., kp.shape[1] :].add_(at.own)
    wr = scores.softmax(-1).flatten(0, 1).flatten(1, 2)
    out = (wr @ vr).view(*scores.shape[:-1], -1)
    return flat_of(wp @ vp, out, at), (qp, kp, vp, qr, kr, vr, wp, wr)


def attend_backward(gradient: Tensor, kept: Sequence[Tensor], scaling: float, at: Layout) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values from that of the result, all (tokens, heads, width), and of keys and values
    before the prefix, (key heads, at.before, width).
    """
    qp, kp, vp, qr, kr, vr, wp, wr = kept
    groups, seen = kp.shape[:2]
    gp, gr = _prefix(gradient, groups, at), rows_of(gradient, groups, at)
    gr.view(-1, gr.shape[-1]).index_fill_(0, at.order(gradient.shape[1], groups).pads, 0)  # padding asks for nothing
    shape, gr = gr.shape, gr.flatten(0, 1).flatten(1, 2)
    sp = torch._softmax_backward_data(gp @ vp.mT, wp, -1, wp.dtype)
    sr = torch._softmax_backward_data(gr @ vr.mT, wr, -1, wr.dtype)
    dq = (sr @ kr).view(shape)
    dk, dv = ((x.mT @ y).view(groups, at.rows, 1, -1, shape[-1]) for x, y in ((sr, qr), (wr, gr)))
    dkp = (sp.mT @ qp).add_(dk[..., :seen, :].sum(1).squeeze(1))
    dvp = (wp.mT @ gp).add_(dv[..., :seen, :].sum(1).squeeze(1))
    return (
        flat_of(sp @ kp, dq, at).mul_(scaling),
        flat_of(dkp[:, at.before :], dk[..., seen:, :], at),
        flat_of(dvp[:, at.before :], dv[..., seen:, :], at),
        dkp[:, : at.before],
        dvp[:, : at.before],
    )


def _seen(prefix: Tensor, rows: Tensor) -> Tensor:
    """Keys or values that rows see, (groups · B, P + T, width): the prefix's (groups, P, width), their own as of `rows_of`.

    They are few beside the scores: copying the prefix for every row spares cutting the scores in two.
    """
    return torch.cat([prefix[:, None].expand(-1, rows.shape[1], -1, -1), rows.squeeze(2)], dim=2).flatten(0, 1)


def _prefix(x: Tensor, groups: int, at: Layout) -> Tensor:
    """(tokens, heads, width) to the prefix's (groups, heads a group · P, width)."""
    return x[: at.prefix].transpose(0, 1).reshape(groups, -1, x.shape[-1])


def rows_of(x: Tensor, groups: int, at: Layout) -> Tensor:
    """(tokens, heads, width) to the rows' (groups, B, heads a group, T, width); padding holds some token."""
    _, heads, width = x.shape
    order = at.order(heads, groups)
    return x.reshape(-1, width).index_select(0, order.spread).view(groups, at.rows, -1, at.width, width)


def flat_of(prefix: Tensor, rows: Tensor, at: Layout) -> Tensor:
    """Back to (tokens, heads, width) from what `_prefix` and `rows_of` make."""
    heads, width = rows.shape[0] * rows.shape[2], rows.shape[-1]
    result = rows.new_empty(at.tokens, heads, width)
    result[: at.prefix] = prefix.reshape(heads, at.prefix, width).transpose(0, 1)
    order = at.order(heads, rows.shape[0])
    torch.index_select(rows.reshape(-1, width), 0, order.gather, out=result[at.prefix :].view(-1, width))
    return result
