"""The benchmarks' sides still run, on a small model; what they measure is for a quiet machine."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import draw, gate, step
from softguard.chat import Chat
from softguard.engine import Engine
from softguard.models import BaseModel

SHAPE = step.Shape(batch=2, prompt=40, response=5)


@pytest.mark.parametrize("keep_hidden", [False, True])
def test_a_step_moves_the_vectors_and_its_products_can_be_made_again(small: BaseModel, keep_hidden: bool) -> None:
    trainer = step.our_trainer(small, SHAPE, keep_hidden)
    before = trainer.student.vectors.detach().clone()
    one = partial(trainer._train_step, [0, 1], 0)
    step.products(small, one)()
    one()  # the first step of a warm-up has no rate
    assert not torch.equal(trainer.student.vectors.detach(), before)


def test_a_gate_steps_all_ways_alike(small: BaseModel) -> None:
    sides = gate.sides(small, 3)
    losses = [sides[name]().safe for name in ("softguard", "from kept caches", "by transformers")]
    assert losses == [pytest.approx(losses[0], rel=1e-3)] * 3
    sides["products of softguard"]()


def test_peers_step_too(small_folder: object) -> None:
    from softguard.models import load_base

    step.peft_gkd(load_base(str(small_folder)), SHAPE)()


def test_both_draw_up_to_as_many_tokens(small: BaseModel) -> None:
    texts, chat = ["one", "two words"], Chat(small.tokenizer, "start", small.stop_ids)
    most = len(texts) * draw.TOKENS
    assert 0 < draw.draw(Engine(small), texts, 2) <= most
    assert 0 < draw.generate(small, chat, texts, 2) <= most


def test_products_of_drawing_are_all_it_makes_but_for_fused_attention(small: BaseModel) -> None:
    engine = Engine(small)

    def ours() -> None:
        draw.draw(engine, ["one", "two words"], 2)

    assert _operations(step.products(small, ours)) == _operations(ours) > 0


def _operations(run: Callable[[], None]) -> int:
    """Of matrix products, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "attention" not in str(operation))
