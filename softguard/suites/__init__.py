"""Suites: what is asked in an evaluation, and which measure its answers are for.

`load_suites` finds them by name: "harmful", "contrast", "everyday" and "drift" are made of the package's own prompts;
"file:PATH" and "hub:DATASET[@CONFIG][:SPLIT]" are the user's, with a label a row; "wrapped:TEMPLATES:REQUESTS" are jailbreaks
by preface; "choices:PATH" are questions with answers to choose from.
"""

from collections.abc import Sequence

from softguard.errors import SoftguardError
from softguard.suites import choices, labelled, packaged, wrapped
from softguard.suites.suite import Suite

__all__ = ["Suite", "load_suites"]


def load_suites(names: Sequence[str], split: str, limit: int = 0) -> list[Suite]:
    """The suites called `names`, each of at most `limit` prompts (0: all), spread evenly over the source.

    Raises SoftguardError for an unknown name or an unusable source.
    """
    suites: list[Suite] = []
    for name in names:
        if name in packaged.SUITES:
            suites.append(packaged.load(name, split, limit))
        elif name.startswith(("file:", "hub:")):
            suites += labelled.load(name, limit)
        elif name.startswith("wrapped:"):
            suites.append(wrapped.load(name, limit))
        elif name.startswith("choices:"):
            suites.append(choices.load(name, limit))
        else:
            raise SoftguardError(
                f"suite {name!r} is unknown; use {', '.join(packaged.SUITES)}, file:PATH, hub:DATASET, "
                "wrapped:TEMPLATES:REQUESTS or choices:PATH"
            )
    names_seen: set[str] = set()
    for suite in suites:
        if suite.name in names_seen:
            raise SoftguardError(
                f"two suites are called {suite.name}; rename one of the files, so that their figures stay apart"
            )
        names_seen.add(suite.name)
    return suites
