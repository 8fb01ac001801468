"""GGUF files read once, several times faster than transformers alone reads them.

For configuration, tokenizer and weights it parses a file's whole metadata anew each: hundreds of thousands of small slices of
an `np.memmap`, which cost several times what slices of a plain array do. And it makes gguf's table of tensor names once a
module of the model. What bar it shows meanwhile is decided here, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np


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
