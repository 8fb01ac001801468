import time

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
        ("1999-2000-1234-5678, 1234 1234 1234 1234", f"{REDACTED}, {REDACTED}"),
        ("ping 2001:db8::1, [fe80::1ff:fe23]:80 or 2001:DB8:1::.", f"ping {REDACTED}, [{REDACTED}]:80 or {REDACTED}."),
        ("ping 2001:0db8:85a3:0:0:8a2e:0370:7334", f"ping {REDACTED}"),
        ("ping fe80::1ff:fe23:4567:890a, fe80::1: or IPv6:fd00::1", f"ping {REDACTED}, {REDACTED}: or IPv6:{REDACTED}"),
        ("ping 2001:db8::1:up, [2001:db8::1]:80", f"ping {REDACTED}:up, [{REDACTED}]:80"),
        ("ping ::ffff:192.0.2.1, 2001:db8::192.0.2.1, 192.168.0.1:80", f"ping ::ffff:{REDACTED}, {REDACTED}, {REDACTED}:80"),
        ("write to a@b@mail.co.uk, ann@bücher.xn--p1ai.", f"write to a@{REDACTED}, {REDACTED}."),
        ("call +44 20 7946 0958, (555) 123-4567 or 555-123-4567", f"call {REDACTED}, {REDACTED} or {REDACTED}"),
        ("call 555‐123‐4567, 555‒123‒4567, 555―123―4567", f"call {REDACTED}, {REDACTED}, {REDACTED}"),
        ("call 555-1234,601 234 567,5551234567", f"call {REDACTED},{REDACTED},{REDACTED}"),
        ("call 55 1234 1567, (02) 2012 2013 or +1939 1945", f"call {REDACTED}, {REDACTED} or {REDACTED}"),
        ("write to jos\u0065\u0301@example.com or jane@bu\u0308cher.de", f"write to {REDACTED} or {REDACTED}"),
        ("call 07700\u2212900123", f"call {REDACTED}"),
        ("born 1985-03-12, SSN 123-45-6789", f"born {REDACTED}, SSN {REDACTED}"),
        ("DE89 3704 0044 0532 0130 00", f"DE{REDACTED}"),
    ],
)
def test_addresses_and_long_numbers_are_redacted(text: str, left: str) -> None:
    assert redacted(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "3, 4, 5, 6, 7, 8, 9 or 3,4,5,6,7,8,9",
        "at 10:30 or 10:30:45, 12.5 km",
        "10:30 – 11:45, 3.50 - 4.50, 12–13",
        "from 1914–1918 to (1939 - 1945). In 2019. 2020 was",
        "years 1990,1991,1992 or 1990, 1991, 1992",
        "x[1::2], std::cout, Face::bad, 1:2::3, @ann",
        "in 2024, 150,000 people paid 3.50",
        "a @ b, page 12-13",
        "me@localhost, a@b, x@y.z, p@ssw0rd",
        "abc::1, a[100::200], a[2000::2], a[::1], face::3d::Point, dead::beef, fe80::1::Point, 1:2:3:4:5:6:7:8",
        "version 1.2.3.4.5, v1.2.3.4, 999.1.1.1",
        "8,336,817, 1,234,567,890, $1,234,567.50",
        "8,336,817 (2019), 150,000 (2019)",
        "1939-1945, 2012–2013, 1066–1087, 1990-1995-2000, 1850–2100, 2019/2018",
        "2012 2013, 2012 2013 2014",
        "World War 2 (1939–1945), World War 1 (1914–18), 1. 1939–1945, (2) 1939-1945",
        "1939–1945 (6 years), 2012–2013 12 points",
        "e\u0301te\u0301, not composed",
        "10\t20\t30\t40",
    ],
)
def test_what_is_no_address_and_no_long_number_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    "part",
    ["a.b.", "a-", "+1", "1", "1-", "1----", "1.1.", "-", "+", "@", "a@b.", ":", "1:", "2001:db8::", "[", "1)(", " ", "2012 "],
)
def test_a_long_text_is_redacted_in_linear_time(part: str) -> None:
    """What takes quadratic time takes a minute and more."""
    begun = time.perf_counter()
    redacted(part * (200_000 // len(part)) + "x@")
    assert time.perf_counter() - begun < 2


def test_what_is_redacted_is_part_of_a_policy_s_identity() -> None:
    made = [Policy(SystemConfig(policy={"a": Action(kind)})).fingerprint for kind in ("keep", "redact")]
    assert made[0] != made[1]
