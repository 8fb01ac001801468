"""The packed pass against one unbatched pass a row."""

from dataclasses import replace

import pytest
import torch

from softguard import attention, frozen
from softguard.adapters import Kind
from softguard.chat import Chat, Slot
from softguard.errors import SoftguardError
from softguard.models import BaseModel
from softguard.packed import packed_hidden
from softguard.prefix import ConstantPrefix, constant_prefix
from tests.references import KINDS, random_adapter, whole_row

PROMPTS = ["How do I bake bread?", "hi", "Write a short poem about the sea and its many moods."]
RESPONSES = ["Mix flour and water.", "Hello! What can I do for you today, my friend?", "Waves."]


def rows_of(chat: Chat) -> tuple[list[list[int]], list[int]]:
    responses = [chat.encode_response(r) for r in RESPONSES]
    return [chat.encode(p) + r[:-1] for p, r in zip(PROMPTS, responses, strict=True)], [len(r) for r in responses]


def packed_as_whole(model: BaseModel) -> torch.Tensor:
    """Check packed rows, and gradients of a soft prompt and of keys and values before it; returns the rows' states.

    `model`: of 3 layers, 2 key heads of 8 numbers and hidden states of 32.
    """
    torch.manual_seed(1)
    vectors, before = torch.randn(4, 32, requires_grad=True), torch.randn(3, 2, 2, 5, 8, requires_grad=True)
    prefix = ConstantPrefix(vectors, [(keys, values) for keys, values in before])
    rows, wanted = [[5, 6, 7, 8], [9], [10, 11, 12]], [2, 1, 3]
    ours = packed_hidden(model, prefix, rows, wanted)
    expected = [whole_row(model, prefix, row)[-n:] for row, n in zip(rows, wanted, strict=True)]
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(torch.cat(h).sin().sum(), (vectors, before)) for h in (ours, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    return torch.cat(ours).detach()


@pytest.fixture(params=["written out", "written out, long rows", "by transformers", "by transformers, long rows"])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "by transformers" in request.param:
        monkeypatch.setattr(frozen, "is_plain", lambda decoder: False)
    if "long rows" in request.param:
        monkeypatch.setattr(attention, "LONG", 0)


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize(("kind", "slot"), KINDS)
def test_packed_rows_give_the_states_and_gradients_of_whole_rows(small: BaseModel, kind: Kind, slot: Slot) -> None:
    chat = Chat(small.tokenizer, slot, small.stop_ids)
    torch.manual_seed(1)
    adapter = random_adapter(small, kind, slot, 5)
    adapter.vectors.requires_grad_()
    prefix = constant_prefix(small, chat, adapter)
    rows, wanted = rows_of(chat)
    ours = packed_hidden(small, prefix, rows, wanted)
    expected = [whole_row(small, prefix, row)[-n:] for row, n in zip(rows, wanted, strict=True)]
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    weights = [torch.randn(e.shape) for e in expected]
    gradients = [
        torch.autograd.grad(
            torch.stack([(h * w).sum() for h, w in zip(states, weights, strict=True)]).sum(), adapter.vectors, retain_graph=True
        )[0]
        for states in (ours, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("layers")
def test_the_demo_model_packed_is_the_demo_model(base: BaseModel, chat: Chat) -> None:
    prefix = constant_prefix(base, chat, None)
    rows, wanted = rows_of(chat)
    with torch.no_grad():
        ours = packed_hidden(base, prefix, rows, wanted)
        expected = [whole_row(base, prefix, row)[-n:] for row, n in zip(rows, wanted, strict=True)]
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_the_demo_model_runs_written_out(base: BaseModel) -> None:
    assert frozen.is_plain(base.model.get_decoder())


@pytest.mark.usefixtures("layers")
def test_attention_with_biases_and_several_queries_a_key(small: BaseModel) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    packed_as_whole(replace(small, model=model.requires_grad_(False)))


def test_attention_whose_scores_are_capped() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, query_pre_attn_scalar=1, attn_logit_softcapping=1.5, initializer_range=0.5, sliding_window=64,
        attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    gemma = BaseModel("tiny", model, None, "")
    capped = packed_as_whole(gemma)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (packed_as_whole(gemma) - capped).abs().max() > 1e-2  # the cap was felt


def test_the_model_attends_as_before_after_a_packed_pass(small: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "is_plain", lambda decoder: False)
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    usual = small.model.config._attn_implementation
    packed_hidden(small, constant_prefix(small, chat, None), [[5, 6]], [1])
    assert small.model.config._attn_implementation == usual


def test_a_window_shorter_than_the_row_is_refused(small: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from softguard import packed

    attention = packed._attention
    monkeypatch.setattr(frozen, "is_plain", lambda decoder: False)
    monkeypatch.setattr(packed, "_attention", lambda *args, **other: attention(*args, **other, sliding_window=4))
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    with pytest.raises(SoftguardError, match="window"):
        packed_hidden(small, constant_prefix(small, chat, None), [[5, 6]], [1])
