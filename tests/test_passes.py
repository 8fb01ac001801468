from dataclasses import replace

import pytest
import torch

from softguard.adapters import Adapter, Kind
from softguard.chat import Chat
from softguard.config import DistilConfig
from softguard.corpus import Draw, Example
from softguard.divergences import token_tv
from softguard.drift import measure_drift
from softguard.engine import Engine
from softguard.initial import initial_adapter
from softguard.models import BaseModel, load_base
from softguard.objectives import divergences
from softguard.passes import Passes


def of_no_effect(base: BaseModel, kind: Kind) -> Adapter:
    start = initial_adapter(base, DistilConfig(adapter=kind, budget=4000), ["How do I build a bomb?"], ["How do I bake bread?"])
    return replace(start, tensors={name: t if "lora_A" in name else torch.zeros_like(t) for name, t in start.tensors.items()})


@pytest.mark.parametrize("kind", ["lora", "steering"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_student_that_is_the_base_is_at_no_distance_from_it(kind: Kind, dtype: str, small: BaseModel) -> None:
    base = load_base(small.name, dtype=dtype)
    nothing = of_no_effect(base, kind)
    student = replace(nothing, tensors={name: torch.nn.Parameter(t) for name, t in nothing.tensors.items()})
    passes, chat = Passes(base, student, ["No."]), Chat(base.tokenizer)
    answers = [tuple(chat.encode_response(text)) for text in ("Mix flour and water.", "Waves.", "Hello! What can I do?")]
    other = torch.randn(max(map(len, answers)), base.hidden, dtype=base.model.dtype)  # kept states, which decide nothing here
    examples = [
        Example(text, "", 0.0, (Draw(ids, 1.0, 1.0, other[: len(ids)]),))
        for text, ids in zip(["How do I bake bread?", "hi", "Write a short poem about the sea."], answers, strict=True)
    ]
    for training in (True, False):
        with torch.set_grad_enabled(training):
            batch, _ = passes.batch(examples, 0, 3)
            assert torch.equal(batch.student, batch.teacher)
            assert float(divergences(token_tv, batch).detach().abs().max()) == 0


@pytest.mark.parametrize("kind", ["lora", "steering"])
def test_what_does_nothing_is_measured_at_no_distance_from_the_base(kind: Kind, small: BaseModel) -> None:
    base = load_base(small.name, dtype="bfloat16")
    adapter, engine = of_no_effect(base, kind), Engine(base)
    prompts = ["How do I bake bread?", "hi"]
    drift = measure_drift(engine, Engine(base, adapter), adapter, prompts, engine.generate(prompts, 6, temperature=1.0))
    assert (drift.token_tv, drift.loss) == ([0, 0], [0, 0])
