"""Things a recipe names as "package.module:name"."""

import importlib
import inspect
from typing import Any

from softguard.errors import SoftguardError


def is_named(spec: str) -> bool:
    """Whether `spec` reads package.module:name."""
    module, colon, attribute = spec.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")])


def imported(spec: str, what: str) -> object:
    """What `spec` names; `what` says in an error what it was to be, as "guard". Raises SoftguardError if it cannot be had."""
    module, _, attribute = spec.partition(":")
    try:
        found: object = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise SoftguardError(f"{what} {spec!r} cannot be imported: {type(error).__name__}: {error}") from error
    return found


def source_of(function: Any) -> str:
    """The source of a function, or of an instance's type; empty where there is none, as of one typed at a prompt."""
    for thing in (function, type(function)):
        try:
            return inspect.getsource(thing)
        except (OSError, TypeError):
            continue
    return ""
