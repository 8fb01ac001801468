"""Several guards as one."""

from collections.abc import Sequence

import numpy as np
import pytest

from softguard.config import SystemConfig
from softguard.errors import SoftguardError
from softguard.guards import load_guard, prompt_safety, response_safety
from softguard.guards.callable import CallableGuard
from softguard.guards.ensemble import EnsembleGuard, How
from softguard.system import SafeSystem


class Fixed(CallableGuard):
    """Says the same numbers to whoever asks, and has a threshold of its own."""

    def __init__(self, said: Sequence[float], threshold: float = 0.5) -> None:
        super().__init__(lambda prompts, responses: list(said), name=f"says{said}", fingerprint=str(said))
        self.prompt_threshold = self.response_threshold = threshold
        self.parameters = 10


PROMPTS = ["a", "b", "c"]


def test_the_most_cautious_and_the_mean() -> None:
    one, other = Fixed([0.9, 0.2, 0.5]), Fixed([0.6, 0.8, 0.7])
    assert prompt_safety(EnsembleGuard("cautious", [one, other]), PROMPTS) == pytest.approx([0.6, 0.2, 0.5])
    assert response_safety(EnsembleGuard("mean", [one, other]), PROMPTS, PROMPTS) == pytest.approx([0.75, 0.5, 0.6])


def test_each_guards_own_threshold_stands_at_one_half() -> None:
    guard = EnsembleGuard("mean", [Fixed([0.2, 0.1, 1.0], threshold=0.2), Fixed([0.5, 0.5, 0.5])])
    said = prompt_safety(guard, PROMPTS)
    assert said[0] == pytest.approx(0.5)
    odds = (0.1 / 0.9) / (0.2 / 0.8)
    assert said[1] == pytest.approx((odds / (1 + odds) + 0.5) / 2)
    assert said[2] == pytest.approx(0.75)


@pytest.mark.parametrize(("said", "threshold", "refused"), [(1 - 1e-7, 1.0, True), (1.0, 1.0, False), (0.0, 0.0, False)])
def test_a_threshold_at_an_end_refuses_what_the_guard_itself_would(said: float, threshold: float, refused: bool) -> None:
    guard = EnsembleGuard("cautious", [Fixed([said], threshold), Fixed([1.0])])
    assert (prompt_safety(guard, ["a"])[0] < 0.5) == refused


@pytest.mark.parametrize("seed", range(3))
def test_a_cautious_system_refuses_what_any_guard_would(seed: int) -> None:
    rng = np.random.default_rng(seed)
    guards = [Fixed(rng.random(50).tolist(), threshold) for threshold in (0.1, 0.5, 0.8)]
    prompts = [str(i) for i in range(50)]
    config = SystemConfig(refusal="no")
    together = SafeSystem(EnsembleGuard("cautious", guards), config).answer(prompts, prompts)
    alone = [SafeSystem(guard, config).answer(prompts, prompts) for guard in guards]
    assert together == [
        "no" if "no" in said else prompt for prompt, said in zip(prompts, zip(*alone, strict=True), strict=True)
    ]


def test_an_ensemble_changes_with_its_guards_rule_and_thresholds() -> None:
    def fingerprint(how: How, *guards: Fixed) -> str:
        return EnsembleGuard(how, guards).fingerprint

    a, b = Fixed([0.1]), Fixed([0.2])
    made = {
        fingerprint("mean", a, b),
        fingerprint("cautious", a, b),
        fingerprint("mean", a, Fixed([0.2], 0.4)),
        fingerprint("mean", a, a),
    }
    assert len(made) == 4
    assert EnsembleGuard("mean", [a, b]).parameters == 20


def test_one_failing_guard_fails_the_ensemble() -> None:
    guard = EnsembleGuard("cautious", [Fixed([0.1, 0.2, 0.3]), Fixed([0.5, float("nan"), 0.5])])
    with pytest.raises(SoftguardError, match="nothing was taken as safe"):
        prompt_safety(guard, PROMPTS)


def test_found_by_name() -> None:
    guard = load_guard("cautious(tests.guards_for_tests:by_word, bundled)")
    assert isinstance(guard, EnsembleGuard)
    assert guard.name.startswith("cautious(tests.guards_for_tests:by_word, softguard-minilm")
    with pytest.raises(SoftguardError, match="needs two guards"):
        load_guard("mean(bundled)")


def test_one_of_several_guards_may_be_several() -> None:
    name = "tests.guards_for_tests:by_word"
    guard = load_guard(f"cautious({name}, mean({name},tests.guards_for_tests:half))")
    assert prompt_safety(guard, ["a bomb", "tea"]) == pytest.approx([0.05, (0.95 + 0.5) / 2])
    with pytest.raises(SoftguardError, match=r"guard 'mean\(tests.guards_for_tests:by_word' is neither"):
        load_guard(f"cautious({name}, mean({name})")


def test_a_guard_of_prompts_alone_can_be_one_of_several() -> None:
    class PromptsAlone(Fixed):
        @property
        def response_threshold(self) -> float:
            raise SoftguardError("fitted without responses")

        @response_threshold.setter
        def response_threshold(self, value: float) -> None:
            pass

    guard = EnsembleGuard("cautious", [PromptsAlone([0.3]), Fixed([0.6])])
    assert prompt_safety(guard, ["a"]) == pytest.approx([0.3])
    assert guard.fingerprint != EnsembleGuard("cautious", [Fixed([0.3]), Fixed([0.6])]).fingerprint


def test_prompts_and_responses_are_moved_by_thresholds_of_their_own() -> None:
    one = Fixed([0.4])
    one.prompt_threshold, one.response_threshold = 0.2, 0.6
    guard = EnsembleGuard("cautious", [one, Fixed([1.0])])
    assert prompt_safety(guard, ["a"])[0] > 0.5 > response_safety(guard, ["a"], ["b"])[0]
