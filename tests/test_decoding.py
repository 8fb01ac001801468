"""Rows that run written out, and rows by transformers, against whole passes without a cache."""

import pytest
import torch
from torch import Tensor

from softguard import decoding, frozen
from softguard.adapters import Adapter, Kind
from softguard.chat import Chat
from softguard.decoding import make_resident
from softguard.models import BaseModel
from softguard.prefix import constant_prefix
from tests.references import random_adapter, whole_row

ROWS = [[40, 41, 42], [50], [60, 61, 62, 63, 64]]
NEXT = [[7, 8, 9], [17, 18, 19], [27, 28, 29]]


@pytest.fixture(params=["written out", "by transformers"], autouse=True)
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by transformers":
        monkeypatch.setattr(frozen, "is_plain", lambda decoder: False)


def whole(base: BaseModel, chat: Chat, adapter: Adapter | None, ids: list[int]) -> tuple[Tensor, Tensor]:
    hidden = whole_row(base, constant_prefix(base, chat, adapter), ids)[-1]
    return base.model.get_output_embeddings()(hidden[None])[0], hidden


@torch.inference_mode()
@pytest.mark.parametrize("room", [decoding._ROOM, 1])  # the second grows at every step
@pytest.mark.parametrize("kind", ["soft_prompt", "kv_prefix", None])
def test_every_step_is_that_of_the_whole_row(
    small: BaseModel, kind: Kind | None, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_ROOM", room)
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    adapter = random_adapter(small, kind) if kind else None
    resident = make_resident(small, chat, adapter)
    assert resident.length == len(chat.prefix.after) + 4 * bool(kind)
    output, rows = resident.begin(ROWS)
    for step in range(4):
        for row in range(3):
            logits, hidden = whole(small, chat, adapter, ROWS[row] + NEXT[row][:step])
            torch.testing.assert_close(output.logits[row], logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(output.hidden[row], hidden, rtol=1e-4, atol=1e-4)
        if step < 3:
            output = rows.step(torch.tensor([ids[step] for ids in NEXT]))


@torch.inference_mode()
@pytest.mark.parametrize("stay", [[0, 2], [1], [2]])  # one row alone, whether it is the longest or not
def test_rows_that_stay_go_on_as_before(small: BaseModel, stay: list[int]) -> None:
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    _, rows = make_resident(small, chat, None).begin(ROWS)
    rows.step(torch.tensor([7, 17, 27]))
    rows.keep(torch.tensor(stay))
    output = rows.step(torch.tensor([NEXT[row][1] for row in stay]))
    for place, row in enumerate(stay):
        torch.testing.assert_close(
            output.logits[place], whole(small, chat, None, ROWS[row] + NEXT[row][:2])[0], rtol=1e-4, atol=1e-4
        )


@torch.inference_mode()
def test_one_prefix_serves_many_batches(small: BaseModel) -> None:
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    resident = make_resident(small, chat, None)
    first, rows = resident.begin(ROWS)
    rows.step(torch.tensor([7, 17, 27]))
    again, _ = resident.begin(ROWS)
    assert torch.equal(first.logits, again.logits)
