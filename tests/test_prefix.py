import pytest
import torch

from softguard.chat import Chat, Slot
from softguard.models import BaseModel
from softguard.prefix import constant_prefix
from tests.references import random_adapter


def test_without_an_adapter_the_prefix_is_the_template(base: BaseModel, chat: Chat) -> None:
    prefix = constant_prefix(base, chat, None)
    ids = torch.tensor([*chat.prefix.before, *chat.prefix.after])
    assert torch.equal(prefix.embeddings, base.model.get_input_embeddings()(ids))
    assert prefix.keys_values is None
    assert prefix.length == len(ids)


@pytest.mark.parametrize("slot", ["start", "system"])
def test_the_soft_prompt_stands_in_its_slot(small: BaseModel, slot: Slot) -> None:
    chat = Chat(small.tokenizer, slot, small.stop_ids)
    adapter = random_adapter(small, "soft_prompt", slot, 3)
    before = len(chat.prefix.before)
    embeddings = constant_prefix(small, chat, adapter).embeddings
    assert torch.equal(embeddings[before : before + 3], adapter.vectors)
    rest = torch.cat([embeddings[:before], embeddings[before + 3 :]])
    assert torch.equal(rest, constant_prefix(small, chat, None).embeddings)


def test_a_key_value_prefix_stands_before_the_template(small: BaseModel) -> None:
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    adapter = random_adapter(small, "kv_prefix", n_soft=3)
    prefix, plain = constant_prefix(small, chat, adapter), constant_prefix(small, chat, None)
    assert torch.equal(prefix.embeddings, plain.embeddings)
    assert prefix.length == plain.length + 3
    assert prefix.keys_values is not None
    values = iter(adapter.vectors[1])  # of one position: by layer, keys before values, head by head
    for keys_values in prefix.keys_values:
        for part in keys_values:
            assert part.shape == (2, 3, 16)
            assert part[:, 1].flatten().tolist() == [float(next(values)) for _ in range(32)]
