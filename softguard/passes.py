"""The passes of base and student that training is made of: from examples of the corpus to an objective's `Batch`."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from softguard.adapted import adapted, changes_layers
from softguard.adapters import Adapter
from softguard.chat import Chat
from softguard.corpus import Example
from softguard.decoding import Resident, gated_log_odds, keep_prefix
from softguard.divergences import token_tv
from softguard.gate import Gate
from softguard.kernels import log_law, selected_log_probs
from softguard.models import BaseModel
from softguard.objectives import Batch, divergences
from softguard.packed import packed_hidden
from softguard.prefix import constant_prefix

_NO_WEIGHT = 1e-3  # branches the system takes less often than this are left out


class Passes:
    """A frozen base beside itself with the adapter that is trained."""

    def __init__(self, base: BaseModel, adapter: Adapter, refusals: Sequence[str]) -> None:
        """`adapter`: its tensors want gradients. `refusals`: all of the system's, the one without a category first."""
        self.base, self.adapter = base, adapter
        self.student_base = adapted(base, adapter)
        # Both by the same code: TV's slope is a sign, so that rounding alone would have a gradient where both agree.
        self._own_code = changes_layers(adapter)
        self.chat = Chat(base.tokenizer, adapter.slot, base.stop_ids)
        self.refusals = [tuple(self.chat.encode_response(refusal)) for refusal in refusals]
        self._teacher_prefix = constant_prefix(base, self.chat, None)

    def student(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Tensor]:
        """Last hidden states, (wanted[i], hidden), at the last tokens of each row; gradients reach the adapter."""
        prefix = constant_prefix(self.student_base, self.chat, self.adapter)
        return packed_hidden(self.student_base, prefix, rows, wanted, self._own_code)

    @torch.no_grad()
    def teacher(self, rows: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Tensor]:
        """The same of the base."""
        return packed_hidden(self.base, self._teacher_prefix, rows, wanted, self._own_code) if rows else []

    def log_odds(self, examples: Sequence[Example]) -> Tensor:
        """The log-odds of refusing of a gate's members, (examples, members); gradients reach the adapter."""
        gate = Gate.of(self.base, self.chat, self.adapter)
        prompts, caches = [self.chat.encode(e.prompt) for e in examples], [e.cache for e in examples if e.cache is not None]
        return gated_log_odds(gate, self._resident, prompts, caches if len(caches) == len(examples) else None)

    @cached_property
    def _resident(self) -> Resident:
        return keep_prefix(self.base, self._teacher_prefix)

    def log_probs(self, hidden: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities, (all tokens,), of the answers' tokens from the hidden states that predict them."""
        target = torch.tensor([i for answer in answers for i in answer], device=self.base.device, dtype=torch.long)
        states = torch.cat(list(hidden)) if hidden else self._teacher_prefix.embeddings[:0]
        return selected_log_probs(states, target, self.base.head)

    def batch(
        self, examples: Sequence[Example], epoch: int, prompts: int, drift_weight: float = 1.0, pairs: bool = False
    ) -> tuple[Batch, Tensor]:
        """Both branches of some examples, by one pass of the student and, unless the corpus kept its states, one of the base.

        `prompts`: what losses are divided by. `pairs`: every prompt gets an answer and a refusal, whatever the system makes of
        it. Also returns the student's last hidden states that predict the rows' first tokens, (S + R, hidden).
        """
        encoded = [self.chat.encode(e.prompt) for e in examples]
        drawn = [e.responses[epoch % len(e.responses)] for e in examples]
        # Of several things said instead of one prompt's responses, the most frequent stands for all in the first token's law.
        usual = [max(e.refusals, key=e.refusals.__getitem__, default=self.refusals[0]) for e in examples]
        safe = [i for i, draw in enumerate(drawn) if pairs or draw.keep > _NO_WEIGHT]
        if pairs:
            refused = [(i, usual[i], e.refusal_rate) for i, e in enumerate(examples)]
        else:
            refused = [(i, ids, u) for i, e in enumerate(examples) for ids, u in e.refusals.items() if u > _NO_WEIGHT]
        responses, refusals = [list(drawn[i].ids) for i in safe], [list(ids) for _, ids, _ in refused]
        answers = responses + refusals
        rows = [encoded[i] + answer[:-1] for i, answer in zip([*safe, *(i for i, *_ in refused)], answers, strict=True)]
        wanted = [len(answer) for answer in answers]
        hidden = self.student(rows, wanted)
        kept = [] if self._own_code else [drawn[i].hidden for i in safe]
        teacher = [states.to(self.base.head.weight) for states in kept if states is not None]
        if len(teacher) < len(safe):
            teacher = self.teacher(rows[: len(safe)], wanted[: len(safe)])
        response, mask = padded_ids(responses, self.base.device)
        _, refusal_mask = padded_ids(refusals, self.base.device)

        def numbers(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.base.device)

        def said(states: Sequence[Tensor]) -> Tensor:
            return spread(self.log_probs(states, refusals), refusal_mask)

        batch = Batch(
            student=_padded(hidden[: len(safe)], hidden[0]),
            teacher=_padded(teacher, hidden[0]),
            head=self.base.head,
            response=response,
            mask=mask,
            p_safe=numbers([drawn[i].keep for i in safe]),
            first_rate=numbers([examples[i].refusal_rate for i in safe]),
            refusal=said(hidden[len(safe) :]),
            refusal_rate=numbers([u for *_, u in refused]),
            refusal_token=torch.tensor([usual[i][0] for i in safe], dtype=torch.long, device=self.base.device),
            prompts=prompts,
            drift_weight=drift_weight,
            begins=torch.tensor(sorted({ids[0] for ids in self.refusals}), device=self.base.device),
            refusal_mask=refusal_mask,
            base_refusal=said(self.teacher(rows[len(safe) :], wanted[len(safe) :])) if pairs else None,
        )
        return batch, torch.stack([row[0] for row in hidden])

    def probe(self, examples: Sequence[Example], batch: Batch, first: Tensor) -> "Probe":
        """Drift along kept answers, and which rows begin as a refusal does; of what `batch` gave for the examples, no pairs."""
        begin = [ids[0] for e in examples for ids, u in e.refusals.items() if u > _NO_WEIGHT]
        likeliest = log_law(first, batch.head).argmax(-1)
        safe, kept, refused = len(batch.p_safe), batch.p_safe > 0.5, batch.refusal_rate > 0.5
        drift = divergences(token_tv, batch)[kept]
        begins = torch.tensor([ids[0] for ids in self.refusals], device=first.device)
        own = likeliest[safe:] == torch.tensor(begin, dtype=torch.long, device=first.device)
        return Probe(
            float(drift.sum()),
            int(batch.mask[kept].sum()),
            int((own & refused).sum()),
            int(refused.sum()),
            int((torch.isin(likeliest[:safe], begins) & kept).sum()),
            int(kept.sum()),
        )

    def gate_probe(self, examples: Sequence[Example], log_odds: Tensor) -> "Probe":
        """The same of a gate. Its TV to the base is at most g, at the first token, and nothing at the others."""
        refused = torch.tensor([e.refusal_rate > 0.5 for e in examples], device=log_odds.device)
        kept = ~refused
        lengths = torch.tensor([max(len(e.responses[0].ids), 1) for e in examples], device=log_odds.device)  # none was drawn: 1
        return Probe(
            float(log_odds.sigmoid()[kept].sum()),
            int(lengths[kept].sum()),
            int((log_odds >= 0)[refused].sum()),
            int(refused.sum()),
            int((log_odds >= 0)[kept].sum()),
            int(kept.sum()),
        )


def token_scale(examples: Sequence[Example], epoch: int) -> float:
    """Weights of the rows of a whole batch over their weighted tokens, `Batch.scale`."""
    rows = [(draw.keep, len(draw.ids)) for draw in (e.responses[epoch % len(e.responses)] for e in examples)]
    rows += [(rate, len(ids)) for e in examples for ids, rate in e.refusals.items()]
    some = [(weight, tokens) for weight, tokens in rows if weight > _NO_WEIGHT]
    return sum(weight for weight, _ in some) / max(sum(weight * tokens for weight, tokens in some), 1.0)


class Probe(NamedTuple):
    """Sums over some rows, from which a line of validation is made."""

    token_tv: float
    tokens: int
    refuses: int
    refused: int
    over_refuses: int
    answered: int


def padded_ids(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, (rows, longest row) each; the mask is 1 on real tokens, float32."""
    width = max(map(len, rows), default=1)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for row, these in enumerate(rows):
        ids[row, : len(these)] = torch.tensor(these)
        mask[row, : len(these)] = 1
    return ids.to(device), mask.to(device)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """(all tokens,) to (rows, longest row), 0 on padding."""
    return torch.zeros_like(mask).masked_scatter(mask > 0, values.float())


def _padded(rows: list[Tensor], like: Tensor) -> Tensor:
    """(rows, longest row, hidden) hidden states, padded with 0."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else like.new_zeros(0, 1, like.shape[-1])
