"""The gate: keys and values that only the tokens before the response see, and a law that follows from them.

Every chat template closes the user's turn with fixed tokens, the *closing*. They are run twice, once as ever and once beside
the gate's keys and values; g(x), the probability the second pass gives to the refusal's first token, is how probable a
refusal is. After it the gate is gone: what is not refused is answered by the base as if nothing had been there,

    q(r|x) = (1 − g(x))·p(r|x) + g(x)·1[r = y_r],

so that TV(P, q) = |U(x) − g(x)| for a system P with a prompt guard (eq. 2; p(y_r) = 0). Training minimises KL(P‖q). Where
the system cuts the guard's probability at a threshold, U is taken before the cut (`Example.soft_refusal_rate`). A student is
less certain than its teacher, so fewer of its g than of the teacher's U reach ½, from which on greedy answers are refusals; a
`bias`, added to the log-odds and chosen on validation prompts, mends that. Where the system cuts nothing, answers that are
drawn are then a little farther from its law than the gate that was trained.

Part of what a gate gets wrong is chance, so it may have *members*: smaller gates that divide its vectors among them, see
nothing of each other and learn each by itself; the log-odds are their mean (Lakshminarayanan et al., 2017).

Keys are kept unturned and stand right before the closing wherever that is, so that a prompt's length changes nothing.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from softguard import frozen
from softguard.adapters import Adapter
from softguard.chat import Chat
from softguard.divergences import P_SAFE_RANGE, log_avoids
from softguard.errors import SoftguardError
from softguard.kernels import law_of
from softguard.models import BaseModel
from softguard.objectives import Losses

_ELSEWHERE = 60  # a position


@dataclass(frozen=True)
class Gate:
    """A gate ready for one base model."""

    base: BaseModel
    closing: tuple[int, ...]  # the template's tokens between the user's text and the response
    keys: Tensor  # (layers, key heads, n_soft, width) float32, unturned; a member's stand together
    values: Tensor  # likewise
    refusal: tuple[int, ...]  # y_r, the end-of-turn token included
    bias: float = 0.0  # added to the log-odds
    members: int = 1  # of n_soft/members positions each

    @classmethod
    def of(cls, base: BaseModel, chat: Chat, adapter: Adapter) -> "Gate":
        """From an adapter's vectors, which gradients reach, and the refusal, bias and members its facts name.

        Raises SoftguardError if the template has no closing, or the model's keys do not turn with their positions as ours do.
        """
        if not chat.closing:
            raise SoftguardError("the chat template has no tokens between user and response; use distil.adapter=kv_prefix")
        _check_turns(base, chat.closing)
        heads, width = base.key_heads
        keys, values = adapter.vectors.view(len(adapter.vectors), -1, 2, heads, width).permute(2, 1, 3, 0, 4)
        refusal = tuple(chat.encode_response(adapter.facts["refusal"]))
        return cls(base, chat.closing, keys, values, refusal, adapter.facts.get("bias", 0.0), adapter.facts.get("members", 1))

    @property
    def n_soft(self) -> int:
        """Positions it has."""
        return self.keys.shape[2]

    def turned(self, before: Tensor) -> list[tuple[Tensor, Tensor]]:
        """By layer, keys and values (rows, key heads, n_soft, width); keys stand right before positions `before` (rows,)."""
        own = torch.arange(-(self.n_soft // self.members), 0, device=before.device)
        positions = before[:, None] + own.repeat(self.members)
        keys = turned(self.keys[:, None], *turns(self.base.model.get_decoder(), self.keys, positions))
        rows = (x.to(self.base.model.dtype).expand(-1, len(before), -1, -1, -1) for x in (keys, self.values[:, None]))
        return list(zip(*rows, strict=True))

    def hidden(self, cache: Any, mask: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states, (rows · members, hidden), at the end of a closing that follows `cache` and sees a member.

        `cache`: transformers', whose first tokens are seen, (rows, tokens) that are real where `mask` is 1. `positions`:
        (rows,), of the closing's first token.
        """
        more = self.n_soft // self.members + len(self.closing)
        window = self.base.window
        if window is not None and mask.shape[1] + more > window:
            raise SoftguardError(
                f"a gate sees a prompt whole, and this model's attention has a window of {window} tokens, of which the prompt "
                f"leaves no room for {more} more; shorten it"
            )
        turned = [[x.chunk(self.members, dim=2) for x in pair] for pair in self.turned(positions)]
        ends = [  # one after another, since each copies the whole cache
            self._member_hidden(cache, [(keys[member], values[member]) for keys, values in turned], mask, positions)
            for member in range(self.members)
        ]
        return torch.stack(ends, dim=1).flatten(0, 1)

    def _member_hidden(self, cache: Any, own: Sequence[tuple[Tensor, Tensor]], mask: Tensor, positions: Tensor) -> Tensor:
        """(rows, hidden) of `hidden`, by layer beside its `own` keys and values, (rows, key heads, n_soft/members, width)."""
        from transformers import DynamicCache

        seen, closing = DynamicCache(config=self.base.model.config), torch.tensor(self.closing, device=mask.device)
        for index, (layer, pair) in enumerate(zip(cache.layers, own, strict=True)):
            before = (x[:, :, : mask.shape[1]] for x in (layer.keys, layer.values))
            seen.update(*(torch.cat(parts, dim=2) for parts in zip(before, pair, strict=True)), index)
        more = own[0][0].shape[2] + len(closing)
        decoder = self.base.model.get_decoder()
        usual = decoder.config._attn_implementation
        if torch.is_grad_enabled() and (mask.device.type, self.base.model.dtype) == ("cpu", torch.bfloat16):
            decoder.config._attn_implementation = "eager"  # the fused attention's backward pass is slow there
        try:
            output = decoder(
                input_ids=closing.expand(len(mask), -1),
                attention_mask=torch.cat([mask, mask.new_ones(len(mask), more)], dim=1),
                position_ids=positions[:, None] + torch.arange(len(closing), device=mask.device),
                past_key_values=seen,
                use_cache=True,
            )
        finally:
            decoder.config._attn_implementation = usual
        return output.last_hidden_state[:, -1]  # type: ignore[no-any-return]

    def log_odds(self, logits: Tensor) -> Tensor:
        """log g − log(1 − g), (rows,) float32 at least, from logits where `hidden` ends: the members' mean, and the bias."""
        return self.each(logits).mean(-1) + self.bias

    def each(self, logits: Tensor) -> Tensor:
        """The members' own log-odds, (rows, members), without the bias, of logits (rows · members, vocabulary)."""
        law = law_of(logits)
        token = torch.tensor(self.refusal[0], device=law.device)
        return (law[:, token] - log_avoids(law, token)).view(-1, self.members)


def losses(log_odds: Tensor, refusal_rate: Tensor, prompts: float) -> Losses:
    """KL(P‖q) of the two mixtures, summed over log-odds and divided by `prompts`: with it TV(P, q) = |U − g| vanishes.

    safe branch: (1 − U)·(log(1 − U) − log(1 − g)); refusal branch: U·(log U − log g).
    """
    rate = refusal_rate.clamp(*P_SAFE_RANGE)
    log_sigmoid = torch.nn.functional.logsigmoid
    safe = (1 - rate) * (torch.log1p(-rate) - log_sigmoid(-log_odds))
    refusal = rate * (rate.log() - log_sigmoid(log_odds))
    return Losses(safe.sum() / prompts, refusal.sum() / prompts)


def bias(log_odds: Tensor, refused: Tensor) -> float:
    """What makes as many of (prompts,) log-odds positive as the system refuses, (prompts,) booleans.

    0 if that is none or all.
    """
    count = int(refused.sum())
    if count in (0, len(log_odds)):
        return 0.0
    falling = log_odds.sort(descending=True).values
    return -float(falling[count - 1] + falling[count]) / 2


def turns(decoder: Any, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (rows, 1, tokens, turned width), of rotary `positions` (rows, tokens); of no width if there are none.

    Of models whose kinds of layers turn differently, (layers, rows, 1, tokens, turned width).
    """
    if not hasattr(decoder, "rotary_emb"):
        return (like.new_empty(1, 1, 1, 0),) * 2
    if "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters:
        each = [decoder.rotary_emb(like, positions, kind) for kind in decoder.config.layer_types]
        cos, sin = (torch.stack(parts) for parts in zip(*each, strict=True))
    else:
        cos, sin = decoder.rotary_emb(like, positions)
    return cos.unsqueeze(-3), sin.unsqueeze(-3)


def unturned(decoder: Any, keys: Tensor, positions: Tensor) -> Tensor:
    """The keys (…, tokens, width) that were turned to `positions` (1, tokens), before they were."""
    cos, sin = turns(decoder, keys, positions)
    scale, _ = turns(decoder, keys, torch.zeros_like(positions))  # some models (YaRN) scale what they turn
    return turned(keys, cos / scale**2, -sin / scale**2)


@torch.no_grad()
def _check_turns(base: BaseModel, ids: tuple[int, ...]) -> None:
    """Raises SoftguardError unless a text's keys elsewhere are its keys here, turned; asked once a model."""
    from transformers import DynamicCache

    decoder = base.model.get_decoder()
    if frozen.is_plain(decoder) or not hasattr(decoder, "rotary_emb") or decoder in _checked:
        return

    def keys(start: int) -> Tensor:
        cache = DynamicCache(config=base.model.config)
        positions = start + torch.arange(len(ids), device=base.device)
        decoder(input_ids=torch.tensor([ids], device=base.device), position_ids=positions[None], past_key_values=cache)
        return torch.stack([layer.keys for layer in cache.layers]).float()  # (layers, 1, key heads, tokens, width)

    own = torch.arange(len(ids), device=base.device)[None]
    here, there = unturned(decoder, keys(0), own), keys(_ELSEWHERE)
    moved = turned(here, *turns(decoder, here, own + _ELSEWHERE))
    if not torch.allclose(moved, there, atol=0.05 * float(there.abs().max())):
        raise SoftguardError(
            f"model {base.name!r} gives keys their positions in a way that a gate does not know; use distil.adapter=kv_prefix"
        )
    _checked.add(decoder)


_checked: "WeakSet[Any]" = WeakSet()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions as transformers turns them: x (…, tokens, width), of which the first turned width is turned."""
    some, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = some.chunk(2, dim=-1)
    some = some * cos + torch.cat([-b, a], dim=-1) * sin
    return torch.cat([some, rest.expand(*some.shape[:-1], -1)], dim=-1)
