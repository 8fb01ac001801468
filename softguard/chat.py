"""The chat format: how a prompt becomes tokens, and the one place that decides where the soft prompt stands.

Every row the model sees reads

    [constant prefix: template text and soft prompt] [user text] [template text] [response]

The constant prefix is the same for all rows, so it is run once and shared (`packed.py`, `decoding.py`). User text is encoded
apart from the template, so that a user who spells control tokens (`<|im_end|>`) gets plain characters.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from softguard.config import fingerprint
from softguard.errors import SoftguardError

_TODAY = date(2024, 7, 26)  # that of every day: what is distilled behind one text must stand behind it tomorrow
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
Slot = Literal["start", "system"]


class Turn(NamedTuple):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Prefix:
    """Token ids before and after the place of the soft prompt, up to the first user text."""

    before: tuple[int, ...]
    after: tuple[int, ...]


class PlainText:
    """Encodes text of users and models so that no control token can come out of it.

    `control` matches the control tokens, longest first; none for a tokenizer without any.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        """`template`: text whose added tokens count as control tokens even where the tokenizer does not mark them special."""
        self._tokenizer = tokenizer
        # Special tokens, and of those not marked so what the template itself uses (Qwen's <tool_call>) or reads <|…|> (its
        # <|fim_prefix|>).
        control = {
            str(token)
            for token in tokenizer.added_tokens_decoder.values()
            if len(str(token).strip()) > 1  # blank lines are text, though Gemma has tokens of them
            and (token.special or str(token) in template or re.fullmatch(r"<\|.*\|>", str(token)))
        }
        longest_first = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
        self.control = re.compile(longest_first) if control else None
        self._spelt = re.compile(f"(?={longest_first})") if control else None  # one that begins within another, too
        self._control_ids = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if str(token) in control)
        self._is_joint = self._ids_of("\nx") == self._ids_of("\n") + self._ids_of("x")

    def encode(self, text: str, after: str = "") -> list[int]:
        """Ids of `text` as it stands behind the template's text `after`.

        A control token spelt in it is cut after its first character and the parts are encoded apart.
        """
        cuts = [0, *(m.start() + 1 for m in self._spelt.finditer(text)), len(text)] if self._spelt else [0, len(text)]
        return [i for start, end in pairwise(cuts) for i in self._part(text[start:end], "\n" if start else after)]

    def behind(self, text: str, after: str) -> list[int]:
        """Ids of `text`, control tokens and all, as it stands behind other text.

        Byte-level tokenizers have the same ids wherever a piece stands, but SentencePiece's put a blank before what they take
        for the beginning (Llama 2, Mistral 7B).
        """
        if self._is_joint or not after:
            return self._ids_of(text)
        for place in (after, "\n"):  # which no piece spans
            before, whole = self._ids_of(place), self._ids_of(place + text)
            if whole[: len(before)] == before:
                return whole[len(before) :]
        return self._ids_of(text)

    def _part(self, text: str, after: str) -> list[int]:
        ids = self.behind(text, after)
        if self._control_ids.isdisjoint(ids):
            return ids
        # A tokenizer that changes text before it looks for control tokens finds them in other letters: one at a time it cannot.
        return [i for letter in text for i in self.behind(letter, "\n") if i not in self._control_ids]

    def _ids_of(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


class Chat:
    """A tokenizer's chat template, taken apart into constant and variable pieces."""

    def __init__(self, tokenizer: Any, slot: Slot = "start", extra_stops: Sequence[int] = ()) -> None:
        """`slot`: "start" puts the soft prompt before everything (the place PEFT uses), "system" inside the system message.

        `extra_stops` are further end-of-turn ids, from the model's generation settings.
        Raises SoftguardError if the tokenizer has no chat template or the template has no system message to enter.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise SoftguardError("the model's tokenizer has no chat template; use an instruction-tuned model")
        if slot not in ("start", "system"):
            raise SoftguardError(f"slot is {slot!r}; it must be start or system")
        self.tokenizer = tokenizer
        self.slot: Slot = slot
        self._template = undated(tokenizer)
        self._plain = PlainText(tokenizer, self._template)

        user = {"role": "user", "content": "u"}
        self._stripped = {"user": self._strips([], "user", []), "assistant": self._strips([user], "assistant", [user])}
        opening, closing = self._fixed([Turn("user", "")], answer=False)
        system_header = self._around_system()[0] if slot == "system" else ""
        if not opening.startswith(system_header):
            raise SoftguardError("the chat template has no fixed system message; use slot: start")
        # A blank before a text is encoded with it, as tokenizers have it.
        self._opening, self._blank = _without_blank(opening)
        rest = self._plain.behind(self._opening[len(system_header) :], system_header)
        self.prefix = Prefix(tuple(self._plain.behind(system_header, "")), tuple(rest))
        self._closing = closing
        self.closing = self._template_ids(closing)  # between the user's text and the response
        *_, between, after = self._fixed([Turn("user", ""), Turn("assistant", "")], answer=True)
        # Llama 2's has a blank before an answer that does not stand where the answer is asked for.
        self._answer_blank = between[len(closing) :] if between.rstrip(" ") == closing else ""
        after_answer = self._template_ids(after)
        # Identity of the template's own text; the same in every slot.
        self.fingerprint = fingerprint(opening, closing, after)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
        ends = [*[i for i in after_answer if i in special][:1], tokenizer.eos_token_id, *extra_stops]
        self._ends: list[int] = [i for i in ends if i is not None]
        self.stop_ids: frozenset[int] = frozenset(self._ends)

    @property
    def end_id(self) -> int:
        """What ends a turn. Raises SoftguardError if nothing does."""
        if not self._ends:
            raise SoftguardError("the model's tokenizer has no token that ends a turn; use an instruction-tuned model")
        return self._ends[0]

    def encode(self, prompt: str) -> list[int]:
        """Ids that follow the constant prefix for a single-turn prompt, up to where the response begins."""
        return [*self.plain_ids(prompt), *self.closing]

    def encode_turns(self, turns: Sequence[Turn]) -> list[int]:
        """Ids that follow the constant prefix for a conversation ending in a user turn.

        Raises SoftguardError unless its turns are a user's and the model's, one after the other.
        """
        roles = [turn.role for turn in turns]
        if roles != ["assistant" if number % 2 else "user" for number in range(len(turns))] or len(turns) % 2 == 0:
            raise SoftguardError(
                f"the conversation's turns are {', '.join(roles) or 'none'}; they must go user, assistant, …, user"
            )
        *openings, closing = self._fixed(turns, answer=False)
        ids: list[int] = []
        for number, (turn, opening) in enumerate(zip(turns, openings, strict=True)):
            fixed, blank = _without_blank(opening)
            ids += [
                *(self._template_ids(fixed) if number else ()),
                *self._plain.encode(blank + self._said(turn.role, turn.text), fixed),
            ]
        return [*ids, *self._template_ids(closing)]

    def encode_response(self, response: str) -> list[int]:
        """Ids of a complete response: its text and the end-of-turn token (without it refusals run on)."""
        return [*self.response_ids(response), self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of response ids, control tokens and the blank that the template itself has before it left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).removeprefix(self._answer_blank)

    def plain_ids(self, text: str) -> list[int]:
        """Ids of a user's text behind the constant prefix; no control token can come out of it, see `PlainText`."""
        return self._plain.encode(self._blank + self._said("user", text), self._opening)

    def response_ids(self, text: str) -> list[int]:
        """Ids of the text of a response, or of its beginning, likewise."""
        return self._plain.encode(self._answer_blank + text, self._closing)

    def _said(self, role: str, text: str) -> str:
        """A message as the template has it."""
        return text.strip() if self._stripped[role] else text

    def _strips(self, before: list[dict[str, str]], role: str, after: list[dict[str, str]]) -> bool:
        """Whether the template leaves out blanks around a role's messages, as Llama 3's and Gemma's do."""
        texts = ("\ue000m\ue001", " \ue000m\ue001\n")
        try:
            bare, blank = (self._render([*before, {"role": role, "content": text}, *after], True) for text in texts)
        except SoftguardError:  # of a template that takes no such conversation
            return False
        return bare == blank

    def _template_ids(self, text: str) -> tuple[int, ...]:
        """Ids of the template's own text behind a user's or a model's."""
        return tuple(self._plain.behind(text, "x"))

    def _fixed(self, turns: Sequence[Turn], answer: bool) -> list[str]:
        """The template's own text before, between and after the messages' contents."""
        marks = [f"\ue000{i}\ue001" for i in range(len(turns))]
        text = self._render([{"role": t.role, "content": m} for t, m in zip(turns, marks, strict=True)], not answer)
        pieces = []
        for mark in marks:
            before, found, text = text.partition(mark)
            if not found:
                raise SoftguardError("the chat template drops or repeats a message; only plain chat templates work")
            pieces.append(before)
        if any("\ue000" in piece for piece in (*pieces, text)):
            raise SoftguardError("the chat template drops or repeats a message; only plain chat templates work")
        return [*pieces, text]

    def with_system(self, text: str) -> list[int]:
        """Ids of the constant prefix with `text` as the system message. Raises SoftguardError if the template takes none."""
        before, after = self._around_system()
        fixed, blank = _without_blank(before)
        opening, _ = _without_blank(after)
        if self._strips([], "system", [{"role": "user", "content": "u"}]):
            text = text.strip()
        return [*self._plain.behind(fixed, ""), *self._plain.encode(blank + text, fixed), *self._template_ids(opening)]

    def _around_system(self) -> tuple[str, str]:
        """The template's text before a system message, and from there to the first user text."""
        system, user = "\ue000s\ue001", "\ue000u\ue001"
        try:
            text = self._render([{"role": "system", "content": system}, {"role": "user", "content": user}], True)
        except SoftguardError:  # so a template refuses a role
            text = ""
        if system not in text or user not in text:
            raise SoftguardError("the chat template takes no system message; use slot: start")
        before, _, rest = text.partition(system)
        return before, rest.partition(user)[0]

    def _render(self, messages: list[dict[str, str]], generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self._template, tokenize=False, add_generation_prompt=generation_prompt
                )
            )
        except Exception as error:  # whatever jinja gives it
            raise SoftguardError(f"the chat template fails ({type(error).__name__}: {error}); use another model") from error


def _without_blank(text: str) -> tuple[str, str]:
    """A template's text before a message, and the blanks at its end."""
    fixed = text.rstrip(" ")
    return fixed, text[len(fixed) :]


def undated(tokenizer: Any) -> str:
    """The tokenizer's chat template, in which today is always the same day (Llama 3, Granite and SmolLM3 write the date).

    Raises SoftguardError if there is none, or several without one that is the usual.
    """
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError as error:
        raise SoftguardError(f"the model's tokenizer has no one chat template ({error}); use another model") from error
    return _NOW.sub(lambda match: repr(_TODAY.strftime(match[2])), template)


class Rows(NamedTuple):
    """Token rows that all end at the last column, whose logits are wanted.

    ids: (rows, width) int64. mask: (rows, width), 1 on real tokens. The constant prefix is not part of them.
    """

    ids: Tensor
    mask: Tensor

    def positions(self, prefix_length: int) -> Tensor:
        """(rows, width) position of every token behind `prefix_length` prefix tokens."""
        return prefix_length + (self.mask.cumsum(-1) - 1).clamp(min=0)

    def full_mask(self, prefix_length: int) -> Tensor:
        """(rows, prefix_length + width) attention mask with the prefix visible to every row."""
        return torch.cat([self.mask.new_ones(len(self.mask), prefix_length), self.mask], dim=1)


def align(prompts: Sequence[Sequence[int]], pad_id: int, device: Any) -> Rows:
    """Pad prompts on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return Rows(ids.to(device), mask.to(device))
