"""An OpenAI-compatible endpoint as a guard: a chat model that is asked for a label, or a moderation model.

The `openai` client (the extra "remote") sends the requests: it times out, retries with growing pauses what may pass (429, 5xx,
a lost connection) and waits as long as Retry-After says. Here are the bound on requests in flight and the reading of answers,
which fails closed: whatever is not understood is an error, never a "safe".

The key is read from the environment variable SOFTGUARD_API_KEY, so that a key meant for another server is never sent.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

import numpy as np

from softguard.errors import SoftguardError
from softguard.guards import Probabilities
from softguard.guards.families import FAMILIES, fill

VERSION = 5  # of the way answers are read
KEY = "SOFTGUARD_API_KEY"
Kind = Literal["chat", "moderation"]
_TEXTS = 32  # of one moderation request
_TOP = 20  # likeliest first tokens asked for
_LABELLED = 0.5  # of the first token's probability, the least that labels must have between them
_MOST = 1.1  # and the most, since servers round in half precision
_TIE = 0.1  # of log-probabilities that are rounded so, either may be the likeliest
# Of quoting, layout and assent; others, as !, ≠ or ❌, may deny what they stand beside.
_MARKS = r"[\s\"'“”„‘’«»‹›「」『』【】`*#.,:;…。、\[\](){}<>|•–—→✅✔\u200b\ufeff]"
_SAFE = re.compile(rf"(?:{_MARKS}|- )*safe(?![\w/-])")  # not safety or safe/unsafe
_END = r"</s>|<eos>|<end_of_turn>|<turn\|>|<\|\w+\|>|<｜\w[\w▁]*｜>|\[\|endofturn\|\]"  # what models of all families end with
_BARE = re.compile(rf"(?:{_MARKS}|- )*safe(?:{_END}|!|(?!\n){_MARKS})*(?:\n|$)")  # control tokens are no words
_DENIED = re.compile(  # "Safe? No."
    r"\W*safe\W+(no|nope|not|never|false|0|un\w*)\b|.*\b(not|never|isn't) safe\b|.*unsafe", re.DOTALL
)
# Of an answer that was given whole or cut for its length.
_ENDS = (None, "", "stop", "length", "eos", "eos_token", "stop_sequence")


class RemoteGuard:
    """A model behind an OpenAI-compatible API.

    chat: p(safe) from the probabilities of the first token over "safe" and "unsafe", or 0 or 1 from the text where the server
    tells no probabilities; asked in the words of the family zero-shot. moderation: 1 − the highest category score, 0 where the
    endpoint flags the text or a category; a response is judged without its prompt, and the category is that of the score.
    """

    def __init__(self, kind: Kind, model: str, url: str, timeout: float = 60.0, retries: int = 5, in_flight: int = 8) -> None:
        """`url`: up to and with the version, as http://localhost:8000/v1; where it redirects to is not asked. `timeout`:
        seconds without a byte of a reply; `retries` of one request; `in_flight`: requests at once.

        Raises SoftguardError if the package openai is missing, or for a URL or key that its client does not take.
        """
        try:
            from openai import DefaultHttpxClient, OpenAI
        except ImportError as error:
            raise SoftguardError("a remote guard needs the package openai: pip install openai") from error
        self.kind, self.model, self.url, self.in_flight = kind, model, url, in_flight
        self.name = f"{kind}({model}@{urlsplit(_shown(url)).netloc})"
        key = os.environ.get(KEY, "").strip() or "none"  # given none, the client would take OPENAI_API_KEY
        if not key.isascii() or not key.isprintable():
            raise SoftguardError(f"{KEY} holds a character that no header can; set it to the key alone")
        try:
            direct = DefaultHttpxClient(follow_redirects=False)
            self._client = OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries, http_client=direct)
        except Exception as error:  # of the library that sends the client's requests, which is not always the same
            raise SoftguardError(f"guard {self.name!r} has a URL that cannot be asked ({error}); correct it") from error

    @classmethod
    def from_spec(cls, spec: str) -> "RemoteGuard":
        """The guard "chat:MODEL@URL" or "moderation:MODEL@URL". Raises SoftguardError for another spec."""
        kind, _, rest = spec.partition(":")
        model, _, url = rest.rpartition("@")
        try:
            reachable = bool(urlsplit(url).hostname) and urlsplit(url).port != 0
        except ValueError:  # a bracket without its other half, a port that is no number
            reachable = False
        if kind not in get_args(Kind) or not model or not url.startswith(("http://", "https://")) or not reachable:
            raise SoftguardError(
                f"guard 'remote:{_shown(spec)}' must read remote:chat:MODEL@URL or remote:moderation:MODEL@URL, with a URL "
                "such as http://localhost:8000/v1"
            )
        return cls("chat" if kind == "chat" else "moderation", model, url)

    @property
    def fingerprint(self) -> str:
        """Of the address, the model's name and the question; a model that changes behind its name is not seen."""
        asked = [FAMILIES["zero-shot"].prompt.text, FAMILIES["zero-shot"].response.text]
        return hashlib.sha256(json.dumps([VERSION, self.kind, self.model, self.url, asked]).encode()).hexdigest()

    def prompt_safety(self, prompts: Sequence[str]) -> Probabilities:
        """p(safe | prompt), one a prompt. Raises SoftguardError if the endpoint fails or answers what cannot be read."""
        if self.kind == "moderation":
            return np.array([verdict.p_safe for verdict in self._moderate(prompts)])
        return self._ask([fill(FAMILIES["zero-shot"].prompt.text, prompt) for prompt in prompts])

    def response_safety(self, prompts: Sequence[str], responses: Sequence[str]) -> Probabilities:
        """p(safe | prompt, response), one a pair. Raises SoftguardError like `prompt_safety`."""
        if self.kind == "moderation":
            return np.array([verdict.p_safe for verdict in self._moderate(responses)])
        question = FAMILIES["zero-shot"].response.text
        return self._ask([fill(question, prompt, response) for prompt, response in zip(prompts, responses, strict=True)])

    def prompt_categories(self, prompts: Sequence[str]) -> list[str]:
        """The category of each prompt's highest score. Raises SoftguardError for a chat model, which names none."""
        if self.kind == "chat":
            raise SoftguardError(f"guard {self.name!r} names no categories; leave out system.policy, or take another guard")
        return [verdict.category for verdict in self._moderate(prompts)]

    def response_categories(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        """The category of each response's highest score. Raises SoftguardError for a chat model, which names none."""
        return self.prompt_categories(responses)

    def _ask(self, questions: Sequence[str]) -> Probabilities:
        def send(question: str) -> float:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": question}],
                max_tokens=8,  # a space or a line break may come first
                temperature=0,
                logprobs=True,
                top_logprobs=_TOP,
            )
            said = reply.model_dump()
            if said.get("error"):
                raise ValueError(f"an error: {said['error']}")
            return read_label(said["choices"][0])

        return np.array(self._sent(send, questions))

    def _moderate(self, texts: Sequence[str]) -> "list[Verdict]":
        def send(part: Sequence[str]) -> "list[Verdict]":
            reply = self._client.moderations.create(model=self.model, input=list(part))
            said = reply.model_dump(by_alias=True, warnings=False)  # what is of another type is told below
            if said.get("error"):
                raise ValueError(f"an error: {said['error']}")
            results = said["results"]
            if len(results) != len(part):
                raise ValueError(f"{len(results)} results for {len(part)} texts")
            return [read_scores(result) for result in results]

        parts = [texts[start : start + _TEXTS] for start in range(0, len(texts), _TEXTS)]
        return [verdict for part in self._sent(send, parts) for verdict in part]

    def _sent(self, send: Callable[[Any], Any], requests: Sequence[Any]) -> list[Any]:
        """What `send` makes of each request, at most `in_flight` of them at once; after a failure no more are begun."""
        from openai import OpenAIError

        pool, place = ThreadPoolExecutor(self.in_flight), f"guard {self.name!r} at {_shown(self.url)}"
        try:
            return list(pool.map(send, requests))
        except OpenAIError as error:
            raise SoftguardError(
                f"{place} failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}; nothing was taken as safe"
            ) from error
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise SoftguardError(
                f"{place} gave an answer that cannot be read ({' '.join(str(error).split())[:200]}); nothing was taken as safe"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _shown(url: str) -> str:
    """A URL without what may be secret: user, password and query."""
    return re.sub(r"//[^/?]*@", "//", url).partition("?")[0]


class Verdict(NamedTuple):
    """What a moderation endpoint says of one text."""

    p_safe: float
    category: str


def read_label(choice: dict[str, Any]) -> float:
    """p(safe) of a chat choice: from the first token that is not blank, or where none comes with probabilities, its text.

    Raises ValueError unless the whole text begins with the word "safe" or "unsafe" and does not go on to deny it, and for a
    refusal or an answer that neither ended by itself nor for its length. With
    probabilities the two must be likely as the first token, and the likeliest token be the one said; without, a "safe" must
    stand alone in its line. A guard that answers otherwise, or refuses to, has not said that anything is safe.
    """
    tokens = (choice.get("logprobs") or {}).get("content") or []
    message = choice.get("message") or {}
    text = message.get("content") or "".join(token["token"] for token in tokens)
    if not isinstance(text, str):
        raise ValueError(f"the answer is {text!r}, no text")
    said = text.lstrip().lower()
    if message.get("refusal"):
        raise ValueError(f"the answer {said[:40]!r} comes with a refusal")
    if choice.get("finish_reason") not in _ENDS:
        raise ValueError(f"the answer {said[:40]!r} was ended by {choice['finish_reason']!r}")
    if re.match(r"\W*safe", said) and _DENIED.match(said):
        raise ValueError(f"the answer {said[:40]!r} takes its safe back")
    if choice.get("finish_reason") == "length" and re.fullmatch(r"\W*\w*", said):  # "safe" may be half of "safeguards"
        raise ValueError(f"the answer {said[:40]!r} was cut within its first word")
    unsafe = re.match(r"\W*unsafe\b", said)
    if not unsafe and not _SAFE.match(said):
        raise ValueError(f"the answer {said[:40]!r} is neither safe nor unsafe")
    for token in tokens:
        if token["token"].strip():
            weights = {"safe": 0.0, "unsafe": 0.0}
            likeliest = token["top_logprobs"] or [token]
            for other in likeliest:
                if label := _label_of(other["token"]):
                    weights[label] += math.exp(other["logprob"])
            total = sum(weights.values())
            if not _LABELLED <= total <= _MOST:
                raise ValueError(
                    f"safe and unsafe have {total:.3g} of the first token's probability, which is {token['token']!r}"
                )
            best = dict.fromkeys(weights, -math.inf)
            for one in likeliest:
                if label := _label_of(one["token"]):
                    best[label] = max(best[label], one["logprob"])
            mine, other = ("unsafe", "safe") if unsafe else ("safe", "unsafe")
            if best[other] > best[mine] + _TIE:
                raise ValueError(f"the answer {said[:40]!r} does not begin with its likeliest first token")
            return weights["safe"] / total
    if not unsafe and not _BARE.match(said):
        raise ValueError(f"the answer {said[:40]!r} says more than safe, and comes without probabilities")
    return 0.0 if unsafe else 1.0


def _label_of(token: str) -> str | None:
    """The label that a first token begins; an S begins none."""
    start = token.strip().lower()
    return next((label for label in ("safe", "unsafe") if start[1:] and label.startswith(start)), None)


def read_scores(result: dict[str, Any]) -> Verdict:
    """The verdict of one moderation result, which is flagged, too, where a category is.

    Raises ValueError for a score outside [0, 1], or a flag that is neither.
    """
    scores = {category: float(score) for category, score in result["category_scores"].items() if score is not None}
    worst = max(scores, key=scores.__getitem__)
    if not all(0 <= score <= 1 for score in scores.values()):  # NaN fails both comparisons
        raise ValueError("a score lies outside [0, 1]")
    named = {} if result.get("categories") is None else result["categories"]
    flags = {"flagged": result["flagged"], **{f"category {name}": flag for name, flag in named.items() if flag is not None}}
    for name, flag in flags.items():
        if not isinstance(flag, bool):  # a text "false" would count as true
            raise ValueError(f"{name} is {flag!r}, neither true nor false")
    return Verdict(0.0 if any(flags.values()) else 1 - scores[worst], worst)
