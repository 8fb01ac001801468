from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Dots1Config, Dots1ForCausalLM

from softguard.adapted import adapted
from softguard.adapters import Adapter, Kind
from softguard.chat import Chat
from softguard.config import DistilConfig
from softguard.engine import Engine
from softguard.errors import SoftguardError
from softguard.initial import initial_adapter
from softguard.models import BaseModel
from softguard.packed import packed_hidden
from softguard.prefix import constant_prefix
from tests.references import whole_row

INSIDE: list[Kind] = ["lora", "steering"]
ROWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


def noisy(base: BaseModel, kind: Kind, budget: int = 4000) -> Adapter:
    """An adapter that does something everywhere: a fresh LoRA's B is 0."""
    config = DistilConfig(adapter=kind, budget=budget)
    start = initial_adapter(base, config, ["How do I build a bomb?"], ["How do I bake bread?"])
    generator = torch.Generator().manual_seed(0)
    tensors = {n: (t + 0.05 * torch.randn(t.shape, generator=generator)).half().float() for n, t in start.tensors.items()}
    return Adapter(kind, tensors, "start", {"objective": "tv"})


@pytest.mark.parametrize("kind", INSIDE)
def test_the_base_stays_as_it_was_and_keeps_its_weights_once(kind: Kind, small: BaseModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    before = small.model(ids).logits
    changed = adapted(small, noisy(small, kind))
    assert (changed.model(ids).logits - before).abs().max() > 1e-3
    assert torch.equal(small.model(ids).logits, before)
    own = {id(p) for p in small.model.parameters()}
    assert own <= {id(p) for p in changed.model.parameters()}


def test_what_stands_before_the_rows_changes_no_layer(small: BaseModel) -> None:
    assert adapted(small, None) is small
    assert adapted(small, Adapter("text", {}, "start", {}, "Be kind.")) is small


def test_a_steering_vector_is_added_to_its_layers_output(small: BaseModel) -> None:
    adapter = noisy(small, "steering")
    (vector,) = adapter.tensors.values()
    ids = torch.tensor([[5, 6, 7]])

    def add(_: torch.nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
        return output + vector

    hook = small.model.model.layers[1].register_forward_hook(add)
    expected = small.model(ids).logits
    hook.remove()
    torch.testing.assert_close(adapted(small, adapter).model(ids).logits, expected)


def test_stock_peft_loads_a_lora_and_gives_the_same_logits(base: BaseModel, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = noisy(base, "lora", budget=57_600)
    adapter.save(tmp_path, base)
    ids = torch.tensor([[1, 504, 2365, 282]])
    with torch.no_grad():
        ours = adapted(base, Adapter.load(tmp_path, base)).model(ids).logits
        peft = PeftModel.from_pretrained(base.model, str(tmp_path))
        theirs = peft(input_ids=ids).logits
        peft.unload()  # PEFT changes the model it is given
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", INSIDE)
def test_packed_passes_give_the_gradients_of_whole_rows(kind: Kind, small: BaseModel) -> None:
    start = noisy(small, kind)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in start.tensors.items()}
    adapter = Adapter(kind, parameters, "start", {})
    changed = adapted(small, adapter)
    prefix = constant_prefix(changed, Chat(small.tokenizer), adapter)
    ours = torch.cat(packed_hidden(changed, prefix, ROWS, [len(row) for row in ROWS], own_code=True))
    expected = torch.cat([whole_row(changed, prefix, row)[-len(row) :] for row in ROWS])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        *(torch.autograd.grad((h * weight).sum(), list(parameters.values())) for h in (ours, expected)), strict=True
    ):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_lora_where_peft_changes_fused_experts_is_refused(small: BaseModel) -> None:
    config = Dots1Config(
        vocab_size=small.model.config.vocab_size, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, first_k_dense_replace=1,
    )  # fmt: skip
    dots = replace(small, name="dots", model=Dots1ForCausalLM(config).eval().requires_grad_(False))
    attention, all_layers = (initial_adapter(dots, DistilConfig(adapter="lora", budget=n), [], []) for n in (600, 20_000))
    adapted(dots, attention)
    with pytest.raises(SoftguardError, match=r"PEFT does not put a LoRA into .*_proj of 'dots'; lower distil\.budget"):
        adapted(dots, all_layers)


@pytest.mark.parametrize("kind", INSIDE)
def test_answers_are_those_of_the_changed_model(kind: Kind, small: BaseModel) -> None:
    adapter = noisy(small, kind)
    engine = Engine(small, adapter)
    (answer,) = engine.generate(["How do I bake bread?"], 6)
    changed = adapted(small, adapter)
    row = [*engine.chat.prefix.before, *engine.chat.prefix.after, *engine.chat.encode("How do I bake bread?")]
    for token in answer.ids:
        assert int(changed.model(torch.tensor([row])).logits[0, -1].argmax()) == token
        row.append(token)
