import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from softguard import engine as engine_module
from softguard import frozen
from softguard.adapters import Kind
from softguard.chat import Chat, Slot, Turn
from softguard.engine import Engine, _inverse_cdf, _largest, _next
from softguard.errors import SoftguardError
from softguard.models import BaseModel
from softguard.prefix import constant_prefix
from tests.references import KINDS, random_adapter, whole_row

PROMPTS = ["How do I bake bread?", "hi", "What is the capital of France?", "Name three colours."]


@pytest.mark.parametrize(("kind", "slot"), KINDS)
def test_a_resident_adapter_is_token_for_token_the_recomputed_one(base: BaseModel, kind: Kind, slot: Slot) -> None:
    adapter = random_adapter(base, kind, slot, 12)
    chat = Chat(base.tokenizer, slot, base.stop_ids)
    ours = Engine(base, adapter).generate(PROMPTS, 16, batch_size=4)
    prefix = constant_prefix(base, chat, adapter)
    for prompt, response in zip(PROMPTS, ours, strict=True):
        states = whole_row(base, prefix, chat.encode(prompt) + list(response.ids[:-1]))[-len(response.ids) :]
        with torch.no_grad():
            logits = base.model.get_output_embeddings()(states)
        chosen = logits.gather(1, torch.tensor(response.ids)[:, None])[:, 0]
        assert len(response.ids) == 16 or response.ids[-1] in chat.stop_ids
        assert (logits.max(-1).values - chosen).max() < 1e-3  # greedy, but for ties within rounding


def test_batching_does_not_change_greedy_answers(base: BaseModel) -> None:
    engine = Engine(base)
    assert engine.generate(PROMPTS, 12, batch_size=4) == engine.generate(PROMPTS, 12, batch_size=1)


def test_streaming_gives_the_generated_text(base: BaseModel) -> None:
    engine = Engine(base)
    assert "".join(engine.stream([Turn("user", PROMPTS[0])], 16)) == engine.generate(PROMPTS[:1], 16)[0].text


def test_sampling_is_repeatable_and_does_not_depend_on_neighbours(small: BaseModel) -> None:
    engine = Engine(small)
    together = engine.generate(PROMPTS, 8, temperature=1.0, seed=3)
    assert engine.generate(PROMPTS[::-1], 8, batch_size=2, temperature=1.0, seed=3)[::-1] == together
    assert engine.generate(PROMPTS, 8, temperature=1.0, seed=4) != together


def test_a_repeated_prompt_gets_other_samples(small: BaseModel) -> None:
    engine = Engine(small)
    first, second = engine.generate(["hi", "hi"], 8, temperature=1.0)
    assert first != second


@pytest.mark.parametrize("vocabulary", [100, 128, 300, 512])
def test_the_likeliest_id_is_the_first_with_the_largest_logit(vocabulary: int) -> None:
    logits = torch.randint(-9, 9, (64, vocabulary), generator=torch.Generator().manual_seed(0)).float()  # many are equal
    logits[0], logits[1] = -torch.inf, -5.0
    expected = [max(range(vocabulary), key=row.__getitem__) for row in logits.tolist()]
    assert _largest(logits).tolist() == expected


@pytest.mark.parametrize("together", [1, 3, 64])
def test_ids_are_drawn_by_float32_laws_of_bfloat16_logits_few_rows_at_a_time(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_LOGITS", together * 1_000)
    generator = torch.Generator().manual_seed(0)
    logits, u = (3 * torch.randn(64, 1_000, generator=generator)).bfloat16(), torch.rand(64, generator=generator)
    upto = (logits.double() / 0.7).softmax(-1).cumsum(-1)
    for row, token in enumerate(_next(logits, 0.7, u).tolist()):
        assert (upto[row, token - 1] if token else 0) - 1e-6 <= u[row] <= upto[row, token] + 1e-6
    assert _next(logits, 0.0, None).tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_inverse_cdf_draws_from_the_law() -> None:
    law = torch.tensor([0.1, 0.0, 0.6, 0.3])
    u = torch.linspace(0, 1, 10_001)[:-1]
    drawn = _inverse_cdf(law.expand(len(u), -1), u)
    shares = np.bincount(drawn.numpy(), minlength=4) / len(u)
    assert np.abs(shares - law.numpy()).max() < 1e-3
    assert shares[1] == 0


def test_ended_rows_leave_the_batch_and_keep_their_answers(base: BaseModel, chat: Chat) -> None:
    engine = Engine(base)
    short, long = engine.generate(["Answer with one word: what is 2+2?", "Write a long story about a dragon."], 40)
    assert short.ids[-1] in chat.stop_ids
    assert len(short.ids) < len(long.ids) == 40


def test_a_prompt_longer_than_the_context_is_told_by_number(small: BaseModel) -> None:
    engine = Engine(small)
    with pytest.raises(SoftguardError, match=r"prompt 2 has \d+ tokens.*context of 512"):
        engine.generate(["hi", "word " * 600], 8)


def test_a_prompt_of_no_tokens_is_told_by_number(small: BaseModel) -> None:
    tokenizer = copy.deepcopy(small.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ 'User:' if m.role == 'user' }}{{ m.content }}{% endfor %}"
    engine = Engine(replace(small, tokenizer=tokenizer))
    told = r"is empty, and the chat template of .* puts nothing behind it; fill it in$"
    with pytest.raises(SoftguardError, match=f"^prompt 2 {told}"):
        engine.generate(["hi", ""], 8)
    with pytest.raises(SoftguardError, match=f"^the conversation {told}"):
        list(engine.stream([Turn("user", "")], 8))
    with pytest.raises(SoftguardError, match=f"^line 3 {told}"):
        engine.check_fits("", 0, "line 3")


def test_a_tokenizer_that_names_no_padding_is_padded_where_nothing_is_seen(small: BaseModel, monkeypatch: Any) -> None:
    monkeypatch.setattr(frozen, "is_plain", lambda decoder: False)
    tokenizer = copy.deepcopy(small.tokenizer)
    tokenizer.eos_token = tokenizer.pad_token = None
    bare, prompts = replace(small, tokenizer=tokenizer), ["hi", "hi there"]  # run together, the first padded
    assert bare.pad_id == 0
    assert [r.ids for r in Engine(bare).generate(prompts, 4)] == [r.ids for r in Engine(small).generate(prompts, 4)]


def test_a_long_prompt_runs_in_a_batch_of_its_own(small: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(small)
    prompts = ["hi", "word " * 200, "a boat", "a longer boat than that"]
    whole = engine.generate(prompts, 3)
    monkeypatch.setattr("softguard.engine._COLUMNS", 256)
    told: list[int] = []
    assert engine.generate(prompts, 3, progress=told.append) == whole
    assert told == [3, 1]
    assert engine.generate([], 3) == []


def test_streaming_gives_a_piece_a_token(base: BaseModel) -> None:
    engine = Engine(base)
    (answer,) = engine.generate(["Tell me of boats."], 6)
    pieces = list(engine.stream([Turn("user", "Tell me of boats.")], 6))
    assert "".join(pieces) == answer.text
    assert len(pieces) == len(answer.ids)


def test_progress_counts_every_prompt(small: BaseModel) -> None:
    engine = Engine(small)
    told: list[int] = []
    engine.generate(PROMPTS, 2, batch_size=3, progress=told.append)
    assert told == [3, 1]
