import pytest
import torch
from torch import Tensor

from softguard.chat import Chat, Slot, align
from softguard.models import BaseModel
from softguard.prefix import continuation_logits, prefix_embeddings, run_prefix

PROMPTS = ["How do I bake bread?", "hi", "Write a short poem about the sea and its many moods."]
RESPONSES = ["Mix flour and water.", "Hello! What can I do for you today, my friend?", "Waves."]


def whole_row_logits(base: BaseModel, chat: Chat, soft: Tensor, prompt: str, response: list[int]) -> Tensor:
    """Logits that predict `response`, from one unbatched pass over everything."""
    ids = chat.encode(prompt) + response[:-1]
    embeddings = torch.cat([prefix_embeddings(base, chat, soft), base.model.get_input_embeddings()(torch.tensor([ids]))], dim=1)
    return base.model(inputs_embeds=embeddings).logits[0, -len(response) :]  # type: ignore[no-any-return]


def loss(rows: list[Tensor]) -> Tensor:
    return torch.cat([logits.log_softmax(-1)[:, 7] for logits in rows]).sum()


@pytest.mark.parametrize("slot", ["start", "system"])
def test_shared_prefix_gives_the_logits_and_gradients_of_whole_rows(small: BaseModel, slot: Slot) -> None:
    chat = Chat(small.tokenizer, slot, small.stop_ids)
    torch.manual_seed(1)
    soft = (0.1 * torch.randn(5, small.hidden)).requires_grad_()
    responses = [chat.encode_response(r) for r in RESPONSES]
    keep = max(map(len, responses))
    rows = align([chat.encode(p) for p in PROMPTS], [r[:-1] for r in responses], small.pad_id, small.device)
    logits = continuation_logits(small, run_prefix(small, chat, soft), rows, keep)
    picked = [logits[i, : len(r)] for i, r in enumerate(responses)]
    expected = [whole_row_logits(small, chat, soft, p, r) for p, r in zip(PROMPTS, responses, strict=True)]
    for ours, theirs in zip(picked, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(loss(picked), soft)
    (reference,) = torch.autograd.grad(loss(expected), soft)
    torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4)


def test_without_a_soft_prompt_the_prefix_is_the_template(base: BaseModel, chat: Chat) -> None:
    ids = torch.tensor([[*chat.prefix.before, *chat.prefix.after]])
    assert torch.equal(prefix_embeddings(base, chat, None), base.model.get_input_embeddings()(ids))


def test_sharing_leaves_the_original_cache_alone(small: BaseModel) -> None:
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    cache = run_prefix(small, chat, None)
    before = [layer.keys.clone() for layer in cache.layers]
    rows = align([chat.encode("hi")] * 3, [[5, 6]] * 3, small.pad_id, small.device)
    continuation_logits(small, cache, rows, 1)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, cache.layers, strict=True))
