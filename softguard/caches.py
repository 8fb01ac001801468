"""The base's keys and values of a corpus's prompts, which a gate does not change: a safetensors file a shard, tensors by the
prompts' numbers in it. They are a copy of what the base computes, not of the corpus's identity: without them training runs the
base again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from softguard.config import fingerprint
from softguard.engine import Engine
from softguard.errors import SoftguardError
from softguard.files import write_file


def caches_of(shard: Path) -> Path:
    """Where those of the Parquet file `shard` lie."""
    return shard.with_suffix(".safetensors")


def keep_caches(path: Path, prompts: Sequence[str], engine: Engine, batch_size: int, progress: Callable[[int], None]) -> None:
    """Write those of a shard's prompts, see `Engine.caches`, unless the file holds them; `progress` is told how many are done.

    Raises SoftguardError for a model they are not kept of, or a full disk.
    """
    identity = fingerprint(list(prompts), engine.base.fingerprint, engine.base.precision)
    if _identity(path) == identity:
        progress(len(prompts))
        return
    made = {str(number): cache.cpu() for number, cache in enumerate(engine.caches(prompts, batch_size, progress))}
    try:
        write_file(path, partial(save_file, made, metadata={"prompts": identity}))
    except SafetensorError as error:  # which is no OSError, whatever the disk said
        raise SoftguardError(f"{path} could not be written ({error}); free space or choose another folder") from error


def _identity(path: Path) -> str | None:
    """What a file of caches says its prompts are; none of a missing or damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("prompts")
    except (OSError, SafetensorError):
        return None


def read_caches(path: Path, numbers: Sequence[int]) -> list[Tensor]:
    """Those of some prompts of a shard, (layers, 2, key heads, tokens, width) each.

    Raises SoftguardError for a damaged file.
    """
    try:
        with safe_open(path, "pt") as file:
            return [file.get_tensor(str(number)) for number in numbers]
    except (OSError, SafetensorError) as error:
        raise SoftguardError(f"{path} is damaged ({error}); remove it, then training runs the base again") from error
