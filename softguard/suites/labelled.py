"""Suites of the user's own prompts: harmful rows measure safety, benign rows over-refusal."""

from pathlib import Path

from softguard.errors import SoftguardError
from softguard.prompts import read_prompts, thin
from softguard.suites.suite import Measure, Suite


def load(name: str, limit: int) -> list[Suite]:
    """One suite a label found in "file:PATH" or "hub:DATASET[:SPLIT]"."""
    source = name.removeprefix("file:")
    prompts = list(read_prompts(source))
    if any(not prompt.label for prompt in prompts):
        raise SoftguardError(f"suite {name}: every row needs a label, harmful or benign, so that its answer can be graded")
    stem = Path(source).stem if name.startswith("file:") else source
    measures: dict[str, Measure] = {"harmful": "safety", "benign": "over_refusal"}
    suites = []
    for label, measure in measures.items():
        chosen = [prompt.text for prompt in prompts if prompt.label == label]
        if chosen:
            suites.append(Suite(f"{stem}-{label}", "all", measure, tuple(thin(chosen, limit))))
    return suites
