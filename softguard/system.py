"""The safe LLM system: a base model, a guard and a refusal. It answers prompts, and it is the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from softguard.config import SystemConfig
from softguard.guards import Guard, Probabilities, load_guard, prompt_safety, response_safety


@dataclass(frozen=True)
class SafeSystem:
    """The law P(r|x) of a base model whose answers a guard may replace by a refusal (eq. 1–2).

    Response guard: P(r|x) = p(r|x)·α(x,r) + 1[r = y_r]·U(x). Prompt guard: P(r|x) = α(x)·p(r|x) + (1 − α(x))·1[r = y_r].
    α is the guard's p(safe) itself ("probabilistic") or 1[p(safe) ≥ threshold] ("threshold").
    """

    guard: Guard
    config: SystemConfig

    @classmethod
    def from_config(cls, config: SystemConfig, guard: Guard | None = None) -> "SafeSystem":
        """The system a recipe describes; `guard` replaces the one it names."""
        return cls(guard or load_guard(config.guard), config)

    @property
    def threshold(self) -> float:
        """p(safe) below which a hard system refuses: the recipe's, else the guard's own, else one half."""
        own = getattr(self.guard, f"{self.config.mode}_threshold", 0.5)
        return float(own if self.config.threshold is None else self.config.threshold)

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

    def answer(self, prompts: Sequence[str], base_responses: Sequence[str], seed: int = 0) -> list[str]:
        """What the system answers where the base would answer `base_responses`.

        A probabilistic system keeps an answer with probability α, drawn from `seed`. Raises SoftguardError, and answers
        nothing, if the guard fails.
        """
        kept = np.random.default_rng(seed).random(len(prompts)) < self.keep(self.p_safe(prompts, base_responses))
        return [text if keep else self.config.refusal for text, keep in zip(base_responses, kept, strict=True)]
