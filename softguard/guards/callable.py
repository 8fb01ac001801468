"""Any Python function as a guard."""

import hashlib
from collections.abc import Callable, Sequence

from softguard.guards import Probabilities
from softguard.named import source_of

Scorer = Callable[[Sequence[str], Sequence[str] | None], Sequence[float] | Probabilities]


class CallableGuard:
    """A guard whose p(safe) comes from `function(prompts, responses)`; for the prompt question responses is None."""

    def __init__(self, function: Scorer, name: str | None = None, fingerprint: str | None = None) -> None:
        self._function = function
        self._name = name or f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"
        self._fingerprint = fingerprint

    @property
    def name(self) -> str:
        """The given name, else module:function."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """The given one, else sha256 of the function's name and source.

        What the function calls or loads is not seen: give a fingerprint if that may change.
        """
        if self._fingerprint is not None:
            return self._fingerprint
        return hashlib.sha256(f"{self._name}\n{source_of(self._function)}".encode()).hexdigest()

    def prompt_safety(self, prompts: Sequence[str]) -> Sequence[float] | Probabilities:
        """p(safe | prompt), one a prompt."""
        return self._function(prompts, None)

    def response_safety(self, prompts: Sequence[str], responses: Sequence[str]) -> Sequence[float] | Probabilities:
        """p(safe | prompt, response), one a pair."""
        return self._function(prompts, responses)
