"""The corpus: for each prompt K responses drawn from the base, what the guard says of them, what the system says instead, and
the refusal rate U(x).

On disk: `manifest.json` beside one folder a split, each holding Parquet shards of `shard_size` prompts. A shard is written
whole or not at all and holds nothing that depends on when or how often the drawing was interrupted; a killed run resumes at
its first missing shard and ends with the same bytes. Drawing and reading need the memory of one shard, however many there are.
Beside each shard may lie the `caches` of its prompts.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from softguard.caches import caches_of, keep_caches, read_caches
from softguard.chat import Chat
from softguard.config import Recipe, fingerprint
from softguard.divergences import P_SAFE_RANGE
from softguard.engine import Engine, Response
from softguard.errors import SoftguardError
from softguard.files import check_folder, read_json, write_file, write_json
from softguard.models import BaseModel
from softguard.prompts import Prompt, read_prompts, read_rows
from softguard.system import SafeSystem

VERSION = 7
_ROW_GROUP = 32  # prompts; what reading one example costs
_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("label", pa.string()),
        ("refusal_rate", pa.float64()),  # U(x)
        (
            "responses",
            pa.list_(
                pa.struct(
                    [
                        ("ids", pa.list_(pa.int32())),
                        ("p_safe", pa.float64()),
                        ("keep", pa.float64()),
                        ("category", pa.string()),
                        ("instead", pa.list_(pa.int32())),  # empty where the response is kept for certain
                        ("hidden", pa.binary()),  # (tokens, hidden) in the base's precision, or none
                    ]
                )
            ),
        ),
    ]
)


_MANIFEST = (
    *("model", "base", "template", "guard", "guard_fingerprint", "system", "refusals", "threshold", "settings"),
    *("precision", "shard_size", "longest", "prompts", "shards"),
)


class Draw(NamedTuple):
    """One response drawn from the base."""

    ids: tuple[int, ...]
    p_safe: float  # what the guard said
    keep: float  # α, what the system makes of it
    hidden: Tensor | None = None  # (tokens, hidden), the base's last hidden states that predict `ids`
    category: str = ""  # what the guard named, where a policy asked
    instead: tuple[int, ...] = ()  # what the system says where it does not keep the response


class Example(NamedTuple):
    """One prompt of the corpus."""

    prompt: str
    label: str
    refusal_rate: float
    responses: tuple[Draw, ...]
    cache: Tensor | None = None  # the base's keys and values, see `Engine.caches`, where they were kept and asked for

    def soft_refusal_rate(self, threshold: float | None) -> float:
        """U(x) had the guard's p(safe) not been cut at `threshold`, but its log-odds set to 0 there; without one, U(x) itself.

        It says more of a prompt than U(x); of a single response it lies on the same side of ½.
        """
        if threshold is None:
            return self.refusal_rate
        low, high = P_SAFE_RANGE
        p_safe = np.clip([draw.p_safe for draw in self.responses], low, high)
        cut = min(max(threshold, low), high)
        odds = p_safe / (1 - p_safe) * (1 - cut) / cut
        return float(np.mean(1 / (1 + odds)))

    @property
    def refusals(self) -> dict[tuple[int, ...], float]:
        """What the system says instead of the responses, and how often; the rates add up to U(x)."""
        rates: dict[tuple[int, ...], float] = {}
        for draw in self.responses:
            if draw.instead:
                rates[draw.instead] = rates.get(draw.instead, 0.0) + (1 - draw.keep) / len(self.responses)
        return rates


@dataclass(frozen=True)
class Corpus:
    """A finished corpus on disk."""

    folder: Path
    manifest: dict[str, Any]
    _sound: set[Path] = field(default_factory=set, repr=False, compare=False)  # shards whose bytes were compared

    @classmethod
    def open(cls, folder: Path | str, base: BaseModel | None = None) -> "Corpus":
        """Open a finished corpus and, given a base, check that the base drew it.

        Raises SoftguardError if it is missing, unfinished, damaged or another model's.
        """
        folder = Path(folder)
        manifest = read_json(folder / "manifest.json", "corpus")
        if manifest.get("version") != VERSION:
            raise SoftguardError(
                f"corpus {folder} has version {manifest.get('version')}, this softguard reads {VERSION}; teach again"
            )
        if not manifest.get("fingerprint"):
            raise SoftguardError(f"corpus {folder} is unfinished; run the same teach command again to complete it")
        if lacking := [key for key in _MANIFEST if key not in manifest]:
            raise SoftguardError(f"{folder / 'manifest.json'} is damaged: it lacks {lacking[0]!r}; remove it and teach again")
        if base is not None and manifest["base"] != base.fingerprint:
            raise SoftguardError(
                f"corpus {folder} was drawn from model {manifest['model']!r} ({manifest['base']}), not from {base.name!r} "
                f"({base.fingerprint}); teach again with this model"
            )
        if base is not None and manifest["template"] != Chat(base.tokenizer).fingerprint:
            raise SoftguardError(
                f"corpus {folder} was drawn behind another chat template than {base.name!r} has now; teach again"
            )
        return cls(folder, manifest)

    @property
    def fingerprint(self) -> str:
        """Identity of the corpus's content."""
        return str(self.manifest["fingerprint"])

    def size(self, split: str) -> int:
        """Number of prompts in a split."""
        return int(self.manifest["prompts"][split])

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response, drawn or said instead."""
        found = 0
        for split, shards in self.manifest["shards"].items():
            for number in range(len(shards)):
                with self._shard(split, number) as table:
                    texts = table.read(columns=[f"responses.list.element.{name}" for name in ("ids", "instead")])
                responses = pc.list_flatten(texts["responses"])
                for name in ("ids", "instead"):
                    found = max(found, pc.max(pc.list_value_length(pc.struct_field(responses, name))).as_py() or 0)
        return found

    def refusal_rates(self, split: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """U(x) of every prompt of a split, (prompts,)."""
        parts = []
        for number in range(len(self._shards(split))):
            with self._shard(split, number) as table:
                parts.append(table.read(columns=["refusal_rate"])["refusal_rate"].to_numpy())
        return np.concatenate(parts)

    def examples(self, split: str, indices: list[int], caches: bool = False) -> list[Example]:
        """The examples at `indices`, in that order, with what is kept of their `caches`; reads only their row groups."""
        size, precision = int(self.manifest["shard_size"]), getattr(torch, self.manifest["precision"].removeprefix("torch."))
        found: dict[int, Example] = {}
        for shard in sorted({i // size for i in indices}):
            with self._shard(split, shard) as table:
                here = [i for i in indices if i // size == shard]
                for group in sorted({i % size // _ROW_GROUP for i in here}):
                    rows = table.read_row_group(group).to_pylist()
                    for i in here:
                        if i % size // _ROW_GROUP == group:
                            found[i] = _example(rows[i % size % _ROW_GROUP], precision)
                kept = caches_of(self._shards(split)[shard])
                if caches and kept.is_file():
                    read = read_caches(kept, [i % size for i in here])
                    found |= {i: found[i]._replace(cache=cache) for i, cache in zip(here, read, strict=True)}
        return [found[i] for i in indices]

    def _shards(self, split: str) -> list[Path]:
        return [self.folder / split / f"{i:05d}.parquet" for i in range(len(self.manifest["shards"][split]))]

    @contextlib.contextmanager
    def _shard(self, split: str, number: int) -> Iterator[pq.ParquetFile]:
        path = self._shards(split)[number]
        try:
            if path not in self._sound and _digest(path) != self.manifest["shards"][split][number]:
                raise SoftguardError(f"corpus shard {path} is missing or damaged; remove it and teach again")
            self._sound.add(path)
            with pq.ParquetFile(path) as table:
                yield table
        except (OSError, pa.ArrowException) as error:
            raise SoftguardError(f"corpus shard {path} is missing or damaged ({error}); remove it and teach again") from error


def teach(
    recipe: Recipe,
    out: Path | str,
    base: BaseModel,
    system: SafeSystem,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Corpus:
    """Draw and score the corpus a recipe asks for, or complete one of which shards or caches are missing.

    `progress` is told the stage, how many prompts were just finished and how many there are. Raises SoftguardError for bad
    prompts, a failing guard (shards finished so far stay and are not drawn again), a full disk, a damaged shard, or a folder
    that holds another recipe's corpus.
    """
    out, engine, sources = Path(out), Engine(base), recipe.teach.sources
    totals = check_teaching(recipe, out, engine, system)
    teacher = _teacher(recipe, base, system)
    known = _known_shards(out, teacher)
    if not known:
        write_json(out / "manifest.json", {**teacher, "fingerprint": None})
    shards: dict[str, list[str]] = {}
    prompts: dict[str, int] = {}
    longest = 0
    for split, source in sources.items():

        def told(stage: str, done: int, split: str = split) -> None:
            progress(f"{stage} {split}", done, totals[split])

        own = (known.get(split, []), teacher["settings"])
        made = list(_draw_split(recipe, *source, out / split, engine, system, *own, told))
        longest = max(longest, *(shard.longest for shard in made))
        shards[split], prompts[split] = [shard.digest for shard in made], sum(shard.prompts for shard in made)
    identity = fingerprint(teacher["settings"], shards)
    found = {"fingerprint": identity, "prompts": prompts, "longest": longest, "shards": shards}
    write_json(out / "manifest.json", {**teacher, **found})
    return Corpus.open(out, base)


def check_teaching(recipe: Recipe, out: Path, engine: Engine, system: SafeSystem) -> dict[str, int]:
    """How many prompts each split has; all are read, so that a bad one is found before hours are spent.

    Raises SoftguardError naming the place of a malformed prompt, or of one too long for the model, a model whose caches are not
    kept, or a folder that cannot be written or holds another recipe's corpus. Nothing is written.
    """
    check_folder(out)
    _known_shards(out, _teacher(recipe, engine.base, system))
    if recipe.teach.keep_caches:
        engine.caches([])  # fails for a model they are not kept of
    new = max(recipe.teach.max_new_tokens, *(len(engine.chat.encode_response(text)) for text in system.policy.refusals))
    return {split: _count(source, limit, new, engine) for split, (source, limit) in recipe.teach.sources.items()}


def _teacher(recipe: Recipe, base: BaseModel, system: SafeSystem) -> dict[str, Any]:
    """What a manifest says of all but the shards."""
    template = Chat(base.tokenizer).fingerprint
    return {
        "version": VERSION,
        "model": base.name,
        "base": base.fingerprint,
        "template": template,
        "guard": system.guard.name,
        "guard_fingerprint": system.guard.fingerprint,
        "system": recipe.system.taught,
        "refusals": list(system.policy.refusals),
        "threshold": system.threshold if recipe.system.decision == "threshold" else None,
        "settings": fingerprint(
            VERSION,
            base.fingerprint,
            template,
            system.guard.fingerprint,
            system.threshold,
            recipe.system,
            system.policy.fingerprint,
            recipe.deciding.teach,
            recipe.seed,
        ),
        "precision": base.precision,
        "shard_size": recipe.teach.shard_size,
    }


def _known_shards(out: Path, teacher: dict[str, Any]) -> dict[str, list[str]]:
    """Digests of the shards of each split of a finished corpus. Raises SoftguardError if `out` holds another teacher's."""
    found: dict[str, Any] = {}
    if (out / "manifest.json").is_file():
        found = read_json(out / "manifest.json", "corpus")
        for key in ("version", "base", "template", "precision", "settings"):
            if found.get(key) != teacher[key]:
                raise SoftguardError(
                    f"{out} holds a corpus made with other settings ({key} differs); choose another --out or remove it"
                )
    for path in sorted([*out.glob("train/*.parquet"), *out.glob("validation/*.parquet")]):  # whose manifest may be lost
        _check_settings(path, _stored(path), teacher["settings"])
    return found.get("shards") or {}


def _check_settings(path: Path, stored: dict[bytes, bytes], settings: str) -> None:
    """Raises SoftguardError for a shard that says that it was made with others."""
    if stored.get(b"settings", settings.encode()) != settings.encode():
        raise SoftguardError(f"{path} was made with other settings; choose another --out or remove it")


def _count(source: str, limit: int, new: int, engine: Engine) -> int:
    count = 0
    for where, row in islice(read_rows(source, limit), limit or None):
        engine.check_fits(row["prompt"], new, where)
        count += 1
    return count


class _Shard(NamedTuple):
    digest: str  # of the file's bytes
    prompts: int
    longest: int  # of its prompts, tokens


def _draw_split(
    recipe: Recipe,
    source: str,
    limit: int,
    folder: Path,
    engine: Engine,
    system: SafeSystem,
    known: list[str],
    settings: str,
    progress: Callable[[str, int], None],
) -> Iterator[_Shard]:
    """Make the split's missing shards and yield them all; `progress` is told a stage and how many prompts went through it.

    `known`: the digests of those of a finished corpus. `settings`: identity of how shards are made.
    """
    drawn, kept = partial(progress, "teach"), partial(progress, "keep caches of")
    prompts = read_prompts(source, limit)
    number = 0
    while shard := list(islice(prompts, recipe.teach.shard_size)):
        path = folder / f"{number:05d}.parquet"
        asked = hashlib.sha256("\0".join(p.text for p in shard).encode()).hexdigest()[:16]
        if path.is_file():
            stored = _stored(path)
            if stored.get(b"prompts", asked.encode()) != asked.encode():
                raise SoftguardError(f"{path} holds other prompts than {source} has now; choose another --out or remove it")
            _check_settings(path, stored, settings)  # once more: another run may have begun here meanwhile
            if not {b"prompts", b"settings"} <= stored.keys() or (number < len(known) and _digest(path) != known[number]):
                raise SoftguardError(f"{path} is damaged; remove it and teach again")
            drawn(len(shard))
        else:
            table = _draw(recipe, shard, engine, system, drawn)
            table = table.replace_schema_metadata({"prompts": asked, "settings": settings})
            caches_of(path).unlink(missing_ok=True)  # of what was here before
            write_file(path, partial(pq.write_table, table, row_group_size=_ROW_GROUP))
        if recipe.teach.keep_caches:
            keep_caches(caches_of(path), [prompt.text for prompt in shard], engine, recipe.teach.batch_size, kept)
        yield _Shard(_digest(path), len(shard), max(len(engine.chat.encode(prompt.text)) for prompt in shard))
        number += 1


def _stored(path: Path) -> dict[bytes, bytes]:
    """What a shard says it was made of and how; nothing, if it is damaged."""
    try:
        return pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return {}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _draw(recipe: Recipe, shard: list[Prompt], engine: Engine, system: SafeSystem, progress: Callable[[int], None]) -> pa.Table:
    """Responses, guard scores and refusal rates of one shard."""
    teach, k = recipe.teach, recipe.teach.responses
    repeated = [prompt.text for prompt in shard for _ in range(k)]
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        progress((done + rows) // k - done // k)
        done += rows

    drawn = engine.generate(
        repeated, teach.max_new_tokens, teach.batch_size, teach.temperature, recipe.seed, count, teach.keep_hidden
    )
    judged = system.judge(repeated, [response.text for response in drawn])
    keep = judged.keep
    rows = []
    for i, prompt in enumerate(shard):
        own = range(i * k, i * k + k)
        rows.append(
            {
                "prompt": prompt.text,
                "label": prompt.label,
                "refusal_rate": float(np.mean([1 - keep[j] for j in own])),
                "responses": [
                    {
                        "ids": drawn[j].ids,
                        "p_safe": float(judged.p_safe[j]),
                        "keep": float(keep[j]),
                        "category": judged.categories[j],
                        "instead": _instead(engine, system, drawn[j], judged.instead[j]) if keep[j] < 1 else [],
                        "hidden": _to_bytes(drawn[j].hidden),
                    }
                    for j in own
                ],
            }
        )
    return pa.Table.from_pylist(rows, _SCHEMA)


def _instead(engine: Engine, system: SafeSystem, response: Response, text: str) -> list[int]:
    """Ids of what is said instead; what is made of a response that was broken off is broken off, too."""
    if text in system.policy.refusals or not response.ids or response.ids[-1] in engine.chat.stop_ids:
        return engine.chat.encode_response(text)
    return engine.chat.response_ids(text)


def _example(row: dict[str, Any], precision: torch.dtype) -> Example:
    responses = tuple(
        Draw(
            tuple(r["ids"]),
            r["p_safe"],
            r["keep"],
            _from_bytes(r["hidden"], len(r["ids"]), precision),
            r["category"],
            tuple(r["instead"]),
        )
        for r in row["responses"]
    )
    return Example(row["prompt"], row["label"], row["refusal_rate"], responses)


def _to_bytes(hidden: Tensor | None) -> bytes | None:
    return None if hidden is None else hidden.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _from_bytes(stored: bytes | None, tokens: int, precision: torch.dtype) -> Tensor | None:
    return None if stored is None else torch.frombuffer(bytearray(stored), dtype=precision).view(tokens, -1)
