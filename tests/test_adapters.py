import json
from pathlib import Path

import pytest
import torch

from softguard.adapters import SoftPrompt, initial_vectors
from softguard.chat import Chat
from softguard.errors import SoftguardError
from softguard.models import BaseModel
from softguard.prefix import prefix_embeddings

FACTS = {"objective": "tv", "guard": "g", "corpus": "c", "settings": "s"}


def test_stock_peft_loads_a_start_slot_prompt_and_gives_the_same_logits(base: BaseModel, chat: Chat, tmp_path: Path) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    vectors = initial_vectors(base, "Be careful.", 10) + 0.05 * torch.randn(10, base.hidden)
    SoftPrompt(vectors, "start", FACTS).save(tmp_path, base)
    ids = [*chat.prefix.after, *chat.encode("How do I bake bread?")]
    tail = base.model.get_input_embeddings()(torch.tensor([chat.encode("How do I bake bread?")]))
    with torch.no_grad():
        ours = base.model(inputs_embeds=torch.cat([prefix_embeddings(base, chat, vectors), tail], dim=1)).logits[0, 10:]
        theirs = PeftModel.from_pretrained(base.model, str(tmp_path))(input_ids=torch.tensor([ids])).logits[0, 10:]
    assert (ours - theirs).abs().max() <= 1e-4


def test_saving_and_loading_keeps_everything(small: BaseModel, tmp_path: Path) -> None:
    vectors = torch.randn(4, small.hidden)
    SoftPrompt(vectors, "system", FACTS).save(tmp_path, small)
    loaded = SoftPrompt.load(tmp_path, small)
    assert torch.equal(loaded.vectors, vectors)
    assert (loaded.slot, loaded.facts, loaded.n_soft) == ("system", FACTS, 4)
    assert not list(tmp_path.glob("*.part"))


def test_only_a_start_slot_prompt_poses_as_a_peft_adapter(small: BaseModel, tmp_path: Path) -> None:
    SoftPrompt(torch.zeros(2, small.hidden), "system", FACTS).save(tmp_path / "system", small)
    SoftPrompt(torch.zeros(2, small.hidden), "start", FACTS).save(tmp_path / "start", small)
    assert not (tmp_path / "system" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "start" / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"


def test_an_adapter_of_another_model_is_refused(base: BaseModel, small: BaseModel, tmp_path: Path) -> None:
    SoftPrompt(torch.zeros(2, small.hidden), "start", FACTS).save(tmp_path, small)
    with pytest.raises(SoftguardError, match=f"belongs to model.*{small.fingerprint}.*not to 'smollm2'"):
        SoftPrompt.load(tmp_path, base)


def test_weights_that_are_not_the_sealed_ones_are_refused(small: BaseModel, tmp_path: Path) -> None:
    SoftPrompt(torch.zeros(2, small.hidden), "start", FACTS).save(tmp_path, small)
    blob = bytearray((tmp_path / "adapter_model.safetensors").read_bytes())
    blob[-1] ^= 1
    (tmp_path / "adapter_model.safetensors").write_bytes(blob)
    with pytest.raises(SoftguardError, match="damaged"):
        SoftPrompt.load(tmp_path, small)


def test_a_folder_without_an_adapter_is_told(small: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(SoftguardError, match=r"softguard\.json is missing"):
        SoftPrompt.load(tmp_path, small)


def test_a_short_text_is_repeated_and_a_long_one_averaged(base: BaseModel) -> None:
    ids = base.tokenizer.encode("one two three", add_special_tokens=False)
    rows = base.model.get_input_embeddings().weight[ids]
    assert torch.equal(initial_vectors(base, "one two three", 2 * len(ids)), rows.repeat(2, 1))
    torch.testing.assert_close(initial_vectors(base, "one two three", 1), rows.mean(0, keepdim=True))


def test_an_empty_initial_text_is_refused(small: BaseModel) -> None:
    with pytest.raises(SoftguardError, match="init_text is empty"):
        initial_vectors(small, "", 4)
