import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from softguard.adapters import VECTORS, Adapter, Kind
from softguard.chat import Chat, Slot
from softguard.errors import SoftguardError
from softguard.models import BaseModel
from softguard.prefix import constant_prefix
from tests.references import KINDS, random_adapter, whole_row

FACTS = {"objective": "tv", "guard": "g", "corpus": "c", "settings": "s", "refusal": "No."}


@pytest.mark.parametrize("kind", ["soft_prompt", "kv_prefix"])
def test_stock_peft_loads_a_start_slot_adapter_and_gives_the_same_logits(
    kind: Kind, base: BaseModel, chat: Chat, tmp_path: Path
) -> None:
    from peft import PeftModel

    adapter = random_adapter(base, kind, n_soft=10)
    adapter.save(tmp_path, base)
    row = chat.encode("How do I bake bread?")
    with torch.no_grad():
        states = whole_row(base, constant_prefix(base, chat, adapter), row)
        ours = base.model.get_output_embeddings()(states)
        ids = torch.tensor([[*chat.prefix.after, *row]])
        theirs = PeftModel.from_pretrained(base.model, str(tmp_path))(input_ids=ids).logits[0]
    assert (ours[-ids.shape[1] :] - theirs[-ids.shape[1] :]).abs().max() <= 1e-4


@pytest.mark.parametrize(("kind", "slot"), KINDS)
def test_saving_and_loading_keeps_everything(kind: Kind, slot: Slot, small: BaseModel, tmp_path: Path) -> None:
    adapter = replace(random_adapter(small, kind, slot), facts=FACTS)
    adapter.save(tmp_path, small)
    loaded = Adapter.load(tmp_path, small)
    assert torch.equal(loaded.vectors, adapter.vectors)
    assert (loaded.kind, loaded.slot, loaded.facts, len(loaded.vectors)) == (kind, slot, FACTS, 4)
    assert loaded.bytes < (tmp_path / "adapter_model.safetensors").stat().st_size < loaded.bytes + 200
    assert not list(tmp_path.glob("*.part"))


def test_values_float16_cannot_hold_are_refused(small: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(SoftguardError, match="learning_rate"):
        Adapter("soft_prompt", {VECTORS: torch.full((2, small.hidden), 1e6)}, "start", FACTS).save(tmp_path, small)
    assert not list(tmp_path.iterdir())


def test_only_a_start_slot_prompt_poses_as_a_peft_adapter(small: BaseModel, tmp_path: Path) -> None:
    Adapter("soft_prompt", {VECTORS: torch.zeros(2, small.hidden)}, "system", FACTS).save(tmp_path / "system", small)
    Adapter("soft_prompt", {VECTORS: torch.zeros(2, small.hidden)}, "start", FACTS).save(tmp_path / "start", small)
    assert not (tmp_path / "system" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "start" / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"


def test_an_adapter_of_another_model_is_refused(base: BaseModel, small: BaseModel, tmp_path: Path) -> None:
    Adapter("soft_prompt", {VECTORS: torch.zeros(2, small.hidden)}, "start", FACTS).save(tmp_path, small)
    with pytest.raises(SoftguardError, match=f"belongs to model.*{small.fingerprint}.*not to 'smollm2'"):
        Adapter.load(tmp_path, base)


def test_weights_that_are_not_the_sealed_ones_are_refused(small: BaseModel, tmp_path: Path) -> None:
    Adapter("soft_prompt", {VECTORS: torch.zeros(2, small.hidden)}, "start", FACTS).save(tmp_path, small)
    blob = bytearray((tmp_path / "adapter_model.safetensors").read_bytes())
    blob[-1] ^= 1
    (tmp_path / "adapter_model.safetensors").write_bytes(blob)
    with pytest.raises(SoftguardError, match="damaged"):
        Adapter.load(tmp_path, small)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("gate", change) for change in ({"bias": -100.0}, {"bias": None}, {"refusal": ""}, {"members": 0}, {"seal": 5})),
        *(("gate", change) for change in ({"adapter": "gates"}, {"adapter": "kv_prefix"}, {"guard": "another"})),
        *(("soft_prompt", {"slot": "system"}), ("text", {"text": "Be rude."})),
    ],
)
def test_facts_that_are_not_the_sealed_ones_are_refused(
    kind: Kind, change: dict[str, object], small: BaseModel, tmp_path: Path
) -> None:
    tensors, text = ({}, "Be kind.") if kind == "text" else (random_adapter(small, kind).tensors, "")
    Adapter(kind, tensors, "start", {**FACTS, "bias": 0.3, "members": 1}, text).save(tmp_path, small)
    Adapter.load(tmp_path, small)
    facts = json.loads((tmp_path / "softguard.json").read_text())
    left = {key: value for key, value in facts.items() if key not in change}
    for changed in (left | change, left):  # another value, or none
        (tmp_path / "softguard.json").write_text(json.dumps(changed))
        with pytest.raises(SoftguardError, match=r"damaged: its softguard\.json is not as it was written"):
            Adapter.load(tmp_path, small)


def test_a_folder_without_an_adapter_is_told(small: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(SoftguardError, match=r"softguard\.json is missing"):
        Adapter.load(tmp_path, small)


def test_a_steering_vector_is_also_saved_as_llama_cpp_reads_it(small: BaseModel, tmp_path: Path) -> None:
    from gguf import GGUFReader

    vector = torch.arange(small.hidden) / 8
    Adapter("steering", {"direction.1": vector}, "start", FACTS).save(tmp_path, small)
    reader = GGUFReader(tmp_path / "control_vector.gguf")
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.data.tolist()) == ("direction.1", vector.tolist())
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.layer_count"].contents() == 1
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_text_is_kept_in_words(small: BaseModel, tmp_path: Path) -> None:
    adapter = Adapter("text", {}, "system", FACTS, "Be kind.")
    adapter.save(tmp_path, small)
    assert Adapter.load(tmp_path, small) == adapter


def test_an_adapter_without_a_seal_is_refused_whatever_version_it_says(small: BaseModel, tmp_path: Path) -> None:
    Adapter("soft_prompt", {VECTORS: torch.zeros(2, small.hidden)}, "start", FACTS).save(tmp_path, small)
    facts = json.loads((tmp_path / "softguard.json").read_text())
    bare = {key: value for key, value in facts.items() if key != "seal"}
    for version, told in (
        (3, r"has version 3, this softguard reads \d; distil again"),
        (facts["version"], "not as it was written"),
    ):
        (tmp_path / "softguard.json").write_text(json.dumps({**bare, "version": version}))
        with pytest.raises(SoftguardError, match=told):
            Adapter.load(tmp_path, small)
