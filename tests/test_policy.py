import pytest

from softguard.config import Action, SystemConfig
from softguard.errors import SoftguardError
from softguard.policy import REDACTED, Policy, redacted


def longer(prompt: str, response: str) -> str:
    return f"{prompt}? {response}!"


def nothing(prompt: str, response: str) -> str:
    return " "


def half(prompt: str, response: str) -> str:
    return response + "\ud83d"


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
            "half": Action("call", function="tests.test_policy:half"),
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
    ("category", "said"),
    [
        ("void", "gave ' '; it must give some text"),
        ("half", r"gave 'yes\\ud83d'; it holds half a character \(a lone surrogate\), mend the text$"),
        ("broken", "failed with KeyError: 'yes'"),
    ],
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
        ("call 555\u2011123\u20114567 now", f"call {REDACTED} now"),
        ("call 555–123—4567 or 555·123·4567", f"call {REDACTED} or {REDACTED}"),
        ("call 555 - 123 - 4567 or 555 ‑ 123 ‑ 4567", f"call {REDACTED} or {REDACTED}"),
        ("call 555\u00a0123\u00a04567 or +49\u202f30\u202f901820", f"call {REDACTED} or {REDACTED}"),
        ("1999-2000-1234-5678, 1,234,567,890 and 1,234,567", f"{REDACTED}, {REDACTED} and {REDACTED}"),
        ("ping 2001:db8::1, [fe80::1ff:fe23]:80 or 2001:DB8:1::.", f"ping {REDACTED}, [{REDACTED}]:80 or {REDACTED}."),
        ("ping 2001:0db8:85a3:0:0:8a2e:0370:7334", f"ping {REDACTED}"),
        ("write to me@localhost.", f"write to {REDACTED}."),
        ("3, 4, 5, 6, 7, 8, 9 or 3,4,5,6,7,8,9", "3, 4, 5, 6, 7, 8, 9 or 3,4,5,6,7,8,9"),
        ("at 10:30 or 10:30:45, 12.5 km", "at 10:30 or 10:30:45, 12.5 km"),
        ("10:30 – 11:45, 3.50 - 4.50, 12–13", "10:30 – 11:45, 3.50 - 4.50, 12–13"),
        ("from 1914–1918 to (1939 - 1945). In 2019. 2020 was", "from 1914–1918 to (1939 - 1945). In 2019. 2020 was"),
        ("years 1990,1991,1992 or 1990, 1991, 1992", "years 1990,1991,1992 or 1990, 1991, 1992"),
        ("x[1::2], std::cout, Face::bad, 1:2::3, @ann", "x[1::2], std::cout, Face::bad, 1:2::3, @ann"),
        ("in 2024, 150,000 people paid 3.50", "in 2024, 150,000 people paid 3.50"),
        ("a @ b, page 12-13", "a @ b, page 12-13"),
    ],
)
def test_addresses_and_long_numbers_are_redacted(text: str, left: str) -> None:
    assert redacted(text) == left
