"""The prompts the method is studied and the released adapters are trained on, many more than the package carries.

    python recipes/build_prompts.py --data ../shared/data --out runs/prompts.jsonl

They are the ones the bundled guard was fitted on (`build_guard.py`: the packaged train split, public requests and
instructions, its bank of strong words in harmless and harmful acts), at most 400 characters long: none is nearly one of the
evaluation prompts. Labels stand in the file to be counted; `teach` reads none, the guard says what it makes of each prompt.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from build_guard import Sources, guard_rows

from softguard.files import write_text

LONGEST = 400  # characters; longer ones are Dolly's with a text to read, and a step would be made of them


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public JSONL files")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows, _ = guard_rows(Sources(options.data), {})
    labels = {row.prompt: "harmful" if row.harmful else "benign" for row in rows if row.harmful is not None}
    kept = {prompt: label for prompt, label in labels.items() if len(prompt) <= LONGEST}
    lines = [json.dumps({"prompt": prompt, "label": label}, ensure_ascii=False) for prompt, label in kept.items()]
    write_text(options.out, "".join(line + "\n" for line in lines))
    print(f"{options.out}: {len(kept)} prompts, {dict(Counter(kept.values()))}, {len(labels) - len(kept)} longer ones left out")


if __name__ == "__main__":
    main()
