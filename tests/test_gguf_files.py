"""What is read once is what transformers alone reads, and what it leaves out is added or refused."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softguard.errors import SoftguardError
from softguard.gguf_files import config_of, read_once
from softguard.models import BaseModel, load_base, locate

SHAPE = {
    "vocab_size": 49152, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 131072, "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def made(**rope: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope)).eval()


def write_gguf(
    path: Path,
    model: Any,
    tensors: Mapping[str, Any] | None = None,
    said: Mapping[str, Any] | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> str:
    """A Llama as llama.cpp's converter writes it, with SmolLM2's tokenizer."""
    source, extra = locate("smollm2")
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    for name, field in gguf.GGUFReader(Path(source, extra["gguf_file"])).fields.items():
        if name.startswith("tokenizer."):
            add = writer.add_array if field.types[0] == gguf.GGUFValueType.ARRAY else None
            add(name, field.contents()) if add else writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, value in (said or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.named_parameters():
        array, stored = value.detach().numpy(), names.get_name(name.removesuffix(".weight")) + ".weight"
        if "q_proj" in name or "k_proj" in name:  # whose rows llama.cpp has in pairs
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if wanted(stored):
            writer.add_tensor(stored, np.ascontiguousarray(array))
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def divisors(model: Any, of: Any) -> Any:
    return (of.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()


def test_llama_3_s_scaled_positions_are_read_from_its_tensor(base: BaseModel, tmp_path: Path) -> None:
    plain, scaled = made(rope_type="default", rope_theta=500_000.0), made(**LLAMA3)
    path = write_gguf(tmp_path / "a.gguf", scaled, {"rope_freqs.weight": divisors(scaled, plain)})
    loaded = load_base(path)
    ids = torch.arange(3, 203)[None]
    with torch.no_grad():
        ours, theirs, other = (model(ids).logits for model in (loaded.model, scaled, plain))
    assert torch.equal(ours, theirs)
    assert (theirs - other).abs().max() > 0.1
    scaled.save_pretrained(tmp_path / "folder")
    base.tokenizer.save_pretrained(tmp_path / "folder")
    assert loaded.fingerprint == load_base(str(tmp_path / "folder")).fingerprint
    unscaled = load_base(write_gguf(tmp_path / "b.gguf", plain))
    assert loaded.fingerprint != unscaled.fingerprint
    same = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}
    ones = {"rope_freqs.weight": np.ones(32, np.float32)}
    assert load_base(write_gguf(tmp_path / "c.gguf", plain, ones, same)).fingerprint == unscaled.fingerprint


@pytest.mark.parametrize(
    ("tensors", "said", "told"),
    [
        ({}, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "is not read from GGUF files"),
        ({}, {"llama.rope.scaling.factor": 4.0}, "is not read from GGUF files"),
        ({}, {"llama.rope.scale_linear": 4.0}, "is not read from GGUF files"),
        ({"rope_factors_long.weight": np.ones(32, np.float32)}, {}, "is not read from GGUF files"),
        ({"rope_freqs.weight": np.linspace(1, 8, 32, dtype=np.float32)}, {}, "is not Llama 3's"),
        ({"blk.0.attn_q.bias": np.ones(128, np.float32)}, {}, "has biases that a LlamaForCausalLM has not"),
    ],
)
def test_what_transformers_leaves_out_of_a_file_is_refused(
    tensors: dict[str, Any], said: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "a.gguf", made(rope_type="default", rope_theta=10_000.0), tensors, said)
    with pytest.raises(SoftguardError, match=rf"a\.gguf .*{told}; give the folder of its safetensors with model\.quantize"):
        load_base(path)


def described(path: Path, make: str, layers: int) -> Path:
    """A file of no tensors, whose positions turn by 12,345."""
    writer = gguf.GGUFWriter(path, make)
    writer.add_block_count(layers)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(12_345.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_base_of_frequencies_is_the_file_s_whatever_the_make(tmp_path: Path) -> None:
    with read_once():
        for make in ("llama", "qwen2", "starcoder2"):
            config = config_of(described(tmp_path / f"{make}.gguf", make, 2))
            assert config.rope_parameters["rope_theta"] == 12_345.0


@pytest.mark.parametrize(("make", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_a_make_whose_scale_of_attention_no_file_says_is_refused(make: str, layers: int, tmp_path: Path) -> None:
    with read_once():
        config_of(described(tmp_path / "a.gguf", make, layers - 1))
        with pytest.raises(
            SoftguardError, match=r"b\.gguf is of a make whose attention is scaled by what GGUF files do not say"
        ):
            config_of(described(tmp_path / "b.gguf", make, layers))


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    model = made(rope_type="default", rope_theta=10_000.0)
    path = write_gguf(tmp_path / "a-00001-of-00002.gguf", model, wanted=lambda name: "blk.1." not in name)
    with pytest.raises(SoftguardError, match=r"lacks 9 of its weights, model\.layers\.1\..*split must be merged"):
        load_base(path)


def test_a_file_read_once_is_what_transformers_reads(base: BaseModel) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, extra = locate("smollm2")
    alone = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **extra)
    tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    assert alone.config.to_dict() == base.model.config.to_dict()
    for (name, theirs), (own, ours) in zip(alone.named_parameters(), base.model.named_parameters(), strict=True):
        assert name == own
        assert torch.equal(theirs, ours)
    assert tokenizer.chat_template == base.tokenizer.chat_template
    assert tokenizer.get_vocab() == base.tokenizer.get_vocab()
    text = "What is a 'gate'?\n\n<|im_end|> naïve 123"
    assert tokenizer(text).input_ids == base.tokenizer(text).input_ids


def test_a_base_is_loaded_from_one_reading_and_no_log_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import modeling_gguf_pytorch_utils as converting

    read, own, bar = [], gguf.GGUFReader.__init__, converting.tqdm

    def counted(self: gguf.GGUFReader, path: str, *more: str) -> None:
        read.append(path)
        own(self, path, *more)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    load_base("smollm2")
    assert len(read) == 1
    assert not "".join(capsys.readouterr())
    assert converting.tqdm is bar


def test_a_file_is_parsed_once_and_gguf_is_left_as_it_was() -> None:
    source, extra = locate("smollm2")
    path, arch = Path(source) / extra["gguf_file"], gguf.MODEL_ARCH.LLAMA
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    with read_once():
        first, table = gguf.GGUFReader(path), gguf.get_tensor_name_map(arch, 30)
        assert gguf.GGUFReader(path) is first
        assert gguf.get_tensor_name_map(arch, 30) is table
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, names)
    assert table.mapping == names(arch, 30).mapping
    expected = reader(path)
    assert first.fields.keys() == expected.fields.keys()
    for ours, theirs in zip(first.tensors, expected.tensors, strict=True):
        assert (ours.name, ours.tensor_type) == (theirs.name, theirs.tensor_type)
        assert (ours.data == theirs.data).all()


def test_gguf_is_left_as_it_was_after_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but no model")
    reader = gguf.GGUFReader
    with pytest.raises(ValueError, match="cannot handle"), read_once():
        gguf.GGUFReader(tmp_path / "broken.gguf")
    assert gguf.GGUFReader is reader
