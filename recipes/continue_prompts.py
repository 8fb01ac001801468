"""More prompts of the kinds there are: the beginnings of given ones, ended otherwise by a language model.

    python recipes/continue_prompts.py runs/prompts.jsonl --data ../shared/data --out runs/continued.jsonl

A student learns from its teacher, which answers for any text, so prompts need no labels and nobody has to write them. Every
prompt of the file that is short enough is cut `--times` times after a share of its words, and the bundled demo model writes on
in the user's turn of its template until it ends that turn. What it does not end in time, ends over several lines, or has been
written before is dropped, and so is what nearly is an evaluation prompt or one of the packaged validation or test splits.
The new prompts and the file's stand in `--out` together, in an order of chance. Half an hour on two cores, an hour without
bfloat16 products; what is written lies in `<out>.parts` until all is, so that a killed run goes on.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from build_guard import Sources, digest, far_from

from softguard.config import fingerprint
from softguard.engine import Engine
from softguard.files import read_json, write_json, write_text
from softguard.models import load_base
from softguard.prompts import read_prompts

LONGEST = 200  # characters of a prompt to continue: longer ones are in wrappers, or instructions with a text to read
SHARE = (0.2, 0.8)  # of its words that are kept, drawn evenly
NEW_TOKENS = 32
TEMPERATURE = 0.8
BATCH = 128  # rows decoded together, of AT_ONCE that are sorted by length
AT_ONCE = 2048


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompts", type=Path, help="JSON lines with a field prompt")
    parser.add_argument("--data", type=Path, required=True, help="folder of the public JSONL files, for its evaluation prompts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--times", type=int, default=4, help="how often each prompt is continued")
    options = parser.parse_args()
    given = [prompt.text for prompt in read_prompts(str(options.prompts))]
    short = [text for text in given if len(text) <= LONGEST]
    beginnings = [start for text in short for start in _beginnings(text, options.times)]
    parts = options.out.with_name(options.out.name + ".parts")
    written = list(dict.fromkeys(_continued(beginnings, parts)))
    sources = Sources(options.data)
    kept_out = [row["prompt"] for name in ("eval_harmbench", "eval_xstest") for row in sources.read(name)]
    kept_out += [row["prompt"] for row in sources.packaged() if row["split"] != "train"]
    known = set(given)
    new = [text for text, far in zip(written, far_from(kept_out, written), strict=True) if far and text not in known]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in sorted([*given, *new], key=digest)]
    write_text(options.out, "".join(line + "\n" for line in lines))
    shutil.rmtree(parts)
    print(f"{options.out}: {len(given)} prompts and {len(new)} new ones")


def _beginnings(text: str, times: int) -> Iterator[str]:
    words = text.split()
    for number in range(times):
        share = np.random.default_rng(digest(f"{number} {text}")).uniform(*SHARE)
        yield " ".join(words[: max(2, round(share * len(words)))])


def _continued(beginnings: Sequence[str], parts: Path) -> Iterator[str]:
    """Every beginning with its end, where the model comes to one; a file of `parts` for each `AT_ONCE` of them."""
    base = load_base("smollm2", "auto")
    engine = Engine(base)
    engine.chat.closing = ()  # so that the model goes on in the user's turn
    done = 0
    for start in range(0, len(beginnings), AT_ONCE):
        some = beginnings[start : start + AT_ONCE]
        part = parts / f"{fingerprint(some, NEW_TOKENS, BATCH, TEMPERATURE, base.fingerprint, base.precision)}.json"
        if not part.is_file():
            write_json(part, {"prompts": _ended(engine, some)})
        yield from read_json(part, "part")["prompts"]
        done += len(some)
        print(f"\r{done}/{len(beginnings)}", end="", flush=True)
    print()


def _ended(engine: Engine, beginnings: Sequence[str]) -> list[str]:
    found = []
    for text, made in zip(beginnings, engine.generate(beginnings, NEW_TOKENS, BATCH, TEMPERATURE), strict=True):
        ended = bool(made.ids) and made.ids[-1] in engine.chat.stop_ids
        if ended and made.text.strip() and "\n" not in made.text:
            found.append(text + made.text.rstrip())
    return found


if __name__ == "__main__":
    main()
