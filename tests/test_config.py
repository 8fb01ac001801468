"""Recipes: YAML in and out, typing slips, impossible values, and the fingerprint."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from softguard.config import (
    Action,
    DistilConfig,
    EvaluateConfig,
    Recipe,
    SystemConfig,
    TeachConfig,
    dump_recipe,
    fingerprint,
    load_recipe,
)
from softguard.errors import SoftguardError

RECIPES = Path(__file__).parents[1] / "recipes"
CHANGED = Recipe(
    seed=7,
    system=SystemConfig(threshold=0.25, refusal="Désolé : « non », 'no' # 5e-3"),
    teach=TeachConfig(temperature=0.0, limit=12),
    distil=DistilConfig(learning_rate=3e-4, length="mean", init_text="two\nlines: yes"),
    evaluate=EvaluateConfig(suites=("harmful", "file:a b.jsonl"), split="validation"),
)


def load_text(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def changes(config: Any, name: str = "", but: str = "") -> Iterator[tuple[str, Any]]:
    """(field, a copy of `config` with another allowed value of that field alone), for every field at any depth less `but`."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if name + field.name == but:
            continue
        value, hint = getattr(config, field.name), hints[field.name]
        options: list[tuple[str, Any]]
        if dataclasses.is_dataclass(value):
            options = list(changes(value, f"{name}{field.name}.", but))
        elif typing.get_origin(hint) is Literal:
            options = [(name + field.name, other) for other in typing.get_args(hint) if other != value]
        elif isinstance(value, bool):
            options = [(name + field.name, not value)]
        elif isinstance(value, str):
            options = [(name + field.name, value + "x")]
        elif isinstance(value, Mapping):
            options = [(name + field.name, {**value, "privacy": Action("redact")})]
        elif isinstance(value, tuple):
            options = [(name + field.name, other) for other in ((value[::-1], value[:-1]) if value else (("x",), ("x", "y")))]
        else:
            other = value / 2 if isinstance(value, float) else value + 1 if value is not None else 0.125
            options = [(name + field.name, other)]
        for path, other in options:
            yield path, dataclasses.replace(config, **{field.name: other})


START = Recipe(distil=DistilConfig(adapter="soft_prompt"))  # the kind that may stand in either slot
CHANGES = [(field, START, recipe) for field, recipe in changes(START, but="distil.members")]  # a gate's alone
CHANGES += [("distil.members", Recipe(), Recipe(distil=DistilConfig(members=2)))]


@pytest.mark.parametrize("recipe", [Recipe(), CHANGED])
def test_dumped_recipe_is_loaded_unchanged(tmp_path: Path, recipe: Recipe) -> None:
    assert load_text(tmp_path, dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(("field", "start", "recipe"), CHANGES, ids=[field for field, *_ in CHANGES])
def test_every_field_is_dumped_loaded_and_fingerprinted(tmp_path: Path, field: str, start: Recipe, recipe: Recipe) -> None:
    assert recipe != start
    assert load_text(tmp_path, dump_recipe(recipe)) == recipe
    assert fingerprint(recipe) != fingerprint(start)


def test_different_changes_have_different_fingerprints() -> None:
    assert len({fingerprint(recipe) for *_, recipe in CHANGES}) == len(CHANGES) > 30


def test_fingerprint_is_the_same_in_another_process() -> None:
    script = "from softguard.config import Recipe, fingerprint; print(fingerprint(Recipe(), 'é', [1, 2.5], None))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(RECIPES.parent)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert seen == {fingerprint(Recipe(), "é", [1, 2.5], None)}


def test_fingerprint_is_16_hex_digits_and_knows_order() -> None:
    assert len(fingerprint("a")) == 16
    assert int(fingerprint("a"), 16) >= 0
    assert fingerprint("a", "b") != fingerprint("b", "a") != fingerprint("ab")


def test_no_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert load_recipe() == load_text(tmp_path, "") == load_text(tmp_path, "# nothing\n") == Recipe()


def test_what_is_left_out_keeps_its_default(tmp_path: Path) -> None:
    recipe = load_text(tmp_path, "distil: {steps: 7}\n")
    assert recipe == Recipe(distil=DistilConfig(steps=7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distil: {lerning_rate: 0.1}", "distil.lerning_rate is unknown; did you mean distil.learning_rate?"),
        ("distill: {}", "distill is unknown; did you mean distil?"),
        ("teach: {max_tokens: 3}", "teach.max_tokens is unknown; did you mean teach.max_new_tokens?"),
        ("evaluate: {suite: [harmful]}", "evaluate.suite is unknown; did you mean evaluate.suites?"),
        ("3: x", "3 is unknown; did you mean "),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SoftguardError) as caught:
        load_text(tmp_path, text)
    assert message in str(caught.value)


def test_a_key_value_prefix_has_no_other_slot_than_the_start() -> None:
    with pytest.raises(SoftguardError, match=r"distil\.slot is system; only a soft_prompt has a choice"):
        load_recipe(None, ["distil.adapter=kv_prefix", "distil.slot=system"])
    assert load_recipe(None, ["distil.adapter=soft_prompt", "distil.slot=system"]).distil.slot == "system"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: one", "seed is 'one'; it must be int"),
        ("seed: true", "seed is True; it must be int"),
        ("seed: 1.5", "seed is 1.5; it must be int"),
        ("seed:", "seed is None; it must be int"),
        ("distil: {steps: 1e2}", "distil.steps is '1e2'; it must be int"),
        ("distil: {learning_rate: fast}", "distil.learning_rate is 'fast'; it must be float"),
        ("distil: {learning_rate: true}", "distil.learning_rate is True; it must be float"),
        ("distil: {init_text: 3}", "distil.init_text is 3; it must be str"),
        ("distil: {length: total}", "distil.length is 'total'; it must be one of sum, mean"),
        ("distil: {length: [sum]}", "distil.length is ['sum']; it must be one of sum, mean"),
        ("system: {threshold: high}", "system.threshold is 'high'; it must be float or none"),
        ("evaluate: {suites: [1]}", "evaluate.suites is 1; it must be str"),
        ("evaluate: {suites: {a: b}}", "evaluate.suites is {'a': 'b'}; it must be str"),
        ("model: smollm2", "model must be a section, not 'smollm2'"),
        ("model:", "model must be a section, not None"),
    ],
)
def test_wrong_type_names_key_value_and_type(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SoftguardError) as caught:
        load_text(tmp_path, text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "must be a mapping of sections, not list"),
        ("just text", "must be a mapping of sections, not str"),
        ("[]", "must be a mapping of sections, not list"),
        ("distil: {steps: 1", "is not valid YAML"),
        ("seed: !!python/object:os.system {}", "is not valid YAML"),
    ],
)
def test_what_is_no_recipe_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SoftguardError) as caught:
        load_text(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipe_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("system: {refusal: Désolé}".encode("latin-1"))
    with pytest.raises(SoftguardError, match="is not valid YAML"):
        load_recipe(path)


def test_missing_recipe_is_told(tmp_path: Path) -> None:
    with pytest.raises(SoftguardError, match=r"none\.yaml cannot be read \(No such file or directory\)"):
        load_recipe(tmp_path / "none.yaml")


def test_integers_serve_as_floats() -> None:
    clip = load_recipe(overrides=["distil.clip=2"]).distil.clip
    assert isinstance(clip, float)
    assert clip == 2.0


def test_overrides_are_applied_in_order() -> None:
    recipe = load_recipe(
        overrides=[
            "seed=3",
            "distil.learning_rate=5e-3",
            "distil.steps=1",
            "distil.steps=9",
            "system.threshold=null",
            "system.refusal=No, a=b",
            "evaluate.suites=[harmful, drift]",
            "distil.length = mean",
        ]
    )
    assert recipe == Recipe(
        seed=3,
        distil=DistilConfig(learning_rate=0.005, steps=9, length="mean"),
        system=SystemConfig(refusal="No, a=b"),
        evaluate=EvaluateConfig(suites=("harmful", "drift")),
    )


def test_one_suite_needs_no_list() -> None:
    assert load_recipe(overrides=["evaluate.suites=harmful"]).evaluate.suites == ("harmful",)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("distil: {steps: 5, n_soft: 6}\n")
    assert load_recipe(path, ["distil.steps=8"]).distil == DistilConfig(steps=8, n_soft=6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distil.steps", "override 'distil.steps' must read section.key=value"),
        ("seed.deep=1", "seed is {'deep': 1}; it must be int"),
        ("distil.step=1", "distil.step is unknown; did you mean distil.steps?"),
        ("distil=1", "distil must be a section, not 1"),
        ("evaluate.suites=[a", "the value is not valid YAML"),
        ("=1", "is unknown"),
    ],
)
def test_unusable_override_is_told(override: str, message: str) -> None:
    with pytest.raises(SoftguardError) as caught:
        load_recipe(overrides=[override])
    assert message in str(caught.value)


def test_override_below_a_value_of_the_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(SoftguardError, match=r"override 'seed\.deep=1': seed is not a section"):
        load_recipe(path, ["seed.deep=1"])


POSITIVE = [
    *(f"distil.{key}" for key in ("n_soft", "members", "batch_size", "accumulate", "learning_rate", "clip", "validate_every")),
    *(f"distil.{key}" for key in ("validation_prompts", "patience", "checkpoint_every", "budget", "beta")),
    *(f"teach.{key}" for key in ("responses", "batch_size", "shard_size")),
    *(f"evaluate.{key}" for key in ("max_new_tokens", "batch_size")),
    *(f"guard.{key}" for key in ("rank", "epochs", "batch", "learning_rate", "head_learning_rate", "prompt_tokens")),
    "guard.response_tokens",
]
NOT_NEGATIVE = [
    *("seed", "model.threads", "teach.temperature", "teach.max_new_tokens", "teach.limit", "evaluate.limit"),
    *(
        "distil.steps",
        "distil.warmup",
        "distil.safe_weight",
        "distil.refusal_weight",
        "distil.drift_weight",
        "guard.weight_decay",
    ),
]


@pytest.mark.parametrize("key", POSITIVE)
def test_sizes_must_be_positive(key: str) -> None:
    with pytest.raises(SoftguardError, match=f"{key} is .*; it must be greater than 0"):
        load_recipe(overrides=[f"{key}=0"])


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_counts_and_weights_must_not_be_negative(key: str) -> None:
    load_recipe(overrides=[f"{key}=0"])
    with pytest.raises(SoftguardError, match=f"{key} is .*; it must not be negative"):
        load_recipe(overrides=[f"{key}=-1"])


@pytest.mark.parametrize("other", ["distil.adapter=kv_prefix", "system.mode=response"])
def test_only_a_gate_behind_a_prompt_guard_is_taught_without_responses(other: str) -> None:
    with pytest.raises(SoftguardError, match=r"teach\.max_new_tokens is 0, but"):
        load_recipe(overrides=["teach.max_new_tokens=0", other])


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1.0e+39"])
@pytest.mark.parametrize("key", ["distil.learning_rate", "distil.safe_weight", "teach.temperature", "system.threshold"])
def test_numbers_must_be_finite_in_float32_too(key: str, value: str) -> None:
    with pytest.raises(SoftguardError, match=key):
        load_recipe(overrides=[f"{key}={value}"])


@pytest.mark.parametrize("value", [-0.1, 1.1])
@pytest.mark.parametrize("key", ["system.threshold", "guard.cut_share", "guard.flagged_benign"])
def test_shares_must_lie_between_0_and_1(key: str, value: float) -> None:
    with pytest.raises(SoftguardError, match=rf"{key} is .*; it must lie in \[0, 1\]"):
        load_recipe(overrides=[f"{key}={value}"])


def test_weights_by_which_nothing_is_learned_or_chosen_are_refused() -> None:
    with pytest.raises(SoftguardError, match="are both 0, so that nothing is learned"):
        load_recipe(overrides=["distil.safe_weight=0", "distil.refusal_weight=0"])
    for weight in ("safe_weight", "refusal_weight"):
        with pytest.raises(SoftguardError, match=f"distil.{weight} .*; objective ppo has no branches"):
            load_recipe(overrides=["distil.objective=ppo", f"distil.{weight}=0"])


def test_weights_of_what_is_not_trained_are_not_asked_for() -> None:
    for untrained in ("distil.steps=0", "distil.adapter=text"):
        load_recipe(overrides=[untrained, "distil.safe_weight=0", "distil.refusal_weight=0"])


def test_a_line_end_of_yaml_alone_is_dumped_and_loaded_unchanged(tmp_path: Path) -> None:
    wanted = load_recipe(overrides=['system.refusal="Désolé,\\x85non."'])
    assert wanted.system.refusal == "Désolé,\x85non."
    (tmp_path / "recipe.yaml").write_text(dump_recipe(wanted), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == wanted


def test_threshold_may_be_either_end() -> None:
    assert [load_recipe(overrides=[f"system.threshold={t}"]).system.threshold for t in (0, 1)] == [0, 1]


@pytest.mark.parametrize("value", [1e-7, 1e-40])
def test_a_temperature_by_which_logits_overflow_is_refused(value: float) -> None:
    with pytest.raises(SoftguardError, match=r"teach\.temperature is .* must be 0, which is greedy, or at least 1e-6"):
        load_recipe(None, [f"teach.temperature={value}"])


def test_what_changes_no_result_does_not_decide() -> None:
    plain = load_recipe(None)
    assert load_recipe(None, ["teach.keep_caches=true", "distil.checkpoint_every=7"]).deciding == plain.deciding == plain
    assert load_recipe(None, ["teach.batch_size=7"]).deciding != plain


def test_another_system_is_told_by_its_setting_but_not_by_the_name_of_its_guard() -> None:
    system = load_recipe(None, ["system.policy.S1.action=keep"]).system
    kept = json.loads(json.dumps(system.taught))
    load_recipe(None, ["system.policy.S1.action=keep", "system.guard=mine:guard"]).system.check_taught(kept, "it", 0.3)
    for change in ("refusal=No.", "policy={}", "threshold=0.5", "mode=response"):
        with pytest.raises(SoftguardError, match=rf"it was made with system\.{change.partition('=')[0]} "):
            load_recipe(None, ["system.policy.S1.action=keep", f"system.{change}"]).system.check_taught(kept, "it", 0.3)


def checked(kept: float | None, wanted: float | None, own: float | None, decision: Any = "threshold") -> None:
    given, taught = (SystemConfig(decision=decision, threshold=line) for line in (wanted, kept))
    given.check_taught(taught.taught, "it", own)


@pytest.mark.parametrize(("kept", "wanted"), [(None, 0.3), (0.3, None), (None, None)])
def test_a_threshold_that_is_the_guards_own_may_be_named_or_not(kept: float | None, wanted: float | None) -> None:
    checked(kept, wanted, 0.3)


@pytest.mark.parametrize(
    ("kept", "wanted", "own", "told"),
    [
        (None, 0.4, 0.3, "0.3, not 0.4"),
        (0.4, None, 0.3, "0.4, not 0.3"),
        (0.4, None, None, "0.4, not the guard's own"),
        (0.4, 0.3, 0.3, "0.4, not 0.3"),
    ],
)
def test_another_threshold_is_told(kept: float | None, wanted: float | None, own: float | None, told: str) -> None:
    with pytest.raises(SoftguardError, match=f"it was made with system.threshold {told};"):
        checked(kept, wanted, own)
    checked(kept, wanted, own, "probabilistic")  # asks for none


def test_refusal_must_say_something() -> None:
    with pytest.raises(SoftguardError, match=r"system\.refusal is empty"):
        load_recipe(overrides=["system.refusal='  '"])


def test_the_members_of_a_gate_share_its_vectors_equally() -> None:
    assert load_recipe(overrides=["distil.n_soft=9", "distil.members=3"]).distil.members == 3
    with pytest.raises(SoftguardError, match=r"distil\.members is 3; it must divide distil\.n_soft 8"):
        load_recipe(overrides=["distil.members=3"])
    with pytest.raises(SoftguardError, match=r"distil\.members is 2; only a gate has members"):
        load_recipe(overrides=["distil.adapter=kv_prefix", "distil.members=2"])


def test_micro_batches_must_not_outnumber_prompts() -> None:
    with pytest.raises(SoftguardError, match=r"distil\.accumulate is 9; it must not exceed distil\.batch_size 8"):
        load_recipe(overrides=["distil.accumulate=9"])


def test_weights_are_the_objectives_own_unless_set() -> None:
    assert DistilConfig(objective="kl-paper").weights == (1, 1)
    assert DistilConfig(adapter="kv_prefix").weights != (1, 1)
    assert DistilConfig(adapter="gate").weights == (1, 1)
    assert DistilConfig(objective="tv", safe_weight=0.0, drift_weight=3.0).weights == (0, 3)


@pytest.mark.parametrize("objective", ["tv-paper", "kl-paper"])
def test_the_published_objectives_have_no_drift_weight(objective: str) -> None:
    with pytest.raises(SoftguardError, match=rf"distil\.drift_weight is 0\.1; objective {objective} has no such weight"):
        load_recipe(overrides=[f"distil.objective={objective}", "distil.drift_weight=0.1"])


def test_every_recipe_of_the_repository_loads() -> None:
    demo = Path(__file__).parents[1] / "softguard" / "data" / "demo.yaml"
    studies = {"paper.yaml", "study-small.yaml", "method.yaml"}  # see test_study
    paths = [demo, *(path for path in sorted(RECIPES.glob("*.yaml")) if path.name not in studies)]
    assert demo.is_file()
    for path in paths:
        assert isinstance(load_recipe(path), Recipe)


def test_a_policy_is_read_dumped_and_told_apart(tmp_path: Path) -> None:
    text = """
system:
  policy:
    medicine: {refusal: Ask a doctor.}
    spam: {action: keep}
    odd: {action: call, function: "mine.actions:answer"}
"""
    recipe = load_text(tmp_path, text)
    assert recipe.system.policy == {
        "medicine": Action(refusal="Ask a doctor."),
        "spam": Action("keep"),
        "odd": Action("call", function="mine.actions:answer"),
    }
    assert load_text(tmp_path, dump_recipe(recipe)) == recipe
    assert fingerprint(recipe.system) != fingerprint(SystemConfig())
    assert load_recipe(None, ["system.policy.spam.action=keep"]).system.policy == {"spam": Action("keep")}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("system.policy=keep", "system.policy is 'keep'; it must be a section"),
        ("system.policy.spam=keep", "system.policy.spam must be a section"),
        ("system.policy.spam.action=drop", "system.policy.spam.action is 'drop'; it must be one of refuse, keep, redact, call"),
        ("system.policy.spam.acton=keep", "system.policy.spam.acton is unknown; did you mean system.policy.spam.action"),
        ("system.policy.spam={action: keep, refusal: not}", "system.policy.spam.refusal is"),
        ("system.policy.spam.refusal=' '", "system.policy.spam.refusal is ' '; it must be some text"),
        ("system.policy.spam.action=call", "system.policy.spam.function is None and its action call"),
        ("system.policy.spam={action: call, function: mine}", "as package.module:function"),
        ("system.policy.spam={function: 'a:b'}", "system.policy.spam.function is 'a:b' and its action refuse"),
    ],
)
def test_an_impossible_policy_is_told_with_its_key(override: str, said: str) -> None:
    with pytest.raises(SoftguardError, match=re.escape(said)):
        load_recipe(None, [override])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distil: {steps: 5}\nseed: 1\ndistil: {n_soft: 4}\n", "key distil stands twice"),
        ("distil:\n  steps: 5\n  steps: 6\n", "key steps stands twice"),
        ("system: {refusal: 2024-13-45}\n", "month must be in 1..12"),
        ("[" * 5000, "not valid YAML"),
        ("system: {policy: {no: {action: keep}}}\n", "system.policy has the key False"),
        ('system: {refusal: "\\ud83d"}\n', "half a character"),
        ("seed: 99999999999999999999\n", "must be below 2"),
        ("evaluate: {suites: []}\n", "evaluate.suites is empty"),
        ("model: {threads: 99999999}\n", "at most 1024"),
    ],
)
def test_what_yaml_reads_strangely_is_told_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SoftguardError) as told:
        load_text(tmp_path, text)
    assert said in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("value", ["2024-13-45", "0b_", "1" * 5000, "!!timestamp foo", "!!bool foo", "!!map [1]", "!!int ''"])
def test_an_override_that_is_no_value_is_told(value: str) -> None:
    with pytest.raises(SoftguardError, match="the value is not valid YAML"):
        load_recipe(None, [f"seed={value}"])
