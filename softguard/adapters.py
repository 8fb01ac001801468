"""Adapters: what is trained beside a frozen model, and how it is saved.

    soft_prompt   embeddings in the template's slot, run through the model once and kept as keys and values
    kv_prefix     the keys and values themselves, of every layer, before everything (prefix tuning, Li and Liang, 2021)
    gate          the same, but seen only where the response begins, to decide whether to refuse; see `gate`
    lora          low-rank differences on linear layers (Hu et al., 2021), as PEFT has them
    steering      one vector, added to one layer's output at every token
    text          a system prompt in words: nothing is trained

`prefix` and `adapted` put them to work. On disk an adapter is PEFT's layout (`adapter_config.json`,
`adapter_model.safetensors`), for a steering vector llama.cpp's (`control_vector.gguf`) beside the safetensors, and our
`softguard.json`, which says what these cannot: the slot, and the fingerprints of base, guard and corpus. A soft prompt in
another slot than the start gets no `adapter_config.json`, because PEFT would put it in the wrong place. Numbers are stored in
float16, which is finer than the bfloat16 they mostly run in.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from softguard.chat import Slot
from softguard.config import fingerprint
from softguard.errors import DivergedError, SoftguardError
from softguard.files import read_json, write_file, write_json
from softguard.models import BaseModel

VERSION = 5
VECTORS = "prompt_embeddings"  # PEFT's name for the vectors of soft prompts and prefixes
DIRECTION = "direction."  # llama.cpp's for a steering vector; the layer's number follows
Kind = Literal["soft_prompt", "kv_prefix", "gate", "lora", "steering", "text"]


@dataclass(frozen=True)
class Adapter:
    """What was trained for one base model, or is being trained.

    tensors, float32, by their names on disk:
    soft_prompt: VECTORS (n_soft, hidden). kv_prefix: VECTORS (n_soft, layers · 2 · key heads · head width), keys before
    values, keys turned to the positions 0 … n_soft − 1. gate: the same, keys unturned. lora: PEFT's, …lora_A.weight (rank,
    in) and …lora_B.weight (out, rank). steering: direction.N (hidden,), for the output of layer N counted from 0. text: none.
    """

    kind: Kind
    tensors: Mapping[str, Tensor]
    slot: Slot
    facts: dict[str, Any]  # what softguard.json says of the base, the system, the corpus and the training
    text: str = ""  # of kind text

    @property
    def vectors(self) -> Tensor:
        """Of a soft prompt or key/value prefix, (n_soft, …)."""
        return self.tensors[VECTORS]

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Size as stored."""
        return 2 * self.parameters + len(self.text.encode())

    @property
    def fingerprint(self) -> str:
        """Identity of what it does to the model: 16 hex digits."""
        said = f" {self.facts.get('refusal')} {self.facts.get('bias', 0.0)}" if self.kind == "gate" else ""
        said += f" {self.facts['members']}" if self.facts.get("members", 1) > 1 else ""
        digest = hashlib.sha256(f"{self.kind} {self.slot} {self.text}{said}".encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def description(self) -> str:
        """Kind and size in a few words."""
        what = f"{len(self.vectors)} vectors, " if VECTORS in self.tensors else ""
        return f"{self.kind} of {what}{self.parameters:,} numbers, {self.bytes:,} bytes"

    def save(self, folder: Path | str, base: BaseModel) -> None:
        """Write the adapter in the place of what `folder` held; `softguard.json`, which seals the rest, comes last.

        Raises DivergedError as `as_stored` does.
        """
        from safetensors.torch import save

        folder, stored = Path(folder), as_stored(self.tensors)
        blob = save(stored)
        write_file(folder / "adapter_model.safetensors", lambda beside: beside.write_bytes(blob))
        for layout in ("adapter_config.json", "control_vector.gguf"):  # what another kind left here would describe it still
            (folder / layout).unlink(missing_ok=True)
        if self.kind == "steering":
            write_file(folder / "control_vector.gguf", partial(_write_control_vector, stored, base))
        elif self.slot == "start" and self.kind not in ("text", "gate"):
            fields = {k: getattr(v, "value", v) for k, v in peft_config(self, base).to_dict().items() if v is not None}
            listed = {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}
            write_json(folder / "adapter_config.json", listed)
        said = {
            "version": VERSION,
            "adapter": self.kind,
            "slot": self.slot,
            **({"n_soft": len(self.vectors)} if VECTORS in self.tensors else {}),
            **({"text": self.text} if self.kind == "text" else {}),
            "weights_sha256": hashlib.sha256(blob).hexdigest(),
            "model": base.name,
            "base": base.fingerprint,
            **self.facts,
        }
        write_json(folder / "softguard.json", {**said, "seal": fingerprint(said)})

    @classmethod
    def load(cls, folder: Path | str, base: BaseModel) -> "Adapter":
        """Read an adapter and check that it belongs to `base`.

        Raises SoftguardError if it is missing or damaged, or was trained for another model or quantisation.
        """
        from safetensors.torch import load

        folder = Path(folder)
        facts = read_json(folder / "softguard.json", "softguard adapter")
        if facts.get("version") != VERSION:
            raise SoftguardError(
                f"adapter {folder} has version {facts.get('version')}, this softguard reads {VERSION}; distil again"
            )
        if facts.get("base") != base.fingerprint:
            raise SoftguardError(
                f"adapter {folder} belongs to model {facts.get('model')!r} ({facts.get('base')}), not to {base.name!r} "
                f"({base.fingerprint}); load it with the model and quantisation it was trained for"
            )
        blob = whole_weights(folder, facts)
        known = ("version", "adapter", "slot", "text", "n_soft", "weights_sha256", "model", "base", "seal")
        tensors = {name: tensor.float().to(base.device) for name, tensor in load(blob).items()}
        rest = {k: v for k, v in facts.items() if k not in known}
        return cls(facts["adapter"], tensors, facts["slot"], rest, facts.get("text", ""))


def as_stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors in float16. Raises DivergedError if a value is not finite in it."""
    stored = {name: tensor.detach().cpu().half().contiguous() for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in stored.values()):
        raise DivergedError("the adapter has values that float16 cannot hold; lower distil.learning_rate")
    return stored


def whole_weights(folder: Path, facts: Mapping[str, Any]) -> bytes:
    """The file of an adapter's weights; `facts`: what its `softguard.json` says.

    Raises SoftguardError if one of the two is not as it was written.
    """
    try:
        blob = (folder / "adapter_model.safetensors").read_bytes()
    except OSError as error:
        raise SoftguardError(f"adapter {folder} has no readable adapter_model.safetensors; distil again") from error
    if hashlib.sha256(blob).hexdigest() != facts.get("weights_sha256"):
        raise SoftguardError(
            f"adapter {folder} is damaged: its weights are not those softguard.json was written for; distil again"
        )
    said = {key: value for key, value in facts.items() if key != "seal"}
    if fingerprint(said) != facts.get("seal"):
        raise SoftguardError(f"adapter {folder} is damaged: its softguard.json is not as it was written; distil again")
    return blob


def peft_config(adapter: Adapter, base: BaseModel) -> Any:
    """What PEFT calls a soft prompt, a key/value prefix or a LoRA."""
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base.name, "inference_mode": True}
    if adapter.kind == "lora":
        modules = {name.split(".")[-3]: tensor.shape[0] for name, tensor in adapter.tensors.items() if ".lora_A." in name}
        rank = next(iter(modules.values()))
        return LoraConfig(**common, r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=sorted(modules))
    heads, width = base.key_heads
    common |= {
        "num_virtual_tokens": len(adapter.vectors),
        "num_layers": base.config.num_hidden_layers,
        "num_transformer_submodules": 1,
    }
    if adapter.kind == "soft_prompt":
        return PromptTuningConfig(**common, token_dim=base.hidden, num_attention_heads=base.config.num_attention_heads)
    return PrefixTuningConfig(**common, token_dim=heads * width, num_attention_heads=heads, encoder_hidden_size=base.hidden)


def _write_control_vector(stored: Mapping[str, Tensor], base: BaseModel, path: Path) -> None:
    """llama.cpp's control vector: one float32 tensor a layer."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", base.model.config.model_type)
    writer.add_uint32("controlvector.layer_count", len(stored))
    for name, tensor in stored.items():
        writer.add_tensor(name, tensor.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
