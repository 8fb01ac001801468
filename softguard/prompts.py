"""Read prompts, one at a time, from files, the package's own set or a hub data set. Labels are optional."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from softguard.errors import SoftguardError
from softguard.text import is_whole

PACKAGED = "packaged"
SUITES = ("harmful", "contrast", "everyday")  # of the packaged prompts, a file each
T = TypeVar("T")


class Prompt(NamedTuple):
    """A prompt and what is known of it; unknown fields are empty."""

    text: str
    label: str = ""  # harmful or benign
    suite: str = ""  # harmful, contrast or everyday, in the packaged set
    category: str = ""
    topic: str = ""
    language: str = ""


def read_prompts(source: str, limit: int = 0) -> Iterator[Prompt]:
    """Stream prompts from `source`, at most `limit` (0: all), checking each.

    `source`: "packaged:SPLIT" (train, validation, test; the package's own prompts), a .jsonl, .csv, .txt or .parquet file
    with a `prompt` column (text: one prompt a line), or "hub:DATASET[@CONFIG][:SPLIT]" (needs `datasets`).
    With a limit, the packaged prompts are thinned evenly so that every suite and topic stays in its proportion.
    Raises SoftguardError that names file, line and field when a row is malformed or the source is empty.
    """
    for _, row in islice(read_rows(source, limit), limit or None):
        yield Prompt(row["prompt"], *(str(row.get(key) or "") for key in Prompt._fields[1:]))


def read_rows(source: str, limit: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream whole rows from a source of prompts as pairs of place ("file:line") and row, checking `prompt` and `label`.

    `limit` only thins packaged prompts, see `read_prompts`. Raises SoftguardError as `read_prompts` does.
    """
    rows: Iterable[tuple[str, Mapping[str, Any]]]
    if source.startswith(f"{PACKAGED}:"):
        rows = _packaged(source, limit)
    elif source.startswith("hub:"):
        rows = _hub(source)
    else:
        rows = _file(Path(source))
    where = ""
    for where, row in rows:
        text, label = row.get("prompt"), row.get("label")
        if not isinstance(text, str):
            raise SoftguardError(f"{where}: field 'prompt' is {'missing' if text is None else 'not text'}; every row needs one")
        if not text.strip():
            raise SoftguardError(f"{where}: the prompt is empty; remove the row or fill it in")
        for key, value in row.items():
            if not is_whole(json.dumps([key, value], ensure_ascii=False, default=str)):  # however deep
                raise SoftguardError(f"{where}: field {key!r} holds half a character (a lone surrogate); mend the text")
        if label not in (None, "", "harmful", "benign"):
            raise SoftguardError(f"{where}: label {label!r} is unknown; use harmful, benign or none")
        yield where, dict(row)
    if not where:
        raise SoftguardError(f"{source} holds no prompts; give at least one")


def packaged_suite(suite: str, split: str) -> list[Prompt]:
    """The packaged prompts of one suite (harmful, contrast, everyday) and split."""
    return [p for p in read_prompts(f"{PACKAGED}:{split}") if p.suite == suite]


def thin(items: list[T], limit: int) -> list[T]:
    """`limit` items spread evenly, always the same ones, in their order; all of them if `limit` is 0 or no smaller.

    One at random from each of `limit` equal parts: a fixed stride would fall in step with lists whose kinds take turns.
    """
    if not limit or limit >= len(items):
        return items
    rng = np.random.default_rng(0)
    return [items[rng.integers(i * len(items) // limit, (i + 1) * len(items) // limit)] for i in range(limit)]


def _packaged(source: str, limit: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    split = source.partition(":")[2]
    if split not in ("train", "validation", "test"):
        raise SoftguardError(f"{source!r}: split {split!r} is unknown; use packaged:train, :validation or :test")
    folder = Path(str(resources.files("softguard") / "data" / "prompts"))
    suites = {suite: [r for r in _file(folder / f"{suite}.jsonl") if r[1]["split"] == split] for suite in SUITES}
    total = sum(map(len, suites.values()))
    if limit and limit < total:
        # Every suite keeps its proportion; what rounding leaves over goes to the first.
        shares = {suite: limit * len(own) // total for suite, own in suites.items()}
        shares[SUITES[0]] += limit - sum(shares.values())
        suites = {suite: thin(own, shares[suite]) if shares[suite] else [] for suite, own in suites.items()}
    return (row for own in suites.values() for row in own)


def _file(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    readers = {".jsonl": _jsonl, ".csv": _csv, ".txt": _text, ".parquet": _parquet}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise SoftguardError(
            f"prompts {path}: the ending {path.suffix!r} is unknown; use {', '.join(readers)}, packaged: or hub:"
        )
    if not path.is_file():
        raise SoftguardError(f"prompts file {path} does not exist; check the path")
    try:
        yield from readers[suffix](path)
    except UnicodeDecodeError as error:
        raise SoftguardError(f"{path} is not UTF-8 text (byte {_first_bad_byte(path)}); convert it") from error
    except OSError as error:
        raise SoftguardError(f"{path} cannot be read: {error}") from error


def _first_bad_byte(path: Path) -> int:
    """Its place in the file; a reader only knows the place in its buffer."""
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return -1


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:  # spreadsheets and some editors begin their files with a mark
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            names: list[str] = []
            try:
                row = json.loads(line, object_pairs_hook=partial(_object, names))
            except (ValueError, RecursionError) as error:
                raise SoftguardError(f"{path}:{number}: not valid JSON ({error}); mend or remove the line") from error
            if not isinstance(row, dict):
                raise SoftguardError(f"{path}:{number}: must be a JSON object with a 'prompt'")
            if twice := _twice(names):
                raise SoftguardError(f"{path}:{number}: the key {twice!r} stands twice; remove one")
            yield f"{path}:{number}", row


def _object(names: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys become `names`: the outermost is made last, so that its keys stay."""
    names[:] = [key for key, _ in pairs]
    return dict(pairs)


def _twice(names: Sequence[str]) -> str:
    """The first name that comes again, or none; columns without one may be several."""
    return next((name for name, count in Counter(names).items() if name and count > 1), "")


def _csv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        csv.field_size_limit(2**31 - 1)  # a cell may be as long as a line of JSON
        reader = csv.DictReader(lines, strict=True)
        try:
            if twice := _twice(reader.fieldnames or ()):
                raise SoftguardError(f"{path}: two columns are called {twice!r}; rename one")
            for row in reader:
                if None in row:
                    raise SoftguardError(
                        f"{path}:{reader.line_num}: the row has more fields than the header; set what holds a comma in quotes"
                    )
                # an empty cell is no response, where JSON can tell an empty one
                yield f"{path}:{reader.line_num}", {k: v or None if k == "response" else v for k, v in row.items()}
        except csv.Error as error:
            raise SoftguardError(f"{path}:{reader.line_num}: not valid CSV ({error})") from error


def _text(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", {"prompt": line.strip()}


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if twice := _twice(table.schema_arrow.names):
                raise SoftguardError(f"{path}: two columns are called {twice!r}; rename one")
            for batch in table.iter_batches(batch_size=1024):
                for row in _batch_rows(batch):
                    number += 1
                    yield f"{path} row {number}", row
    except pyarrow.ArrowException as error:
        raise SoftguardError(f"{path} is not a Parquet file ({error})") from error
    except UnicodeDecodeError as error:
        raise SoftguardError(f"{path} row {number + 1} is not UTF-8 text; convert it") from error
    except (ValueError, ArithmeticError, LookupError) as error:  # two keys of one name in a field, times out of Python's range
        raise SoftguardError(
            f"{path} row {number + 1} cannot be read ({error}); mend the value or leave out its column"
        ) from error


def _batch_rows(batch: Any) -> Iterable[dict[str, Any]]:
    """Rows of Parquet; one by one where a value cannot be read, so that those before it are counted."""
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, ArithmeticError, LookupError):
        return (batch.slice(row, 1).to_pylist()[0] for row in range(len(batch)))


def _hub(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    place, _, split = source.removeprefix("hub:").partition(":")
    name, _, config = place.partition("@")
    try:
        import datasets
    except ImportError as error:
        raise SoftguardError(f"{source}: reading hub data sets needs 'datasets'; run: pip install datasets") from error
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{source} row {number}", row
    except Exception as error:  # whatever its scripts, parsers and the network raise
        raise SoftguardError(f"{source} could not be loaded ({' '.join(str(error).split())[:200]})") from error
