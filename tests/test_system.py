from collections.abc import Sequence

import numpy as np
import pytest

from softguard.config import Action, SystemConfig
from softguard.errors import SoftguardError
from softguard.guards.callable import CallableGuard
from softguard.system import SafeSystem
from tests import guards_for_tests
from tests.guards_for_tests import ByCategory

PROMPTS, ANSWERS = ["how do I build a bomb", "how do I build a boat"], ["first …", "take wood"]


def system(guard: str = "by_word", **options: object) -> SafeSystem:
    return SafeSystem.from_config(SystemConfig(guard=f"tests.guards_for_tests:{guard}", **options))  # type: ignore[arg-type]


def test_a_hard_system_refuses_what_lies_below_the_threshold() -> None:
    hard = system()
    assert hard.answer(PROMPTS, ANSWERS) == [hard.config.refusal, "take wood"]
    assert system(threshold=0.01).answer(PROMPTS, ANSWERS) == ANSWERS
    assert system(threshold=0.99).answer(PROMPTS, ANSWERS) == [hard.config.refusal] * 2


def test_a_probabilistic_system_keeps_answers_as_often_as_the_guard_says() -> None:
    kept = system("half", decision="probabilistic").answer(["x"] * 4000, ["y"] * 4000, seed=1)
    assert abs(kept.count("y") / 4000 - 0.5) < 0.03


def test_the_law_is_hard_or_the_guards_own_probability() -> None:
    p_safe = np.array([0.05, 0.95])
    assert system().keep(p_safe).tolist() == [0, 1]
    assert system(decision="probabilistic").keep(p_safe).tolist() == [0.05, 0.95]


def test_the_mode_decides_what_the_guard_reads() -> None:
    class Reader:
        name = fingerprint = "reader"

        def prompt_safety(self, prompts: object) -> list[float]:
            return [0.25]

        def response_safety(self, prompts: object, responses: object) -> list[float]:
            return [0.75]

    def read_by(mode: str) -> float:
        return float(SafeSystem(Reader(), SystemConfig(mode=mode)).p_safe(["x"], ["y"])[0])  # type: ignore[arg-type]

    assert (read_by("prompt"), read_by("response")) == (0.25, 0.75)


def test_the_guards_own_threshold_serves_where_the_recipe_names_none() -> None:
    class Own:
        name = fingerprint = "own"
        prompt_threshold, response_threshold = 0.3, 0.7

        def prompt_safety(self, prompts: object) -> list[float]:
            return [0.5]

        def response_safety(self, prompts: object, responses: object) -> list[float]:
            return [0.5]

    assert SafeSystem(Own(), SystemConfig(mode="prompt")).threshold == 0.3
    assert SafeSystem(Own(), SystemConfig(mode="response")).threshold == 0.7
    assert SafeSystem(Own(), SystemConfig(threshold=0.9)).threshold == 0.9


@pytest.mark.parametrize("guard", ["not_a_number", "throws"])
@pytest.mark.parametrize("mode", ["prompt", "response"])
def test_a_failing_guard_answers_nothing(guard: str, mode: str) -> None:
    with pytest.raises(SoftguardError, match="nothing was taken as safe"):
        system(guard, mode=mode).answer(PROMPTS, ANSWERS)


def test_the_guards_for_tests_are_the_ones_named() -> None:
    assert guards_for_tests.by_word(["a bomb", "a boat"], None) == [0.05, 0.95]


POLICY = {
    "medicine": Action(refusal="Ask a doctor."),
    "advertising": Action("keep"),
    "privacy": Action("redact"),
}
ASKED = ["a boat", "a bomb", "a pill", "a@b.org", "a spam", "an odd thing"]


def by_category(**options: object) -> SafeSystem:
    config = SystemConfig(guard="tests.guards_for_tests:by_category", refusal="No.", policy=POLICY, **options)  # type: ignore[arg-type]
    return SafeSystem.from_config(config)


@pytest.mark.parametrize("mode", ["prompt", "response"])
def test_the_policy_says_what_each_category_gets(mode: str) -> None:
    judged = by_category(mode=mode).judge(ASKED, ASKED)
    assert judged.categories == ["", "weapons", "medicine", "privacy", "advertising", "other"]
    assert judged.keep.tolist() == [1, 0, 0, 0, 1, 0]
    said = ["a boat", "No.", "Ask a doctor.", "[redacted]", "a spam", "No."]
    assert by_category(mode=mode).answer(ASKED, ASKED) == said


@pytest.mark.parametrize("decision", ["threshold", "probabilistic"])
def test_a_redacted_answer_that_is_rejected_again_is_refused(decision: str) -> None:
    answers = ["a@b.org", "a@b.org @home"]  # the second's other address is not known as one
    assert by_category(mode="response", decision=decision).judge(["hi", "hi"], answers).instead == ["[redacted]", "No."]
    asked_of_prompts = by_category(mode="prompt", decision=decision).judge(["x@y"], answers[1:])
    assert asked_of_prompts.instead == ["[redacted] @home"]


def test_a_probabilistic_system_says_each_as_often_as_its_law() -> None:
    """P(r|x) = α·p(r|x) + (1 − α)·1[r = a_c(y)]."""
    said = by_category(decision="probabilistic").answer(["a pill", "a spam"] * 2000, ["yes"] * 4000, seed=1)
    doctor = said[::2].count("Ask a doctor.") / 2000
    assert abs(doctor - 0.95) < 0.02
    assert set(said[::2]) == {"yes", "Ask a doctor."}
    assert set(said[1::2]) == {"yes"}


def test_without_a_policy_nobody_is_asked_for_categories() -> None:
    judged = system().judge(PROMPTS, ANSWERS)
    assert (judged.categories, judged.keep.tolist()) == (["", ""], [0, 1])
    assert judged.instead == [system().config.refusal] * 2


def test_a_policy_needs_a_guard_that_names_categories() -> None:
    with pytest.raises(SoftguardError, match=r"names no categories of a prompt, which system\.policy needs"):
        system(policy=POLICY)

    class Silent(guards_for_tests.ByCategory):
        def prompt_categories(self, prompts: object) -> list[str]:
            raise SoftguardError("guard 'silent' names no categories")

    with pytest.raises(SoftguardError, match="'silent' names no categories"):
        SafeSystem.from_config(SystemConfig(policy=POLICY), Silent())


@pytest.mark.parametrize("named", [["weapons"], ["weapons", None], None, ["a", "b", "c"]])
def test_a_guard_that_names_categories_badly_answers_nothing(named: object) -> None:
    class Bad(guards_for_tests.ByCategory):
        def prompt_categories(self, prompts: object) -> list[str]:
            return named  # type: ignore[return-value]

    with pytest.raises(SoftguardError, match="'by category' "):
        SafeSystem(Bad(), SystemConfig(policy=POLICY)).answer(["bomb", "pill"], ["y", "y"])


def test_a_function_that_cannot_be_imported_is_told_at_once() -> None:
    with pytest.raises(SoftguardError, match=r"system.policy.odd.function 'nowhere:f' cannot be imported"):
        system(policy={"odd": Action("call", function="nowhere:f")})


def test_what_stands_at_the_threshold_is_kept() -> None:
    half = SafeSystem(CallableGuard(lambda prompts, responses: [0.5] * len(prompts)), SystemConfig(threshold=0.5))
    assert half.keep(np.array([0.5])).tolist() == [1]


def test_a_category_s_own_words_are_ready_wherever_a_refusal_may_be_drawn() -> None:
    class Unsure(ByCategory):
        def prompt_safety(self, prompts: Sequence[str]) -> list[float]:
            return [0.7] * len(prompts)

    config = SystemConfig(refusal="No.", decision="probabilistic", policy={"medicine": Action(refusal="Ask a doctor.")})
    judged = SafeSystem.from_config(config, Unsure()).judge(["a pill"], ["yes"])
    assert judged.instead == ["Ask a doctor."]
