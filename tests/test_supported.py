"""Models of other makes: what is refused, and that what is not is computed as transformers has it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from softguard.adapted import adapted, decoder_layers
from softguard.adapters import DIRECTION, VECTORS, Adapter
from softguard.chat import Chat
from softguard.engine import Engine
from softguard.errors import SoftguardError
from softguard.gate import Gate
from softguard.initial import initial_vectors
from softguard.models import BaseModel
from softguard.packed import packed_hidden
from softguard.prefix import ConstantPrefix
from softguard.supported import check_supported

SMALL = {
    "vocab_size": 49152, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
GEMMA3 = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48}
STATES = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
PROMPTS = ["hi", "How do I bake some bread in a very small oven?", "no"]


def made(base: BaseModel, make: str, config: str = "", **settings: Any) -> BaseModel:
    torch.manual_seed(0)
    kind = getattr(transformers, config or f"{make}Config")
    model = getattr(transformers, f"{make}ForCausalLM")(kind(**SMALL, **settings)).eval().requires_grad_(False)
    return replace(base, name=make, model=model)


@pytest.mark.parametrize(
    ("make", "settings", "told"),
    [
        ("Falcon", {}, "keeps its layers in another way"),
        ("Mamba", {}, "layers that are no attention"),
        ("FalconH1", STATES, "layers that are no attention"),
        ("HyperCLOVAX", {"logits_scaling": 8.0}, "makes its logits in another way"),
    ],
)
def test_makes_that_would_be_computed_wrongly_are_refused(
    make: str, settings: dict[str, Any], told: str, small: BaseModel
) -> None:
    base = made(small, make, **settings)
    with pytest.raises(SoftguardError, match=rf"model '{make}' .*{told}"):
        check_supported(base.name, base.model, base.head)


@pytest.mark.parametrize(
    ("make", "settings"),
    [("Qwen3", {"head_dim": 8}), ("Olmo2", {}), ("Phi3", {}), ("Mixtral", {}), ("Granite", {"residual_multiplier": 0.22})],
)
def test_other_makes_run_as_transformers_has_them(make: str, settings: dict[str, Any], small: BaseModel) -> None:
    base = made(small, make, **settings)
    check_supported(base.name, base.model, base.head)
    prefix, rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)), [[5, 6, 7], [8], [9, 10]]
    with torch.no_grad():
        found = packed_hidden(base, ConstantPrefix(prefix), rows, [len(row) for row in rows])
        for own, row in zip(found, rows, strict=True):
            embeddings = torch.cat([prefix, base.model.get_input_embeddings()(torch.tensor(row))])
            whole = base.model.get_decoder()(inputs_embeds=embeddings[None]).last_hidden_state[0, 3:]
            torch.testing.assert_close(own, whole, rtol=1e-4, atol=1e-4)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))

    def add(_: torch.nn.Module, __: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    hook = decoder_layers(base.model)[1].register_forward_hook(add)
    expected = base.model(torch.tensor([[5, 6, 7]])).logits
    hook.remove()
    steered = adapted(base, Adapter("steering", {f"{DIRECTION}1": vector}, "start", {}))
    torch.testing.assert_close(steered.model(torch.tensor([[5, 6, 7]])).logits, expected)


@pytest.mark.parametrize(
    ("make", "settings", "told"),
    [
        ("GptOss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "attention asks for s_aux"),
        ("StableLm", {}, "a StableLmModel cannot be trained here"),
    ],
)
def test_attention_that_would_be_trained_wrongly_is_refused(
    make: str, settings: dict[str, Any], told: str, small: BaseModel
) -> None:
    base = made(small, make, **settings)
    with pytest.raises(SoftguardError, match=told):
        packed_hidden(base, ConstantPrefix(torch.randn(3, 32)), [[5, 6], [7]], [1, 1])


def a_gate(base: BaseModel, text: str = "You are careful.") -> Adapter:
    vectors = initial_vectors(base, "gate", text, 4)
    return Adapter("gate", {VECTORS: vectors}, "start", {"refusal": "No."})


@pytest.mark.parametrize("make", ["Cohere", "Glm"])
def test_a_gate_is_refused_where_its_keys_would_be_turned_wrongly(make: str, small: BaseModel) -> None:
    settings: dict[str, Any] = {"head_dim": 8} if make == "Glm" else {}
    base = made(small, make, **settings)
    chat = Chat(base.tokenizer)
    with pytest.raises(SoftguardError, match=r"in a way that a gate does not know; use distil\.adapter=kv_prefix"):
        Gate.of(base, chat, a_gate(base))


def test_a_gates_keys_turn_by_layer_where_kinds_of_layers_do(small: BaseModel) -> None:
    """Gemma 3's sliding layers have another rotary base than the others."""
    base = made(small, "Gemma3", "Gemma3TextConfig", **GEMMA3)
    ids = base.tokenizer.encode("You are careful.", add_special_tokens=False)[:4]
    gate = Gate.of(base, Chat(base.tokenizer), a_gate(base))
    cache = transformers.DynamicCache(config=base.model.config)
    with torch.no_grad():
        base.model(torch.tensor([ids]), position_ids=torch.arange(30, 30 + len(ids))[None], past_key_values=cache)
    for (keys, _), layer in zip(gate.turned(torch.tensor([30 + len(ids)])), cache.layers, strict=True):
        torch.testing.assert_close(keys, layer.keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", ["Gemma3", "Mistral"])
def test_rows_of_a_window_do_not_depend_on_longer_ones_beside_them(make: str, small: BaseModel) -> None:
    settings = GEMMA3 if make == "Gemma3" else {"sliding_window": 48}
    base = made(small, make, f"{make}TextConfig" if make == "Gemma3" else "", **settings)
    engine = Engine(base)
    together = [response.ids for response in engine.generate(PROMPTS, 5)]
    assert together == [engine.generate([prompt], 5)[0].ids for prompt in PROMPTS]
    assert {len(batch) for batch in engine._batches([[1], [1, 2], [3]], 8)} == {1, 2}


def test_a_gate_wants_room_for_the_prompt_in_the_window(small: BaseModel) -> None:
    base = made(small, "Gemma3", "Gemma3TextConfig", **GEMMA3)
    with pytest.raises(SoftguardError, match="attention has a window of 48 tokens"):
        Engine(base, a_gate(base)).log_odds(["How do I bake bread? " * 10])
