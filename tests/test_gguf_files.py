"""What is read once is what transformers alone reads."""

from pathlib import Path

import gguf
import pytest
import torch

from softguard.gguf_files import read_once
from softguard.models import BaseModel, load_base, locate


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
