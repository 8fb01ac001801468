"""What the tests compare with: transformers' own passes over whole rows, random adapters, and models of other makes."""

from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from softguard.adapters import VECTORS, Adapter, Kind
from softguard.chat import Slot
from softguard.initial import initial_vectors
from softguard.models import BaseModel
from softguard.prefix import ConstantPrefix

KINDS = [("soft_prompt", "start"), ("soft_prompt", "system"), ("kv_prefix", "start")]
SMALL = {
    "vocab_size": 49152, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip


def made(base: BaseModel, make: str, config: str = "", **settings: Any) -> BaseModel:
    """A small random model of another make, with the tokenizer of `base`."""
    torch.manual_seed(0)
    kind = getattr(transformers, config or f"{make}Config")
    model = getattr(transformers, f"{make}ForCausalLM")(kind(**{**SMALL, **settings})).eval().requires_grad_(False)
    return replace(base, name=make, model=model)


def random_adapter(base: BaseModel, kind: Kind, slot: Slot = "start", n_soft: int = 4, seed: int = 0) -> Adapter:
    """Near what training starts from; its values are those float16 has, so that saving changes nothing."""
    vectors = initial_vectors(base, kind, "You are a careful assistant.", n_soft)
    noise = 0.1 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
    near = (vectors + noise * vectors.square().mean().sqrt()).half().float()
    return Adapter(kind, {VECTORS: near}, slot, {"objective": "tv"})


def cache_of(prefix: ConstantPrefix) -> DynamicCache | None:
    """The keys and values before the prefix as transformers holds them."""
    if prefix.keys_values is None:
        return None
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix.keys_values):
        cache.update(keys[None], values[None], layer)
    return cache


def whole_row(base: BaseModel, prefix: ConstantPrefix, row: list[int]) -> Tensor:
    """Last hidden states, (tokens of prefix and row, hidden), of one pass over a whole row."""
    embeddings = torch.cat([prefix.embeddings, base.model.get_input_embeddings()(torch.tensor(row))])
    output = base.model.get_decoder()(inputs_embeds=embeddings[None], past_key_values=cache_of(prefix))
    return output.last_hidden_state[0]  # type: ignore[no-any-return]
