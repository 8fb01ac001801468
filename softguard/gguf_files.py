"""GGUF files read once, several times faster than transformers alone reads them, and with what it leaves out.

For configuration, tokenizer and weights it parses a file's whole metadata anew each: hundreds of thousands of small slices of
an `np.memmap`, which cost several times what slices of a plain array do. And it makes gguf's table of tensor names once a
module of the model. What bar it shows meanwhile is decided here, too.

Of what a file says of its model's positions transformers takes the base of their frequencies alone, and that not of every make;
Llama 3's scaling is a tensor of divisors. What is neither taken nor added here is refused: the logits would be another model's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softguard.errors import SoftguardError

_MEND = "give the folder of its safetensors with model.quantize instead"
_LARGE = {"gemma2": 46, "gemma3": 62}  # layers of those of 27B, whose attention is scaled by what no file says
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # of every release


@contextmanager
def read_once() -> Iterator[None]:
    """Within it, `gguf` keeps what it has read of a file. Not for more than one thread at a time."""
    import gguf

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """Its `data`, which it slices, are the file's bytes as a plain array."""

        @property
        def data(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
            return self._bytes

        @data.setter
        def data(self, mapped: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
            self._bytes = mapped.view(np.ndarray)

    own = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(Reader), cache(own[1])
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = own


def config_of(path: Path) -> Any:
    """transformers' configuration of a GGUF file, its positions turned as the file says. Within `read_once`.

    Raises SoftguardError for positions, or a scale of attention, that it cannot tell.
    """
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    reader = gguf.GGUFReader(str(path))
    said = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items() if ".rope." in name}
    tensors = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name.startswith("rope_f")}
    make = reader.fields["general.architecture"].contents()
    factor = said.get("rope.scaling.factor") or said.get("rope.scale_linear") or 1
    kind = said.get("rope.scaling.type", "linear")  # which old files leave out
    if (kind != "none" and factor != 1) or kind not in ("none", "linear") or tensors.keys() - {"rope_freqs.weight"}:
        raise SoftguardError(f"{path} scales its positions in a way that is not read from GGUF files; {_MEND}")
    if config.num_hidden_layers == _LARGE.get(make):
        raise SoftguardError(f"{path} is of a make whose attention is scaled by what GGUF files do not say; {_MEND}")
    rope = getattr(config, "rope_parameters", None) or {}
    turned = rope.get("full_attention", rope)  # of makes whose kinds of layers turn differently
    if "rope.freq_base" in said and "rope_theta" in turned:
        turned["rope_theta"] = said["rope.freq_base"]
    divisors = torch.tensor(tensors.get("rope_freqs.weight", [1])).float()
    if (divisors != 1).any():
        rope |= {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
        if not torch.allclose(divisors, _llama3_divisors(config), rtol=1e-3):
            raise SoftguardError(f"{path} scales its positions in a way that is not Llama 3's; {_MEND}")
    return config


def _llama3_divisors(config: Any) -> torch.Tensor:
    """By which Llama 3 divides the frequencies of `config`, (head width / 2)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = 2 * len(scaled)
    plain = torch.pow(config.rope_parameters["rope_theta"], -torch.arange(0, width, 2) / width)
    divisors: torch.Tensor = plain / scaled
    return divisors


def check_read(path: Path, model: Any) -> None:
    """Raises SoftguardError if a GGUF file has biases that `model`, made of it, has not. Within `read_once`."""
    import gguf

    stored = sum(tensor.name.endswith(".bias") for tensor in gguf.GGUFReader(str(path)).tensors)
    if stored > sum(name.endswith("bias") for name, _ in model.named_parameters()):
        raise SoftguardError(f"{path} has biases that a {type(model).__name__} has not; {_MEND}")


@contextmanager
def bar_on_terminals() -> Iterator[None]:
    """Within it, transformers shows its bar of tensors being converted on terminals, not in logs. One thread at a time."""
    from transformers import modeling_gguf_pytorch_utils as converting

    bar = getattr(converting, "tqdm", None)  # no public name: where it is another, the bar stays as it is
    if bar is None:
        yield
        return
    converting.tqdm = partial(bar, disable=None)
    try:
        yield
    finally:
        converting.tqdm = bar
