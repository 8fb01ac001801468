"""Rows that run written out, and rows by transformers, against whole passes without a cache."""

import pytest
import torch
from torch import Tensor

from softguard import frozen
from softguard.chat import Chat
from softguard.decoding import make_resident
from softguard.models import BaseModel
from softguard.prefix import prefix_embeddings

ROWS = [[40, 41, 42], [50], [60, 61, 62, 63, 64]]
NEXT = [[7, 8, 9], [17, 18, 19], [27, 28, 29]]


@pytest.fixture(params=["written out", "by transformers"], autouse=True)
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by transformers":
        monkeypatch.setattr(frozen, "is_plain", lambda decoder: False)


def whole(base: BaseModel, chat: Chat, soft: Tensor | None, ids: list[int]) -> tuple[Tensor, Tensor]:
    embeddings = torch.cat([prefix_embeddings(base, chat, soft), base.model.get_input_embeddings()(torch.tensor([ids]))], dim=1)
    hidden = base.model.get_decoder()(inputs_embeds=embeddings).last_hidden_state[0, -1]
    return base.model.get_output_embeddings()(hidden[None])[0], hidden


@torch.inference_mode()
@pytest.mark.parametrize("with_soft", [True, False])
def test_every_step_is_that_of_the_whole_row(small: BaseModel, with_soft: bool) -> None:
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    soft = torch.randn(4, small.hidden) if with_soft else None
    resident = make_resident(small, chat, soft)
    output, decoding = resident.begin(ROWS, 3)
    for step in range(4):
        for row in range(3):
            logits, hidden = whole(small, chat, soft, ROWS[row] + NEXT[row][:step])
            torch.testing.assert_close(output.logits[row], logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(output.hidden[row], hidden, rtol=1e-4, atol=1e-4)
        if step < 3:
            output = decoding.step(torch.tensor([ids[step] for ids in NEXT]))


@torch.inference_mode()
def test_rows_that_stay_go_on_as_before(small: BaseModel) -> None:
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    _, decoding = make_resident(small, chat, None).begin(ROWS, 3)
    decoding.step(torch.tensor([7, 17, 27]))
    decoding.keep(torch.tensor([0, 2]))
    output = decoding.step(torch.tensor([8, 28]))
    for place, row in enumerate((0, 2)):
        torch.testing.assert_close(
            output.logits[place], whole(small, chat, None, ROWS[row] + NEXT[row][:2])[0], rtol=1e-4, atol=1e-4
        )


@torch.inference_mode()
def test_one_prefix_serves_many_batches(small: BaseModel) -> None:
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    resident = make_resident(small, chat, None)
    first, decoding = resident.begin(ROWS, 3)
    decoding.step(torch.tensor([7, 17, 27]))
    again, _ = resident.begin(ROWS, 3)
    assert torch.equal(first.logits, again.logits)
