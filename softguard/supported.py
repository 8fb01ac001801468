"""What a model must be like to be run and trained here. What would be computed wrongly, or end in a raw error, is refused."""

from typing import Any

import torch
from torch import nn

from softguard import frozen
from softguard.errors import SoftguardError


@torch.no_grad()
def check_supported(name: str, model: Any, head: Any) -> None:
    """Raises SoftguardError unless the model is a decoder of attention layers whose logits are those of its `head`.

    Rows that share a prefix, or stand in one flat sequence, would run into each other in the state of a recurrent or a
    convolution layer; laws are made at the head, apart from the model's own code.
    """
    from transformers import DynamicCache

    make, decoder = f"model {name!r} ({type(model).__name__})", model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise SoftguardError(f"{make} keeps its layers in another way than is known here; use another model")
    if frozen.is_plain(decoder):
        return
    ids = torch.arange(4, device=model.device)[None]
    cache = DynamicCache(config=model.config)
    hidden = decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[0]
    state = any(isinstance(module, nn.Conv1d) for module in decoder.modules())  # recurrent layers begin with one, too
    if state or not all(torch.is_tensor(getattr(layer, "keys", None)) for layer in cache.layers):
        raise SoftguardError(f"{make} has layers that are no attention; use another model")
    own, ours = model(input_ids=ids).logits[0].float(), head.logits(hidden).float()
    if not torch.allclose(ours, own, atol=0.05 * float(own.abs().max())):
        raise SoftguardError(f"{make} makes its logits in another way than is known here; use another model")
