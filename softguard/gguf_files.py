"""GGUF files read once, several times faster than transformers alone reads them.

For configuration, tokenizer and weights it parses a file's whole metadata anew each: hundreds of thousands of small slices of
an `np.memmap`, which cost several times what slices of a plain array do. And it makes gguf's table of tensor names once a
module of the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np


@contextmanager
def read_once() -> Iterator[None]:
    """Within it, `gguf` keeps what it has read of a file, and transformers shows its bar on terminals alone, not in logs.

    Not for more than one thread at a time.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """Its `data`, which it slices, are the file's bytes as a plain array."""

        @property
        def data(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
            return self._bytes

        @data.setter
        def data(self, mapped: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
            self._bytes = mapped.view(np.ndarray)

    own = gguf.GGUFReader, gguf.get_tensor_name_map, reading.tqdm
    gguf.GGUFReader, gguf.get_tensor_name_map, reading.tqdm = cache(Reader), cache(own[1]), partial(own[2], disable=None)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, reading.tqdm = own
