"""The model an adapter changes from within: a LoRA's or a steering vector's copy of the base around the same weights.

Soft prompts, prefixes and texts stand before the rows and change nothing here, see `prefix`.
"""

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from softguard import frozen
from softguard.adapters import DIRECTION, Adapter, peft_config
from softguard.errors import SoftguardError
from softguard.models import BaseModel


def changes_layers(adapter: Adapter | None) -> bool:
    """Whether an adapter is in the model's layers; others stand before the rows."""
    return adapter is not None and adapter.kind in ("lora", "steering")


def adapted(base: BaseModel, adapter: Adapter | None) -> BaseModel:
    """The base with the adapter in its layers; the base itself where nothing in them changes.

    The copy's modules are new, its weights are the base's own, so that both run side by side. Gradients reach the adapter's
    tensors where these are parameters that want them. Raises SoftguardError for a LoRA that PEFT does not put there.
    """
    if adapter is None or not changes_layers(adapter):
        return base
    shared = {id(tensor): tensor for tensor in (*base.model.parameters(), *base.model.buffers())}
    model = copy.deepcopy(base.model, shared)
    if adapter.kind == "lora":
        _inject_lora(model, adapter, base)
    else:
        _steer(model, adapter)
    return replace(base, model=model)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's layers, first to last."""
    layers: nn.ModuleList = model.get_decoder().layers
    return layers


def _inject_lora(model: nn.Module, adapter: Adapter, base: BaseModel) -> None:
    from peft import get_peft_model

    wrapped = get_peft_model(model, peft_config(adapter, base))
    for name, tensor in adapter.tensors.items():
        path, factor = name.removesuffix(".weight").rsplit(".", 1)  # …q_proj and lora_A or lora_B
        layer = wrapped.get_submodule(path)
        if not hasattr(layer, factor):  # of some mixtures of experts it changes the fused experts instead
            raise SoftguardError(
                f"PEFT does not put a LoRA into {path.removeprefix('base_model.model.')} of {base.name!r}; lower "
                "distil.budget, so that it is of attention alone, or choose another distil.adapter"
            )
        getattr(layer, factor)["default"].weight = _parameter(tensor)


def _steer(model: Any, adapter: Adapter) -> None:
    """Add the vector to a layer's output; where layers run written out, where the last product joins the residual stream."""
    plain = frozen.is_plain(model.get_decoder())
    for name, vector in adapter.tensors.items():
        layer: Any = decoder_layers(model)[int(name.removeprefix(DIRECTION))]
        if plain:
            layer.mlp.down_proj = _Steered(layer.mlp.down_proj, _parameter(vector))
        else:
            layer.register_parameter("steering", _parameter(vector))
            layer.register_forward_hook(_add_steering)


def _add_steering(layer: Any, _: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return output[0] + layer.steering.to(output[0].dtype), *output[1:]
    return output + layer.steering.to(output.dtype)


class _Steered(nn.Module):
    """A linear layer and a vector that is added to what it gives."""

    def __init__(self, linear: nn.Linear, vector: nn.Parameter) -> None:
        super().__init__()
        self.linear, self.vector = linear, vector

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.vector.to(x.dtype)  # type: ignore[no-any-return]


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
