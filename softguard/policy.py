"""What the system says instead of an answer its guard rejects, by the category the guard names (A.3's actions a_c)."""

import hashlib
import json
import re
from collections.abc import Callable

from softguard.config import Action, SystemConfig
from softguard.errors import SoftguardError
from softguard.named import imported, source_of
from softguard.text import is_whole

REDACTED = "[redacted]"
_BETWEEN = r"[ \u00a0\u2007\u2009\u202f()/.·\u2010-\u2015-]"  # digits of one number: blanks, brackets, dots and dashes
_YEAR = r"(?:1[5-9]|20)\d\d"
_YEARS = rf"{_YEAR}{_BETWEEN}{{1,3}}{_YEAR}(?!{_BETWEEN}{{0,3}}\d)"
_PERSONAL = re.compile(
    r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*"  # addresses of mail
    r"|\b\d{1,3}(?:\.\d{1,3}){3}\b"  # and of machines
    r"|\b(?:[\da-f]{1,4}:){7}[\da-f]{1,4}\b"
    r"|\b(?=[\da-f:]{0,40}\d)[\da-f]{3,4}(?::[\da-f]{1,4}){0,6}::(?:[\da-f]{1,4}:){0,5}(?:[\da-f]{1,4}\b)?"  # no x[1::2]
    rf"|\+?\(?(?<!\d)(?!{_YEARS})\d(?:{_BETWEEN}{{0,3}}\d){{6,}}"  # telephone, card and account numbers: seven digits or more
    r"|\b\d{1,3}(?:,\d{3,}){2,}\b",
    re.IGNORECASE,
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
        """Of the sources of its functions; what they call or load is not seen."""
        sources = {category: source_of(function) for category, function in self._functions.items()}
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

    def instead(self, category: str, prompt: str, response: str) -> str:
        """What is said instead of `response`.

        A redacted answer that reads as before was rejected for something else, so it is refused. Raises SoftguardError if a
        function fails or gives anything but whole text.
        """
        action = self._action(category)
        if action.action == "redact":
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
    """`text` without addresses of mail and machines, and without numbers of seven digits or more; a span of years stays."""
    return _PERSONAL.sub(REDACTED, text)
