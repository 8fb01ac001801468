"""Generative guards: language models that answer a safety question with a label token.

p(safe) is the softmax of the next-token logits over the family's label tokens, read where the label would be
said; nothing is generated. What all rows begin with is run once and shared. User text never becomes a control token, but a
family whose prompt marks its parts by plain words can be told those words by a user, as the published one can.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch

from softguard.chat import PlainText, undated
from softguard.decoding import keep_prefix
from softguard.errors import SoftguardError
from softguard.guards import Probabilities
from softguard.guards.families import Question, fill, find_family
from softguard.models import BaseModel, load_base
from softguard.prefix import ConstantPrefix

_BATCH = 16  # rows of one pass
Matrix = np.ndarray[Any, np.dtype[np.float64]]


class _Asked(NamedTuple):
    prompt: str
    response: str
    criterion: str


class GenerativeGuard:
    """A language model asked as its family was trained to be asked; `fingerprint` is of the model, the family and its texts."""

    def __init__(self, family: str, base: BaseModel) -> None:
        """Raises SoftguardError for an unknown family, or a model that lacks the family's chat template, control tokens or
        labels."""
        self.family, self.base = find_family(family), base
        self.name = f"{family}({base.name})"
        if self.family.turn and not base.tokenizer.chat_template:
            raise SoftguardError(f"model {base.name!r} has no chat template, which guard family {family!r} needs")
        template = undated(base.tokenizer) if self.family.turn else ""
        told = json.dumps([family, asdict(self.family), base.fingerprint, template], sort_keys=True)
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()
        self._plain = PlainText(base.tokenizer, f"{self.family.prompt.text}{base.tokenizer.chat_template}")
        control = self._plain.control
        if not self.family.turn and not (control and control.match(self.family.prompt.text)):
            raise SoftguardError(
                f"model {base.name!r} lacks the control tokens of guard family {family!r}; name one of that family"
            )
        self._first_ids(self._labels)

    @classmethod
    def load(cls, spec: str) -> "GenerativeGuard":
        """The guard "FAMILY:MODEL", where MODEL is whatever `load_base` takes. Raises SoftguardError if it cannot be loaded."""
        family, _, model = spec.partition(":")
        find_family(family)  # before the model is loaded for nothing
        if not model:
            raise SoftguardError(f"guard 'generative:{spec}' names no model; write generative:{family}:MODEL")
        return cls(family, load_base(model, "auto"))

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return sum(parameter.numel() for parameter in self.base.model.parameters())

    def prompt_safety(self, prompts: Sequence[str]) -> Probabilities:
        """p(safe | prompt), float64 (prompts,). Raises SoftguardError for a prompt that does not fit the model's context."""
        return self._worst(self.family.prompt, prompts, prompts)

    def response_safety(self, prompts: Sequence[str], responses: Sequence[str]) -> Probabilities:
        """p(safe | prompt, response), float64 (pairs,). Raises SoftguardError for a pair that does not fit the context."""
        return self._worst(self.family.response, prompts, responses)

    def prompt_categories(self, prompts: Sequence[str]) -> list[str]:
        """The likeliest category of each prompt, were it unsafe. Raises SoftguardError if the family names none."""
        return self._categories(self.family.prompt, prompts, prompts)

    def response_categories(self, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        """The likeliest category of each pair, were it unsafe. Raises SoftguardError if the family names none."""
        return self._categories(self.family.response, prompts, responses)

    @property
    def _labels(self) -> tuple[str, ...]:
        return self.family.safe + self.family.unsafe

    def _worst(self, question: Question, prompts: Sequence[str], responses: Sequence[str]) -> Probabilities:
        return np.asarray(self._safety(question, prompts, responses).min(axis=1), dtype=np.float64)

    def _safety(self, question: Question, prompts: Sequence[str], responses: Sequence[str]) -> Matrix:
        """p(safe) by each criterion, (texts, criteria)."""
        return np.stack([self._by(question, prompts, responses, rule) for _, rule in question.criteria], axis=1)

    def _by(self, question: Question, prompts: Sequence[str], responses: Sequence[str], criterion: str) -> Probabilities:
        asked = [_Asked(p, r, criterion) for p, r in zip(prompts, responses, strict=True)]
        answers = [""] * len(asked)
        safe = np.empty(0)
        for lead in question.lead:
            answers = [answer + lead for answer in answers]
            law = self._law(question, asked, answers, self._labels)
            safe = law[:, : len(self.family.safe)].sum(axis=1)
            said = [self._labels[label] for label in law.argmax(axis=1)]
            answers = [answer + label for answer, label in zip(answers, said, strict=True)]
        return safe

    def _categories(self, question: Question, prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
        if len(question.criteria) > 1:
            worst = self._safety(question, prompts, responses).argmin(axis=1)
            return [question.criteria[i][0] for i in worst]
        known = [(name, label) for name, label in self.family.categories if name in question.text]
        if not known:
            raise SoftguardError(f"guard {self.name!r} names no categories; leave out system.policy, or take another guard")
        asked = [_Asked(p, r, "") for p, r in zip(prompts, responses, strict=True)]
        answer = question.lead[-1] + self.family.unsafe[0] + question.category_lead
        law = self._law(question, asked, [answer] * len(asked), [label for _, label in known])
        return [known[i][0] for i in law.argmax(axis=1)]

    def _law(self, question: Question, asked: Sequence[_Asked], answers: Sequence[str], labels: Sequence[str]) -> Matrix:
        """Probability of each label next, among the labels, (texts, labels)."""
        if not asked:
            return np.empty((0, len(labels)))
        chosen = torch.tensor(self._first_ids(labels), device=self.base.device)
        rows = [self._ids(question, *a, answer) for a, answer in zip(asked, answers, strict=True)]
        longest = max(map(len, rows))
        if longest > self.base.context:
            raise SoftguardError(
                f"guard {self.name!r} is asked of {longest:,} tokens, its model reads {self.base.context:,}; shorten the text"
            )
        common = takewhile(lambda pair: pair[0] == pair[1], zip(min(rows), max(rows), strict=False))
        shared = min(sum(1 for _ in common), min(map(len, rows)) - 1)
        law = np.empty((len(rows), len(labels)))
        with torch.inference_mode():
            embed = self.base.model.get_input_embeddings()
            prefix = keep_prefix(self.base, ConstantPrefix(embed(torch.tensor(rows[0][:shared], device=self.base.device))))
            groups = prefix.together([len(row) for row in rows])
            for batch in (group[start : start + _BATCH] for group in groups for start in range(0, len(group), _BATCH)):
                output, _ = prefix.begin([rows[i][shared:] for i in batch])
                law[batch] = output.logits[:, chosen].double().softmax(-1).cpu().numpy()
        return law

    def _first_ids(self, labels: Sequence[str]) -> list[int]:
        """The first id of each label; after a colon where it begins with a space, so that SentencePiece adds no second one."""
        found = []
        for label in labels:
            before = ":" if label.startswith(" ") else ""
            found.append(self._plain.encode(before + label)[len(self._plain.encode(before))])
        if len(set(found)) < len(labels):
            raise SoftguardError(f"the tokens of model {self.base.name!r} do not tell the labels {', '.join(labels)} apart")
        return found

    def _ids(self, question: Question, prompt: str, response: str, criterion: str, answer: str) -> list[int]:
        """Ids of the whole prompt and of what has been answered; control tokens come from the template alone."""
        template = question.text
        if self.family.turn:
            turn = [{"role": "user", "content": template}]
            template = str(
                self.base.tokenizer.apply_chat_template(
                    turn, chat_template=undated(self.base.tokenizer), tokenize=False, add_generation_prompt=True
                )
            )
        template += answer
        ids: list[int] = []
        before = ""
        for piece, is_control in _pieces(self._plain.control, template):
            if is_control:
                ids.append(self.base.tokenizer.convert_tokens_to_ids(piece))
            else:
                ids += self._plain.encode(fill(piece, prompt, response, criterion), before)
            before = piece
        return ids


def _pieces(control: re.Pattern[str] | None, template: str) -> Iterable[tuple[str, bool]]:
    """The template cut at its control tokens: pieces, and whether each is one."""
    start = 0
    for match in control.finditer(template) if control else ():
        if match.start() > start:
            yield template[start : match.start()], False
        yield match[0], True
        start = match.end()
    if start < len(template):
        yield template[start:], False
