"""One pass over a prefix and the rows that follow it, for training, scoring and drift: the prefix once instead of once a row,
and no padding outside attention.

All tokens go through the model's layers as one flat sequence, prefix first. Only attention looks at rows (`attention`).
Layers of the common make run as `frozen` has them written out, all others as transformers has them.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from softguard import frozen
from softguard.attention import Layout, alike, attend, attend_backward
from softguard.errors import SoftguardError
from softguard.models import BaseModel
from softguard.prefix import ConstantPrefix

_NAME = "softguard_packed"
# What models tell their attention that changes nothing here, or is heeded below. Not what some have beside it, such as sinks.
_KNOWN = (
    "dropout",
    "sliding_window",
    "softcap",
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
)


def packed_hidden(
    base: BaseModel,
    prefix: ConstantPrefix,
    rows: Sequence[Sequence[int]],
    wanted: Sequence[int],
    own_code: bool = False,
) -> list[Tensor]:
    """Last hidden states, (wanted[i], hidden), at the last `wanted[i]` tokens of each row of ids, all behind `prefix`.

    Gradients reach the prefix. `own_code`: run all layers by the model's own code, so that they reach weights within them, too.
    Raises SoftguardError for a model whose attention sees less than the whole row.
    """
    groups = alike([len(row) for row in rows])
    order = [i for group in groups for i in group]  # of the rows in the flat sequence
    lengths = [len(rows[i]) for i in order]
    length, device, before = len(prefix.embeddings), prefix.embeddings.device, prefix.length - len(prefix.embeddings)
    ids = torch.tensor([token for i in order for token in rows[i]], device=device)
    positions = before + torch.cat([torch.arange(length), *(length + torch.arange(n) for n in lengths)]).to(device)
    ends = dict(zip(order, (length + np.cumsum(lengths)).tolist(), strict=True))
    kept = torch.cat([torch.arange(ends[i] - n, ends[i]) for i, n in enumerate(wanted)]).to(device)
    embeddings = torch.cat([prefix.embeddings, base.model.get_input_embeddings()(ids)])
    at = Layout(length, [[len(rows[i]) for i in group] for group in groups], prefix.embeddings, before)
    decoder = base.model.get_decoder()
    if frozen.is_plain(decoder) and not own_code:
        hidden = frozen.run_layers(decoder, embeddings, positions, [at] * len(decoder.layers), prefix.keys_values)
    else:
        _check(decoder)
        hidden = _run_any(decoder, embeddings, positions, at, prefix.keys_values)
    return list(torch.split(hidden[kept], list(wanted)))


def _run_any(decoder: Any, embeddings: Tensor, positions: Tensor, at: Layout, before: frozen.KeysValues | None) -> Tensor:
    """Last hidden states, (tokens, hidden), by the model's own code with our attention in its place."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    usual = decoder.config._attn_implementation
    decoder.config._attn_implementation = _NAME
    try:
        output = decoder(
            inputs_embeds=embeddings[None], position_ids=positions[None], use_cache=False, layout=at, before=before
        )
    finally:
        decoder.config._attn_implementation = usual
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


@torch.no_grad()
def _check(decoder: Any) -> None:
    """Raises SoftguardError unless a row of a flat sequence comes out as it does alone; asked once a model."""
    if decoder in _checked:
        return
    first, second = torch.arange(4, device=decoder.device), torch.arange(4, 7, device=decoder.device)
    embeddings = decoder.get_input_embeddings()(torch.cat([first, second]))
    positions = torch.tensor([0, 1, 2, 3, 1, 2, 3], device=decoder.device)
    at = Layout(1, [[3, 3]], embeddings)
    alone = decoder(inputs_embeds=embeddings[[0, 4, 5, 6]][None], use_cache=False).last_hidden_state[0, 1:].float()
    try:
        packed = _run_any(decoder, embeddings, positions, at, None)[4:].float()
    except TypeError as error:  # of a make whose layers do not hand on what attention is told
        raise SoftguardError(f"a {type(decoder).__name__} cannot run here ({error}); use another model") from error
    if not torch.allclose(packed, alone, atol=0.05 * float(alone.abs().max())):
        raise SoftguardError(f"a {type(decoder).__name__} cannot run here: its rows change each other; use another model")
    _checked.add(decoder)


_checked: "WeakSet[Any]" = WeakSet()


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    layout: Layout,
    before: frozen.KeysValues | None,
    **other: Any,
) -> tuple[Tensor, None]:
    if strange := [name for name, value in other.items() if value is not None and name not in _KNOWN]:
        raise SoftguardError(f"this model's attention asks for {strange[0]}, which is not known here; use another model")
    window = other.get("sliding_window")
    if window is not None and window < layout.before + layout.prefix + layout.width:
        raise SoftguardError(f"this model's attention has a window of {window} tokens, shorter than a row; use shorter prompts")
    keys, values = (None, None) if before is None else before[module.layer_idx]
    cap = other.get("softcap") or 0.0
    width = value.shape[-1]
    value = nn.functional.pad(value, (0, key.shape[-1] - width))  # latent attention's values are narrower than its keys
    mixed = _Attention.apply(query[0], key[0], value[0], keys, values, scaling, layout, cap)  # type: ignore[no-untyped-call]
    return mixed[None, ..., :width], None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        scaling: float,
        at: Layout,
        cap: float,
    ) -> Tensor:
        before = None if keys is None or values is None else (keys, values)
        result, kept = attend(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scaling, at, before, cap)
        ctx.save_for_backward(*kept)
        ctx.scaling, ctx.at, ctx.cap = scaling, at, cap
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, keys, values = attend_backward(gradient, ctx.saved_tensors, ctx.scaling, ctx.at, ctx.cap)
        before = (keys, values) if ctx.at.before else (None, None)
        return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), *before, None, None, None
