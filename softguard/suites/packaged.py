"""Suites of the package's own prompts."""

from softguard.prompts import packaged_suite, thin
from softguard.suites.suite import Measure, Suite

SUITES: dict[str, Measure] = {
    "harmful": "safety",
    "contrast": "over_refusal",
    "everyday": "over_refusal",
    "drift": "drift",  # over contrast and everyday prompts alike
}


def load(name: str, split: str, limit: int) -> Suite:
    """One packaged suite."""
    sources = ("contrast", "everyday") if name == "drift" else (name,)
    prompts = [prompt.text for source in sources for prompt in packaged_suite(source, split)]
    return Suite(name, split, SUITES[name], tuple(thin(prompts, limit)))
