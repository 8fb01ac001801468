"""The prompts the released adapters and the method's study are trained on, more kinds than the package carries.

    python recipes/build_prompts.py --data ../shared/data --out runs/prompts.jsonl --validation runs/validation.jsonl

What the bundled guard was fitted on (`build_guard.py`), none nearly an evaluation prompt: the packaged train split and the
recipe's bank of strong words in harmless and harmful acts, `--public` of the public requests and instructions, at most 400
characters long, and `--wrapped` of the packaged ones in wrappers. The first two whole, because in them every harmful prompt
has harmless neighbours; the public ones alone teach topics. Beside them `--nested` packaged ones in wrappers within wrappers,
which become as long as those people use, while none of ours does alone. Labels stand in the file to be counted; `teach` reads
none, the guard says what it makes of each prompt. Their order is one of chance, so that the first n are a sample.

For validation the packaged validation split, a fifth of it once more in wrappers and a tenth in nested ones, none of which
stands around a training prompt.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from build_guard import Json, Row, Sources, digest, guard_rows, some, wrapped, wrappers

from softguard.files import write_text
from softguard.prompts import read_prompts

LONGEST = 400  # characters; longer ones are instructions with a text to read, and a step would be made of them
NESTED = (1000, 4000)  # characters a nested prompt has at least, drawn evenly


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public JSONL files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True, help="where the validation prompts go")
    parser.add_argument("--public", type=int, default=2000, help="public prompts among them")
    parser.add_argument("--wrapped", type=int, default=1600, help="wrapped prompts among them")
    parser.add_argument("--nested", type=int, default=400, help="prompts in wrappers within wrappers among them")
    options = parser.parse_args()
    packaged = [(prompt.text, prompt.label) for prompt in read_prompts("packaged:train")]
    sources = Sources(options.data)
    rows, _ = guard_rows(sources, {})
    labels = {row.prompt: "harmful" if row.harmful else "benign" for row in rows if row.harmful is not None}
    train = [row for row in sources.packaged() if row["split"] == "train"]
    around = {row.prompt for row in wrapped(train, 1.0)}
    deep = sorted(train, key=lambda row: digest("nested: " + row["prompt"]))[: options.nested]
    found = {row["prompt"] for name in tuple(sources.used) if not name.startswith("prompts/") for row in sources.read(name)}
    others = sorted(set(labels) - {text for text, _ in packaged}, key=digest)
    public = [text for text in others if text in found and len(text) <= LONGEST]
    bank = [text for text in others if text not in found | around]
    chosen = [*bank, *public[: options.public], *[text for text in others if text in around][: options.wrapped]]
    _write(options.out, [*packaged, *((text, labels[text]) for text in chosen), *map(_pair, nested(deep))])
    kept = [row for row in sources.packaged() if row["split"] == "validation"]
    held_out = [*wrapped(kept, 0.2, held_out=True), *nested(some(kept, 0.1), held_out=True)]
    _write(options.validation, [*((row["prompt"], row["label"]) for row in kept), *map(_pair, held_out)])


def nested(rows: Sequence[Json], held_out: bool = False) -> list[Row]:
    """Labelled prompts, each in wrappers within wrappers up to a length drawn from `NESTED`; `held_out` as of `wrappers`."""
    texts = wrappers(held_out)
    low, high = NESTED
    found = []
    for row in rows:
        text = row["prompt"]
        wanted = low + digest("length: " + text) % (high - low)
        while len(text) < wanted:
            text = texts[digest("around: " + text) % len(texts)].replace("{prompt}", text)
        found.append(Row(text, row["label"] == "harmful"))
    return found


def _pair(row: Row) -> tuple[str, str]:
    return row.prompt, "harmful" if row.harmful else "benign"


def _write(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    lines = [
        json.dumps({"prompt": text, "label": label}, ensure_ascii=False)
        for text, label in sorted(pairs, key=lambda pair: digest(pair[0]))
    ]
    write_text(path, "".join(line + "\n" for line in lines))
    print(f"{path}: {len(pairs)} prompts, {dict(Counter(label for _, label in pairs))}")


if __name__ == "__main__":
    main()
