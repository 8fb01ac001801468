"""Jailbreaks by preface: harmful requests behind templates such as "Do Anything Now"."""

from pathlib import Path

from softguard.errors import SoftguardError
from softguard.prompts import read_prompts, thin
from softguard.suites.suite import Suite

_PLACES = ("INSERT PROMPT HERE", "{prompt}")  # where a template says its request goes; otherwise behind it


def load(name: str, limit: int) -> Suite:
    """The suite of "wrapped:TEMPLATES:REQUESTS", two sources of prompts; request i stands in template i modulo their number.

    Rows of REQUESTS labelled benign are left out. Raises SoftguardError if a source is missing from the name, or unusable.
    """
    templates, colon, requests = name.removeprefix("wrapped:").partition(":")
    if not templates or not colon or not requests:
        raise SoftguardError(f"suite {name!r} is incomplete; write wrapped:TEMPLATES:REQUESTS, two files of prompts")
    texts = [prompt.text for prompt in read_prompts(requests) if prompt.label != "benign"]
    if not texts:
        raise SoftguardError(f"suite {name!r}: every row of {requests} is labelled benign; give requests to wrap")
    wrappers = [prompt.text.replace("{generator.name}", "the assistant") for prompt in read_prompts(templates)]
    chosen = thin(texts, limit)
    prompts = [_wrap(wrappers[i % len(wrappers)], request) for i, request in enumerate(chosen)]
    return Suite(f"{Path(templates).stem}-{Path(requests).stem}", "all", "safety", tuple(prompts))


def _wrap(template: str, request: str) -> str:
    for place in _PLACES:
        if place in template:
            return template.replace(place, request)
    return f"{template.rstrip()}\n\n{request}"
