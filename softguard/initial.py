"""What training an adapter starts from."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softguard.adapted import decoder_layers
from softguard.adapters import DIRECTION, VECTORS, Adapter, Kind
from softguard.chat import Chat
from softguard.config import DistilConfig
from softguard.errors import SoftguardError
from softguard.gate import unturned
from softguard.models import BaseModel


def initial_adapter(
    base: BaseModel, config: DistilConfig, refused: Sequence[str], kept: Sequence[str], seed: int = 0
) -> Adapter:
    """The adapter a recipe describes, before its first step.

    `refused`, `kept`: some training prompts the system refuses and answers; a steering vector starts from the difference
    between them. `seed` draws a LoRA's A.
    Raises SoftguardError for an empty text, a budget no LoRA fits, or prompts of one sort only.
    """
    slot = config.slot
    if config.adapter == "text":
        if not config.init_text.strip():
            raise SoftguardError("distil.init_text is empty; give the text that is to stand before every prompt")
        return Adapter("text", {}, slot, {}, config.init_text)
    if config.adapter == "lora":
        return Adapter("lora", _lora(base, config.budget, seed), slot, {})
    if config.adapter == "steering":
        layers = len(decoder_layers(base.model))
        layer = min(max(1, round(config.depth * layers)), layers - 1)  # llama.cpp counts from 1 and steers no layer 0
        return Adapter("steering", {f"{DIRECTION}{layer}": _direction(base, layer, refused, kept)}, slot, {})
    return Adapter(config.adapter, {VECTORS: initial_vectors(base, config.adapter, config.init_text, config.n_soft)}, slot, {})


@torch.no_grad()
def initial_vectors(base: BaseModel, kind: Kind, text: str, n_soft: int) -> Tensor:
    """`text` as the model reads it. Shape as in `Adapter`, float32.

    A soft prompt gets its embeddings, repeated if there are fewer than n_soft, averaged over neighbours if there are more. A
    key/value prefix or a gate gets the keys and values the model makes of its first n_soft tokens, repeated likewise. Text,
    never noise: rows off the embedding manifold cost safety before training begins.
    Raises SoftguardError if the text has no tokens, or for keys and values of a model whose are of two shapes.
    """
    ids = base.tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise SoftguardError("distil.init_text is empty; give the text the adapter starts from")
    if kind in ("kv_prefix", "gate"):
        ids = (ids * -(-n_soft // len(ids)))[:n_soft]
        cache = base.model(torch.tensor([ids], device=base.device), use_cache=True).past_key_values
        if {x.shape[1::2] for layer in cache.layers for x in (layer.keys, layer.values)} != {base.key_heads}:
            raise SoftguardError(
                f"model {base.name!r} has keys and values of two shapes, where a {kind}'s are of one; use distil.adapter="
                "soft_prompt"
            )
        pairs = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
        if kind == "gate":
            pairs = pairs.float()
            pairs[:, :1] = unturned(base.model.get_decoder(), pairs[:, :1], torch.arange(n_soft, device=base.device)[None])
        return pairs.permute(3, 0, 1, 2, 4).flatten(1).float()  # from (layers, 2, key heads, n_soft, width)
    rows: Tensor = base.model.get_input_embeddings()(torch.tensor(ids, device=base.device)).float()  # (tokens, hidden)
    if len(rows) <= n_soft:
        return rows[torch.arange(n_soft, device=base.device) % len(rows)].clone()
    return torch.stack([part.mean(0) for part in rows.tensor_split(n_soft)])


def _lora(base: BaseModel, budget: int, seed: int) -> dict[str, Tensor]:
    """A's drawn as PEFT draws them, B's 0, so that nothing changes at first."""
    rank, targets = lora_shape(base, budget)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, module in base.model.named_modules():
        if _is_linear(module) and name.split(".")[-1] in targets:
            bound = module.in_features**-0.5  # kaiming_uniform with a = √5
            a = (2 * torch.rand(rank, module.in_features, generator=generator) - 1) * bound
            b = torch.zeros(module.out_features, rank)
            tensors |= {f"base_model.model.{name}.lora_{factor}.weight": t for factor, t in (("A", a), ("B", b))}
    return {name: tensor.to(base.device) for name, tensor in tensors.items()}


def lora_shape(base: BaseModel, budget: int) -> tuple[int, tuple[str, ...]]:
    """Rank and targets of the LoRA that comes nearest to `budget` numbers from below; of equals, the one with most targets.

    Targets are the attention's linear layers, one after another, or all linear layers of the decoder. More rank than a layer's
    width would add nothing to it.
    Raises SoftguardError if the budget is less than the least LoRA takes.
    """
    layers = decoder_layers(base.model)
    linear = {name: module for name, module in layers[0].named_modules() if _is_linear(module)}
    sizes = {name.split(".")[-1]: len(layers) * (m.in_features + m.out_features) for name, m in linear.items()}
    attention = [name.split(".")[-1] for name in linear if "attn" in name]
    choices = [tuple(attention[:n]) for n in range(1, len(attention) + 1)] + [tuple(sizes)]
    each = {targets: sum(sizes[t] for t in targets) for targets in choices}  # numbers of one rank
    width = min(min(m.in_features, m.out_features) for m in linear.values())
    ranks = {targets: min(budget // n, width) for targets, n in each.items()}
    size, _, rank, targets = max((ranks[targets] * n, len(targets), ranks[targets], targets) for targets, n in each.items())
    if not size:
        least = min(each.values())
        raise SoftguardError(f"distil.budget is {budget}; the least LoRA of {base.name!r} has {least:,} numbers")
    return rank, targets


def _is_linear(module: nn.Module) -> bool:
    """Routers of experts may be linear layers that give more than the product (PhiMoE's)."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


@torch.no_grad()
def _direction(base: BaseModel, layer: int, refused: Sequence[str], kept: Sequence[str]) -> Tensor:
    """Difference of means of the layer's output where the response begins, prompts that are refused less those kept."""
    if not refused or not kept:
        raise SoftguardError("the system refuses all training prompts or none; a steering vector starts from the difference")
    chat = Chat(base.tokenizer, "start", base.stop_ids)
    fixed = [*chat.prefix.before, *chat.prefix.after]

    ends: list[Tensor] = []
    hook = decoder_layers(base.model)[layer].register_forward_hook(lambda _, __, output: ends.append(output[0, -1].float()))
    try:
        for prompt in (*refused, *kept):
            base.model(torch.tensor([[*fixed, *chat.encode(prompt)]], device=base.device), logits_to_keep=1)
    finally:
        hook.remove()
    return torch.stack(ends[: len(refused)]).mean(0) - torch.stack(ends[len(refused) :]).mean(0)
