"""Generation with the constant prefix resident: its keys and values are computed once and shared by all requests."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softguard.chat import Chat, Turn, align
from softguard.errors import SoftguardError
from softguard.models import BaseModel
from softguard.prefix import run_prefix, share


class Response(NamedTuple):
    """One generated response. `ids` ends with the end-of-turn id if the model ended it."""

    ids: tuple[int, ...]
    text: str
    hidden: Tensor | None = None  # (tokens, hidden) last hidden states that predict `ids`, where they were asked for


class _Token(NamedTuple):
    id: int
    hidden: Tensor | None  # (hidden,)


class Engine:
    """A base model with, or without, a soft prompt resident in its cache."""

    def __init__(self, base: BaseModel, chat: Chat, soft_prompt: Tensor | None = None) -> None:
        """`soft_prompt`: (n_soft, hidden), or none for the base alone."""
        self.base = base
        self.chat = chat
        with torch.inference_mode():
            self.prefix = run_prefix(base, chat, soft_prompt)
        self.prefix_length: int = self.prefix.get_seq_length()

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        batch_size: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        progress: Callable[[int], None] = lambda done: None,
        keep_hidden: bool = False,
    ) -> list[Response]:
        """Answer single-turn prompts, in their order; greedy at temperature 0.

        Prompts of like length run together. Sampling draws each prompt's tokens from a stream of its own, seeded by `seed`,
        the prompt and how often it came before, so that a result does not depend on its neighbours.
        `progress` is told how many prompts each finished batch held. `keep_hidden` also returns last hidden states.
        Raises SoftguardError for a prompt that does not fit the model's context.
        """
        encoded = [self.chat.encode(prompt) for prompt in prompts]
        for number, ids in enumerate(encoded, 1):
            self._check_fits(len(ids), max_new_tokens, f"prompt {number}")
        draws = _streams(prompts, max_new_tokens, seed) if temperature > 0 else None
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        responses: dict[int, Response] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            picked = None if draws is None else torch.from_numpy(draws[batch])
            made: list[list[_Token]] = [[] for _ in batch]
            for tokens in self._steps([encoded[i] for i in batch], max_new_tokens, temperature, picked, keep_hidden):
                for row, token in tokens.items():
                    made[row].append(token)
            for i, answer in zip(batch, made, strict=True):
                drawn = tuple(token.id for token in answer)
                hidden = torch.stack([token.hidden for token in answer if token.hidden is not None]) if keep_hidden else None
                responses[i] = Response(drawn, self._text(drawn), hidden)
            progress(len(batch))
        return [responses[i] for i in range(len(prompts))]

    def stream(self, turns: Sequence[Turn], max_new_tokens: int) -> Iterator[str]:
        """Answer a conversation greedily and yield its text piece by piece as it is made."""
        ids = self.chat.encode_turns(turns)
        self._check_fits(len(ids), max_new_tokens, "the conversation")
        made: list[int] = []
        shown = ""
        for tokens in self._steps([ids], max_new_tokens, 0.0, None):
            made += [token.id for token in tokens.values()]
            text = self._text(made)
            if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                yield text[len(shown) :]
                shown = text
        yield self._text(made)[len(shown) :]

    def _text(self, ids: Sequence[int]) -> str:
        return self.chat.decode([i for i in ids if i not in self.chat.stop_ids])

    def _check_fits(self, length: int, new: int, what: str) -> None:
        if self.prefix_length + length + new > self.base.context:
            raise SoftguardError(
                f"{what} has {length} tokens; with {self.prefix_length} of prefix and {new} new ones it exceeds the model's "
                f"context of {self.base.context}; shorten it"
            )

    @torch.inference_mode()
    def _steps(
        self, prompts: Sequence[list[int]], new: int, temperature: float, draws: Tensor | None, keep_hidden: bool = False
    ) -> Iterator[dict[int, _Token]]:
        """Yield, step by step, the next token of every row that has not ended; ended rows leave the batch."""
        rows = align(prompts, [[]] * len(prompts), self.base.pad_id, self.base.device)
        cache = share(self.base, self.prefix, len(prompts))
        mask, positions, ids = rows.full_mask(self.prefix_length), rows.positions(self.prefix_length), rows.ids
        alive = list(range(len(prompts)))
        for step in range(new):
            output = self._forward(ids, mask, positions, cache, keep_hidden)
            logits = output.logits[:, -1].float()  # (alive, vocabulary)
            if draws is None:
                chosen = logits.argmax(-1)
            else:
                u = draws[alive, step].to(logits.device)
                chosen = _inverse_cdf((logits / temperature).softmax(-1), u)
            tokens = chosen.tolist()
            states = output.hidden_states[-1][:, -1].clone() if keep_hidden else [None] * len(tokens)
            yield dict(zip(alive, map(_Token, tokens, states), strict=True))
            keep = [i for i, token in enumerate(tokens) if token not in self.chat.stop_ids]
            if not keep or step == new - 1:
                return
            if len(keep) < len(alive):
                index = torch.tensor(keep, device=ids.device)
                cache.batch_select_indices(index)
                chosen, mask, positions = chosen[index], mask[index], positions[index]
                alive = [alive[i] for i in keep]
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, hidden: bool) -> Any:
        return self.base.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=hidden,
        )


def _streams(prompts: Sequence[str], length: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(prompts, length) uniform numbers; a repeated prompt gets a new stream at each repetition."""
    seen: dict[str, int] = {}
    streams = np.empty((len(prompts), length), dtype=np.float32)
    for row, prompt in enumerate(prompts):
        repetition = seen[prompt] = seen.get(prompt, -1) + 1
        digest = hashlib.sha256(f"{seed}\0{repetition}\0{prompt}".encode()).digest()
        streams[row] = np.random.default_rng(int.from_bytes(digest[:16])).random(length, dtype=np.float32)
    return streams


def _inverse_cdf(probabilities: Tensor, u: Tensor) -> Tensor:
    """Draw one id a row: (rows, vocabulary) probabilities and (rows,) uniform numbers to (rows,) ids."""
    cumulative = probabilities.double().cumsum(-1)
    target = u.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)
