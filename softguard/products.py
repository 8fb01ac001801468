"""Products with frozen weights, in the order in which the processor's library makes them fastest.

(tokens, n) @ (n, m) can be asked for as its transpose. In float32 on processors with AVX2 alone PyTorch's library (MKL) makes
few rows up to twice as fast that way, and its result, read as (tokens, m), lies in columns; operations on it keep that. A
thousand rows gain nothing by it, nor does bfloat16 (measured with AMX), and with AVX-512 a head takes up to half as long again.
All these, and GPUs, are left as they are. The numbers are the same but for rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn

_TURNED = torch.backends.cpu.get_cpu_capability() == "AVX2"
_FEW = 512  # rows
_LONG, _ENOUGH = 2**14, 64  # of fewer rows MKL sums so many terms ten times less exactly when it is turned
_BLOCK = 512  # of a head's vectors: the product of few rows with as many lies in cache, where turning it costs little


def linear(layer: Any, x: Tensor) -> Tensor:
    """A frozen linear layer of (tokens, n), or whatever else stands in its place."""
    if type(layer) is not nn.Linear or not _turns(x):
        return layer(x)  # type: ignore[no-any-return]
    if layer.bias is None:
        return (layer.weight @ x.mT).mT
    return torch.addmm(layer.bias[:, None], layer.weight, x.mT).mT


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


def _turns(x: Tensor) -> bool:
    return _TURNED and x.dtype == torch.float32 and x.device.type == "cpu" and 1 < len(x) <= _FEW
