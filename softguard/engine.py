"""Generation with the constant prefix resident: its keys and values are computed once and shared by all requests."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softguard.adapted import adapted
from softguard.adapters import Adapter
from softguard.chat import Chat, Turn
from softguard.decoding import make_resident
from softguard.errors import SoftguardError
from softguard.gate import Gate
from softguard.models import BaseModel

_BLOCK = 128  # ids summed at once when one is drawn, or compared when the likeliest is taken
_LOGITS = 2**19  # of which next ids are chosen at once
_COLUMNS = 2**17  # of keys and values that the prompts of a batch may take, each as many as the longest; 3 GB of SmolLM2's
_CROWDED = 0.75  # share of running rows below which ended ones leave the batch


class Response(NamedTuple):
    """One generated response. `ids` ends with the end-of-turn id if the model ended it."""

    ids: tuple[int, ...]
    text: str
    hidden: Tensor | None = None  # (tokens, hidden) last hidden states that predict `ids`, where they were asked for


class _Token(NamedTuple):
    id: int
    hidden: Tensor  # (hidden,)


class Engine:
    """A base model with, or without, an adapter resident in its cache."""

    def __init__(self, base: BaseModel, adapter: Adapter | None = None) -> None:
        """`adapter`: none for the base alone. Raises SoftguardError for one distilled behind another chat template."""
        self.base = adapted(base, adapter)
        self.chat = Chat(base.tokenizer, adapter.slot if adapter else "start", base.stop_ids)
        if adapter is not None and adapter.facts.get("template", self.chat.fingerprint) != self.chat.fingerprint:
            raise SoftguardError(
                f"the adapter was distilled behind another chat template than {base.name!r} has; load it with the model and "
                "tokenizer it was trained for"
            )
        self.gate = Gate.of(self.base, self.chat, adapter) if adapter is not None and adapter.kind == "gate" else None
        self.prefix = make_resident(self.base, self.chat, adapter, self.gate)
        self._window = self.base.window

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        batch_size: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        progress: Callable[[int], None] = lambda done: None,
        keep_hidden: bool = False,
    ) -> list[Response]:
        """Answer single-turn prompts, in their order; greedy at temperature 0. No new tokens are empty answers, at once.

        Prompts of like length run together. Sampling draws each prompt's tokens from a stream of its own, seeded by `seed`,
        the prompt and how often it came before, so that a result does not depend on its neighbours.
        `progress` is told how many prompts each finished batch held. `keep_hidden` also returns last hidden states.
        Raises SoftguardError for a prompt of no tokens, or that does not fit the model's context.
        """
        if not max_new_tokens:
            progress(len(prompts))
            return [Response((), "")] * len(prompts)
        encoded = [self.chat.encode(prompt) for prompt in prompts]
        for number, ids in enumerate(encoded, 1):
            self._check_length(len(ids), max_new_tokens, f"prompt {number}")
        draws = _streams(prompts, max_new_tokens, seed) if temperature > 0 else None
        responses: dict[int, Response] = {}
        for batch in self._batches(encoded, batch_size):
            picked = None if draws is None else torch.from_numpy(draws[batch])
            made: list[list[int]] = [[] for _ in batch]
            states: list[list[Tensor]] = [[] for _ in batch]
            for tokens in self._steps([encoded[i] for i in batch], max_new_tokens, temperature, picked):
                for row, token in tokens.items():
                    made[row].append(token.id)
                    if keep_hidden:  # each is part of a whole step's, which it keeps in memory
                        states[row].append(token.hidden)
            for i, drawn, hidden in zip(batch, made, states, strict=True):
                responses[i] = Response(tuple(drawn), self._text(drawn), torch.stack(hidden) if keep_hidden else None)
            progress(len(batch))
        return [responses[i] for i in range(len(prompts))]

    def stream(self, turns: Sequence[Turn], max_new_tokens: int) -> Iterator[str]:
        """Answer a conversation greedily and yield its text piece by piece as it is made."""
        ids = self.check_conversation(turns, max_new_tokens)
        made: list[int] = []
        shown = ""
        for tokens in self._steps([ids], max_new_tokens, 0.0, None):
            made += [token.id for token in tokens.values()]
            text = self._text(made)
            if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                yield text[len(shown) :]
                shown = text
        if rest := self._text(made)[len(shown) :]:
            yield rest

    def log_odds(
        self, prompts: Sequence[str], batch_size: int = 128, progress: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """A gate's log-odds of refusing single-turn prompts, (prompts,); −∞ without a gate, which nothing else refuses by.

        `progress` is told how many prompts each finished batch held.
        """
        if self.gate is None:
            return torch.full((len(prompts),), -torch.inf)
        encoded = [self.chat.encode(prompt) for prompt in prompts]
        for number, ids in enumerate(encoded, 1):
            self._check_length(len(ids), 0, f"prompt {number}")
        result = torch.empty(len(prompts))
        for batch in self._batches(encoded, batch_size):
            output, _ = self.prefix.begin([encoded[i] for i in batch])
            assert output.gated is not None
            result[batch] = self.gate.log_odds(output.gated).cpu().float()
            progress(len(batch))
        return result

    def caches(
        self, prompts: Sequence[str], batch_size: int = 128, progress: Callable[[int], None] = lambda done: None
    ) -> list[Tensor]:
        """Keys and values of single-turn prompts up to the template's closing, (layers, 2, key heads, tokens, width) each.

        `progress` is told how many prompts each finished batch held. Raises SoftguardError for a model they are not kept of.
        """
        if self.prefix.caches is None:
            raise SoftguardError(
                f"{self.base.name} runs by transformers, so its keys and values are not kept; leave teach.keep_caches out"
            )
        encoded = [self.chat.plain_ids(prompt) for prompt in prompts]
        found: dict[int, Tensor] = {}
        for batch in self._batches(encoded, batch_size):
            found |= zip(batch, self.prefix.caches([encoded[i] for i in batch]), strict=True)
            progress(len(batch))
        return [found[i] for i in range(len(prompts))]

    def refuses(
        self, prompts: Sequence[str], batch_size: int = 128, progress: Callable[[int], None] = lambda done: None
    ) -> list[bool]:
        """Which prompts a gate refuses in greedy answers; none without a gate."""
        return (~(self.log_odds(prompts, batch_size, progress) < 0)).tolist()  # what is no number refuses

    def refuse_some(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        max_new_tokens: int,
        batch_size: int = 128,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """What `generate` says greedily with a gate, given the base's greedy `answers`, of which none has to be made again."""
        refusal = self._text(self.gate.refusal[:max_new_tokens]) if self.gate is not None else ""
        refused = self.refuses(prompts, batch_size, progress)
        return [refusal if no else answer for no, answer in zip(refused, answers, strict=True)]

    def _text(self, ids: Sequence[int]) -> str:
        return self.chat.decode([i for i in ids if i not in self.chat.stop_ids])

    def _batches(self, encoded: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
        """Indices of rows by ascending length, in batches, which are smaller where rows are long."""
        for group in self.prefix.together([len(ids) for ids in encoded]):
            batch: list[int] = []
            for row in group:
                if batch and (len(batch) == batch_size or (len(batch) + 1) * len(encoded[row]) > _COLUMNS):
                    yield batch
                    batch = []
                batch.append(row)
            if batch:
                yield batch

    def check_fits(self, prompt: str, max_new_tokens: int, what: str, at_once: int | None = None) -> None:
        """Raises SoftguardError, in which `what` stands for it, for a prompt of no tokens or that does not fit the context, or
        a window of attention: a gate needs the prompt in it, and a pass over prompt and answer so many tokens more as `at_once`
        says; none: there is no such pass.
        """
        self._check_length(len(self.chat.encode(prompt)), max_new_tokens, what, at_once)

    def check_conversation(self, turns: Sequence[Turn], max_new_tokens: int) -> list[int]:
        """Ids of a conversation. Raises SoftguardError for one that does not fit the context, or as `encode_turns` does."""
        ids = self.chat.encode_turns(turns)
        self._check_length(len(ids), max_new_tokens, "the conversation")
        return ids

    def _check_length(self, length: int, new: int, what: str, at_once: int | None = None) -> None:
        if not length:
            raise SoftguardError(
                f"{what} is empty, and the chat template of {self.base.name!r} puts nothing behind it; fill it in"
            )
        if self.prefix.length + length + new > self.base.context:
            raise SoftguardError(
                f"{what} has {length} tokens; with {self.prefix.length} of prefix and {new} new ones it exceeds the model's "
                f"context of {self.base.context}; shorten it"
            )
        own = self.gate.n_soft // self.gate.members if self.gate is not None else 0
        others = self.prefix.length + max(own, at_once or 0)
        if self._window is not None and (own or at_once is not None) and length + others > self._window:
            raise SoftguardError(
                f"{what} has {length} tokens; with {others} others it exceeds the window of {self._window} tokens "
                "that the model's attention has, and that must hold them all here; shorten it"
            )

    @torch.inference_mode()
    def _steps(
        self, prompts: Sequence[list[int]], new: int, temperature: float, draws: Tensor | None
    ) -> Iterator[dict[int, _Token]]:
        """Yield, step by step, the next token of every row that has not ended."""
        output, decoding = self.prefix.begin(prompts)
        refused: set[int] = set()
        if self.gate is not None and output.gated is not None:
            refused, draws = _refused(self.gate.log_odds(output.gated), draws)
        running = list(range(len(prompts)))  # rows that are still decoded, ended ones among them for a while
        ended: set[int] = set()
        for step in range(new):
            chosen = _next(output.logits, temperature, None if draws is None else draws[running, step])
            if self.gate is not None and refused:
                said = self.gate.refusal[min(step, len(self.gate.refusal) - 1)]
                chosen[[place for place, row in enumerate(running) if row in refused]] = said
            made = zip(running, chosen.tolist(), output.hidden, strict=True)
            tokens = {row: _Token(id_, hidden) for row, id_, hidden in made if row not in ended}
            yield tokens
            ended |= {row for row, token in tokens.items() if token.id in self.chat.stop_ids}
            if len(ended) == len(prompts) or step == new - 1:
                return
            keep = [i for i, row in enumerate(running) if row not in ended]
            if len(keep) <= _CROWDED * len(running):  # leaving copies what stays, so it waits until it pays
                index = torch.tensor(keep, device=chosen.device)
                decoding.keep(index)
                chosen, running = chosen[index], [running[i] for i in keep]
            output = decoding.step(chosen)


def _refused(log_odds: Tensor, draws: Tensor | None) -> tuple[set[int], Tensor | None]:
    """Rows a gate refuses, and the uniform numbers (rows, tokens) that are left for the others.

    Of the first number u < g refuses, as likely as g; (u − g)/(1 − g) is then uniform again. Without draws g ≥ ½ does. What is
    no number refuses.
    """
    g = log_odds.sigmoid().cpu()
    if draws is None:
        return _indices(~(g < 0.5)), None
    first = draws[:, 0]
    rest = ((first - g) / (1 - g)).clamp(0, 1 - 2**-24)
    return _indices(~(first >= g)), torch.cat([rest[:, None], draws[:, 1:]], dim=1)


def _indices(true: Tensor) -> set[int]:
    return set(true.nonzero().flatten().tolist())


def _streams(prompts: Sequence[str], length: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(prompts, length) uniform numbers; a repeated prompt gets a new stream at each repetition."""
    seen: dict[str, int] = {}
    streams = np.empty((len(prompts), length), dtype=np.float32)
    for row, prompt in enumerate(prompts):
        repetition = seen[prompt] = seen.get(prompt, -1) + 1
        digest = hashlib.sha256(f"{seed}\0{repetition}\0{prompt}".encode()).digest()
        streams[row] = np.random.default_rng(int.from_bytes(digest[:16])).random(length, dtype=np.float32)
    return streams


def _next(logits: Tensor, temperature: float, u: Tensor | None) -> Tensor:
    """Next ids, (rows,), of (rows, vocabulary): the likeliest, or where there are uniform numbers u (rows,) one drawn by each.

    Laws are made in float32 at least; on a processor of a few rows at a time, which stay in cache.
    """
    few = max(1, _LOGITS // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    chosen = []
    for start in range(0, len(logits), few):
        part = logits[start : start + few].to(torch.promote_types(logits.dtype, torch.float32))
        if u is None:
            chosen.append(_largest(part))
        else:
            drawn = u[start : start + few].to(part.device)
            chosen.append(_inverse_cdf((part / temperature).softmax(-1), drawn))
    return torch.cat(chosen)


def _largest(logits: Tensor) -> Tensor:
    """The first id of those with the largest logit, (rows,), of (rows, vocabulary).

    By way of blocks, whose maxima PyTorch finds several times as fast on processors as the place of one in a long row.
    """
    blocks = _in_blocks(logits, -torch.inf)
    block = blocks.amax(-1).argmax(-1)  # the first of equal ones; what is no number is the largest
    inside = blocks[torch.arange(len(block), device=block.device), block].argmax(-1)
    return block * _BLOCK + inside


def _in_blocks(x: Tensor, filler: float) -> Tensor:
    """(rows, vocabulary) as (rows, blocks, ids of a block), the last block filled up."""
    short = -x.shape[-1] % _BLOCK
    padded = torch.nn.functional.pad(x, (0, short), value=filler) if short else x
    return padded.view(len(x), -1, _BLOCK)


def _inverse_cdf(probabilities: Tensor, u: Tensor) -> Tensor:
    """Draw one id a row: (rows, vocabulary) probabilities and (rows,) uniform numbers to (rows,) ids.

    Sums over blocks of ids are float64, as are those within the block that `u` falls into: one pass over the vocabulary.
    """
    blocks = _in_blocks(probabilities, 0.0)
    upto = blocks.sum(-1).double().cumsum(-1)  # (rows, blocks)
    target = u.double()[:, None] * upto[:, -1:]
    block = torch.searchsorted(upto, target, right=True).clamp(max=upto.shape[-1] - 1)
    before = torch.where(block > 0, upto.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK)).squeeze(1).double().cumsum(-1)
    within = torch.searchsorted(inside, target - before, right=True).clamp(max=_BLOCK - 1)
    return (block * _BLOCK + within).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)
