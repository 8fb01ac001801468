"""Several guards as one: the most cautious of them, or their mean."""

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from softguard.errors import SoftguardError
from softguard.guards import Guard, Probabilities, own_threshold, prompt_safety, response_safety

How = Literal["cautious", "mean"]


class EnsembleGuard:
    """p(safe) is the least, or the mean, of what the guards say.

    Guards draw their lines in different places, so each p(safe) is first moved to where that guard's own threshold t (one
    half where it has none) stands at one half, by scaling its odds: p(1 − t) / (p(1 − t) + (1 − p)t). With the threshold one
    half, "cautious" then refuses what any of them would refuse. If one guard fails, the ensemble does.
    """

    prompt_threshold = response_threshold = 0.5

    def __init__(self, how: How, guards: Sequence[Guard]) -> None:
        """Raises SoftguardError for fewer than two guards."""
        if len(guards) < 2:
            raise SoftguardError(f"guard {how}(…) needs two guards or more, separated by commas")
        self.how, self.guards = how, tuple(guards)

    @property
    def name(self) -> str:
        """The rule and its guards."""
        return f"{self.how}({', '.join(guard.name for guard in self.guards)})"

    @property
    def fingerprint(self) -> str:
        """Of the rule, and of all guards with their thresholds."""
        parts = [f"{g.fingerprint} {_seal(g, 'prompt')} {_seal(g, 'response')}" for g in self.guards]
        return hashlib.sha256("\n".join([self.how, *parts]).encode()).hexdigest()

    @property
    def parameters(self) -> int:
        """Of all guards together."""
        return sum(int(getattr(guard, "parameters", 0)) for guard in self.guards)

    def prompt_safety(self, prompts: Sequence[str]) -> Probabilities:
        """p(safe | prompt), one a prompt."""
        return self._together("prompt", [prompt_safety(guard, prompts) for guard in self.guards])

    def response_safety(self, prompts: Sequence[str], responses: Sequence[str]) -> Probabilities:
        """p(safe | prompt, response), one a pair."""
        return self._together("response", [response_safety(guard, prompts, responses) for guard in self.guards])

    def _together(self, question: Literal["prompt", "response"], said: Sequence[Probabilities]) -> Probabilities:
        moved = [_moved(p, own_threshold(guard, question)) for p, guard in zip(said, self.guards, strict=True)]
        rule = np.min if self.how == "cautious" else np.mean
        return np.asarray(rule(np.stack(moved), axis=0), dtype=np.float64)


def parse_ensemble(spec: str) -> tuple[How, list[str]] | None:
    """The rule and the guards' specs of "cautious(A, B)" or "mean(A, B)", or none for another spec."""
    how, bracket, rest = spec.partition("(")
    if not bracket or how not in get_args(How) or not rest.endswith(")"):
        return None
    rule: How = "cautious" if how == "cautious" else "mean"
    return rule, [part.strip() for part in _parts(rest[:-1]) if part.strip()]


def _parts(text: str) -> list[str]:
    """`text` cut at its commas, but not within brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _seal(guard: Guard, question: Literal["prompt", "response"]) -> str:
    try:
        return str(own_threshold(guard, question))
    except SoftguardError:  # fitted for the other question alone
        return "none"


def _moved(p: Probabilities, threshold: float) -> Probabilities:
    t = min(max(threshold, 1e-6), 1 - 1e-6)
    moved = p * (1 - t) / (p * (1 - t) + (1 - p) * t)
    return np.where(p < threshold, np.minimum(moved, np.nextafter(0.5, 0)), np.maximum(moved, 0.5))  # at the ends, too
