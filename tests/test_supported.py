"""Models of other makes: what is refused, and that what is not is computed as transformers has it."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from softguard.adapted import adapted, decoder_layers
from softguard.adapters import DIRECTION, VECTORS, Adapter, Kind
from softguard.chat import Chat
from softguard.config import SystemConfig, load_recipe
from softguard.corpus import teach
from softguard.cost import flops_per_token
from softguard.distill import distil
from softguard.engine import Engine
from softguard.errors import SoftguardError
from softguard.evaluation import check_evaluation, engines_of
from softguard.gate import Gate
from softguard.initial import initial_vectors
from softguard.judges import load_judges
from softguard.models import BaseModel, load_base
from softguard.packed import packed_hidden
from softguard.prefix import ConstantPrefix, constant_prefix
from softguard.supported import check_supported
from softguard.system import SafeSystem
from tests.references import LATENT, made, random_adapter

GEMMA3 = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48}
GEMMA4 = {
    "config": "Gemma4TextConfig", "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
TWO_SHAPES: list[tuple[str, dict[str, Any]]] = [  # one of keys, one of values
    ("Youtu", LATENT),
    ("DeepseekV2", {**LATENT, "first_k_dense_replace": 2, "n_routed_experts": 2}),
]
GEMMA3N = {
    "config": "Gemma3nTextConfig", "head_dim": 8, "vocab_size_per_layer_input": 49152, "hidden_size_per_layer_input": 8,
    "laurel_rank": 4, "intermediate_size": 48, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4,
}  # fmt: skip
OF_TOKENS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 49152}
STATES = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
PROMPTS = ["hi", "How do I bake some bread in a very small oven?", "no"]


@pytest.mark.parametrize(
    ("make", "settings", "told"),
    [
        ("Falcon", {}, "keeps its layers in another way"),
        ("Mamba", {}, "layers that are no attention"),
        ("FalconH1", STATES, "layers that are no attention"),
        ("Lfm2", {"layer_types": ["conv", "conv"]}, "layers that are no attention"),
        ("MiniMax", {"num_local_experts": 2}, "cannot be run as is needed here .*MiniMax uses cache of its own"),
        ("Gemma4", GEMMA4 | OF_TOKENS, "cannot be run as is needed here .*do not exactly match the embedding"),
        ("Gemma4", GEMMA4 | {"global_head_dim": 16}, "layers whose keys and values are of several shapes"),
        ("Gemma3n", GEMMA3N, "layers without keys and values of their own"),
        ("HyperCLOVAX", {"logits_scaling": 8.0}, "makes its logits in another way"),
    ],
)
def test_makes_that_would_be_computed_wrongly_are_refused(
    make: str, settings: dict[str, Any], told: str, small: BaseModel
) -> None:
    base = made(small, make, **settings)
    with pytest.raises(SoftguardError, match=rf"^model '{make}' .*{told}.*; use another model$"):
        check_supported(base.name, base.model, base.head)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        ("Qwen3", {"head_dim": 8}),
        ("Olmo2", {}),
        ("Phi3", {}),
        ("Mixtral", {}),
        ("Granite", {"residual_multiplier": 0.22}),
        ("Gemma4", {**GEMMA4, "sliding_window": 48}),
        *TWO_SHAPES,
    ],
)
def test_other_makes_run_as_transformers_has_them(make: str, settings: dict[str, Any], small: BaseModel) -> None:
    base = made(small, make, **settings)
    check_supported(base.name, base.model, base.head)
    prefix, rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)), [[5, 6, 7], [8], [9, 10]]
    with torch.no_grad():
        found = packed_hidden(base, ConstantPrefix(prefix), rows, [len(row) for row in rows])
        for own, row in zip(found, rows, strict=True):
            embeddings = torch.cat([prefix, base.model.get_input_embeddings()(torch.tensor(row))])
            whole = base.model.get_decoder()(inputs_embeds=embeddings[None]).last_hidden_state[0, 3:]
            torch.testing.assert_close(own, whole, rtol=1e-4, atol=1e-4)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))

    def add(_: torch.nn.Module, __: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    hook = decoder_layers(base.model)[1].register_forward_hook(add)
    expected = base.model(torch.tensor([[5, 6, 7]])).logits
    hook.remove()
    steered = adapted(base, Adapter("steering", {f"{DIRECTION}1": vector}, "start", {}))
    torch.testing.assert_close(steered.model(torch.tensor([[5, 6, 7]])).logits, expected)


@pytest.mark.parametrize(
    ("make", "settings", "told"),
    [
        ("GptOss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "attention asks for s_aux"),
        ("StableLm", {}, "a StableLmModel cannot run here"),
    ],
)
def test_attention_that_would_be_trained_wrongly_is_refused(
    make: str, settings: dict[str, Any], told: str, small: BaseModel
) -> None:
    base = made(small, make, **settings)
    with pytest.raises(SoftguardError, match=told):
        packed_hidden(base, ConstantPrefix(torch.randn(3, 32)), [[5, 6], [7]], [1, 1])


def a_gate(base: BaseModel, text: str = "You are careful.") -> Adapter:
    vectors = initial_vectors(base, "gate", text, 4)
    return Adapter("gate", {VECTORS: vectors}, "start", {"refusal": "No."})


def longrope(limit: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    return {
        "max_position_embeddings": 512,
        "original_max_position_embeddings": limit,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "factor": 512 / limit, "original_max_position_embeddings": limit,
            **factors,
        },
    }  # fmt: skip


@pytest.mark.parametrize("make", ["Phi3", "Llama"])
def test_longrope_reads_as_far_as_its_short_factors_reach(make: str, small: BaseModel) -> None:
    """One token more and a longer row would turn the others, and itself otherwise than the prefix that is kept."""
    base = made(small, make, **longrope(64))
    engine = Engine(base)
    room = 64 - engine.prefix.length - len(engine.chat.closing)
    prompts = ["hi", "a" + " a" * (room - 2)]
    for prompt, response in zip(prompts, engine.generate(prompts, 1), strict=True):
        ids = [*engine.chat.prefix.before, *engine.chat.prefix.after, *engine.chat.encode(prompt)]
        assert response.ids == (int(base.model(torch.tensor([ids])).logits[0, -1].argmax()),)
    with pytest.raises(SoftguardError, match=r"prompt 2 has \d+ tokens; .* context of 64; shorten it"):
        engine.generate(["hi", "a" + " a" * (room - 1)], 1)


def test_longrope_of_one_kind_of_layers_counts(small: BaseModel) -> None:
    base = made(small, "Qwen3")
    base.model.config.rope_parameters = {"full_attention": longrope(64)["rope_parameters"], "sliding_attention": None}
    assert base.context == 64


def test_a_dynamic_rope_reads_as_far_as_before(small: BaseModel) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    base = made(small, "Qwen3", head_dim=8, rope_parameters=rope)
    with pytest.raises(SoftguardError, match="context of 512"):
        Engine(base).generate(["a " * 512], 1)


@pytest.mark.parametrize("make", ["Cohere", "Glm"])
def test_a_gate_is_refused_where_its_keys_would_be_turned_wrongly(make: str, small: BaseModel) -> None:
    settings: dict[str, Any] = {"head_dim": 8} if make == "Glm" else {}
    base = made(small, make, **settings)
    chat = Chat(base.tokenizer)
    with pytest.raises(SoftguardError, match=r"in a way that a gate does not know; use distil\.adapter=kv_prefix"):
        Gate.of(base, chat, a_gate(base))


def test_a_gates_keys_turn_by_layer_where_kinds_of_layers_do(small: BaseModel) -> None:
    """Gemma 3's sliding layers have another rotary base than the others."""
    base = made(small, "Gemma3", "Gemma3TextConfig", **GEMMA3)
    ids = base.tokenizer.encode("You are careful.", add_special_tokens=False)[:4]
    gate = Gate.of(base, Chat(base.tokenizer), a_gate(base))
    cache = transformers.DynamicCache(config=base.model.config)
    with torch.no_grad():
        base.model(torch.tensor([ids]), position_ids=torch.arange(30, 30 + len(ids))[None], past_key_values=cache)
    for (keys, _), layer in zip(gate.turned(torch.tensor([30 + len(ids)])), cache.layers, strict=True):
        torch.testing.assert_close(keys, layer.keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["kv_prefix", "gate"])
@pytest.mark.parametrize(("make", "settings"), TWO_SHAPES)
def test_keys_and_values_of_two_shapes_take_no_adapter_of_one(
    make: str, settings: dict[str, Any], kind: Kind, small: BaseModel
) -> None:
    with pytest.raises(SoftguardError, match=rf"two shapes, where a {kind}'s are of one; use distil\.adapter=soft_prompt"):
        initial_vectors(made(small, make, **settings), kind, "You are careful.", 4)


@pytest.mark.parametrize(("make", "settings"), TWO_SHAPES)
def test_soft_prompts_stand_before_models_whose_keys_and_values_are_of_two_shapes(
    make: str, settings: dict[str, Any], small: BaseModel
) -> None:
    base = made(small, make, **settings)
    adapter = Adapter("soft_prompt", {VECTORS: initial_vectors(base, "soft_prompt", "You are careful.", 4)}, "start", {})
    engine = Engine(base, adapter)
    fixed = [*engine.chat.prefix.before, *engine.chat.prefix.after]
    for prompt, response in zip(PROMPTS, engine.generate(PROMPTS, 1), strict=True):
        ids = torch.tensor([*fixed, *engine.chat.encode(prompt)])
        embeddings = torch.cat([adapter.vectors, base.model.get_input_embeddings()(ids)])
        assert response.ids == (int(base.model(inputs_embeds=embeddings[None]).logits[0, -1].argmax()),)


@pytest.mark.parametrize("make", ["Gemma3", "Mistral"])
def test_rows_of_a_window_do_not_depend_on_longer_ones_beside_them(make: str, small: BaseModel) -> None:
    settings = GEMMA3 if make == "Gemma3" else {"sliding_window": 48}
    base = made(small, make, f"{make}TextConfig" if make == "Gemma3" else "", **settings)
    engine = Engine(base)
    together = [response.ids for response in engine.generate(PROMPTS, 5)]
    assert together == [engine.generate([prompt], 5)[0].ids for prompt in PROMPTS]
    assert {len(batch) for batch in engine._batches([[1], [1, 2], [3]], 8)} == {1, 2}


def test_a_gate_wants_room_for_the_prompt_in_the_window(small: BaseModel) -> None:
    base = made(small, "Gemma3", "Gemma3TextConfig", **GEMMA3)
    long, engine = "How do I bake bread? " * 10, Engine(base, a_gate(base))
    with pytest.raises(SoftguardError, match=r"prompt 1 has .* exceeds the window of 48 tokens"):
        engine.log_odds([long])
    with pytest.raises(SoftguardError, match="attention has a window of 48 tokens"):
        engine.prefix.begin([engine.chat.encode(long)])


def test_what_is_run_at_once_wants_room_in_the_window(small: BaseModel) -> None:
    engine = Engine(made(small, "Mistral", sliding_window=48))
    engine.check_fits("hi", 100, "a prompt")  # decoding goes on beyond it
    with pytest.raises(SoftguardError, match=r"a prompt has .* exceeds the window of 48 tokens"):
        engine.check_fits("hi", 100, "a prompt", at_once=99)
    engine.check_fits("hi", 4, "a prompt", at_once=3)
    row, room = engine.chat.encode("hi"), 48 - engine.prefix.length
    for more in (room - len(row), room - len(row) + 1):
        fits = more + len(row) <= room
        with nullcontext() if fits else pytest.raises(SoftguardError, match="window of 48 tokens"):
            engine.check_fits("hi", 100, "a prompt", at_once=more)
        with nullcontext() if fits else pytest.raises(SoftguardError, match="window of 48 tokens"):
            packed_hidden(engine.base, constant_prefix(engine.base, engine.chat, None), [row + [5] * more], [1])


def test_questions_and_a_gates_drift_want_room_for_what_they_run_at_once_alone(small: BaseModel, tmp_path: Path) -> None:
    base = made(small, "Mistral", sliding_window=64)
    short, long = tmp_path / "short.jsonl", tmp_path / "long.jsonl"
    for path, times in ((short, 1), (long, 20)):
        path.write_text(json.dumps({"prompt": "Which one is it? " * times, "answer": "A", "choices": ["A", "B"]}) + "\n")
    system = SafeSystem.from_config(SystemConfig(guard="tests.guards_for_tests:by_word", refusal="No."))
    for adapter, suite, fits in (
        (None, f"choices:{short}", True),
        (random_adapter(base, "kv_prefix"), f"choices:{short}", True),
        (None, f"choices:{long}", False),
        (a_gate(base), "drift", True),
        (random_adapter(base, "kv_prefix"), "drift", False),
    ):
        settings = [f"evaluate.suites=['{suite}']", "evaluate.max_new_tokens=60", "evaluate.limit=1"]
        recipe = load_recipe(overrides=settings)
        engines = engines_of(base, adapter).values()
        with nullcontext() if fits else pytest.raises(SoftguardError, match=r"suite (drift|long) .* exceeds the window of 64"):
            check_evaluation(recipe, tmp_path / "out", system, adapter, engines, load_judges(recipe.evaluate))


def test_an_answer_that_a_window_does_not_hold_is_told_before_training(small: BaseModel, tmp_path: Path) -> None:
    base = made(small, "Mistral", sliding_window=64)
    asked = tmp_path / "asked.txt"
    asked.write_text("How do I build a boat?\nAnd a bomb?\n")
    settings = [f"teach.prompts={asked}", f"teach.validation={asked}", "teach.max_new_tokens=60", "system.refusal=No."]
    settings += ["system.guard=tests.guards_for_tests:by_word", "distil.adapter=kv_prefix", "distil.steps=2"]
    recipe = load_recipe(overrides=settings)
    corpus = teach(recipe, tmp_path / "corpus", base, SafeSystem.from_config(recipe.system))
    drawn = [len(draw.ids) for e in corpus.examples("train", [0, 1]) for draw in e.responses]
    assert corpus.longest_response == max(drawn) > 40
    with pytest.raises(SoftguardError, match="exceeds the window of 64 tokens"):
        distil(recipe, corpus, tmp_path / "adapter", base)


@pytest.mark.parametrize("changes", [["distil.members=2", "distil.n_soft=4"], ["distil.adapter=kv_prefix"]])
def test_a_prompt_that_a_window_does_not_hold_is_told_before_training(
    changes: list[str], small: BaseModel, tmp_path: Path
) -> None:
    base = made(small, "Mistral", sliding_window=64)
    asked = tmp_path / "asked.txt"
    asked.write_text("\n".join(["How do I build a boat?", "And a bomb?", "How do I bake bread? " * 10]))
    settings = [f"teach.prompts={asked}", f"teach.validation={asked}", "teach.max_new_tokens=2", "distil.steps=2", *changes]
    recipe = load_recipe(overrides=["system.guard=tests.guards_for_tests:by_word", *settings])
    corpus = teach(recipe, tmp_path / "corpus", base, SafeSystem.from_config(recipe.system))
    with pytest.raises(SoftguardError, match=r"the longest prompt of corpus .* exceeds the window of 64 tokens"):
        distil(recipe, corpus, tmp_path / "adapter", base)
    assert not (tmp_path / "adapter").exists()


def test_a_model_that_sees_images_too_is_its_text_model(small: BaseModel, tmp_path: Path) -> None:
    text = made(small, "Gemma3", "Gemma3TextConfig", **GEMMA3)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = transformers.Gemma3Config(text_config=text.model.config, vision_config={**vision, "patch_size": 14})
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.model.state_dict())
    model.tie_weights()
    model.save_pretrained(tmp_path)
    small.tokenizer.save_pretrained(tmp_path)
    both = load_base(str(tmp_path))
    assert (both.context, both.window, both.key_heads) == (text.context, text.window, text.key_heads)
    for adapter in (a_gate(text), random_adapter(text, "kv_prefix"), random_adapter(text, "soft_prompt")):
        answers = [[r.ids for r in Engine(base, adapter).generate(PROMPTS[:1], 4)] for base in (text, both)]
        assert answers[0] == answers[1]
        adapter.save(tmp_path / adapter.kind, both)
    gates = [Engine(base, a_gate(text)).log_odds(PROMPTS[:1]) for base in (text, both)]
    torch.testing.assert_close(*gates)
    system = SafeSystem.from_config(SystemConfig(guard="tests.guards_for_tests:by_word"))
    assert flops_per_token(both, system, None, 64) == flops_per_token(text, system, None, 64)
