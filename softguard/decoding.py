"""Answers token by token behind a resident prefix, whose keys and values are computed once and copied to every row.

Models `frozen` knows run written out: prompts are not padded, and keys and values lie in buffers of the length they will
need. All others run as transformers has them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from softguard import frozen
from softguard.adapters import Adapter
from softguard.attention import Layout, flat_of, rows_of
from softguard.chat import Chat, align
from softguard.gate import Gate
from softguard.models import BaseModel
from softguard.prefix import ConstantPrefix, constant_prefix


class Output(NamedTuple):
    """What predicts the next token of every row."""

    logits: Tensor  # (rows, vocabulary) float32 at least
    hidden: Tensor  # (rows, hidden)
    gated: Tensor | None = None  # (rows, hidden), of the pass beside a gate, where the response begins


class Decoding(Protocol):
    """Some rows under way."""

    def step(self, ids: Tensor) -> Output:
        """Append one id, (rows,), to every row."""

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but those at these indices."""


Begin = Callable[[Sequence[Sequence[int]], int], tuple[Output, Decoding]]  # prompts, new tokens at most


class Resident(NamedTuple):
    """A constant prefix whose keys and values are kept. `begin` starts rows of ids behind it."""

    length: int
    begin: Begin


@torch.inference_mode()
def make_resident(base: BaseModel, chat: Chat, adapter: Adapter | None, gate: Gate | None = None) -> Resident:
    """Run the constant prefix with `adapter`, or without, and keep it. With a `gate` every row also passes it."""
    return keep_prefix(base, constant_prefix(base, chat, adapter), gate)


@torch.inference_mode()
def keep_prefix(base: BaseModel, prefix: ConstantPrefix, gate: Gate | None = None) -> Resident:
    """Run `prefix` and keep it."""
    if frozen.is_plain(base.model.get_decoder()):
        kept = _run_plain_prefix(base, prefix)
        return Resident(prefix.length, lambda prompts, new: _PlainRows.begin(base, kept, prompts, new, gate))
    cache = run_prefix(base, prefix)
    return Resident(prefix.length, lambda prompts, new: _AnyRows.begin(base, cache, prompts, gate))


def run_prefix(base: BaseModel, prefix: ConstantPrefix) -> Any:
    """Transformers' cache of `prefix`, of one row."""
    cache = _empty_cache(base)
    for index, (keys, values) in enumerate(prefix.keys_values or ()):
        cache.update(keys[None], values[None], index)
    base.model(inputs_embeds=prefix.embeddings[None], past_key_values=cache, use_cache=True)
    return cache


def gated_log_odds(gate: Gate, prefix: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """A gate's log-odds of refusing, (prompts,), with gradients to it; `prefix` of `run_prefix` without one.

    What comes before the closing does not depend on the gate, so the pass over it has none.
    """
    count, result = len(gate.closing), torch.zeros(len(prompts), device=gate.base.device)
    for group in alike([len(prompt) for prompt in prompts]):
        with torch.no_grad():
            _, rows = _AnyRows.begin(gate.base, prefix, [prompts[i][:-count] for i in group])
        log_odds = gate.log_odds(gate.hidden(rows.cache, rows.mask, rows.mask.sum(-1)))
        result = result.index_copy(0, torch.tensor(group, device=result.device), log_odds)
    return result


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices by ascending length, in groups of which padding takes at most a quarter more than the rows themselves."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= 1.25 * (sum(lengths[j] for j in groups[-1]) + lengths[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


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

    def __init__(self, base: BaseModel, prefix: list[_Kept], lengths: Sequence[int], new: int) -> None:
        self.base, self.decoder, self.prefix = base, base.model.get_decoder(), prefix
        self.scaling = frozen.scaling(self.decoder)
        self.lengths = torch.tensor(lengths, device=base.device)
        self.longest = max(lengths)
        groups, self.start, width = prefix[0].keys.shape
        # (rows, key heads, tokens, width); every row's own copy of the prefix first, so that one call attends to all
        shape = (len(lengths), groups, self.start + self.longest + new, width)
        self.buffers = [_Kept(*(x.new_zeros(shape) for x in kept)) for kept in prefix]

    @classmethod
    def begin(
        cls, base: BaseModel, prefix: list[_Kept], prompts: Sequence[Sequence[int]], new: int, gate: Gate | None = None
    ) -> tuple[Output, "_PlainRows"]:
        lengths = [len(prompt) for prompt in prompts]
        self = cls(base, prefix, lengths, new)
        ids = torch.tensor([i for prompt in prompts for i in prompt], device=base.device)
        at, count = Layout(0, lengths, prefix[0].keys), len(ids)
        positions = torch.cat([self.start + torch.arange(n) for n in lengths]).to(base.device)
        aside = None if gate is None else _Aside(self, gate)
        if aside is not None:  # behind all rows, their closings once more
            ids, positions = torch.cat([ids, aside.ids]), torch.cat([positions, aside.positions])

        width = self.start + at.width
        tokens = torch.arange(width, device=base.device)
        seen = tokens <= self.start + torch.arange(at.width, device=base.device)[:, None]  # (T, tokens); padding is behind

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            groups = k.shape[1]
            for buffer, resident, own in zip(self.buffers[index], self.prefix[index], (k[:count], v[:count]), strict=True):
                buffer[:, :, : self.start] = resident
                buffer[:, :, self.start : width] = rows_of(own, groups, at).squeeze(2).transpose(0, 1)
            keys, values = self.buffers[index]
            rows = rows_of(q[:count], groups, at)
            mixed = torch.nn.functional.scaled_dot_product_attention(
                rows.transpose(0, 1).flatten(1, 2), keys[:, :, :width], values[:, :, :width], seen, scale=self.scaling,
                enable_gqa=True,
            )  # fmt: skip
            mixed = mixed.view(len(lengths), groups, -1, *mixed.shape[2:]).transpose(0, 1)
            mixed = flat_of(mixed.new_empty(0, mixed.shape[-1]), mixed, at)
            return mixed if aside is None else torch.cat([mixed, aside.attend(index, q[count:], k[count:], v[count:])])

        embeddings = base.model.get_input_embeddings()(ids)
        hidden = frozen.infer(self.decoder, embeddings, positions, attend)
        output = self._output(hidden[self.lengths.cumsum(0) - 1])
        return output if aside is None else output._replace(gated=hidden[count:][aside.last]), self

    def step(self, ids: Tensor) -> Output:
        positions = self.start + self.lengths
        rows, width = torch.arange(len(ids), device=ids.device), self.start + self.longest + 1
        seen = (torch.arange(width, device=ids.device) <= positions[:, None])[:, None, None]  # (rows, 1, 1, tokens)
        mask = None if len(ids) == 1 else seen

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.buffers[index]
            keys[rows, :, positions], values[rows, :, positions] = k, v
            mixed = torch.nn.functional.scaled_dot_product_attention(  # heads of one key stand as its queries
                q.view(len(ids), k.shape[1], -1, k.shape[2]), keys[:, :, :width], values[:, :, :width], mask, scale=self.scaling
            )
            return mixed.reshape(q.shape)

        hidden = frozen.infer(self.decoder, self.base.model.get_input_embeddings()(ids), positions, attend)
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        return self._output(hidden)

    def keep(self, rows: Tensor) -> None:
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())
        self.buffers = [_Kept(*(x[rows] for x in kept)) for kept in self.buffers]

    def _output(self, hidden: Tensor) -> Output:
        logits = self.base.model.get_output_embeddings()(hidden)
        return Output(logits.to(torch.promote_types(logits.dtype, torch.float32)), hidden)


class _Aside:
    """The closings of some rows once more, beside a gate: (rows · n,) tokens that see what stands before the rows' own."""

    def __init__(self, rows: _PlainRows, gate: Gate) -> None:
        self.rows, self.count = rows, len(gate.closing)
        device = rows.lengths.device
        before = rows.start + rows.lengths - self.count  # position of the closing's first token
        self.gate = gate.turned(before)
        self.ids = torch.tensor(gate.closing, device=device).repeat(len(before))
        self.positions = (before[:, None] + torch.arange(self.count, device=device)).flatten()
        self.last = torch.arange(self.count - 1, len(self.ids), self.count, device=device)
        self.width = rows.start + rows.longest
        there = (torch.arange(self.width, device=device) < before[:, None])[:, None, None].expand(-1, 1, self.count, -1)
        own = torch.ones(self.count, gate.n_soft + self.count, dtype=torch.bool, device=device).tril(gate.n_soft)
        self.seen = torch.cat([there, own.expand(len(before), 1, -1, -1)], dim=-1)  # (rows, 1, n, tokens, gate and n)

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As of `frozen.infer`, after the rows' own keys and values of the layer are in their buffers."""
        q, k, v = (x.view(-1, self.count, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # (rows, heads, n, width)
        keys, values = (
            torch.cat([buffer[:, :, : self.width], gate, own], dim=2)
            for buffer, gate, own in zip(self.rows.buffers[index], self.gate[index], (k, v), strict=True)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, self.seen, scale=self.rows.scaling, enable_gqa=True
        )
        return mixed.transpose(1, 2).flatten(0, 1)


class _AnyRows:
    """Rows of any causal language model, padded on the left, in transformers' own cache."""

    def __init__(self, base: BaseModel, cache: Any, mask: Tensor, positions: Tensor) -> None:
        self.base, self.cache, self.mask, self.positions = base, cache, mask, positions

    @classmethod
    def begin(
        cls, base: BaseModel, prefix: Any, prompts: Sequence[Sequence[int]], gate: Gate | None = None
    ) -> tuple[Output, "_AnyRows"]:
        rows = align(prompts, [[]] * len(prompts), base.pad_id, base.device)
        length = prefix.get_seq_length()
        shared = _empty_cache(base)
        for index, layer in enumerate(prefix.layers):
            shared.update(*(x.expand(len(prompts), -1, -1, -1) for x in (layer.keys, layer.values)), index)
        self = cls(base, shared, rows.full_mask(length), rows.positions(length))
        output = self._run(rows.ids)
        return output if gate is None else output._replace(gated=self._aside(gate)), self

    def _aside(self, gate: Gate) -> Tensor:
        count, before = len(gate.closing), _empty_cache(self.base)
        for index, layer in enumerate(self.cache.layers):
            before.update(layer.keys[:, :, :-count], layer.values[:, :, :-count], index)
        return gate.hidden(before, self.mask[:, :-count], self.positions[:, -count])

    def step(self, ids: Tensor) -> Output:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return self._run(ids[:, None])

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def _run(self, ids: Tensor) -> Output:
        output = self.base.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=True,
        )
        return Output(output.logits[:, -1].float(), output.hidden_states[-1][:, -1])


def _empty_cache(base: BaseModel) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=base.model.config)
