"""Suites of the user's own prompts: harmful rows measure safety, benign rows over-refusal."""

from pathlib import Path

from softguard.errors import SoftguardError
from softguard.prompts import read_rows, thin
from softguard.suites.suite import Measure, Suite


def load(name: str, limit: int) -> list[Suite]:
    """One suite a label found in "file:PATH" or "hub:DATASET[@CONFIG][:SPLIT]"."""
    source = name.removeprefix("file:")
    rows = list(read_rows(source))
    if bare := [where for where, row in rows if not row.get("label")]:
        raise SoftguardError(f"{bare[0]}: the row has no label; it needs harmful or benign, so that its answer can be graded")
    stem = Path(source).stem if name.startswith("file:") else source
    measures: dict[str, Measure] = {"harmful": "safety", "benign": "over_refusal"}
    suites = []
    for label, measure in measures.items():
        chosen = [row["prompt"] for _, row in rows if row["label"] == label]
        if chosen:
            suites.append(Suite(f"{stem}-{label}", "all", measure, tuple(thin(chosen, limit))))
    return suites
