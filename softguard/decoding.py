"""Answers token by token behind a resident prefix, whose keys and values are computed once and copied to every row.

Models `frozen` knows run written out: prompts are not padded, and keys and values lie in buffers that grow a block of columns
at a time. All others run as transformers has them.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from softguard import frozen
from softguard.adapters import Adapter
from softguard.attention import Beside, Group, Rows, alike, flat_of, rows_of
from softguard.chat import Chat, align
from softguard.gate import Gate
from softguard.models import BaseModel
from softguard.prefix import ConstantPrefix, constant_prefix


class Output(NamedTuple):
    """What predicts the next token of every row."""

    logits: Tensor  # (rows, vocabulary) in the head's precision
    hidden: Tensor  # (rows, hidden)
    gated: Tensor | None = None  # logits of the pass beside a gate where the response begins, (rows · members, vocabulary)


class Decoding(Protocol):
    """Some rows under way."""

    def step(self, ids: Tensor) -> Output:
        """Append one id, (rows,), to every row."""

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but those at these indices."""

    def closed(self, gate: Gate) -> Tensor:
        """Last hidden states, (rows · members, hidden), of closings behind the rows that see the gate; gradients reach it.

        Comes last.
        """


Begin = Callable[[Sequence[Sequence[int]]], tuple[Output, Decoding]]  # of prompts
Caches = Sequence[Tensor]  # of rows, the keys and values behind the prefix, (layers, 2, key heads, tokens, width) each


class Resident(NamedTuple):
    """A constant prefix whose keys and values are kept. `begin` starts rows of ids behind it.

    Of models that run written out rows are not padded, and their own keys and values can be kept as well.
    """

    length: int
    begin: Begin
    together: Callable[[Sequence[int]], list[list[int]]]  # indices of rows by ascending length, those that can run together
    caches: Callable[[Sequence[Sequence[int]]], Caches] | None = None  # of prompts
    closed: Callable[[Caches, Gate], Tensor] | None = None  # as of `Decoding`, behind rows of which `caches` are kept


@torch.no_grad()
def make_resident(base: BaseModel, chat: Chat, adapter: Adapter | None, gate: Gate | None = None) -> Resident:
    """Run the constant prefix with `adapter`, or without, and keep it. With a `gate` every row also passes it."""
    return keep_prefix(base, constant_prefix(base, chat, adapter), gate)


@torch.no_grad()
def keep_prefix(base: BaseModel, prefix: ConstantPrefix, gate: Gate | None = None) -> Resident:
    """Run `prefix` and keep it."""
    if frozen.is_plain(base.model.get_decoder()):
        kept = _run_plain_prefix(base, prefix)

        def caches(prompts: Sequence[Sequence[int]]) -> Caches:
            return _PlainRows.begin(base, kept, prompts)[1].caches()

        def closed(caches: Caches, gate: Gate) -> Tensor:
            groups = alike([prefix.length + cache.shape[3] for cache in caches])
            order = torch.tensor([i for group in groups for i in group], device=base.device)
            states = _closed([_PlainRows.resume(base, kept, [caches[i] for i in group]) for group in groups], gate)
            return states.view(len(order), gate.members, -1)[order.argsort()].flatten(0, 1)

        return Resident(
            prefix.length,
            lambda prompts: _PlainRows.begin(base, kept, prompts, gate),
            lambda lengths: [_ascending(lengths)],
            caches=caches,
            closed=closed,
        )
    cache = _run_prefix(base, prefix)
    # Padding stands between the prefix and a row, where a window of attention counts it.
    together = equal if any(layer.is_sliding for layer in cache.layers) else alike
    return Resident(prefix.length, lambda prompts: _AnyRows.begin(base, cache, prompts, gate), together)


def _run_prefix(base: BaseModel, prefix: ConstantPrefix) -> Any:
    """Transformers' cache of `prefix`, of one row."""
    cache = _empty_cache(base)
    for index, (keys, values) in enumerate(prefix.keys_values or ()):
        cache.update(keys[None], values[None], index)
    base.model(inputs_embeds=prefix.embeddings[None], past_key_values=cache, use_cache=True)
    return cache


def gated_log_odds(gate: Gate, prefix: Resident, prompts: Sequence[Sequence[int]], caches: Caches | None = None) -> Tensor:
    """The log-odds of refusing of a gate's members, (prompts, members), with gradients to it; `prefix` is kept without one.

    What comes before the closing does not depend on the gate, so the pass over it has none, and is spared by its `caches`.
    """
    if caches is not None and prefix.closed is not None:
        return gate.each(gate.base.head.logits(prefix.closed(caches, gate)))
    count, result = len(gate.closing), torch.zeros(len(prompts), gate.members, device=gate.base.device)
    for group in prefix.together([len(prompt) for prompt in prompts]):
        with torch.no_grad():
            _, rows = prefix.begin([prompts[i][:-count] for i in group])
        odds = gate.each(gate.base.head.logits(rows.closed(gate)))
        result = result.index_copy(0, torch.tensor(group, device=result.device), odds)
    return result


def equal(lengths: Sequence[int]) -> list[list[int]]:
    """Indices by ascending length, in groups of one length each."""
    return [list(group) for _, group in groupby(_ascending(lengths), key=lengths.__getitem__)]


def _ascending(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__)


_ROOM = 32  # columns: growing copies all, an empty column is read in vain; softmax of bfloat16 is faster on multiples


class _Kept(NamedTuple):
    """Keys and values of one layer, (key heads, tokens, width)."""

    keys: Tensor
    values: Tensor


def _run_plain_prefix(base: BaseModel, prefix: ConstantPrefix) -> list[_Kept]:
    kept = []
    tokens = len(prefix.embeddings)
    before = prefix.length - tokens
    seen = torch.ones(tokens, prefix.length, dtype=torch.bool, device=base.device).tril(before)

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        if prefix.keys_values:
            k, v = (torch.cat(pair, dim=1) for pair in zip(prefix.keys_values[index], (k, v), strict=True))
        kept.append(_Kept(k.contiguous(), v.contiguous()))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], seen, scale=frozen.scaling(base.model.get_decoder()), enable_gqa=True
        )
        return mixed[0].transpose(0, 1)

    positions = torch.arange(before, prefix.length, device=base.device)
    frozen.infer(base.model.get_decoder(), prefix.embeddings, positions, attend)
    return kept


class _PlainRows:
    """Rows of a model that runs written out."""

    def __init__(self, base: BaseModel, prefix: list[_Kept], lengths: Sequence[int]) -> None:
        self.base, self.decoder, self.prefix = base, base.model.get_decoder(), prefix
        self.scaling = frozen.scaling(self.decoder)
        self.lengths = torch.tensor(lengths, device=base.device)
        self.longest = max(lengths)
        groups, self.start, width = prefix[0].keys.shape
        # (rows, key heads, columns, width); every row's own copy of the prefix first, so that one call attends to all. No part
        # is left out of that call, for what is not contiguous is copied: what a row does not see is hidden, and there is little
        # more room than there are tokens
        shape = (len(lengths), groups, -(-(self.start + self.longest) // _ROOM) * _ROOM, width)
        self.buffers = [_Kept(*(x.new_zeros(shape) for x in kept)) for kept in prefix]
        behind = torch.arange(shape[2], device=base.device) >= self.start + self.lengths[:, None]
        # (rows, columns) added to scores
        self.mask = self.buffers[0].keys.new_zeros(behind.shape)
        self.mask.masked_fill_(behind, torch.finfo(self.mask.dtype).min)

    @classmethod
    def begin(
        cls, base: BaseModel, prefix: list[_Kept], prompts: Sequence[Sequence[int]], gate: Gate | None = None
    ) -> tuple[Output, "_PlainRows"]:
        lengths = [len(prompt) for prompt in prompts]
        self = cls(base, prefix, lengths)
        groups = alike(lengths)
        order = [i for group in groups for i in group]  # of the rows in the flat sequence
        ids = torch.tensor([token for i in order for token in prompts[i]], device=base.device)
        positions = torch.cat([self.start + torch.arange(lengths[i]) for i in order]).to(base.device)
        together = [_Together(self, group, [lengths[i] for i in group]) for group in groups]
        sizes = [part.own.tokens for part in together]
        count = len(ids)
        aside = None if gate is None else _Aside([self], gate, self.start + self.lengths - len(gate.closing))
        if aside is not None:  # behind all rows, their closings once more
            ids, positions = torch.cat([ids, aside.ids]), torch.cat([positions, aside.positions])

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = zip(together, *(torch.split(x[:count], sizes) for x in (q, k, v)), strict=True)
            mixed = [part.attend(index, *own) for part, *own in parts]
            return torch.cat(mixed if aside is None else [*mixed, aside.attend(index, q[count:], k[count:], v[count:])])

        embeddings = base.model.get_input_embeddings()(ids)
        hidden = frozen.infer(self.decoder, embeddings, positions, attend)
        place = torch.tensor(order, device=base.device)
        last = torch.empty_like(place).index_copy_(0, place, self.lengths[place].cumsum(0) - 1)
        if aside is None:
            return _output(base, hidden[last]), self
        logits, ends, _ = _output(base, torch.cat([hidden[last], hidden[count:][aside.last]]))  # the head is read once
        return Output(logits[: len(last)], ends[: len(last)], logits[len(last) :]), self

    @classmethod
    def resume(cls, base: BaseModel, prefix: list[_Kept], caches: Caches) -> "_PlainRows":
        self = cls(base, prefix, [cache.shape[3] for cache in caches])
        for index, layer in enumerate(self.buffers):
            for buffer, resident in zip(layer, prefix[index], strict=True):
                buffer[:, :, : self.start] = resident
            for row, cache in enumerate(caches):
                for buffer, own in zip(layer, cache[index], strict=True):
                    buffer[row, :, self.start : self.start + cache.shape[3]] = own
        return self

    def caches(self) -> Caches:
        own = [slice(self.start, self.start + length) for length in self.lengths.tolist()]
        return [
            torch.stack([torch.stack([x[row, :, tokens] for x in kept]) for kept in self.buffers])
            for row, tokens in enumerate(own)
        ]

    def step(self, ids: Tensor) -> Output:
        groups, column = self.buffers[0].keys.shape[1], self.start + self.longest  # of the new tokens of all rows
        if column == self.mask.shape[1]:
            self._make_room()
        self.mask[:, column] = 0
        mask = self.mask[:, None, None].expand(-1, groups, -1, -1).flatten(0, 1)  # (rows · key heads, 1, columns)

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.buffers[index]
            keys[:, :, column], values[:, :, column] = k, v
            queries = q.reshape(len(mask), -1, q.shape[-1])  # heads of one key stand as its queries
            scores = torch.baddbmm(mask, queries, keys.flatten(0, 1).mT, alpha=self.scaling)
            return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(q.shape)

        embeddings = self.base.model.get_input_embeddings()(ids)
        last = frozen.infer(self.decoder, embeddings, self.start + self.lengths, attend)
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        return _output(self.base, last)

    def _make_room(self) -> None:
        self.mask = torch.nn.functional.pad(self.mask, (0, _ROOM), value=torch.finfo(self.mask.dtype).min)
        for index, kept in enumerate(self.buffers):
            self.buffers[index] = _Kept(*(torch.nn.functional.pad(x, (0, 0, 0, _ROOM)) for x in kept))

    def closed(self, gate: Gate) -> Tensor:
        return _closed([self], gate)

    def keep(self, rows: Tensor) -> None:
        self.lengths, self.mask = self.lengths[rows], self.mask[rows]
        self.buffers = [_Kept(*(x[rows] for x in kept)) for kept in self.buffers]


class _Together:
    """Some of the rows, alike in length, whose own tokens stand together in the flat sequence."""

    def __init__(self, rows: _PlainRows, group: list[int], lengths: list[int]) -> None:
        self.rows, self.own = rows, Rows(lengths, rows.prefix[0].keys)
        device = rows.lengths.device
        # a slice is no copy: where all rows are alike and in order, what they see is read where it is kept
        whole = group == list(range(len(rows.lengths)))
        self.index: slice | Tensor = slice(None) if whole else torch.tensor(group, device=device)
        self.width = rows.start + self.own.width
        tokens = torch.arange(self.width, device=device)
        self.seen = tokens <= rows.start + torch.arange(self.own.width, device=device)[:, None]  # padding is behind

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As of `frozen.infer`; puts the rows' keys and values into their buffers."""
        groups, start = k.shape[1], self.rows.start
        for buffer, resident, own in zip(self.rows.buffers[index], self.rows.prefix[index], (k, v), strict=True):
            buffer[self.index, :, :start] = resident
            buffer[self.index, :, start : self.width] = rows_of(own, groups, self.own).squeeze(2).transpose(0, 1)
        keys, values = (buffer[self.index, :, : self.width] for buffer in self.rows.buffers[index])
        rows = rows_of(q, groups, self.own)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            rows.transpose(0, 1).flatten(1, 2), keys, values, self.seen, scale=self.rows.scaling, enable_gqa=True
        )
        mixed = mixed.view(self.own.count, groups, q.shape[1] // groups, *mixed.shape[2:]).transpose(0, 1)
        return flat_of(mixed, self.own, q.new_empty(q.shape))


def _closed(parts: Sequence[_PlainRows], gate: Gate) -> Tensor:
    """`Decoding.closed` behind the rows of all parts, in one pass."""
    aside = _Aside(parts, gate, torch.cat([part.start + part.lengths for part in parts]))
    embeddings = gate.base.model.get_input_embeddings()(aside.ids)
    return frozen.run_layers(parts[0].decoder, embeddings, aside.positions, aside.layers, aside.gate)[aside.last]


class _Aside:
    """Closings beside a gate, one a member: (rows · members · n,) tokens that see what stands before positions `before`
    (rows,), where they begin, and their own member.
    """

    def __init__(self, parts: Sequence[_PlainRows], gate: Gate, before: Tensor) -> None:
        device, count, many = before.device, len(gate.closing), gate.members
        self.scaling, self.gate = parts[0].scaling, gate.turned(before)
        self.ids = torch.tensor(gate.closing, device=device).repeat(len(before) * many)
        self.positions = (before[:, None] + torch.arange(count, device=device).repeat(many)).flatten()
        self.last = torch.arange(count - 1, len(self.ids), count, device=device)
        place = torch.arange(many * count, device=device)
        whose = (torch.arange(gate.n_soft, device=device) * many // gate.n_soft, place // count)
        own = place[:, None] // count == torch.cat(whose)
        own[:, gate.n_soft :] &= place[:, None] >= place
        layers = []
        for part, ends in zip(parts, torch.split(before, [len(part.lengths) for part in parts]), strict=True):
            width = part.start + part.longest
            there = (torch.arange(width, device=device) < ends[:, None])[:, None].expand(-1, many * count, -1)
            seen = torch.cat([there, own.expand(len(ends), -1, -1)], dim=-1)  # (rows, many · n, tokens, gate and many · n)
            layers.append([Group(kept.keys[:, :, :width], kept.values[:, :, :width], seen) for kept in part.buffers])
        self.layers = [Beside(groups) for groups in zip(*layers, strict=True)]

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As of `frozen.infer`, after the rows' own keys and values of the layer are in their buffers."""
        return self.layers[index].attend(q, k, v, self.scaling, self.gate[index])[0]


class _AnyRows:
    """Rows of any causal language model, padded on the left, in transformers' own cache."""

    def __init__(self, base: BaseModel, cache: Any, mask: Tensor, positions: Tensor) -> None:
        self.base, self.cache, self.mask, self.positions = base, cache, mask, positions

    @classmethod
    def begin(
        cls, base: BaseModel, prefix: Any, prompts: Sequence[Sequence[int]], gate: Gate | None = None
    ) -> tuple[Output, "_AnyRows"]:
        rows = align(prompts, base.pad_id, base.device)
        length = prefix.get_seq_length()
        shared = _empty_cache(base)
        for index, layer in enumerate(prefix.layers):
            shared.update(*(x.expand(len(prompts), -1, -1, -1) for x in (layer.keys, layer.values)), index)
        self = cls(base, shared, rows.full_mask(length), rows.positions(length))
        output = self._run(rows.ids)
        if gate is None:
            return output, self
        count = len(gate.closing)
        hidden = gate.hidden(self.cache, self.mask[:, :-count], self.positions[:, -count])
        return output._replace(gated=base.head.logits(hidden)), self

    def step(self, ids: Tensor) -> Output:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return self._run(ids[:, None])

    def closed(self, gate: Gate) -> Tensor:
        return gate.hidden(self.cache, self.mask, self.mask.sum(-1))

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def _run(self, ids: Tensor) -> Output:
        output = self.base.model.get_decoder()(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return _output(self.base, output.last_hidden_state[:, -1])


def _output(base: BaseModel, hidden: Tensor) -> Output:
    """Of last hidden states (rows, hidden)."""
    return Output(base.head.logits(hidden), hidden)


def _empty_cache(base: BaseModel) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=base.model.config)
