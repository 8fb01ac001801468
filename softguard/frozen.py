"""A decoder layer with frozen weights, its backward pass written out: gradients reach its input, and keys and values that
stand before it, alone.

PyTorch would record some fifty small operations a layer and keep a tensor for most; here the same mathematics is two
functions that keep what they need. Layers of another make than `is_plain` knows go through transformers' own code.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from softguard.products import gated, into_input, linear, linear_plus, side_by_side

KeysValues = Sequence[tuple[Tensor, Tensor]]  # of every layer, (key heads, tokens, width) each


class Attention(Protocol):
    """What the tokens of one pass see in one layer: an `attention.Layout`, or an `attention.Beside`."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(tokens, heads, width) like the queries, and what `backward` needs; `before`: keys and values that are no token's."""

    def backward(self, gradient: Tensor, kept: Sequence[Tensor], scaling: float) -> tuple[Tensor, ...]:
        """Gradients of queries, keys, values, and of `before`'s keys and values."""


_PLAIN = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}


def is_plain(decoder: Any) -> bool:
    """Whether every layer is RMS norm, rotary attention to the whole row, RMS norm and SiLU-gated linear units."""
    config = decoder.config
    return (
        all(type(layer).__name__ in _PLAIN for layer in decoder.layers)
        and getattr(config, "hidden_act", None) == "silu"
        and not getattr(config, "mlp_bias", False)
        and not getattr(config, "sliding_window", None)
    )


def scaling(decoder: Any) -> float:
    """What attention multiplies its scores by."""
    return float(decoder.layers[0].self_attn.scaling)


def infer(
    decoder: Any, embeddings: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Last hidden states, (tokens, hidden), without a gradient.

    `attend` gets a layer's number and its queries, keys and values, (tokens, heads, width), and returns what is like the
    queries.
    """
    hidden, turn = embeddings, _turns(decoder, embeddings, positions)
    for index, layer in enumerate(decoder.layers):
        q, k, v = _queries_keys_values(layer.self_attn, _norm(hidden, layer.input_layernorm)[0], turn)
        hidden = linear_plus(layer.self_attn.o_proj, attend(index, q, k, v).flatten(1), hidden)
        middle = _norm(hidden, layer.post_attention_layernorm)[0]
        hidden = linear_plus(layer.mlp.down_proj, gated(layer.mlp.gate_proj, layer.mlp.up_proj, middle), hidden)
    return decoder.norm(hidden)  # type: ignore[no-any-return]


def run_layers(
    decoder: Any, embeddings: Tensor, positions: Tensor, seen: Sequence[Attention], before: KeysValues | None = None
) -> Tensor:
    """Last hidden states, (tokens, hidden), of embeddings (tokens, hidden) at `positions` (tokens,).

    `seen`: by layer, its attention. `before`: by layer, keys and values that stand before tokens and are none's, shaped as
    that attention has them.
    """
    hidden, turn = embeddings, _turns(decoder, embeddings, positions)
    for index, layer in enumerate(decoder.layers):
        keys, values = (None, None) if before is None else before[index]
        hidden = _Layer.apply(hidden, keys, values, layer, turn, seen[index])  # type: ignore[no-untyped-call]
    return decoder.norm(hidden)  # type: ignore[no-any-return]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        layer: Any,
        turn: tuple[Tensor, Tensor],
        seen: Attention,
    ) -> Tensor:
        attention, mlp = layer.self_attn, layer.mlp
        first, first_scale = _norm(x, layer.input_layernorm)
        before = None if keys is None or values is None else (keys, values)
        mixed, kept = seen.attend(*_queries_keys_values(attention, first, turn), attention.scaling, before)
        middle = linear_plus(attention.o_proj, mixed.flatten(1), x)
        second, second_scale = _norm(middle, layer.post_attention_layernorm)
        gate, up = linear(mlp.gate_proj, second), linear(mlp.up_proj, second)
        ctx.save_for_backward(x, first_scale, middle, second_scale, gate, up, *kept)
        ctx.layer, ctx.turn, ctx.seen, ctx.has_before = layer, turn, seen, before is not None
        return linear_plus(mlp.down_proj, torch.nn.functional.silu(gate).mul_(up), middle)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        x, first_scale, middle, second_scale, gate, up, *kept = ctx.saved_tensors
        attention, mlp, (cos, sin) = ctx.layer.self_attn, ctx.layer.mlp, ctx.turn
        into_product = into_input(outer, mlp.down_proj.weight)
        into_gate = torch.ops.aten.silu_backward(into_product * up, gate)
        into_up = into_product.mul_(torch.nn.functional.silu(gate))  # made once more, since keeping it is no faster
        into_second = into_input(into_up, mlp.up_proj.weight, into_input(into_gate, mlp.gate_proj.weight))
        into_middle = _norm_backward(into_second, middle, second_scale, ctx.layer.post_attention_layernorm).add_(outer)
        into_mixed = into_input(into_middle, attention.o_proj.weight)
        q, k, v, keys, values = ctx.seen.backward(into_mixed.view(len(x), -1, attention.head_dim), kept, attention.scaling)
        q, k = _turn(q, cos, -sin), _turn(k, cos, -sin)  # a rotation's transpose is the rotation back
        into_first = into_input(q.flatten(1), attention.q_proj.weight)
        into_first = into_input(k.flatten(1), attention.k_proj.weight, into_first)
        into_first = into_input(v.flatten(1), attention.v_proj.weight, into_first)
        into_x = _norm_backward(into_first, x, first_scale, ctx.layer.input_layernorm).add_(into_middle)
        before = (keys, values) if ctx.has_before else (None, None)
        return into_x, *before, None, None, None


def _queries_keys_values(attention: Any, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, heads, width) each, queries and keys turned to their positions."""
    made = side_by_side((attention.q_proj, attention.k_proj, attention.v_proj), x)
    q, k, v = (each.view(len(x), -1, attention.head_dim) for each in made)
    return _turn(q, *turn), _turn(k, *turn), v


def _turns(decoder: Any, embeddings: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the positions' angles, (tokens, 1, head width/2)."""
    cos, sin = decoder.rotary_emb(embeddings[None], positions[None])  # (1, tokens, head width)
    half = cos.shape[-1] // 2
    return cos[0, :, None, :half], sin[0, :, None, :half]


def _norm(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """RMS norm, w·x/√(mean x² + ε), and its inverse root in float32 at least, (tokens, 1)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)  # mixing precisions in one operation is slower
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = (size.square() / x.shape[-1] + norm.variance_epsilon).rsqrt()
    return wide.mul_(scale).to(x.dtype).mul_(norm.weight), scale


def _norm_backward(outer: Tensor, x: Tensor, scale: Tensor, norm: Any) -> Tensor:
    """s·(g − x·s²·mean(g·x)) with g = w·outer."""
    g, wide = torch.mul(outer, norm.weight).to(scale.dtype), x.to(scale.dtype, copy=True)
    share = (g * wide).sum(-1, keepdim=True).mul_(scale.square()).div_(x.shape[-1])
    return g.sub_(wide.mul_(share)).mul_(scale).to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (tokens, heads, width), a head's halves the axes of its planes; cos and sin (tokens, 1, width/2)."""
    a, b = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin)
    return out
