"""Guards: what a guard is, how its answers are checked, and how one is found by name.

A guard says how probable it is that something is *safe*, and may name the category of what is not. Whatever it returns passes
through `prompt_safety`, `response_safety` or `categories` below, which fail closed: an exception, a NaN, a masked value, one
outside [0, 1] or that is no number, or a wrong count is an error, never a "safe".
"""

import builtins
import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Set
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from softguard.errors import SoftguardError
from softguard.named import imported, is_named
from softguard.text import is_whole

Probabilities = np.ndarray[tuple[int], np.dtype[np.float64]]


class Guard(Protocol):
    """A model that tells safe prompts and responses from unsafe ones, in batches.

    It may have `prompt_categories(prompts)` and `response_categories(prompts, responses)` too, see `categories`, and
    `prompt_threshold` and `response_threshold`, see `own_threshold`.
    """

    @property
    def name(self) -> str:
        """Short name for tables and files."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the guard's answers could change; a corpus records it."""

    def prompt_safety(self, prompts: Sequence[str]) -> Sequence[float] | Probabilities:
        """p(safe | prompt), one a prompt."""

    def response_safety(self, prompts: Sequence[str], responses: Sequence[str]) -> Sequence[float] | Probabilities:
        """p(safe | prompt, response), one a pair."""


def load_guard(spec: str) -> Guard:
    """Find a guard by `spec`: "bundled", a folder with a card.json, "generative:FAMILY:MODEL", "remote:chat:MODEL@URL" or
    "remote:moderation:MODEL@URL", "package.module:name", or "cautious(A, B)" or "mean(A, B)" of such guards.

    A name stands for a guard, or for a function that is called as f(prompts, responses or None) and gives p(safe), see
    `CallableGuard`; of several guards, see `EnsembleGuard`. Raises SoftguardError if there is no such guard.
    """
    from softguard.guards.ensemble import EnsembleGuard, parse_ensemble

    ensemble = parse_ensemble(spec)
    if ensemble is not None:
        how, parts = ensemble
        return EnsembleGuard(how, [load_guard(part) for part in parts])
    if spec == "bundled" or Path(spec, "card.json").is_file():
        from softguard.guards.encoder import BUNDLED, EncoderGuard

        return EncoderGuard.load(BUNDLED if spec == "bundled" else spec)
    if spec.startswith("generative:"):
        from softguard.guards.generative import GenerativeGuard

        return GenerativeGuard.load(spec.removeprefix("generative:"))
    if spec.startswith("remote:"):
        from softguard.guards.remote import RemoteGuard

        return RemoteGuard.from_spec(spec.removeprefix("remote:"))
    if not is_named(spec):
        raise SoftguardError(
            f"guard {spec!r} is neither 'bundled', nor a folder with a card.json, nor 'generative:FAMILY:MODEL', nor "
            "'remote:chat:MODEL@URL', nor 'package.module:function', nor 'cautious(A, B)' or 'mean(A, B)' of guards"
        )
    from softguard.guards.callable import CallableGuard

    found: Any = imported(spec, "guard")
    if hasattr(found, "prompt_safety") and hasattr(found, "response_safety") and not isinstance(found, type):
        for field in ("name", "fingerprint"):
            if not isinstance(getattr(found, field, None), str):
                raise SoftguardError(f"guard {spec!r} has no text as its {field}; give it one, as an attribute or a property")
        return found  # type: ignore[no-any-return]
    if not builtins.callable(found):  # the bare name is the submodule softguard.guards.callable
        raise SoftguardError(f"guard {spec!r} is a {type(found).__name__}, not a function f(prompts, responses or None)")
    return CallableGuard(found, name=spec)


def prompt_safety(guard: Guard, prompts: Sequence[str]) -> Probabilities:
    """Ask `guard` for p(safe | prompt) of every prompt and check the answer.

    Returns (prompts,) float64 in [0, 1]. Raises SoftguardError if the guard fails in any way.
    """
    return _checked(guard.name, len(prompts), lambda: guard.prompt_safety(prompts))


def response_safety(guard: Guard, prompts: Sequence[str], responses: Sequence[str]) -> Probabilities:
    """Ask `guard` for p(safe | prompt, response) of every pair and check the answer.

    Returns (pairs,) float64 in [0, 1]. Raises SoftguardError if the guard fails in any way.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    return _checked(guard.name, len(prompts), lambda: guard.response_safety(prompts, responses))


def own_threshold(guard: Guard, question: Literal["prompt", "response"]) -> float:
    """p(safe) from which on the guard itself calls a prompt or a response safe; one half if it names none.

    Raises SoftguardError if naming it fails, or what it names is no number in [0, 1].
    """
    name = f"{question}_threshold"
    try:
        own = getattr(guard, name)
    except (Exception, SystemExit) as error:
        if not isinstance(error, AttributeError) or inspect.getattr_static(guard, name, None) is not None:
            raise SoftguardError(f"guard {guard.name!r} failed to name its {name} ({type(error).__name__}: {error})") from error
        return 0.5
    try:
        line = float(own)
    except (TypeError, ValueError, OverflowError):
        line = math.nan
    if not 0 <= line <= 1:
        raise SoftguardError(
            f"guard {guard.name!r} has {own!r} as its {question}_threshold; it must be a number in [0, 1], or left out"
        )
    return line


def categories(
    guard: Guard, mode: Literal["prompt", "response"], prompts: Sequence[str], responses: Sequence[str]
) -> list[str]:
    """Ask `guard` for the category of every prompt, or of every pair, by its optional method, and check the answer.

    Returns (pairs,) names; an empty one is no category, such as of a text that is safe. Raises SoftguardError if the guard has
    no such method or it fails.
    """
    ask = getattr(guard, f"{mode}_categories", None)
    if ask is None:
        raise SoftguardError(
            f"guard {guard.name!r} names no categories of a {mode}, which system.policy needs; take a guard with a method "
            f"{mode}_categories, or leave out system.policy"
        )
    if not prompts:
        return []
    try:
        given = ask(prompts) if mode == "prompt" else ask(prompts, responses)
        if isinstance(given, str | Set | Mapping):  # whose parts stand in no order, or are letters
            raise TypeError(f"a {type(given).__name__} says nothing of which text is which; give a list")
        named = list(given)
    except SoftguardError:
        raise
    except (Exception, SystemExit) as error:
        raise SoftguardError(f"guard {guard.name!r} failed to name categories with {type(error).__name__}: {error}") from error
    if len(named) != len(prompts) or not all(isinstance(name, str) and is_whole(name) for name in named):
        raise SoftguardError(
            f"guard {guard.name!r} must name one category a text, as text; it gave {named[:3]} … for {len(prompts)}"
        )
    return [str(name) for name in named]


def _checked(name: str, count: int, ask: Callable[[], Sequence[float] | Probabilities]) -> Probabilities:
    if count == 0:
        return np.empty(0)
    try:
        given = ask()
        values = np.asarray(given)
        what = str(values.dtype)
        if values.dtype == object:  # Decimal and Fraction are numbers; astype would take None as NaN and text as a number
            what = next((type(value).__name__ for value in values.flat if not isinstance(value, Decimal | Real)), "")
            values = values if what else values.astype(np.float64)
    except SoftguardError:
        raise
    except (Exception, SystemExit) as error:
        raise SoftguardError(
            f"guard {name!r} failed with {type(error).__name__}: {error}; nothing was taken as safe"
        ) from error
    if values.dtype.kind not in "buif":  # text and dates could be read as numbers
        raise SoftguardError(f"guard {name!r} gave {what} where each text needs a number in [0, 1]; nothing was taken as safe")
    values = np.where(np.ma.getmask(given), np.nan, values.astype(np.float64))
    if values.shape != (count,):
        raise SoftguardError(f"guard {name!r} gave shape {values.shape} for {count} texts; it must give one number each")
    bad = np.flatnonzero(~((values >= 0) & (values <= 1)))  # NaN fails both comparisons
    if len(bad):
        raise SoftguardError(
            f"guard {name!r} gave {values[bad[0]]} for text {bad[0]}; p(safe) lies in [0, 1], nothing was taken as safe"
        )
    return values
