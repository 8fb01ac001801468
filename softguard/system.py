"""The safe LLM system: a base model, a guard and a policy. It answers prompts, and it is the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from softguard.config import SystemConfig
from softguard.guards import Guard, Probabilities, categories, load_guard, own_threshold, prompt_safety, response_safety
from softguard.policy import Policy


class Judgement(NamedTuple):
    """What the system makes of some answers of the base."""

    p_safe: Probabilities  # (pairs,) what the guard says
    keep: Probabilities  # (pairs,) α, the probability that the answer stands
    categories: list[str]  # empty where the guard was not asked
    instead: list[str]  # what is said otherwise


@dataclass(frozen=True)
class SafeSystem:
    """The law P(r|x) of a base model whose answers a guard may replace by a refusal (eq. 1–2).

    Response guard: P(r|x) = p(r|x)·α(x,r) + 1[r = y_r]·U(x). Prompt guard: P(r|x) = α(x)·p(r|x) + (1 − α(x))·1[r = y_r].
    α is the guard's p(safe) itself ("probabilistic") or 1[p(safe) ≥ threshold] ("threshold"). With a policy the guard names the
    category c of what it rejects, and a_c(y) stands where y_r does (A.3); a category that is kept has α = 1.
    """

    guard: Guard
    config: SystemConfig

    @classmethod
    def from_config(cls, config: SystemConfig, guard: Guard | None = None) -> "SafeSystem":
        """The system a recipe describes; `guard` replaces the one it names.

        Raises SoftguardError if there is no such guard, its threshold is no number in [0, 1], or for a policy whose functions
        cannot be imported or whose guard names no categories.
        """
        system = cls(guard or load_guard(config.guard), config)
        system.keep(np.empty(0))  # asks for the threshold
        if system.policy:
            categories(system.guard, config.mode, ["Hello"], ["Hello"])  # some guards tell that they name none when asked
        return system

    @cached_property
    def policy(self) -> Policy:
        """What is said instead of rejected answers. Raises SoftguardError if a function it names cannot be imported."""
        return Policy(self.config)

    @property
    def threshold(self) -> float:
        """p(safe) below which a hard system refuses: the recipe's, else the guard's own, else one half."""
        given = self.config.threshold
        return own_threshold(self.guard, self.config.mode) if given is None else float(given)

    def p_safe(self, prompts: Sequence[str], responses: Sequence[str]) -> Probabilities:
        """What the guard says of each pair, (pairs,); in prompt mode it does not look at the response."""
        if self.config.mode == "prompt":
            return prompt_safety(self.guard, prompts)
        return response_safety(self.guard, prompts, responses)

    def keep(self, p_safe: Probabilities) -> Probabilities:
        """α, the probability that the system keeps an answer, from the guard's p(safe)."""
        if self.config.decision == "threshold":
            return (p_safe >= self.threshold).astype(np.float64)
        return p_safe

    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> Judgement:
        """What the system makes of each pair. Raises SoftguardError if the guard, or a function of the policy, fails."""
        p_safe = self.p_safe(prompts, responses)
        keep = self.keep(p_safe)
        named, instead = [""] * len(prompts), [self.config.refusal] * len(prompts)
        if self.policy:
            keep = keep.copy()
            rejected = np.flatnonzero(keep < 1).tolist()
            found = categories(self.guard, self.config.mode, [prompts[i] for i in rejected], [responses[i] for i in rejected])
            for i, category in zip(rejected, found, strict=True):
                named[i] = category
                if self.policy.keeps(category):
                    keep[i] = 1
                else:
                    instead[i] = self.policy.instead(category, prompts[i], responses[i])
            self._refuse_again([i for i in rejected if self.policy.redacts(named[i])], prompts, instead)
        return Judgement(p_safe, keep, named, instead)

    def _refuse_again(self, rows: Sequence[int], prompts: Sequence[str], instead: list[str]) -> None:
        """Put the refusal where a redacted answer is below the threshold still: what was left out was not all.

        In prompt mode the guard reads no answers, so none is asked for again.
        """
        changed = [i for i in rows if instead[i] != self.config.refusal]
        if changed and self.config.mode == "response":
            p_safe = self.p_safe([prompts[i] for i in changed], [instead[i] for i in changed])
            for i in np.array(changed)[p_safe < self.threshold]:
                instead[i] = self.config.refusal

    def answer(self, prompts: Sequence[str], base_responses: Sequence[str], seed: int = 0) -> list[str]:
        """What the system answers where the base would answer `base_responses`.

        A probabilistic system keeps an answer with probability α, drawn from `seed`. Raises SoftguardError, and answers
        nothing, if the guard fails.
        """
        judged = self.judge(prompts, base_responses)
        kept = np.random.default_rng(seed).random(len(prompts)) < judged.keep
        return [text if keep else said for text, keep, said in zip(base_responses, kept, judged.instead, strict=True)]
