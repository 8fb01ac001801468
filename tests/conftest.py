"""Models the tests share: the real demo model, and a small random one of the same family for whole runs."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it; tests ask no network

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softguard.chat import Chat
from softguard.models import BaseModel, load_base


@pytest.fixture(scope="session")
def base() -> BaseModel:
    """SmolLM2-135M-Instruct in float32."""
    return load_base("smollm2")


@pytest.fixture(scope="session")
def chat(base: BaseModel) -> Chat:
    return Chat(base.tokenizer, "start", base.stop_ids)


@pytest.fixture(scope="session")
def small_folder(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer random Llama and SmolLM2's tokenizer."""
    return save_small(base, tmp_path_factory.mktemp("small"), seed=0)


def save_small(base: BaseModel, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small(small_folder: Path) -> BaseModel:
    return load_base(str(small_folder))
