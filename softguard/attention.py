"""Attention over one flat sequence: a prefix, then rows that all continue it and do not see each other. Rows of nearly one
length are padded to each other inside of it, no others and nowhere else, and the prefix's keys and values are there once.
Before the prefix may stand keys and values that belong to no token, those of a key/value prefix.

Attention's weights grow with the square of a row's length, so what is kept for the backward pass is attention's inputs alone,
and the weights are made once more for the gradient: those of short rows by operations that are written out, those of long
ones a block at a time by PyTorch's fused kernel.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

LONG = 512  # tokens; on a processor the fused kernel draws level near 300 in float32, past 600 in bfloat16, with less memory


class Layout:
    """Where the tokens of P prefix positions and of rows stand in the flat sequence, the rows in groups of alike lengths."""

    def __init__(self, prefix: int, groups: Sequence[Sequence[int]], like: Tensor, before: int = 0) -> None:
        """For rows of as many tokens as `groups` says, in that order, and tensors of the dtype and on the device of `like`.

        `before`: keys and values that stand before the prefix and are no token's.
        """
        self.prefix, self.before, self._like = prefix, before, like.new_empty(0)
        self.groups = [Rows(lengths, like) for lengths in groups]
        ends = list(accumulate((rows.tokens for rows in self.groups), initial=prefix))
        self.places = [slice(*place) for place in pairwise(ends)]
        self.tokens, self.width = ends[-1], max(rows.width for rows in self.groups)

    @cached_property
    def causal(self) -> Tensor:
        """(P, before + P) added to scores of the prefix."""
        return _later(self.prefix, self.before + self.prefix, self._like)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`attend` in this layout."""
        return attend(q, k, v, scaling, self, before)

    def backward(self, gradient: Tensor, kept: Sequence[Tensor], scaling: float) -> tuple[Tensor, ...]:
        """`attend_backward` in this layout."""
        return attend_backward(gradient, kept, scaling, self)


class Rows:
    """B rows of at most T tokens, which stand one behind the other in a flat sequence of their own.

    Attention's own order is (key heads, B, queries' heads a key head, T), rows padded on the right.
    """

    def __init__(self, lengths: Sequence[int], like: Tensor) -> None:
        """For rows of `lengths` tokens, and tensors of the dtype and on the device of `like`."""
        self.count, self.width, self.tokens = len(lengths), max(lengths), sum(lengths)
        self.long = self.width > LONG
        position, size = torch.arange(self.width), torch.tensor(lengths)
        there = position < size[:, None]  # (B, T)
        self._like = like.new_empty(0)
        self._token = torch.where(there, (size.cumsum(0) - size)[:, None] + position, 0)  # (B, T)
        self._there = there.flatten()  # (B·T,), False on padding
        self._orders: dict[tuple[int, int], _Order] = {}

    @cached_property
    def own(self) -> Tensor:
        """(T, T) added to scores within any row: its padding comes later than all of its tokens."""
        return _later(self.width, self.width, self._like)

    def order(self, heads: int, groups: int) -> "_Order":
        """Indices for tensors of so many heads that share `groups` key heads."""
        if (heads, groups) not in self._orders:
            head = torch.arange(heads).view(groups, 1, -1, 1)
            spread = self._token[:, None] * heads + head  # (groups, B, heads a group, T)
            place = torch.arange(spread.numel()).view(spread.shape).permute(1, 3, 0, 2).flatten(0, 1)  # (B·T, groups, …)
            indices = spread, place[self._there], place[~self._there]
            self._orders[heads, groups] = _Order(*(i.flatten().to(self._like.device) for i in indices))
        return self._orders[heads, groups]


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices by ascending length, in groups of which padding takes at most a quarter more than the rows themselves."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= 1.25 * (sum(lengths[j] for j in groups[-1]) + lengths[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


class Group(NamedTuple):
    """Rows that `Beside` takes together: their keys and values, and what each of the T tokens beside them sees."""

    keys: Tensor  # (rows, key heads, tokens, width), without a gradient; values alike
    values: Tensor
    seen: Tensor  # (rows, T, tokens + gate's + T), False on padding and on what comes later


class Beside:
    """Attention of T tokens a row that stand beside keys and values of their own, the gate's, behind what the row has seen.

    In attention's order for them, (rows, key heads, queries' heads a key head · T, width), a group of rows after the other.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        """For rows in the order of `groups`."""
        self._groups = groups
        self._rows = [len(group.seen) for group in groups]
        self._tokens = groups[0].seen.shape[1]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(rows · T, heads, width) queries, keys and values alike; `before`: the gate's, (rows, key heads, n_soft, width)."""
        assert before is not None
        heads = k.shape[1]
        parts = zip(
            self._groups, *map(self._split, (q * scaling, k, v)), *(torch.split(x, self._rows) for x in before), strict=True
        )
        results, kept = [], []
        for (keys, values, seen), *own, gate_keys, gate_values in parts:
            q, k, v = (self._beside(x, heads) for x in own)
            keys, values = torch.cat([keys, gate_keys, k], dim=2), torch.cat([values, gate_values, v], dim=2)
            scores = (q @ keys.mT).view(len(q), heads, -1, *seen.shape[1:])
            scores.masked_fill_(~seen[:, None, None], torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1).flatten(2, 3)
            results.append(self._flat(weights @ values, own[0].shape[1]))
            kept += [q, keys, values, weights]
        return torch.cat(results), tuple(kept)

    def backward(self, gradient: Tensor, kept: Sequence[Tensor], scaling: float) -> tuple[Tensor, ...]:
        """Gradients of queries, keys and values, (rows · T, heads, width), and of the gate's, as `before`."""
        found: list[tuple[Tensor, ...]] = []
        for number, (group, outer) in enumerate(zip(self._groups, self._split(gradient), strict=True)):
            q, keys, values, weights = kept[4 * number :][:4]
            heads, rows = keys.shape[1], group.keys.shape[2]
            g = self._beside(outer, heads)
            s = torch._softmax_backward_data(g @ values.mT, weights, -1, weights.dtype)
            dk, dv = s[..., rows:].mT @ q, weights[..., rows:].mT @ g  # what the row has seen needs none
            gate = keys.shape[2] - rows - self._tokens
            own = (self._flat(x[:, :, gate:], heads) for x in (dk, dv))
            found.append((self._flat(s @ keys, gradient.shape[1]), *own, dk[:, :, :gate], dv[:, :, :gate]))
        dq, *others = (torch.cat(parts) for parts in zip(*found, strict=True))
        return dq.mul_(scaling), *others

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(rows · T, …) by group."""
        return torch.split(x, [rows * self._tokens for rows in self._rows])

    def _beside(self, x: Tensor, groups: int) -> Tensor:
        """(rows · T, heads, width) to attention's order."""
        return x.view(-1, self._tokens, groups, x.shape[1] // groups, x.shape[2]).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def _flat(self, x: Tensor, heads: int) -> Tensor:
        """And back."""
        return x.view(len(x), heads, self._tokens, x.shape[-1]).transpose(1, 2).reshape(-1, heads, x.shape[-1])


class _Order(NamedTuple):
    spread: Tensor  # of attention's order, into (tokens, heads)
    gather: Tensor  # of (tokens of rows, heads), into attention's order
    pads: Tensor  # of the padding, in attention's order


def attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, at: Layout, before: tuple[Tensor, Tensor] | None = None, cap: float = 0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Softmax attention in a `Layout`: (tokens, heads, width) queries, (tokens, key heads, width) keys and values.

    `before`: keys and values (key heads, at.before, width) that every token sees. `cap`: c of scores c·tanh(s/c), if they are
    capped. Returns (tokens, heads, width) and what `attend_backward` needs.
    """
    heads = k.shape[1]
    q = q * scaling
    qp, kp, vp = (_prefix(x, heads, at) for x in (q, k, v))
    if before is not None:
        kp, vp = (torch.cat([x, own], dim=1) for x, own in zip(before, (kp, vp), strict=True))
    result = q.new_empty(q.shape)  # contiguous, as a turned q is not
    _put_prefix(_prefix_weights(qp, kp, at, cap)[0] @ vp, result)
    kept = [qp, kp, vp]
    for rows, place in zip(at.groups, at.places, strict=True):
        qr, kr, vr = (rows_of(x[place], heads, rows) for x in (q, k, v))
        shape, queries, keys, values = qr.shape, qr.flatten(0, 1), _seen(kp, kr), _seen(vp, vr)
        kept += [queries, kr, vr]
        fused = _is_fused(rows, cap)
        mixed = _fused(queries, keys, values) if fused else _weights(queries, keys, rows, cap)[0] @ values
        flat_of(mixed.view(shape), rows, result[place])
    return result, tuple(kept)


def attend_backward(gradient: Tensor, kept: Sequence[Tensor], scaling: float, at: Layout, cap: float = 0) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values from that of the result, all (tokens, heads, width), and of keys and values
    before the prefix, (key heads, at.before, width).
    """
    qp, kp, vp, *of_groups = kept
    heads, seen, width = kp.shape
    gp = _prefix(gradient, heads, at)
    weights, slope = _prefix_weights(qp, kp, at, cap)
    sp = _softmax_backward(gp @ vp.mT, weights, slope)
    dkp, dvp = sp.mT @ qp, weights.mT @ gp
    into_q, into_k, into_v = (gradient.new_empty(at.tokens, n, width) for n in (gradient.shape[1], heads, heads))
    for number, (rows, place) in enumerate(zip(at.groups, at.places, strict=True)):
        qr, kr, vr = of_groups[3 * number :][:3]
        gr = rows_of(gradient[place], heads, rows)
        gr.view(-1, width).index_fill_(0, rows.order(gradient.shape[1], heads).pads, 0)  # padding asks for nothing
        shape, gr, keys, values = gr.shape, gr.flatten(0, 1), _seen(kp, kr), _seen(vp, vr)
        if _is_fused(rows, cap):
            dq, dk, dv = _fused_backward(gr, qr, keys, values)
        else:
            dq, dk, dv = _weighed_backward(gr, qr, keys, values, *_weights(qr, keys, rows, cap))
        dk, dv = (x.view(heads, rows.count, 1, -1, width) for x in (dk, dv))
        dkp, dvp = (into.add_(x[..., :seen, :].sum(1).squeeze(1)) for into, x in ((dkp, dk), (dvp, dv)))
        for x, into in ((dq.view(shape), into_q), (dk[..., seen:, :], into_k), (dv[..., seen:, :], into_v)):
            flat_of(x, rows, into[place])
    for x, into in ((sp @ kp, into_q), (dkp[:, at.before :], into_k), (dvp[:, at.before :], into_v)):
        _put_prefix(x, into)
    return into_q.mul_(scaling), into_k, into_v, dkp[:, : at.before], dvp[:, : at.before]


def _prefix_weights(q: Tensor, k: Tensor, at: Layout, cap: float) -> tuple[Tensor, Tensor | None]:
    """Of the prefix, (key heads, heads a group · P, before + P), and the slope of a cap."""
    scores, slope = _capped(q @ k.mT, cap)
    scores = scores.view(len(q), -1, at.prefix, k.shape[1]) + at.causal
    return scores.softmax(-1).flatten(1, 2), slope  # sums are float32 whatever goes in and out


def _weights(q: Tensor, k: Tensor, rows: Rows, cap: float) -> tuple[Tensor, Tensor | None]:
    """Of short rows, (groups · B, heads a group · T, before + P + T), and the slope of a cap.

    Queries are (groups · B, heads a group, T, width), keys what `_seen` makes.
    """
    scores, slope = _capped(q.flatten(1, 2) @ k.mT, cap)
    scores = scores.view(*q.shape[:-1], k.shape[1])
    scores[..., -rows.width :].add_(rows.own)
    return scores.softmax(-1).flatten(1, 2), slope


def _weighed_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, slope: Tensor | None) -> tuple[Tensor, ...]:
    g, q = g.flatten(1, 2), q.flatten(1, 2)
    s = _softmax_backward(g @ v.mT, weights, slope)
    return s @ k, s.mT @ q, weights.mT @ g


def _softmax_backward(outer: Tensor, weights: Tensor, slope: Tensor | None) -> Tensor:
    """The gradient of scores before their cap."""
    gradient = torch._softmax_backward_data(outer, weights, -1, weights.dtype)
    return gradient if slope is None else gradient.mul_(slope)


def _capped(scores: Tensor, cap: float) -> tuple[Tensor, Tensor | None]:
    """c·tanh(s/c) and its slope, 1 − tanh²; the scores alone without a cap."""
    if not cap:
        return scores, None
    bent = scores.div_(cap).tanh_()
    return bent * cap, 1 - bent.square()


def _is_fused(rows: Rows, cap: float) -> bool:
    return rows.long and not cap  # the kernel knows no cap


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Long rows: the result, like the queries (groups · B, heads a group, T, width), by PyTorch's kernel.

    Queries of nobody stand before the row's, one for each key that all of it sees: then what a query sees is what the kernel
    calls causal, which spares it half the products and us a mask. Key heads are expanded, without a copy, since not every
    fused kernel knows groups.
    """
    ahead = k.shape[1] - q.shape[2]
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    padded = torch.nn.functional.pad(q, (0, 0, ahead, 0))
    return torch.nn.functional.scaled_dot_product_attention(padded, k, v, is_causal=True, scale=1.0)[:, :, ahead:]


def _fused_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(_fused(*inputs), inputs, g)


def _seen(prefix: Tensor, rows: Tensor) -> Tensor:
    """Keys or values that rows see, (groups · B, P + T, width): the prefix's (groups, P, width), their own as of `rows_of`.

    They are few beside the scores: copying the prefix for every row spares cutting the scores in two.
    """
    return torch.cat([prefix[:, None].expand(-1, rows.shape[1], -1, -1), rows.squeeze(2)], dim=2).flatten(0, 1)


def _prefix(x: Tensor, groups: int, at: Layout) -> Tensor:
    """(tokens, heads, width) to the prefix's (groups, heads a group · P, width)."""
    return x[: at.prefix].transpose(0, 1).reshape(groups, -1, x.shape[-1])


def _put_prefix(x: Tensor, into: Tensor) -> None:
    """Of what `_prefix` makes into the beginning of (tokens, heads, width)."""
    heads = into.shape[1]
    prefix = x.reshape(heads, -1, x.shape[-1])
    into[: prefix.shape[1]] = prefix.transpose(0, 1)


def rows_of(x: Tensor, groups: int, rows: Rows) -> Tensor:
    """(tokens, heads, width) to the rows' (groups, B, heads a group, T, width); padding holds some token."""
    _, heads, width = x.shape
    order = rows.order(heads, groups)
    return x.reshape(-1, width).index_select(0, order.spread).view(groups, rows.count, heads // groups, rows.width, width)


def flat_of(x: Tensor, rows: Rows, out: Tensor) -> Tensor:
    """Back into `out`, (tokens, heads, width), from what `rows_of` makes."""
    width = x.shape[-1]
    torch.index_select(x.reshape(-1, width), 0, rows.order(out.shape[1], x.shape[0]).gather, out=out.view(-1, width))
    return out


def _later(queries: int, keys: int, like: Tensor) -> Tensor:
    """(queries, keys) that hides what comes after a query, the last of which stands at the last key."""
    return like.new_full((queries, keys), torch.finfo(like.dtype).min).triu_(1 + keys - queries)
