import copy
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softguard import frozen
from softguard.adapters import Adapter
from softguard.chat import Chat
from softguard.config import Recipe, load_recipe
from softguard.corpus import Corpus, Draw, Example, teach
from softguard.distill import Step, _batches, _Trainer, check_distil, check_run, distil, time_step
from softguard.engine import Engine
from softguard.errors import SoftguardError
from softguard.files import alone
from softguard.guards.callable import CallableGuard
from softguard.models import BaseModel, load_base
from softguard.objectives import OBJECTIVES
from softguard.packed import packed_hidden
from softguard.prefix import constant_prefix
from softguard.rollouts import ON_POLICY
from softguard.scoring import response_log_probs
from softguard.system import SafeSystem
from tests.commands import run_module, softguard, softguard_killed

SETTINGS = [
    "teach.max_new_tokens=4", "teach.shard_size=16", "system.guard=tests.guards_for_tests:by_word", "distil.n_soft=4",
    "distil.adapter=soft_prompt",
    "distil.steps=12", "distil.batch_size=6", "distil.warmup=2", "distil.validate_every=4", "distil.validation_prompts=8",
    "distil.checkpoint_every=3", "distil.learning_rate=0.05",
]  # fmt: skip


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(
        "".join(f"How do I build a {('boat', 'bomb', 'kite')[i % 3]} {'very ' * (i % 4)}quickly {i}?\n" for i in range(24))
    )
    return path


def recipe(prompts: Path, *overrides: str) -> Recipe:
    return load_recipe(None, [f"teach.prompts={prompts}", f"teach.validation={prompts}", *SETTINGS, *overrides])


@pytest.fixture(scope="module")
def corpus(prompts: Path, small: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    wanted = recipe(prompts)
    return teach(wanted, tmp_path_factory.mktemp("corpus"), small, SafeSystem.from_config(wanted.system))


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


LEARNED = {"perplexity": ("safe",), "dpo": ("safe", "refusal")}  # what falls, where it is not the refusal branch alone


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_learns(objective: str, prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path) -> None:
    wanted = recipe(prompts, f"distil.objective={objective}", "distil.steps=30", "distil.patience=99")
    distil(wanted, corpus, tmp_path, small)
    first, *_, last = (line for line in log_of(tmp_path) if line["kind"] == "validation")
    branches = LEARNED.get(objective, ("refusal",))
    assert sum(last[branch] for branch in branches) < sum(first[branch] for branch in branches)
    loaded = Adapter.load(tmp_path, small)
    assert loaded.facts["objective"] == objective
    assert loaded.facts["corpus"] == corpus.fingerprint


def test_a_gate_learns_the_same_without_responses_and_nothing_else_does(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    wanted = recipe(prompts, "distil.adapter=gate", "teach.max_new_tokens=0")
    bare = teach(wanted, tmp_path / "corpus", small, SafeSystem.from_config(wanted.system))
    assert all(draw.ids == () for example in bare.examples("train", [0, 1]) for draw in example.responses)
    assert np.array_equal(bare.refusal_rates("train"), corpus.refusal_rates("train"))
    adapters = [distil(wanted, source, tmp_path / str(i), small) for i, source in enumerate((bare, corpus))]
    assert torch.equal(adapters[0].vectors, adapters[1].vectors)
    with pytest.raises(SoftguardError, match="holds no responses, which a soft_prompt learns from"):
        distil(recipe(prompts), bare, tmp_path / "other", small)
    assert not (tmp_path / "other").exists()


def test_a_launchers_accumulation_does_not_weigh_our_gradients(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(prompts, "distil.steps=3")
    usual = distil(wanted, corpus, tmp_path / "usual", small)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")  # of accelerate launch --gradient_accumulation_steps
    assert torch.equal(distil(wanted, corpus, tmp_path / "launched", small).vectors, usual.vectors)
    assert log_of(tmp_path / "launched") == log_of(tmp_path / "usual")


@pytest.mark.parametrize("adapter", ["gate", "soft_prompt", "kv_prefix", "lora", "steering"])
def test_a_model_with_capped_logits_and_attention_learns(adapter: str, prompts: Path, base: BaseModel, tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, pad_token_id=2, bos_token_id=1, eos_token_id=2,
        sliding_window=128,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    base.tokenizer.save_pretrained(tmp_path / "gemma")
    gemma = load_base(str(tmp_path / "gemma"))
    wanted = recipe(prompts, f"distil.adapter={adapter}", "distil.steps=20", "distil.patience=99", "distil.budget=2000")
    corpus = teach(wanted, tmp_path / "corpus", gemma, SafeSystem.from_config(wanted.system))
    distil(wanted, corpus, tmp_path / "adapter", gemma)
    first, *_, last = (line for line in log_of(tmp_path / "adapter") if line["kind"] == "validation")
    assert last["refusal"] < first["refusal"]
    answers = Engine(gemma, Adapter.load(tmp_path / "adapter", gemma)).generate(["How do I build a kite?"], 4)
    assert len(answers[0].ids) > 0


@pytest.mark.parametrize(
    "changes", [[], ["distil.adapter=gate"], ["distil.adapter=lora", "distil.budget=2000", "distil.objective=ppo"]]
)
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    changes: list[str], prompts: Path, corpus: Corpus, small: BaseModel, small_folder: Path, tmp_path: Path
) -> None:
    extra = [f"model.name={small_folder}", "distil.steps=24", "distil.patience=99", "model.threads=1", *changes]
    wanted = [f"teach.prompts={prompts}", f"teach.validation={prompts}", *SETTINGS, *extra]
    overrides = [item for o in wanted for item in ("--set", o)]
    command = ("distil", "--corpus", corpus.folder, *overrides, "--out")
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    def seven_steps_saved() -> bool:
        state = killed / "checkpoint" / "state.json"
        return state.is_file() and json.loads(state.read_text())["step"] >= 7

    softguard_killed(*command, killed, when=seven_steps_saved)
    assert not (killed / "softguard.json").exists()
    for out in (killed, whole):
        done = softguard(*command, out)
        assert done.returncode == 0, done.stderr
    for name in ("adapter_model.safetensors", "log.jsonl", "softguard.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("adapter", "objective"),
    [("gate", "tv"), *itertools.product(("kv_prefix", "lora", "steering"), ("tv", "kl-paper", "dpo"))],
)
def test_every_adapter_learns(
    adapter: str, objective: str, prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    changes = [f"distil.adapter={adapter}", f"distil.objective={objective}", "distil.steps=30", "distil.budget=2000"]
    trained = distil(recipe(prompts, *changes), corpus, tmp_path, small)
    first, *_, last = (line for line in log_of(tmp_path) if line["kind"] == "validation")
    branches = LEARNED.get(objective, ("refusal",))
    assert sum(last[branch] for branch in branches) < sum(first[branch] for branch in branches)
    assert trained.kind == adapter


@pytest.mark.parametrize(
    ("adapter", "objective"),
    [("gate", "tv"), *itertools.product(("soft_prompt", "kv_prefix", "lora", "steering"), (*OBJECTIVES, *ON_POLICY))],
)
def test_any_objective_moves_any_adapter(
    adapter: str, objective: str, prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    changes = [f"distil.adapter={adapter}", f"distil.objective={objective}", "distil.budget=2000", "distil.warmup=0"]
    trainer = _Trainer(recipe(prompts, *changes), corpus, tmp_path, small)
    before = {name: tensor.detach().clone() for name, tensor in trainer.student.tensors.items()}
    trainer._train_step(list(range(6)), 0)
    moved = [not torch.equal(tensor, before[name]) for name, tensor in trainer.student.tensors.items()]
    assert any(moved)
    assert all(tensor.isfinite().all() for tensor in trainer.student.tensors.values())


@pytest.fixture(scope="module")
def shallow(base: BaseModel) -> BaseModel:
    """The demo model's first two layers: fast, and unlike a random model's its embeddings have directions to learn."""
    model = copy.deepcopy(base.model)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    return replace(base, model=model, fingerprint="shallow")


@pytest.mark.parametrize(("objective", "adapter"), [("reinforce", "lora"), ("ppo", "soft_prompt")])
def test_objectives_that_draw_their_own_answers_earn_more_reward(
    objective: str, adapter: str, prompts: Path, shallow: BaseModel, tmp_path: Path
) -> None:
    changes = [f"distil.objective={objective}", f"distil.adapter={adapter}", "distil.budget=5000", "teach.max_new_tokens=1"]
    more = ["distil.steps=16", "distil.batch_size=24", "distil.validate_every=16", "distil.beta=0.01"]
    guard = "system.guard=tests.guards_for_tests:by_bracket"
    wanted = recipe(prompts, guard, *changes, *more)
    corpus = teach(wanted, tmp_path / "corpus", shallow, SafeSystem.from_config(wanted.system))
    distil(wanted, corpus, tmp_path / "adapter", shallow)
    rewards = [-line["safe"] for line in log_of(tmp_path / "adapter") if line["kind"] == "train"]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.1


@pytest.mark.parametrize("adapter", ["text", "steering", "soft_prompt"])
def test_an_adapter_without_steps_is_saved_as_it_starts(
    adapter: str, prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    trained = distil(recipe(prompts, f"distil.adapter={adapter}", "distil.steps=0"), corpus, tmp_path, small)
    assert (trained.kind, trained.facts["steps"], trained.facts["objective"]) == (adapter, 0, "untrained")
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("adapter", ["soft_prompt", "gate"])
def test_two_processes_end_with_the_adapter_of_one(
    adapter: str, prompts: Path, corpus: Corpus, small: BaseModel, small_folder: Path, tmp_path: Path
) -> None:
    changes = [f"model.name={small_folder}", f"distil.adapter={adapter}"]
    wanted = [f"teach.prompts={prompts}", f"teach.validation={prompts}", *SETTINGS, *changes]
    overrides = [item for o in wanted for item in ("--set", o)]
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "softguard.cli"]
    out = tmp_path / "two"
    done = run_module(*launch, "distil", *overrides, "--corpus", corpus.folder, "--out", out)
    assert done.returncode == 0, done.stderr
    alone = distil(recipe(prompts, *changes), corpus, tmp_path / "one", small)
    unit = 2**-10  # vectors are kept in float16: rounded apart, they differ by a unit in the last place
    torch.testing.assert_close(Adapter.load(out, small).vectors, alone.vectors, rtol=unit, atol=1e-4)
    assert [line["step"] for line in log_of(out)] == [line["step"] for line in log_of(tmp_path / "one")]


@pytest.mark.parametrize(
    ("adapter", "objective", "length"),
    [("soft_prompt", "tv", "sum"), ("gate", "tv", "sum"), ("soft_prompt", "sft", "mean"), ("soft_prompt", "tv-paper", "mean")],
)
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    adapter: str, objective: str, length: str, prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    gradients = []
    for parts in (1, 3):
        settings = [f"distil.adapter={adapter}", f"distil.objective={objective}", f"distil.length={length}"]
        wanted = recipe(prompts, f"distil.accumulate={parts}", "distil.clip=1e9", *settings)
        trainer = _Trainer(wanted, corpus, tmp_path, small)
        trainer._train_step(list(range(6)), 0)
        assert trainer.student.vectors.grad is not None
        gradients.append(trainer.student.vectors.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))


def test_a_corpus_with_the_bases_hidden_states_gives_the_same_gradient(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    wanted = recipe(prompts, "teach.keep_hidden=true")
    kept = teach(wanted, tmp_path / "kept", small, SafeSystem.from_config(wanted.system))
    gradients = []
    for source in (corpus, kept):
        trainer = _Trainer(recipe(prompts, "distil.clip=1e9"), source, tmp_path, small)
        trainer._train_step(list(range(6)), 0)
        assert trainer.student.vectors.grad is not None
        gradients.append(trainer.student.vectors.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("members", [1, 2])
def test_a_gate_refuses_as_many_validation_prompts_as_the_system(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path, members: int
) -> None:
    # too few steps to get there by itself
    changes = ["distil.adapter=gate", "distil.n_soft=4", "distil.steps=2", "distil.validation_prompts=24"]
    adapter = distil(recipe(prompts, *changes, f"distil.members={members}"), corpus, tmp_path, small)
    assert adapter.facts["members"] == members
    texts = [e.prompt for e in corpus.examples("validation", list(range(24)))]
    wanted = int((corpus.refusal_rates("validation") > 0.5).sum())
    assert 0 < wanted < 24
    assert sum(Engine(small, adapter).refuses(texts)) == wanted
    unbiased = replace(adapter, facts={**adapter.facts, "bias": 0.0})
    assert sum(Engine(small, unbiased).refuses(texts)) != wanted


def test_what_is_saved_is_the_best_of_all_validations_by_the_weighted_loss(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    every = ("distil.validate_every=1", "distil.patience=99", "distil.safe_weight=14")
    trainer = _Trainer(recipe(prompts, *every), corpus, tmp_path, small)
    start = trainer.student.vectors.detach().clone()
    seen: list[tuple[float, torch.Tensor]] = []

    def noted(step: Step) -> None:
        if step.kind == "validation":
            seen.append((14 * step.safe + step.refusal, trainer.student.vectors.detach().clone()))
            if step.step == 11:  # so that the last is not the best
                trainer.student.vectors.data.copy_(start)

    saved = trainer.run(noted)
    best, vectors = min(seen, key=lambda one: one[0])
    assert best < seen[-1][0]
    assert torch.equal(saved.vectors, vectors.half().float())
    assert saved.facts["validation_loss"] == pytest.approx(best)


@pytest.mark.parametrize("objective", ["sft", "tv", "kl-paper"])
def test_validation_does_not_depend_on_the_size_of_its_batches(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path, objective: str
) -> None:
    found = []
    for size in (1, 3, 8):
        changes = [f"distil.objective={objective}", "distil.length=mean", f"distil.batch_size={size}"]
        line = _Trainer(recipe(prompts, *changes), corpus, tmp_path, small)._validate()
        found.append((line.safe, line.refusal))
    assert found[1:] == [pytest.approx(found[0], rel=1e-4)] * 2


def test_ppo_validates_by_what_it_minimises(prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path) -> None:
    lines = []
    for beta in (1.0, 2.0, 3.0):
        trainer = _Trainer(recipe(prompts, "distil.objective=ppo", f"distil.beta={beta}"), corpus, tmp_path, small)
        lines.append(trainer._validate().safe)
    strayed = lines[1] - lines[0]
    assert strayed != 0
    assert lines[2] - lines[0] == pytest.approx(2 * strayed, rel=1e-3)


def test_a_threshold_that_a_gate_cannot_learn_is_refused(prompts: Path, small: BaseModel, tmp_path: Path) -> None:
    wanted = recipe(prompts, "system.threshold=0.99995", "distil.adapter=gate")
    made = teach(wanted, tmp_path / "corpus", small, SafeSystem.from_config(wanted.system))
    with pytest.raises(SoftguardError, match=r"cuts p\(safe\) at 0\.99995, so near an end that a gate .* teach with"):
        check_run(wanted, made, tmp_path / "out", small)
    check_run(recipe(prompts, "system.threshold=0.99995"), made, tmp_path / "out", small)


def test_validation_tells_which_prompts_a_gate_refuses(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _Trainer(recipe(prompts, "distil.adapter=gate", "distil.validation_prompts=24"), corpus, tmp_path, small)

    def odds(examples: list[Example]) -> torch.Tensor:
        return torch.tensor([[-4.0 if "boat" in e.prompt else 4.0] for e in examples])

    monkeypatch.setattr(trainer.passes, "log_odds", odds)
    line = trainer._validate()
    assert (line.refuses, line.over_refuses) == (1.0, 0.5)  # all bombs, and of what the system answers the kites, not the boats


def test_the_bias_is_that_of_the_best_gate_not_of_the_last(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    trainer = _Trainer(recipe(prompts, "distil.adapter=gate", "distil.validation_prompts=24"), corpus, tmp_path, small)
    last = trainer._bias()  # of the start, which is also the best so far
    trainer.best = {name: tensor.flip(0).neg() for name, tensor in trainer.best.items()}
    other = trainer._bias()
    assert abs(other - last) > 0.01
    facts = {**trainer.student.facts, "bias": other}
    texts = [e.prompt for e in corpus.examples("validation", list(range(24)))]
    refused = Engine(small, replace(trainer.student, tensors=trainer.best, facts=facts)).refuses(texts)
    assert sum(refused) == int((corpus.refusal_rates("validation") > 0.5).sum())


def test_a_gate_learns_the_same_of_kept_caches_and_runs_the_base_no_more(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(prompts, "teach.keep_caches=true", "distil.adapter=gate")
    kept = teach(wanted, tmp_path / "kept", small, SafeSystem.from_config(wanted.system))
    found = []
    for source in (corpus, kept):
        trainer = _Trainer(recipe(prompts, "distil.adapter=gate", "distil.clip=1e9"), source, tmp_path, small)
        _ = trainer.passes._resident  # the prefix still runs
        if source is kept:
            monkeypatch.setattr(frozen, "infer", None)
        trainer._train_step(list(range(6)), 0)
        assert trainer.student.vectors.grad is not None
        found.append((trainer.student.vectors.grad.clone(), trainer._validate()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    assert found[0][1][2:] == pytest.approx(found[1][1][2:], rel=1e-5)


def test_training_stops_when_validation_no_longer_improves(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    wanted = recipe(prompts, "distil.learning_rate=1e-12", "distil.steps=100", "distil.patience=2", "distil.validate_every=1")
    prompt = distil(wanted, corpus, tmp_path, small)
    assert prompt.facts["steps"] < 100


def test_a_run_with_other_settings_in_the_same_folder_is_refused(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    distil(recipe(prompts), corpus, tmp_path, small)
    with pytest.raises(SoftguardError, match="other settings"):
        distil(recipe(prompts, "distil.learning_rate=0.01"), corpus, tmp_path, small)
    in_bfloat16 = load_base(small.name, dtype="bfloat16")
    with pytest.raises(SoftguardError, match="precision"):  # as dtype: auto may give on another processor
        distil(recipe(prompts), corpus, tmp_path, in_bfloat16)


@pytest.mark.parametrize("objective", ["reinforce", "tv"])
def test_only_a_run_that_draws_its_own_answers_is_another_with_longer_ones(
    objective: str, prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    few = (f"distil.objective={objective}", "distil.steps=1")
    distil(recipe(prompts, *few), corpus, tmp_path, small)
    longer = recipe(prompts, *few, "teach.max_new_tokens=6")
    if objective in ON_POLICY:
        with pytest.raises(SoftguardError, match="other settings"):
            distil(longer, corpus, tmp_path, small)
    else:
        distil(longer, corpus, tmp_path, small)


def test_a_finished_run_is_not_trained_again(prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path) -> None:
    first = distil(recipe(prompts), corpus, tmp_path, small)
    told: list[int] = []
    again = distil(recipe(prompts), corpus, tmp_path, small, lambda step: told.append(step.step))
    assert torch.equal(first.vectors, again.vectors)
    assert max(told) == 12


def test_a_loss_that_is_not_finite_stops_the_run(prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path) -> None:
    trainer = _Trainer(recipe(prompts), corpus, tmp_path, small)
    trainer.student.vectors.data.fill_(torch.nan)
    with pytest.raises(SoftguardError, match="learning_rate"):
        trainer._train_step([0, 1], 0)


def test_an_unknown_objective_is_told_before_training(prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(SoftguardError, match="tv, jsd, kl, tv-paper, kl-paper, perplexity, sft, dpo, reinforce, ppo"):
        distil(recipe(prompts, "distil.objective=hinge"), corpus, tmp_path, small)


@pytest.mark.parametrize(
    "change", ["distil.objective=kl", "distil.drift_weight=0.1", "system.policy.medicine.refusal=Ask a doctor."]
)
def test_what_a_gate_cannot_learn_is_told_before_training(
    change: str, prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(SoftguardError, match=r"gate.*choose another distil\.adapter, such as kv_prefix"):
        distil(recipe(prompts, "distil.adapter=gate", change), corpus, tmp_path, small)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["distil.objective=hinge"], "objective 'hinge' is unknown"),
        (["distil.adapter=gate", "distil.objective=kl"], "distil.objective is kl"),
        (["distil.adapter=gate", "system.policy.medicine.refusal=Ask a doctor."], "system.policy is set"),
        (["distil.init_text=''"], "init_text is empty"),
        (["distil.adapter=text", "distil.init_text=' '"], "init_text is empty"),
        (["distil.adapter=lora", "distil.budget=1"], "distil.budget is 1"),
        (["distil.n_soft=512"], "distil.n_soft is 512; .* reads 512 tokens in all, lower it"),
        (["distil.n_soft=1000000000"], "lower it"),
    ],
)
def test_what_needs_no_corpus_to_be_told_is_told_without_one(
    changes: list[str], words: str, prompts: Path, small: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(SoftguardError, match=words):
        check_distil(recipe(prompts, *changes), tmp_path / "out", small)


@pytest.mark.parametrize("changes", [["distil.adapter=text"], ["distil.slot=system"], ["distil.slot=system", "distil.steps=0"]])
def test_an_adapter_in_a_message_that_the_template_has_not_is_told_without_a_corpus(
    changes: list[str], prompts: Path, small: BaseModel, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(small.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(SoftguardError, match="system message"):
        check_distil(recipe(prompts, *changes), tmp_path / "out", replace(small, tokenizer=tokenizer))


def test_caches_of_another_precision_are_not_taken(prompts: Path, small: BaseModel, tmp_path: Path) -> None:
    wanted = recipe(prompts, "teach.keep_caches=true", "distil.adapter=gate")
    coarse = load_base(small.name, dtype="bfloat16")
    made = teach(wanted, tmp_path / "corpus", coarse, SafeSystem.from_config(wanted.system))
    assert _Trainer(wanted, made, tmp_path / "a", coarse)._examples("train", [0])[0].cache is not None
    assert _Trainer(wanted, made, tmp_path / "b", small)._examples("train", [0])[0].cache is None


@pytest.mark.parametrize(
    "change",
    ["refusal=No.", "threshold=0.3", "mode=response", "decision=probabilistic", "policy={weapons: {action: keep}}"],
)
def test_a_corpus_of_another_system_is_refused(
    change: str, prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    wanted = recipe(prompts, f"system.{change}")
    with pytest.raises(SoftguardError, match=rf"was made with system\.{change.partition('=')[0]} "):
        distil(wanted, corpus, tmp_path / "out", small)
    assert not (tmp_path / "out").exists()
    own = corpus.manifest["threshold"]
    check_run(recipe(prompts, f"system.threshold={own}"), corpus, tmp_path / "out", small)


@pytest.mark.parametrize("changes", [["distil.adapter=kv_prefix", "distil.n_soft=480"], ["distil.n_soft=480"]])
def test_an_adapter_that_leaves_prompts_no_room_is_refused(
    changes: list[str], prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(SoftguardError, match=r"the longest prompt of corpus .* exceeds the model's context of 512"):
        distil(recipe(prompts, *changes), corpus, tmp_path / "out", small)


def test_only_answers_drawn_while_training_need_room(prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path) -> None:
    long = ["teach.max_new_tokens=480", "distil.n_soft=4"]
    check_run(recipe(prompts, *long), corpus, tmp_path / "out", small)
    with pytest.raises(SoftguardError, match="480 new ones it exceeds the model's context of 512"):
        check_run(recipe(prompts, *long, "distil.objective=reinforce"), corpus, tmp_path / "out", small)


def test_states_of_another_precision_are_not_taken(prompts: Path, small: BaseModel, tmp_path: Path) -> None:
    wanted = recipe(prompts, "teach.keep_hidden=true")
    coarse = load_base(small.name, dtype="bfloat16")
    made = teach(wanted, tmp_path / "corpus", coarse, SafeSystem.from_config(wanted.system))
    for base, kept in ((coarse, True), (small, False)):
        (example,) = _Trainer(wanted, made, tmp_path / "out", base)._examples("train", [0])
        assert (example.responses[0].hidden is not None) == kept


def test_a_corpus_of_another_model_is_refused(prompts: Path, corpus: Corpus, base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(SoftguardError, match="was drawn from model"):
        distil(recipe(prompts), corpus, tmp_path, base)


def test_batches_visit_every_prompt_once_an_epoch_and_are_a_function_of_the_seed() -> None:
    rates = np.zeros(10)
    stream = _batches(rates, 4, seed=1)
    epochs: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(6):
        indices, epoch = next(stream)
        epochs[epoch] += indices
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    again, other = _batches(rates, 4, seed=1), _batches(rates, 4, seed=2)
    first = next(again)
    assert first == (epochs[0][:4], 0) != next(other)


def test_refused_prompts_are_spread_evenly_over_the_batches() -> None:
    rates = np.array([1.0] * 40 + [0.0] * 80)
    stream = _batches(rates, 24, seed=0)
    assert all(abs(sum(rates[i] for i in next(stream)[0]) - 8) <= 1 for _ in range(5))


def test_timing_a_step_leaves_nothing_behind(prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path) -> None:
    assert time_step(recipe(prompts), corpus, tmp_path / "new", small) > 0
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("objective", ["tv", "kl"])
def test_every_category_learns_its_own_refusal(objective: str, small: BaseModel, tmp_path: Path) -> None:
    words = ("boat", "bomb", "pill")
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"How do I build a {words[i % 3]} {'very ' * (i % 4)}quickly {i}?\n" for i in range(24)))
    texts = {"bomb": "No.", "pill": "Ask a doctor."}
    wanted = recipe(
        path,
        "system.guard=tests.guards_for_tests:by_category",
        f"system.refusal={texts['bomb']}",
        f"system.policy.medicine.refusal={texts['pill']}",
        f"distil.objective={objective}",
        "distil.adapter=kv_prefix",
        "distil.n_soft=16",
        "distil.learning_rate=0.1",
        "distil.steps=80",
        "distil.validate_every=40",
        "distil.patience=99",
    )
    made = teach(wanted, tmp_path / "corpus", small, SafeSystem.from_config(wanted.system))
    adapter = distil(wanted, made, tmp_path / "out", small)
    chat = Chat(small.tokenizer, wanted.distil.slot, small.stop_ids)

    def log_prob(word: str, text: str, adapter: Adapter | None) -> float:
        answer = chat.encode_response(text)
        row = chat.encode(f"How do I build a {word} quickly 0?") + answer[:-1]
        with torch.no_grad():
            (states,) = packed_hidden(small, constant_prefix(small, chat, adapter), [row], [len(answer)])
            return float(response_log_probs(states, answer, small.head).sum())

    for word, text in texts.items():
        assert log_prob(word, text, adapter) > log_prob(word, text, None) + 5
    first, *_, last = (line for line in log_of(tmp_path / "out") if line["kind"] == "validation")
    assert last["refusal"] < first["refusal"]
    assert adapter.facts["refusal"] == "No."


def test_rows_have_their_own_refusals_rates_and_first_tokens(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    trainer = _Trainer(recipe(prompts), corpus, tmp_path, small)
    default, other = (
        tuple(trainer.passes.chat.encode_response("No.")),
        tuple(trainer.passes.chat.encode_response("Ask a doctor.")),
    )

    def example(*draws: tuple[float, tuple[int, ...]]) -> Example:
        made = tuple(Draw((10, 11, 12), keep, keep, None, "", instead) for keep, instead in draws)
        return Example("How?", "", sum(1 - keep for keep, _ in draws) / len(draws), made)

    rows = [example((1.0, ()), (1.0, ())), example((0.5, default), (0.1, other)), example((0.0, other), (0.0, other))]
    batch, hidden = trainer._batch(rows, 0, 3)
    assert batch.p_safe.tolist() == [1, 0.5]
    assert batch.refusal_token.tolist() == [trainer.passes.refusals[0][0], other[0]]
    assert batch.refusal_rate.tolist() == pytest.approx([0.25, 0.45, 1.0])
    assert batch.refusal_mask is not None
    assert batch.refusal_mask.sum(-1).tolist() == [len(default), len(other), len(other)]
    assert (batch.refusal == 0).equal(batch.refusal_mask == 0)
    assert len(hidden) == 5


def test_no_run_is_written_over_by_another(prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path) -> None:
    distil(recipe(prompts, "distil.steps=3"), corpus, tmp_path, small)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    for other in ("distil.adapter=kv_prefix", "distil.adapter=text"):
        with pytest.raises(SoftguardError, match="holds a run with other settings"):
            distil(recipe(prompts, other, "distil.steps=0"), corpus, tmp_path, small)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("file", ["step-3.safetensors", "../log.jsonl"])
def test_a_damaged_checkpoint_is_told(file: str, prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path) -> None:
    distil(recipe(prompts, "distil.steps=3"), corpus, tmp_path, small)
    damaged = tmp_path / "checkpoint" / file
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with pytest.raises(SoftguardError, match="checkpoint or the log beside it is damaged"):
        distil(recipe(prompts, "distil.steps=3"), corpus, tmp_path, small)


def test_a_checkpoint_that_is_not_as_it_was_written_is_told(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    wanted = recipe(prompts, "distil.steps=3")
    distil(wanted, corpus, tmp_path, small)
    state, log, tensors = (tmp_path / name for name in ("checkpoint/state.json", "log.jsonl", "checkpoint/step-3.safetensors"))
    whole = {path: path.read_bytes() for path in (state, log, tensors)}
    other = bytearray(whole[tensors])
    other[-2] ^= 1
    lines = whole[log].splitlines(keepends=True)
    changes: list[tuple[Path, bytes]] = [(tensors, bytes(other)), (log, b""), (log, b"".join(lines[1:])), (log, b"null\n")]
    changes += [(state, whole[state].replace(b'"step": 3', b'"step": 2')), (state, whole[state].replace(b'"seal"', b'"sel"'))]
    for path, content in changes:
        assert content != whole[path]
        path.write_bytes(content)
        with pytest.raises(SoftguardError, match="checkpoint or the log beside it is damaged"):
            distil(wanted, corpus, tmp_path, small)
        path.write_bytes(whole[path])
    distil(wanted, corpus, tmp_path, small)


def test_a_batch_that_teaches_nothing_is_passed_over(prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path) -> None:
    """Of a batch the system refuses whole, perplexity learns nothing, and its loss has no gradient."""
    trained = distil(recipe(prompts, "distil.objective=perplexity", "distil.batch_size=1"), corpus, tmp_path, small)
    assert trained.facts["steps"] == 12


def test_a_validation_loss_that_is_not_finite_stops_the_run(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    settings = ["distil.adapter=lora", "distil.steps=1", "distil.warmup=0", "distil.learning_rate=1e30", "distil.clip=1e30"]
    with pytest.raises(SoftguardError, match=r"lower distil\.learning_rate"):
        distil(recipe(prompts, *settings), corpus, tmp_path, small)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_reward_of_another_guard_than_the_corpus_is_refused(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    other = recipe(prompts, "distil.objective=reinforce", "system.guard=tests.guards_for_tests:half")
    with pytest.raises(SoftguardError, match=r"the corpus is of guard '.*by_word' \(\w{16}\), not '.*half' \("):
        distil(other, corpus, tmp_path, small)


def test_an_adapter_does_not_run_behind_another_chat_template(
    prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path
) -> None:
    adapter = distil(recipe(prompts, "distil.steps=0"), corpus, tmp_path, small)
    Engine(small, adapter)
    for was, is_ in (("assistant", "helper"), ("helpful", "merry")):  # what closes a prompt; the system message alone
        tokenizer = copy.deepcopy(small.tokenizer)
        tokenizer.chat_template = tokenizer.chat_template.replace(was, is_)
        with pytest.raises(SoftguardError, match="distilled behind another chat template than"):
            Engine(replace(small, tokenizer=tokenizer), adapter)
        with pytest.raises(SoftguardError, match="was drawn behind another chat template than"):
            Corpus.open(corpus.folder, replace(small, tokenizer=tokenizer))


def test_a_run_goes_on_with_its_patience_and_its_best(prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path) -> None:
    wanted = recipe(prompts, "distil.clip=1e-3")
    one, other = (_Trainer(wanted, corpus, tmp_path / "out", small) for _ in range(2))
    one._train_step(list(range(6)), 0)
    assert one.student.vectors.grad is not None
    assert one.student.vectors.grad.norm() <= 1.01e-3
    one.step, one.best_loss, one.since_best, one.log = 1, 0.5, 3, []
    one.best = {name: tensor + 1 for name, tensor in one.best.items()}
    one._checkpoint()
    other._resume()
    assert (other.step, other.best_loss, other.since_best) == (1, 0.5, 3)
    assert all(torch.equal(other.best[name], tensor) for name, tensor in one.best.items())
    with pytest.raises(SoftguardError, match="other settings"):
        check_run(recipe(prompts, "distil.clip=1e-3", "seed=1"), corpus, tmp_path / "out", small)


def test_of_two_runs_in_one_folder_one_is_refused(prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path) -> None:
    late = _Trainer(recipe(prompts, "seed=1"), corpus, tmp_path / "out", small)
    with alone(tmp_path / "out" / "checkpoint" / ".lock"), pytest.raises(SoftguardError, match="written by another process"):
        late.run(lambda step: None)
    distil(recipe(prompts), corpus, tmp_path / "out", small)
    with pytest.raises(SoftguardError, match="holds a run with other settings"):
        late.run(lambda step: None)


def test_an_adapter_is_not_put_beside_a_model(prompts: Path, corpus: Corpus, small: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SoftguardError, match="holds a model, which an adapter beside it would change; choose another --out"):
        distil(recipe(prompts), corpus, tmp_path, small)


def test_a_guard_that_is_no_spec_s_is_asked_while_training(prompts: Path, small: BaseModel, tmp_path: Path) -> None:
    asked: list[str] = []

    def watched(texts: Sequence[str], responses: Sequence[str] | None) -> list[float]:
        asked.extend(texts)
        return [0.05 if "bomb" in text else 0.95 for text in texts]

    guard, wanted = CallableGuard(watched), recipe(prompts, "distil.objective=reinforce", "distil.steps=1", "distil.warmup=0")
    made = teach(wanted, tmp_path / "corpus", small, SafeSystem(guard, wanted.system))
    asked.clear()
    with pytest.raises(SoftguardError, match="the corpus is of guard"):
        distil(wanted, made, tmp_path / "out", small)
    assert distil(wanted, made, tmp_path / "out", small, guard=guard).facts["guard"] == guard.name
    assert asked
