"""The soft prompt: its vectors, where they come from, and how they are saved.

On disk an adapter is PEFT's layout (`adapter_config.json`, `adapter_model.safetensors`) and our `softguard.json`, which says
what PEFT cannot: the slot, and the fingerprints of base, guard and corpus. Only a start-slot prompt gets `adapter_config.json`,
because PEFT would put any other in the wrong place.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softguard.chat import Slot
from softguard.errors import SoftguardError
from softguard.files import read_json, write_file, write_json
from softguard.models import BaseModel

VERSION = 1
_KEY = "prompt_embeddings"  # PEFT's name for the vectors


@dataclass(frozen=True)
class SoftPrompt:
    """n_soft vectors in the embedding space of one base model."""

    vectors: Tensor  # (n_soft, hidden) float32
    slot: Slot
    facts: dict[str, Any]  # what softguard.json says of the base, the system, the corpus and the training

    @property
    def n_soft(self) -> int:
        """Number of vectors."""
        return len(self.vectors)

    def save(self, folder: Path, base: BaseModel) -> None:
        """Write the adapter; `softguard.json`, which seals the rest, comes last."""
        from peft import PromptTuningConfig
        from safetensors.torch import save

        blob = save({_KEY: self.vectors.detach().cpu().float().contiguous()})
        write_file(folder / "adapter_model.safetensors", lambda beside: beside.write_bytes(blob))
        if self.slot == "start":
            config = PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=self.n_soft,
                token_dim=self.vectors.shape[1],
                num_layers=base.model.config.num_hidden_layers,
                num_attention_heads=base.model.config.num_attention_heads,
                num_transformer_submodules=1,
                base_model_name_or_path=base.name,
                inference_mode=True,
            )
            fields = {k: getattr(v, "value", v) for k, v in config.to_dict().items() if v is not None}
            write_json(folder / "adapter_config.json", fields)
        write_json(
            folder / "softguard.json",
            {
                "version": VERSION,
                "slot": self.slot,
                "n_soft": self.n_soft,
                "hidden": self.vectors.shape[1],
                "weights_sha256": hashlib.sha256(blob).hexdigest(),
                "model": base.name,
                "base": base.fingerprint,
                **self.facts,
            },
        )

    @classmethod
    def load(cls, folder: Path, base: BaseModel) -> "SoftPrompt":
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
        rest = {
            k: v
            for k, v in facts.items()
            if k not in ("version", "slot", "n_soft", "hidden", "weights_sha256", "model", "base")
        }
        vectors: Tensor = load(blob)[_KEY]
        return cls(vectors.to(base.device), facts["slot"], rest)


def initial_vectors(base: BaseModel, text: str, n_soft: int) -> Tensor:
    """Embeddings of `text` brought to (n_soft, hidden): repeated if it is short, averaged over neighbours if it is long.

    Text, never noise: rows off the embedding manifold cost safety before training begins (METHOD §3.2).
    Raises SoftguardError if the text has no tokens.
    """
    ids = base.tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise SoftguardError("distil.init_text is empty; give the text the soft prompt starts from")
    rows: Tensor = base.model.get_input_embeddings()(torch.tensor(ids, device=base.device)).detach().float()  # (tokens, hidden)
    if len(rows) <= n_soft:
        return rows[torch.arange(n_soft, device=base.device) % len(rows)].clone()
    return torch.stack([part.mean(0) for part in rows.tensor_split(n_soft)])
