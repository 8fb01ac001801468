import pytest
import torch

from softguard.chat import Chat, Slot
from softguard.models import BaseModel
from softguard.prefix import prefix_embeddings


def test_without_a_soft_prompt_the_prefix_is_the_template(base: BaseModel, chat: Chat) -> None:
    ids = torch.tensor([[*chat.prefix.before, *chat.prefix.after]])
    assert torch.equal(prefix_embeddings(base, chat, None), base.model.get_input_embeddings()(ids))


@pytest.mark.parametrize("slot", ["start", "system"])
def test_the_soft_prompt_stands_in_its_slot(small: BaseModel, slot: Slot) -> None:
    chat = Chat(small.tokenizer, slot, small.stop_ids)
    soft = torch.randn(3, small.hidden)
    before = len(chat.prefix.before)
    embeddings = prefix_embeddings(small, chat, soft)
    assert torch.equal(embeddings[0, before : before + 3], soft)
    rest = torch.cat([embeddings[:, :before], embeddings[:, before + 3 :]], dim=1)
    assert torch.equal(rest, prefix_embeddings(small, chat, None))
