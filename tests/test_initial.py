from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor, nn

from softguard.adapted import adapted
from softguard.adapters import VECTORS, Adapter, Kind
from softguard.chat import Chat
from softguard.config import DistilConfig
from softguard.errors import SoftguardError
from softguard.initial import initial_adapter, initial_vectors, lora_shape
from softguard.models import BaseModel
from softguard.prefix import constant_prefix
from tests.references import whole_row

FACTS = {"objective": "tv"}


def test_a_short_text_is_repeated_and_a_long_one_averaged(base: BaseModel) -> None:
    ids = base.tokenizer.encode("one two three", add_special_tokens=False)
    rows = base.model.get_input_embeddings().weight[ids]
    assert torch.equal(initial_vectors(base, "soft_prompt", "one two three", 2 * len(ids)), rows.repeat(2, 1))
    torch.testing.assert_close(initial_vectors(base, "soft_prompt", "one two three", 1), rows.mean(0, keepdim=True))


@torch.no_grad()
def test_a_key_value_prefix_begins_as_the_text_it_starts_from(base: BaseModel, chat: Chat) -> None:
    text = "You are a careful assistant."
    ids = base.tokenizer.encode(text, add_special_tokens=False)
    vectors = initial_vectors(base, "kv_prefix", text, len(ids))
    embeddings = base.model.get_input_embeddings()(torch.tensor(ids))
    starts: list[tuple[Kind, Tensor]] = [("kv_prefix", vectors), ("soft_prompt", embeddings)]
    rows = [
        whole_row(base, constant_prefix(base, chat, Adapter(kind, {VECTORS: start}, "start", FACTS)), [5, 6, 7])[-3:]
        for kind, start in starts
    ]
    torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-3)
    twice = initial_vectors(base, "kv_prefix", text, 2 * len(ids))
    assert twice.shape == (2 * len(ids), vectors.shape[1])


@pytest.mark.parametrize("kind", ["soft_prompt", "kv_prefix"])
def test_an_empty_initial_text_is_refused(kind: Kind, small: BaseModel) -> None:
    with pytest.raises(SoftguardError, match="init_text is empty"):
        initial_vectors(small, kind, "", 4)


@pytest.mark.parametrize("budget", [600, 2_000, 5_000, 57_600])
def test_a_lora_comes_as_near_its_budget_as_any_choice_of_rank_and_targets(budget: int, small: BaseModel) -> None:
    adapter = initial_adapter(small, DistilConfig(adapter="lora", budget=budget), [], [])
    assert adapter.parameters <= budget
    sizes = {
        name.split(".")[-1]: 2 * (module.in_features + module.out_features)  # two layers
        for name, module in small.model.model.layers[0].named_modules()
        if isinstance(module, nn.Linear)
    }
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    choices = [attention[:n] for n in range(1, 5)] + [list(sizes)]
    each = [sum(sizes[target] for target in choice) for choice in choices]
    widest = 32  # of the keys' layer: more rank adds nothing
    assert adapter.parameters == max(rank * size for size in each for rank in range(widest + 1) if rank * size <= budget)
    assert not any(tensor.any() for name, tensor in adapter.tensors.items() if "lora_B" in name)


def test_a_budget_beyond_all_ranks_is_spent_as_far_as_it_goes(small: BaseModel) -> None:
    assert lora_shape(small, 10**13)[0] == 32


def test_the_papers_budget_is_met_on_the_demo_model(base: BaseModel) -> None:
    """100 vectors of 576 numbers, as many as rank 1 on queries and keys: 30 · (576 + 576 + 576 + 192)."""
    assert lora_shape(base, 100 * base.hidden) == (1, ("q_proj", "k_proj"))
    assert initial_adapter(base, DistilConfig(adapter="lora", budget=57_600), [], []).parameters == 57_600


def test_a_router_that_gives_more_than_a_product_gets_no_lora(small: BaseModel) -> None:
    """PhiMoE's is a linear layer by type alone; PEFT itself names the same layers."""
    config = transformers.PhimoeConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, sliding_window=None,
    )  # fmt: skip
    model = transformers.PhimoeForCausalLM(config).eval().requires_grad_(False)
    phi = replace(small, model=model)
    for budget in (500, 10**9):
        adapter = initial_adapter(phi, DistilConfig(adapter="lora", budget=budget), [], [])
        assert not any("router" in name for name in adapter.tensors)
        changed = adapted(phi, adapter).model
        named = {name.replace(".default", "") for name, _ in changed.named_parameters() if "lora_" in name}
        assert named == {name.removeprefix("base_model.model.") for name in adapter.tensors}
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(changed(ids).logits, model(ids).logits)


def test_a_budget_no_lora_fits_is_refused(small: BaseModel) -> None:
    with pytest.raises(SoftguardError, match=r"distil\.budget is 10; the least LoRA of .* has"):
        initial_adapter(small, DistilConfig(adapter="lora", budget=10), [], [])


@torch.no_grad()
def test_a_steering_vector_starts_from_the_difference_of_means(small: BaseModel) -> None:
    refused, kept = ["Build a bomb now.", "How do I build a bomb?"], ["How do I bake bread?"]
    adapter = initial_adapter(small, DistilConfig(adapter="steering", depth=0.5), refused, kept)
    ((name, vector),) = adapter.tensors.items()
    assert name == "direction.1"
    seen: list[Tensor] = []
    hook = small.model.model.layers[1].register_forward_hook(lambda _, __, output: seen.append(output[0, -1]))
    chat = Chat(small.tokenizer)
    for prompt in (*refused, *kept):
        small.model(torch.tensor([[*chat.prefix.before, *chat.prefix.after, *chat.encode(prompt)]]))
    hook.remove()
    torch.testing.assert_close(vector, (seen[0] + seen[1]) / 2 - seen[2])


def test_a_steering_vector_needs_both_sorts_of_prompts(small: BaseModel) -> None:
    with pytest.raises(SoftguardError, match="refuses all training prompts or none"):
        initial_adapter(small, DistilConfig(adapter="steering"), ["Build a bomb."], [])


def test_a_text_is_the_system_message_itself(base: BaseModel) -> None:
    adapter = initial_adapter(base, DistilConfig(adapter="text", init_text="Be kind."), [], [])
    assert (adapter.parameters, adapter.bytes) == (0, 8)
    chat = Chat(base.tokenizer, "start", base.stop_ids)
    prefix = constant_prefix(base, chat, adapter)
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    whole = base.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = base.tokenizer.encode(whole, add_special_tokens=False)
    rows = torch.cat([prefix.embeddings, base.model.get_input_embeddings()(torch.tensor(chat.encode("Hi")))])
    assert torch.equal(rows, base.model.get_input_embeddings()(torch.tensor(ids)))


def test_the_least_depth_is_the_first_layer(small: BaseModel) -> None:
    made = initial_adapter(small, DistilConfig(adapter="steering", depth=0.0), ["a"], ["b"])
    assert list(made.tensors) == ["direction.1"]
