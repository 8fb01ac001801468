"""Products with frozen weights, in the layout and order in which the processor's libraries make them fastest.

In bfloat16 PyTorch's library (oneDNN) lays a weight out for itself at every product. For few rows it does so once here, which
gives the same numbers in two thirds of the time (measured with AMX; a thousand rows gain nothing) and takes these weights
twice in memory; so large weights stay as they are. That library also finishes a product with what follows it, in cache.

In float32 (tokens, n) @ (n, m) can be asked for as its transpose. On processors with AVX2 alone PyTorch's library (MKL) makes
few rows up to twice as fast that way, and its result, read as (tokens, m), lies in columns; operations on it keep that. A
thousand rows gain nothing by it, and with AVX-512 a head takes up to half as long again. These, and GPUs, are left as they are.
The numbers are the same but for rounding.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_FEW = 512  # rows

_MKLDNN = torch.ops.mkldnn
_LAYS_OUT = torch.backends.mkldnn.is_available() and _MKLDNN._is_mkldnn_bf16_supported()  # type: ignore[no-untyped-call]
# Bytes of weights that are laid out: layers of 1.5 billion parameters gain less and would take 2.6 GB more
_LARGE, _LARGE_HEAD = 2**24, 2**26
_ROWS = 64  # for which the library chooses a layout; of fewer and of more rows it was as good as any
# Of weights, their laid out copies, what shows that a weight is still the same, and its memory, which is so not given anew
_laid_out: MutableMapping[Tensor, tuple[Tensor, Any, Any]] = WeakTensorKeyDictionary()

_TURNED = torch.backends.cpu.get_cpu_capability() == "AVX2"
_LONG, _ENOUGH = 2**14, 64  # of fewer rows MKL sums so many terms ten times less exactly when it is turned
_BLOCK = 512  # of a head's vectors: the product of few rows with as many lies in cache, where turning it costs little


def linear(layer: Any, x: Tensor) -> Tensor:
    """A frozen linear layer of (tokens, n), or whatever else stands in its place."""
    if _is_laid_out([layer], x):
        return _linear(_in_layout([layer.weight]), x, layer.bias)
    if type(layer) is not nn.Linear or not _turns(x):
        return layer(x)  # type: ignore[no-any-return]
    if layer.bias is None:
        return (layer.weight @ x.mT).mT
    return torch.addmm(layer.bias[:, None], layer.weight, x.mT).mT


def linear_plus(layer: Any, x: Tensor, rest: Tensor) -> Tensor:
    """As `linear`, and `rest` (tokens, m) added; without a gradient."""
    if _is_laid_out([layer], x):
        return _MKLDNN._linear_pointwise.binary(x, rest, _in_layout([layer.weight]), layer.bias, "add")  # type: ignore[no-any-return]
    return linear(layer, x).add_(rest)


def gated(gate: Any, up: Any, x: Tensor) -> Tensor:
    """silu(gate·x)·(up·x) of (tokens, n); without a gradient."""
    if not _is_laid_out([gate, up], x):
        return nn.functional.silu(linear(gate, x)).mul_(linear(up, x))
    opened = _linear(_in_layout([gate.weight]), x, gate.bias, "swish")
    return _MKLDNN._linear_pointwise.binary(x, opened, _in_layout([up.weight]), up.bias, "mul")  # type: ignore[no-any-return]


def side_by_side(layers: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    """What several layers make of (tokens, n), (tokens, m) each."""
    if not _is_laid_out(layers, x):
        return [linear(layer, x) for layer in layers]
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    made = _linear(_in_layout([layer.weight for layer in layers]), x, bias)
    return torch.split(made, [len(layer.weight) for layer in layers], dim=-1)


def into_input(outer: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """The gradient (tokens, n) from that of what a layer gives, (tokens, m), and what is to be added to it."""
    if not _turns(outer) or (outer.shape[1] >= _LONG and len(outer) < _ENOUGH):
        return outer @ weight if plus is None else torch.addmm(plus, outer, weight)
    return (weight.mT @ outer.mT).mT if plus is None else torch.addmm(plus.mT, weight.mT, outer.mT).mT


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(tokens, hidden) to (tokens, vocabulary) in rows, with a gradient to `hidden`."""
    return _Logits.apply(hidden, weight)  # type: ignore[no-any-return,no-untyped-call]


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        if _lays_out(hidden) and weight.nbytes <= _LARGE_HEAD:
            return _linear(_in_layout([weight]), hidden, None)
        if not _turns(hidden):
            return hidden @ weight.mT
        result = hidden.new_empty(len(hidden), len(weight))
        for start in range(0, len(weight), _BLOCK):
            part = slice(start, start + _BLOCK)
            result[:, part] = (weight[part] @ hidden.mT).mT
        return result

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        return into_input(outer, ctx.weight), None


def _is_laid_out(layers: Sequence[Any], x: Tensor) -> bool:
    """Whether all of them are layers whose products are made of `_in_layout`."""
    if any(type(layer) is not nn.Linear or layer.weight.nbytes > _LARGE for layer in layers):
        return False
    return _lays_out(x) and len({layer.bias is None for layer in layers}) == 1


def _lays_out(x: Tensor) -> bool:
    here = _LAYS_OUT and x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(x) <= _FEW
    return here and not (x.requires_grad and torch.is_grad_enabled())


def _in_layout(weights: Sequence[Tensor]) -> Tensor:
    """Weights, one below the other, as oneDNN lays them out for itself; made at first use, and anew when they have changed.

    What is written through `.data` (PEFT's merging) shows nowhere: load the base again then.
    """
    known, now = _laid_out.get(weights[0]), [(weight.data_ptr(), weight._version) for weight in weights]
    if known is None or known[1] != now:
        with torch.no_grad():
            copy = _MKLDNN._reorder_linear_weight(torch.cat(list(weights)), _ROWS)
        known = _laid_out[weights[0]] = copy, now, [weight.untyped_storage() for weight in weights]
    return known[0]


def _linear(weight: Tensor, x: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    return _MKLDNN._linear_pointwise(x, weight, bias, then, [], "")  # type: ignore[no-any-return]


def _turns(x: Tensor) -> bool:
    return _TURNED and x.dtype == torch.float32 and x.device.type == "cpu" and 1 < len(x) <= _FEW
