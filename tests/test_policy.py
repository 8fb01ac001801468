import pytest

from softguard.config import Action, SystemConfig
from softguard.errors import SoftguardError
from softguard.policy import REDACTED, Policy, redacted


def longer(prompt: str, response: str) -> str:
    return f"{prompt}? {response}!"


def nothing(prompt: str, response: str) -> str:
    return " "


def fails(prompt: str, response: str) -> str:
    raise KeyError(response)


POLICY = Policy(
    SystemConfig(
        refusal="No.",
        policy={
            "medicine": Action(refusal="Ask a doctor."),
            "weapons": Action("refuse"),
            "advertising": Action("keep"),
            "privacy": Action("redact"),
            "odd": Action("call", function="tests.test_policy:longer"),
            "void": Action("call", function="tests.test_policy:nothing"),
            "broken": Action("call", function="tests.test_policy:fails"),
        },
    )
)


@pytest.mark.parametrize(
    ("category", "response", "said"),
    [
        ("medicine", "take it", "Ask a doctor."),
        ("weapons", "take it", "No."),
        ("unheard of", "take it", "No."),
        ("", "take it", "No."),
        ("privacy", "write to a@b.org", f"write to {REDACTED}"),
        ("privacy", "he lives there", "No."),
        ("odd", "yes", "why? yes!"),
    ],
)
def test_the_category_decides_what_is_said(category: str, response: str, said: str) -> None:
    assert POLICY.instead(category, "why", response) == said


def test_one_category_is_kept_and_refusals_are_counted_once() -> None:
    assert [c for c in ("medicine", "advertising", "unheard of") if POLICY.keeps(c)] == ["advertising"]
    assert POLICY.refusals == ("No.", "Ask a doctor.")
    assert bool(POLICY)
    assert not Policy(SystemConfig())


def test_the_fingerprint_tells_functions_apart() -> None:
    def fingerprint(name: str) -> str:
        return Policy(SystemConfig(policy={"odd": Action("call", function=f"tests.test_policy:{name}")})).fingerprint

    assert fingerprint("longer") == fingerprint("longer")
    assert len({fingerprint("longer"), fingerprint("nothing"), POLICY.fingerprint, Policy(SystemConfig()).fingerprint}) == 4


@pytest.mark.parametrize(
    ("category", "said"), [("void", "gave ' '; it must give some text"), ("broken", "failed with KeyError: 'yes'")]
)
def test_a_function_that_fails_is_told_with_its_key(category: str, said: str) -> None:
    with pytest.raises(SoftguardError, match=rf"^system.policy.{category}.function .* {said}"):
        POLICY.instead(category, "why", "yes")


@pytest.mark.parametrize(("name", "said"), [("nowhere:f", "cannot be imported"), ("math:pi", "is a float, not a function")])
def test_a_function_that_cannot_be_had_is_told_at_once(name: str, said: str) -> None:
    with pytest.raises(SoftguardError, match=rf"^system.policy.odd.function '{name}' {said}"):
        Policy(SystemConfig(policy={"odd": Action("call", function=name)}))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("ann.lee+x@mail.example.org writes", f"{REDACTED} writes"),
        ("call +49 (30) 901820-0 now", f"call {REDACTED} now"),
        ("card 4111-1111-1111-1111.", f"card {REDACTED}."),
        ("host 192.168.0.1 is up", f"host {REDACTED} is up"),
        ("in 2024, 150,000 people paid 3.50", "in 2024, 150,000 people paid 3.50"),
        ("a @ b, page 12-13", "a @ b, page 12-13"),
    ],
)
def test_addresses_and_long_numbers_are_redacted(text: str, left: str) -> None:
    assert redacted(text) == left
