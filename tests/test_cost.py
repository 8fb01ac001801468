"""What systems cost, by counted operations and a counted clock."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from softguard import cost
from softguard.config import SystemConfig
from softguard.cost import _PROMPT, _TOKENS, flops_per_token, measure_cost
from softguard.engine import Engine
from softguard.models import BaseModel
from softguard.system import SafeSystem
from tests.references import LATENT, made


class Listening:
    """A guard that keeps what it was asked of."""

    name = fingerprint = "listening"
    parameters = 1000

    def __init__(self) -> None:
        self.asked: list[str] = []

    def prompt_safety(self, prompts: Sequence[str]) -> list[float]:
        self.asked += prompts
        return [1.0] * len(prompts)

    def response_safety(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        self.asked += responses
        return [1.0] * len(responses)


@pytest.mark.parametrize(("mode", "waited"), [("prompt", 2000), ("response", 3000)])
def test_a_response_guard_is_waited_for_with_the_whole_answer(
    mode: Literal["prompt", "response"], waited: float, small: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at the clock takes a second: one to the first token, one to the last, one for the guard."""
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    guard, engine = Listening(), Engine(small)
    costs = measure_cost(small, engine, SafeSystem(guard, replace(SystemConfig(), mode=mode)), None, None)
    found = {(c.system, c.metric): c.value for c in costs}
    assert found["base", "time to first token"] == 1000
    assert found["safe_system", "time to first token"] == waited
    assert found["base", "decoding speed"] / found["safe_system", "decoding speed"] == pytest.approx(3 / 2)
    answer = engine.generate([_PROMPT], _TOKENS)[0].text
    assert set(guard.asked) == {_PROMPT if mode == "prompt" else answer}


def test_a_guard_costs_two_operations_a_parameter(small: BaseModel) -> None:
    flops = flops_per_token(small, SafeSystem(Listening(), SystemConfig()), None, 512)
    assert flops["safe_system"] == flops["base"] + 2000


@pytest.mark.parametrize(
    ("make", "settings", "anew"),
    [
        ("Llama", {}, 0),
        ("Qwen3", {"head_dim": 16}, 0),
        ("Youtu", LATENT, 2 * 16 * 4 * (8 + 8)),
    ],  # heads' keys, values of rank 16
)
def test_operations_behind_more_tokens_are_those_counted_of_the_products(
    make: str, settings: dict[str, Any], anew: int, small: BaseModel
) -> None:
    """`anew`: by layer and position, of keys and values that the make's code has not kept."""
    base, guard = made(small, make, **settings), SafeSystem(Listening(), SystemConfig())
    base.model.set_attn_implementation("eager")

    def counted(context: int) -> int:
        cache = DynamicCache(config=base.model.config)
        with torch.no_grad():
            base.model(torch.zeros(1, context, dtype=torch.long), past_key_values=cache)
            with FlopCounterMode(display=False) as counter:
                base.model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
        return int(counter.get_total_flops())

    found = [flops_per_token(base, guard, None, context)["base"] for context in (20, 50)]
    assert found[1] - found[0] == counted(50) - counted(20) - 2 * 30 * anew > 0


@pytest.mark.parametrize("make", ["Mixtral", "Qwen3Moe"])
def test_a_token_is_sent_to_some_experts_alone_however_many_there_are(make: str, small: BaseModel) -> None:
    system = SafeSystem(Listening(), SystemConfig())
    found = []
    for experts in (4, 8):
        name = {"Mixtral": "num_local_experts", "Qwen3Moe": "num_experts"}[make]
        sizes: dict[str, Any] = {name: experts, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        found.append(flops_per_token(made(small, make, **sizes), system, None, 20)["base"])
    assert 0 < found[1] - found[0] <= 2 * 4 * 32 * 4  # of the routers, whose rows are the experts


def test_a_mixture_whose_layers_are_all_dense_sends_tokens_nowhere(small: BaseModel) -> None:
    settings: dict[str, Any] = {**LATENT, "n_routed_experts": 2, "first_k_dense_replace": 2}
    dense = made(small, "DeepseekV2", **settings)
    assert dense.config.num_experts_per_tok is None
    assert flops_per_token(dense, SafeSystem(Listening(), SystemConfig()), None, 20)["base"] > 0
