"""The prompts the released adapters and the method's study are trained on, more kinds than the package carries.

    python recipes/build_prompts.py --data ../shared/data --out runs/prompts.jsonl

What the bundled guard was fitted on (`build_guard.py`), at most 400 characters long, none nearly an evaluation prompt: the
packaged train split twice, the recipe's bank of strong words in harmless and harmful acts once, and `--public` of the public
requests and instructions. Twice and once whole, because in these two every harmful prompt has harmless neighbours; the public
ones alone teach topics. Labels stand in the file to be counted; `teach` reads none, the guard says what it makes of each
prompt.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from build_guard import Sources, digest, guard_rows

from softguard.files import write_text
from softguard.prompts import read_prompts

LONGEST = 400  # characters; longer ones are instructions with a text to read, and a step would be made of them


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public JSONL files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--public", type=int, default=2000, help="public prompts among them")
    options = parser.parse_args()
    packaged = [(prompt.text, prompt.label) for prompt in read_prompts("packaged:train")]
    sources = Sources(options.data)
    rows, _ = guard_rows(sources, {})
    labels = {row.prompt: "harmful" if row.harmful else "benign" for row in rows if row.harmful is not None}
    own = {text for text, _ in packaged}
    others = [(text, label) for text, label in labels.items() if text not in own and len(text) <= LONGEST]
    found = {row["prompt"] for name in tuple(sources.used) if not name.startswith("prompts/") for row in sources.read(name)}
    public = sorted((pair for pair in others if pair[0] in found), key=lambda pair: digest(pair[0]))
    bank = [pair for pair in others if pair[0] not in found]
    chosen = [*packaged, *packaged, *bank, *public[: options.public]]
    lines = [json.dumps({"prompt": prompt, "label": label}, ensure_ascii=False) for prompt, label in chosen]
    write_text(options.out, "".join(line + "\n" for line in lines))
    print(f"{options.out}: {len(chosen)} prompts, {len(bank)} of the bank, {dict(Counter(label for _, label in chosen))}")


if __name__ == "__main__":
    main()
