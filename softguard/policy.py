"""What the system says instead of an answer its guard rejects, by the category the guard names (A.3's actions a_c)."""

import hashlib
import json
import re
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from unicodedata import normalize

from softguard.config import Action, SystemConfig
from softguard.errors import SoftguardError
from softguard.named import imported, source_of
from softguard.text import is_whole

REDACTED = "[redacted]"
_REDACTION = "3"  # raised when other text is left out, or another is delivered
# Each pattern reads a text in linear time: a match begins only where its kind of characters does, or has a greatest length.
_MAIL = re.compile(r"(?<![\w.+-])[\w.+-]++@(?:[\w-]++\.)+[^\W\d_]{2}[\w-]*")  # p@ssw0rd has no domain
_IPV6 = re.compile(
    r"(?<!\w)(?<!::)(?!\d{1,4}::\d{0,4}(?![\da-f:]))"  # no slice [2000::2]
    r"(?:[\da-f]{0,4}:){2,8}(?:[\da-f]{1,4}|(?<=::))(?:(?:\.\d{1,3}){3})?(?!\w|::)",
    re.IGNORECASE,
)
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)")
_NETWORKS = [ip_network(name) for name in ("0.0.0.0/0", "2000::/3", "fc00::/7", "fe80::/10")]  # of hosts: face::3d is code

_BETWEEN = r"[ \u00a0\u2007\u2009\u202f()/.·\u2010-\u2015\u2212-]"  # digits of one number: blanks, brackets, dots and dashes
_NUMBER = re.compile(
    r"(?P<amount>(?<![\d,])\d{1,3}(?:,\d{3})+(?!\d))"  # read first, so that 150,000 (2019) holds no number 000 (2019
    rf"|\+?\(?(?<!\d)\d(?:{_BETWEEN}{{0,3}}\d){{6,}}"  # telephone, card and account numbers: seven digits or more
)
_YEAR = r"(?:1\d\d\d|20\d\d|2100)"
_YEARS = re.compile(
    rf"\(?(?:\d{_BETWEEN}{{1,3}})?"  # World War 2 (1939–1945); two digits may be an area's code
    rf"({_YEAR})(?!{_BETWEEN}{{1,3}}\1)"  # a card 1234 1234 1234 1234 is no list of years
    rf"(?:(?:{_BETWEEN}{{1,3}}{_YEAR})+|[/\u2010-\u2015-]\d\d)"
    rf"(?: {_BETWEEN}{{0,2}}\d\d?)?"  # 1939–1945 (6 years)
)


class Policy:
    """A recipe's actions, ready to be taken. A category it does not know gets the default refusal."""

    def __init__(self, config: SystemConfig) -> None:
        """Raises SoftguardError if a function it names cannot be imported."""
        self._actions = dict(config.policy)
        self._refusal = config.refusal
        self._functions: dict[str, Callable[[str, str], object]] = {}
        for category, action in self._actions.items():
            if action.function is not None:
                found = imported(action.function, f"system.policy.{category}.function")
                if not callable(found):
                    raise SoftguardError(
                        f"system.policy.{category}.function {action.function!r} is a {type(found).__name__}, not a function "
                        "f(prompt, response)"
                    )
                self._functions[category] = found

    @property
    def fingerprint(self) -> str:
        """Of the sources of its functions, and of how it redacts; what functions call or load is not seen."""
        sources = {category: source_of(function) for category, function in self._functions.items()}
        sources |= {category: _REDACTION for category in self._actions if self.redacts(category)}
        return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()

    def __bool__(self) -> bool:
        return bool(self._actions)

    @property
    def refusals(self) -> tuple[str, ...]:
        """The default refusal and those of categories, each once."""
        own = [action.refusal for action in self._actions.values() if action.refusal is not None]
        return tuple(dict.fromkeys([self._refusal, *own]))

    def keeps(self, category: str) -> bool:
        """Whether an answer stands although the guard rejects it."""
        return self._action(category).action == "keep"

    def redacts(self, category: str) -> bool:
        """Whether personal data is left out of an answer that the guard rejects."""
        return self._action(category).action == "redact"

    def instead(self, category: str, prompt: str, response: str) -> str:
        """What is said instead of `response`.

        A redacted answer that reads as before was rejected for something else, so it is refused. Raises SoftguardError if a
        function fails or gives anything but whole text.
        """
        action = self._action(category)
        if self.redacts(category):
            text = redacted(response)
            return self._refusal if text == response else text
        if action.action != "call":
            return self._refusal if action.refusal is None else action.refusal
        try:
            said: object = self._functions[category](prompt, response)
        except (Exception, SystemExit) as error:
            raise SoftguardError(
                f"system.policy.{category}.function {action.function!r} failed with {type(error).__name__}: {error}"
            ) from error
        if not isinstance(said, str) or not said.strip():
            raise SoftguardError(f"system.policy.{category}.function {action.function!r} gave {said!r}; it must give some text")
        if not is_whole(said):
            raise SoftguardError(
                f"system.policy.{category}.function {action.function!r} gave {said!r}; it holds half a character (a lone "
                "surrogate), mend the text"
            )
        return said

    def _action(self, category: str) -> Action:
        return self._actions.get(category, Action())


def redacted(text: str) -> str:
    """`text` without addresses of mail and machines, and without numbers of seven digits or more; amounts and years stay."""
    composed = normalize("NFC", text)  # in which an accent is part of its letter
    found = _redacted(composed)
    return text if found == composed else found


def _redacted(text: str) -> str:
    text = _MAIL.sub(REDACTED, text)
    for pattern in (_IPV6, _IPV4):
        text = pattern.sub(lambda found: REDACTED if _is_host(found[0]) else found[0], text)
    return _NUMBER.sub(lambda found: found[0] if found["amount"] or _YEARS.fullmatch(found[0]) else REDACTED, text)


def _is_host(address: str) -> bool:
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    return any(ip in network for network in _NETWORKS)
