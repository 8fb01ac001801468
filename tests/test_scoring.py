"""Choices by log-likelihood, against whole rows scored one by one."""

import pytest
import torch

from softguard.chat import Chat
from softguard.kernels import Head
from softguard.models import BaseModel
from softguard.prefix import constant_prefix
from softguard.scoring import likeliest, response_log_probs
from tests.references import random_adapter, whole_row

PROMPTS = ["Which letter?", "How much is it, in words?", "Say something, anything at all."]
CHOICES = [["A", "B", "C", "D"], ["one hundred", "two hundred", "two"], ["hello there", "bye"]]


@torch.no_grad()
@pytest.mark.parametrize("adapted", [False, True])
def test_the_likeliest_choice_is_that_of_whole_rows(small: BaseModel, adapted: bool) -> None:
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    prefix = constant_prefix(small, chat, random_adapter(small, "kv_prefix") if adapted else None)
    expected = []
    for prompt, choices in zip(PROMPTS, CHOICES, strict=True):
        scores = []
        for choice in choices:
            ids = chat.plain_ids(choice)
            states = whole_row(small, prefix, chat.encode(prompt) + ids[:-1])[-len(ids) :]
            laws = small.model.get_output_embeddings()(states).log_softmax(-1)
            scores.append(sum(float(law[i]) for law, i in zip(laws, ids, strict=True)))
        expected.append(scores.index(max(scores)))
    told: list[int] = []
    assert likeliest(small, chat, prefix, PROMPTS, CHOICES, told.append) == expected
    assert sum(told) == 3


def test_log_probabilities_of_given_ids() -> None:
    head = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.5]])
    states = torch.tensor([[0.3, -0.2], [1.0, 1.0]])
    expected = [(head @ s).log_softmax(-1)[i] for s, i in zip(states, (2, 0), strict=True)]
    torch.testing.assert_close(response_log_probs(states, [2, 0], Head(head)), torch.stack(expected))
