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
    convolution layer; soft prompts are no token's embeddings; laws are made at the head, apart from the model's own code.
    """
    from transformers import DynamicCache

    make, decoder = f"model {name!r} ({type(model).__name__})", model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise SoftguardError(f"{make} keeps its layers in another way than is known here; use another model")
    if frozen.is_plain(decoder):
        return
    if any(isinstance(module, nn.Conv1d) for module in decoder.modules()):  # recurrent layers begin with one, too
        raise SoftguardError(f"{make} has layers that are no attention; use another model")
    ids = torch.arange(4, device=model.device)[None]
    embeddings = model.get_input_embeddings()(ids)
    embeddings = torch.cat([embeddings, embeddings.mean(1, keepdim=True)], dim=1)  # the last is no token's
    cache = DynamicCache(config=model.config)
    try:
        hidden = decoder(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).last_hidden_state[0, :4]
    except Exception as error:  # each make has its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise SoftguardError(f"{make} cannot be run as is needed here ({reason}); use another model") from error
    named = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    kept = [x for x in named if isinstance(x, torch.Tensor)]
    if len(kept) < 2 * len(decoder.layers):
        raise SoftguardError(f"{make} has layers without keys and values of their own; use another model")
    if len({(layer.keys.shape[1::2], layer.values.shape[1::2]) for layer in cache.layers}) > 1:  # heads and their width
        raise SoftguardError(f"{make} has layers whose keys and values are of several shapes; use another model")
    own, ours = model(input_ids=ids).logits[0].float(), head.logits(hidden).float()
    if not torch.allclose(ours, own, atol=0.05 * float(own.abs().max())):
        raise SoftguardError(f"{make} makes its logits in another way than is known here; use another model")
