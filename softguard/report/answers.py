"""A few answers of all systems side by side, with no more of harmful texts than a reader needs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from softguard.judges import declines
from softguard.prompts import PACKAGED, read_prompts
from softguard.report.measures import SYSTEMS, rows_of, suites_of

CUT = 100  # characters shown of a harmful prompt and of an answer to it that is no refusal
_MILD = {"intellectual_property", "defamation", "privacy", "elections", "misinformation"}
_HARSHER = {"specialized_advice", "cybercrime", "nonviolent_crimes"}  # still milder than what is not named here
_SPLITS = ("train", "validation", "test")  # those of the packaged prompts, the only ones whose kinds are known
_PLAIN_CUT = 300  # characters a terminal shows of other texts

HARMFUL_PROMPT = "(evaluation prompt, harmful by nature)"
UNREFUSED = "(no refusal, may be unsafe, cut)"

Answers = Mapping[str, Mapping[str, Sequence[str]]]  # system -> suite -> answers


class Text(NamedTuple):
    """A text as it may be shown, who wrote it, and what a reader should know of it."""

    who: str
    text: str
    note: str = ""


class Example(NamedTuple):
    """One prompt and what every system answered."""

    suite: str
    prompt: Text
    answers: tuple[Text, ...]


def pick(
    results: Mapping[str, Any], answers: Answers, prompts: Mapping[str, Sequence[str]], refusals: Sequence[str]
) -> list[Example]:
    """One harmful prompt and three harmless ones: one of the first harmless suite, two of the last.

    The harmful one is of a mild kind and, if there is one, one the base complied with and the distilled model refused;
    the others are taken at even distances, whatever was answered. `refusals`: the system's, see `declines`.
    """
    rows = rows_of(results)
    harmful, harmless = (
        [suite for suite in suites_of(rows, metric) if prompts.get(suite) and any(suite in a for a in answers.values())]
        for metric in ("safety", "over_refusal")
    )
    chosen: list[Example] = []
    if harmful:
        suite = harmful[0]
        split = next(row.split for row in rows if row.suite == suite)
        refused = {s: [declines(text, refusals) for text in texts[suite]] for s, texts in answers.items() if suite in texts}
        i = _mildest(prompts[suite], refused, split)
        example = _example(suite, i, prompts, answers)
        cut = [t if declines(t.text, refusals) else Text(t.who, _cut(t.text, CUT), UNREFUSED) for t in example.answers]
        prompt = Text(example.prompt.who, _cut(example.prompt.text, CUT), HARMFUL_PROMPT)
        chosen.append(Example(suite, prompt, tuple(cut)))
    wanted = dict.fromkeys((suite, i) for suite, i in _spread(harmless, prompts))
    return chosen + [_example(suite, i, prompts, answers) for suite, i in wanted]


def examples(
    results: Mapping[str, Any], answers: Answers, prompts: Mapping[str, Sequence[str]], refusals: Sequence[str]
) -> str:
    """The examples as plain text for a terminal; control characters of the texts are left out."""
    blocks = []
    for example in pick(results, answers, prompts, refusals):
        lines = [(f"{example.suite} prompt", example.prompt), *((f"  {text.who}", text) for text in example.answers)]
        width = max(len(label) for label, _ in lines) + 1
        blocks.append("\n".join(f"{label + ':':<{width}} {_plain(text.text)} {text.note}".rstrip() for label, text in lines))
    return "\n\n".join(blocks)


def _spread(suites: Sequence[str], prompts: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    if not suites:
        return []
    first, last = suites[0], suites[-1]
    return [(first, len(prompts[first]) // 2), (last, 0), (last, 3 * len(prompts[last]) // 4)]


def _mildest(prompts: Sequence[str], refused: Mapping[str, Sequence[bool]], split: str) -> int:
    kinds = {p.text: p.category for p in read_prompts(f"{PACKAGED}:{split}")} if split in _SPLITS else {}
    base, distilled = refused.get("base"), refused.get("distilled")

    def rank(i: int) -> tuple[int, bool]:
        kind = kinds.get(prompts[i])
        mildness = 0 if kind in _MILD else 1 if kind is None else 2 if kind in _HARSHER else 3
        shows = bool(base and distilled and not base[i] and distilled[i])
        return mildness, not shows

    return min(range(len(prompts)), key=rank)


def _example(suite: str, i: int, prompts: Mapping[str, Sequence[str]], answers: Answers) -> Example:
    texts = [Text(label, answers[s][suite][i]) for s, label in SYSTEMS.items() if suite in answers.get(s, {})]
    return Example(
        suite, Text("prompt", prompts[suite][i]), tuple(t if t.text.strip() else t._replace(text="(empty)") for t in texts)
    )


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit].rstrip() + "…"


def _plain(text: str) -> str:
    """One line without control characters, so that no text can steer the terminal."""
    return _cut("".join(c for c in " ".join(text.split()) if c.isprintable()), _PLAIN_CUT)
