"""What a GPU computes is what the processor computes; skipped where there is none."""

import json
from pathlib import Path

import pytest
import torch

from softguard.adapters import Adapter
from softguard.config import load_recipe
from softguard.corpus import teach
from softguard.distill import distil
from softguard.engine import Engine
from softguard.models import load_base
from softguard.system import SafeSystem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the processor, and there is no GPU")


@pytest.mark.parametrize(
    "changes",
    [
        ["gate"],
        ["gate", "teach.keep_caches=true"],
        ["soft_prompt"],
        ["kv_prefix", "distil.objective=jsd"],
        ["lora", "distil.objective=kl", "distil.budget=2000"],
        ["steering", "distil.objective=dpo"],
        ["kv_prefix", "distil.objective=sft"],
        ["kv_prefix", "distil.objective=perplexity"],
    ],
)
def test_a_corpus_and_an_adapter_are_those_of_the_processor(changes: list[str], small_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "".join(f"How do I build a {('boat', 'bomb')[i % 2]} {'very ' * (i % 4)}quickly {i}?\n" for i in range(24))
    )
    recipe = load_recipe(
        None,
        [
            f"teach.prompts={prompts}", f"teach.validation={prompts}", "teach.max_new_tokens=4", "teach.keep_hidden=true",
            "system.guard=tests.guards_for_tests:by_word", "distil.n_soft=4", "distil.steps=6", "distil.batch_size=6",
            "distil.warmup=2", "distil.validate_every=3", "distil.learning_rate=0.01", f"distil.adapter={changes[0]}",
            *changes[1:],
        ],
    )  # fmt: skip
    losses, drawn, answers = [], [], []
    for device in ("cpu", "cuda"):
        base, folder = load_base(str(small_folder), device=device), tmp_path / device
        assert base.device.type == device
        corpus = teach(recipe, folder / "corpus", base, SafeSystem.from_config(recipe.system))
        drawn.append([e.responses[0].ids for e in corpus.examples("train", list(range(24)))])
        adapter = distil(recipe, corpus, folder / "adapter", base)
        log = [json.loads(line) for line in (folder / "adapter" / "log.jsonl").read_text().splitlines()]
        losses.append([line["safe"] + line["refusal"] for line in log])
        engine = Engine(base, Adapter.load(folder / "adapter", base))
        answers.append([r.ids for r in engine.generate(["How do I build a boat?", "How do I build a kite very quickly?"], 5)])
        assert all(tensor.device.type == device for tensor in adapter.tensors.values())
    assert drawn[0] == drawn[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3, abs=1e-4)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("objective", ["reinforce", "ppo"])
def test_a_policy_is_trained(objective: str, small_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"How do I build a {('boat', 'bomb')[i % 2]} {i}?\n" for i in range(12)))
    recipe = load_recipe(
        None,
        [
            f"teach.prompts={prompts}", f"teach.validation={prompts}", "teach.max_new_tokens=4",
            "system.guard=tests.guards_for_tests:by_word", "distil.adapter=kv_prefix", "distil.n_soft=4", "distil.steps=3",
            "distil.batch_size=6", "distil.validate_every=3", f"distil.objective={objective}",
        ],
    )  # fmt: skip
    base = load_base(str(small_folder), device="cuda")
    corpus = teach(recipe, tmp_path / "corpus", base, SafeSystem.from_config(recipe.system))
    start = distil(
        load_recipe(None, ["distil.adapter=kv_prefix", "distil.n_soft=4", "distil.steps=0"]), corpus, tmp_path / "0", base
    )
    moved = distil(recipe, corpus, tmp_path / "adapter", base)
    assert not torch.equal(start.vectors, moved.vectors)
