import numpy as np
import pytest
import torch

from softguard.adapters import initial_vectors
from softguard.chat import Chat, Turn
from softguard.engine import Engine, _inverse_cdf
from softguard.errors import SoftguardError
from softguard.models import BaseModel
from softguard.prefix import prefix_embeddings

PROMPTS = ["How do I bake bread?", "hi", "What is the capital of France?", "Name three colours."]


@pytest.fixture(scope="module")
def soft(base: BaseModel) -> torch.Tensor:
    torch.manual_seed(0)
    return initial_vectors(base, "You are a careful assistant.", 12) + 0.02 * torch.randn(12, base.hidden)


@pytest.mark.parametrize("slot", ["start", "system"])
def test_resident_prompt_is_token_for_token_the_recomputed_one(base: BaseModel, soft: torch.Tensor, slot: str) -> None:
    chat = Chat(base.tokenizer, slot, base.stop_ids)  # type: ignore[arg-type]
    ours = Engine(base, chat, soft).generate(PROMPTS, 16, batch_size=4)
    for prompt, response in zip(PROMPTS, ours, strict=True):
        tail = base.model.get_input_embeddings()(torch.tensor([chat.encode(prompt)]))
        whole = torch.cat([prefix_embeddings(base, chat, soft), tail], dim=1)
        theirs = base.model.generate(
            inputs_embeds=whole, attention_mask=torch.ones(whole.shape[:2]), max_new_tokens=16, do_sample=False, pad_token_id=2
        )
        assert list(response.ids) == theirs[0].tolist()


def test_batching_does_not_change_greedy_answers(base: BaseModel, chat: Chat) -> None:
    engine = Engine(base, chat)
    assert engine.generate(PROMPTS, 12, batch_size=4) == engine.generate(PROMPTS, 12, batch_size=1)


def test_streaming_gives_the_generated_text(base: BaseModel, chat: Chat) -> None:
    engine = Engine(base, chat)
    assert "".join(engine.stream([Turn("user", PROMPTS[0])], 16)) == engine.generate(PROMPTS[:1], 16)[0].text


def test_sampling_is_repeatable_and_does_not_depend_on_neighbours(small: BaseModel) -> None:
    engine = Engine(small, Chat(small.tokenizer, "start", small.stop_ids))
    together = engine.generate(PROMPTS, 8, temperature=1.0, seed=3)
    assert engine.generate(PROMPTS[::-1], 8, batch_size=2, temperature=1.0, seed=3)[::-1] == together
    assert engine.generate(PROMPTS, 8, temperature=1.0, seed=4) != together


def test_a_repeated_prompt_gets_other_samples(small: BaseModel) -> None:
    engine = Engine(small, Chat(small.tokenizer, "start", small.stop_ids))
    first, second = engine.generate(["hi", "hi"], 8, temperature=1.0)
    assert first != second


def test_inverse_cdf_draws_from_the_law() -> None:
    law = torch.tensor([0.1, 0.0, 0.6, 0.3])
    u = torch.linspace(0, 1, 10_001)[:-1]
    drawn = _inverse_cdf(law.expand(len(u), -1), u)
    shares = np.bincount(drawn.numpy(), minlength=4) / len(u)
    assert np.abs(shares - law.numpy()).max() < 1e-3
    assert shares[1] == 0


def test_ended_rows_leave_the_batch_and_keep_their_answers(base: BaseModel, chat: Chat) -> None:
    engine = Engine(base, chat)
    short, long = engine.generate(["Answer with one word: what is 2+2?", "Write a long story about a dragon."], 40)
    assert short.ids[-1] in chat.stop_ids
    assert len(short.ids) < len(long.ids) == 40


def test_a_prompt_longer_than_the_context_is_told_by_number(small: BaseModel) -> None:
    engine = Engine(small, Chat(small.tokenizer, "start", small.stop_ids))
    with pytest.raises(SoftguardError, match=r"prompt 2 has \d+ tokens.*context of 512"):
        engine.generate(["hi", "word " * 600], 8)


def test_progress_counts_every_prompt(small: BaseModel) -> None:
    engine = Engine(small, Chat(small.tokenizer, "start", small.stop_ids))
    told: list[int] = []
    engine.generate(PROMPTS, 2, batch_size=3, progress=told.append)
    assert told == [3, 1]
