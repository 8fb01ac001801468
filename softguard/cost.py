"""What each system costs: parameters, bytes, time to first token, tokens a second; and on what that was measured."""

import platform
import statistics
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

import torch

import softguard
from softguard.adapters import Adapter
from softguard.chat import Chat, Turn
from softguard.engine import Engine
from softguard.models import BaseModel
from softguard.prefix import constant_prefix
from softguard.system import SafeSystem

_PROMPT = "Explain in a few sentences why the sky is blue during the day and red in the evening."
_ROUNDS = 7
_TOKENS = 24


class Cost(NamedTuple):
    """One figure of cost."""

    system: str
    metric: str
    value: float
    unit: str


def measure_cost(
    base: BaseModel,
    base_engine: Engine,
    system: SafeSystem,
    adapter: Adapter | None,
    distilled_engine: Engine | None,
) -> list[Cost]:
    """Sizes of every system, and medians over rounds in which the systems take turns.

    The safe system's time to first token is what its user waits for: a prompt guard is asked before the base begins, a
    response guard after all `_TOKENS` tokens are there.
    """
    model = sum(p.numel() for p in base.model.parameters())
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    guard = getattr(system.guard, "parameters", 0)  # a function has no size that could be seen
    costs = [
        Cost("base", "parameters", model, "count"),
        Cost("safe_system", "parameters", model + guard, "count"),
        Cost("base", "weights in memory", weights, "bytes"),
        Cost("safe_system", "weights in memory", weights + 4 * guard, "bytes"),
    ]
    engines = {"base": base_engine}
    if adapter is not None and distilled_engine is not None:
        engines["distilled"] = distilled_engine
        extra = adapter.parameters
        costs.append(Cost("distilled", "parameters", model + extra, "count"))
        costs.append(Cost("distilled", "weights in memory", weights + adapter.bytes, "bytes"))
        costs.append(Cost("distilled", "adapter", adapter.bytes, "bytes"))
    for name, (first, rate) in _times(engines, system).items():
        costs.append(Cost(name, "time to first token", first, "ms"))
        costs.append(Cost(name, "decoding speed", rate, "tokens/s"))
    return costs


def _times(engines: Mapping[str, Engine], system: SafeSystem) -> dict[str, tuple[float, float]]:
    """Median milliseconds to the first token and tokens a second, by system."""
    first: dict[str, list[float]] = {name: [] for name in (*engines, "safe_system")}
    rate: dict[str, list[float]] = {name: [] for name in first}
    for round_ in range(_ROUNDS + 1):
        for name, engine in engines.items():
            begin = time.perf_counter()
            pieces = engine.stream([Turn("user", _PROMPT)], _TOKENS)
            answer = [next(pieces, "")]
            begun = time.perf_counter()
            answer += pieces
            end = time.perf_counter()
            timed = [(name, begun - begin, end - begin)]
            if name == "base":
                asked = time.perf_counter()
                system.p_safe([_PROMPT], ["".join(answer) or " "])
                guard = time.perf_counter() - asked
                waited = guard + (begun - begin if system.config.mode == "prompt" else end - begin)
                timed.append(("safe_system", waited, guard + end - begin))
            if round_:  # the first round warms up
                for who, wait, whole in timed:
                    first[who].append(1000 * wait)
                    rate[who].append(len(answer) / whole)  # a piece a token
    return {name: (statistics.median(first[name]), statistics.median(rate[name])) for name in first}


def flops_per_token(base: BaseModel, system: SafeSystem, adapter: Adapter | None, context: int) -> dict[str, float]:
    """Floating-point operations of decoding one token behind `context` others, by system.

    Two a weight that multiplies, of experts those that a token is sent to, and two a number of every head's key and value, by
    layer and position seen (Kaplan et al., 2020, table 1), kept or not.
    The guard counts two a parameter, as if it read every token once. An adapter counts the positions it takes; what can be
    merged into the weights, as a LoRA or a steering vector can, adds nothing.
    """
    model, config = base.model, base.config
    parts = (model.get_decoder(), model.get_output_embeddings())
    read = {id(p): (name, p) for part in parts for name, p in part.named_parameters()}  # shared once
    chosen = _experts_chosen(config)
    weights = sum(p.numel() * (chosen if ".experts." in name else 1) for name, p in read.values() if p.dim() > 1)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        weights -= model.get_input_embeddings().weight.numel()  # looked up, not multiplied
    widths = [getattr(config, name, base.key_heads[1]) for name in ("qk_head_dim", "v_head_dim")]  # latent attention has both
    position = 2 * config.num_hidden_layers * config.num_attention_heads * sum(widths)
    alone = float(2 * weights + position * context)
    flops = {"base": alone, "safe_system": alone + 2 * getattr(system.guard, "parameters", 0)}
    if adapter is not None:
        own = constant_prefix(base, Chat(base.tokenizer, adapter.slot, base.stop_ids), adapter)
        plain = constant_prefix(base, Chat(base.tokenizer, "start", base.stop_ids), None)
        flops["distilled"] = alone + position * (own.length - plain.length)
    return flops


def _experts_chosen(config: Any) -> float:
    """The share of a mixture's experts that a token is sent to."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None)  # none where all layers are dense
    return chosen / experts if experts and chosen else 1.0


def versions() -> dict[str, str]:
    """Package versions, processor and threads behind a measurement."""
    packages = ("torch", "transformers", "peft", "accelerate", "scikit-learn")
    return {
        "softguard": softguard.__version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "cpu": platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
