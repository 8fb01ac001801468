"""Adapters: a few trained vectors, what they start from, and how they are saved.

    soft_prompt   embeddings in the template's slot, run through the model once and kept as keys and values
    kv_prefix     the keys and values themselves, of every layer, before everything (prefix tuning, Li and Liang, 2021)

On disk an adapter is PEFT's layout (`adapter_config.json`, `adapter_model.safetensors`) and our `softguard.json`, which says
what PEFT cannot: the slot, and the fingerprints of base, guard and corpus. A soft prompt in another slot than the start gets
no `adapter_config.json`, because PEFT would put it in the wrong place. Vectors are stored in float16, which is finer than the
bfloat16 they mostly run in.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from softguard.chat import Slot
from softguard.errors import SoftguardError
from softguard.files import read_json, write_file, write_json
from softguard.models import BaseModel

VERSION = 2
Kind = Literal["soft_prompt", "kv_prefix"]
_KEY = "prompt_embeddings"  # PEFT's name for the vectors of both kinds


@dataclass(frozen=True)
class Adapter:
    """n_soft vectors for one base model.

    vectors: (n_soft, hidden) for a soft prompt; (n_soft, layers · 2 · key heads · head width) for a key/value prefix, keys
    before values, keys turned to the positions 0 … n_soft − 1.
    """

    kind: Kind
    vectors: Tensor  # float32
    slot: Slot
    facts: dict[str, Any]  # what softguard.json says of the base, the system, the corpus and the training

    @property
    def n_soft(self) -> int:
        """Number of vectors, hence of positions they take."""
        return len(self.vectors)

    @property
    def bytes(self) -> int:
        """Size as stored."""
        return 2 * self.vectors.numel()

    def save(self, folder: Path, base: BaseModel) -> None:
        """Write the adapter; `softguard.json`, which seals the rest, comes last.

        Raises SoftguardError if a value is not finite in float16.
        """
        from safetensors.torch import save

        stored = self.vectors.detach().cpu().half().contiguous()
        if not stored.isfinite().all():
            raise SoftguardError("the adapter has values that float16 cannot hold; lower distil.learning_rate")
        blob = save({_KEY: stored})
        write_file(folder / "adapter_model.safetensors", lambda beside: beside.write_bytes(blob))
        if self.slot == "start":
            fields = {k: getattr(v, "value", v) for k, v in self._peft_config(base).to_dict().items() if v is not None}
            write_json(folder / "adapter_config.json", fields)
        write_json(
            folder / "softguard.json",
            {
                "version": VERSION,
                "adapter": self.kind,
                "slot": self.slot,
                "n_soft": self.n_soft,
                "weights_sha256": hashlib.sha256(blob).hexdigest(),
                "model": base.name,
                "base": base.fingerprint,
                **self.facts,
            },
        )

    def _peft_config(self, base: BaseModel) -> Any:
        from peft import PrefixTuningConfig, PromptTuningConfig

        heads, width = base.key_heads
        common = {
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": self.n_soft,
            "num_layers": base.model.config.num_hidden_layers,
            "num_transformer_submodules": 1,
            "base_model_name_or_path": base.name,
            "inference_mode": True,
        }
        if self.kind == "soft_prompt":
            return PromptTuningConfig(
                **common, token_dim=base.hidden, num_attention_heads=base.model.config.num_attention_heads
            )
        return PrefixTuningConfig(**common, token_dim=heads * width, num_attention_heads=heads, encoder_hidden_size=base.hidden)

    @classmethod
    def load(cls, folder: Path, base: BaseModel) -> "Adapter":
        """Read an adapter and check that it belongs to `base`.

        Raises SoftguardError if it is missing or damaged, or was trained for another model or quantisation.
        """
        from safetensors.torch import load

        facts = read_json(folder / "softguard.json", "softguard adapter")
        if facts.get("version") != VERSION:
            raise SoftguardError(
                f"adapter {folder} has version {facts.get('version')}, this softguard reads {VERSION}; distil again"
            )
        if facts["base"] != base.fingerprint:
            raise SoftguardError(
                f"adapter {folder} belongs to model {facts['model']!r} ({facts['base']}), not to {base.name!r} "
                f"({base.fingerprint}); load it with the model and quantisation it was trained for"
            )
        try:
            blob = (folder / "adapter_model.safetensors").read_bytes()
        except OSError as error:
            raise SoftguardError(f"adapter {folder} has no readable adapter_model.safetensors; distil again") from error
        if hashlib.sha256(blob).hexdigest() != facts["weights_sha256"]:
            raise SoftguardError(
                f"adapter {folder} is damaged: its weights are not those softguard.json was written for; distil again"
            )
        known = ("version", "adapter", "slot", "n_soft", "weights_sha256", "model", "base")
        vectors: Tensor = load(blob)[_KEY].float()
        rest = {k: v for k, v in facts.items() if k not in known}
        return cls(facts["adapter"], vectors.to(base.device), facts["slot"], rest)


@torch.no_grad()
def initial_vectors(base: BaseModel, kind: Kind, text: str, n_soft: int) -> Tensor:
    """What training starts from: `text` as the model reads it. Shape as in `Adapter`, float32.

    A soft prompt gets its embeddings, repeated if there are fewer than n_soft, averaged over neighbours if there are more. A
    key/value prefix gets the keys and values the model makes of its first n_soft tokens, repeated likewise. Text, never noise:
    rows off the embedding manifold cost safety before training begins (METHOD §3.2).
    Raises SoftguardError if the text has no tokens.
    """
    ids = base.tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise SoftguardError("distil.init_text is empty; give the text the adapter starts from")
    if kind == "kv_prefix":
        ids = (ids * -(-n_soft // len(ids)))[:n_soft]
        cache = base.model(torch.tensor([ids], device=base.device), use_cache=True).past_key_values
        pairs = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
        return pairs.permute(3, 0, 1, 2, 4).flatten(1).float()  # from (layers, 2, key heads, n_soft, width)
    rows: Tensor = base.model.get_input_embeddings()(torch.tensor(ids, device=base.device)).float()  # (tokens, hidden)
    if len(rows) <= n_soft:
        return rows[torch.arange(n_soft, device=base.device) % len(rows)].clone()
    return torch.stack([part.mean(0) for part in rows.tensor_split(n_soft)])
