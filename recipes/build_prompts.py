"""The prompts the released adapters and the method's study are trained on, more kinds than the package carries.

    python recipes/build_prompts.py --data ../shared/data --out runs/prompts.jsonl

What the bundled guard was fitted on (`build_guard.py`), none nearly an evaluation prompt: the packaged train split and the
recipe's bank of strong words in harmless and harmful acts, `--public` of the public requests and instructions, at most 400
characters long, and `--wrapped` of the packaged ones in wrappers. The first two whole, because in them every harmful prompt
has harmless neighbours; the public ones alone teach topics. Labels stand in the file to be counted; `teach` reads none, the
guard says what it makes of each prompt. Their order is one of chance, so that the first n are a sample.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from build_guard import Sources, digest, guard_rows, wrapped

from softguard.files import write_text
from softguard.prompts import read_prompts

LONGEST = 400  # characters; longer ones are instructions with a text to read, and a step would be made of them


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public JSONL files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--public", type=int, default=2000, help="public prompts among them")
    parser.add_argument("--wrapped", type=int, default=1600, help="wrapped prompts among them")
    options = parser.parse_args()
    packaged = [(prompt.text, prompt.label) for prompt in read_prompts("packaged:train")]
    sources = Sources(options.data)
    rows, _ = guard_rows(sources, {})
    labels = {row.prompt: "harmful" if row.harmful else "benign" for row in rows if row.harmful is not None}
    train = [row for row in sources.packaged() if row["split"] == "train"]
    around = {row.prompt for row in wrapped(train, 1.0)}
    found = {row["prompt"] for name in tuple(sources.used) if not name.startswith("prompts/") for row in sources.read(name)}
    others = sorted(set(labels) - {text for text, _ in packaged}, key=digest)
    public = [text for text in others if text in found and len(text) <= LONGEST]
    bank = [text for text in others if text not in found | around]
    chosen = [*bank, *public[: options.public], *[text for text in others if text in around][: options.wrapped]]
    pairs = sorted([*packaged, *((text, labels[text]) for text in chosen)], key=lambda pair: digest(pair[0]))
    lines = [json.dumps({"prompt": prompt, "label": label}, ensure_ascii=False) for prompt, label in pairs]
    write_text(options.out, "".join(line + "\n" for line in lines))
    print(f"{options.out}: {len(pairs)} prompts, {len(bank)} of the bank, {dict(Counter(label for _, label in pairs))}")


if __name__ == "__main__":
    main()
