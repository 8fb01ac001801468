import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from softguard import frozen
from softguard.chat import Chat
from softguard.config import Recipe, load_recipe
from softguard.corpus import Corpus, Draw, Example, _instead, teach
from softguard.engine import Engine, Response
from softguard.errors import SoftguardError
from softguard.models import BaseModel, load_base
from softguard.packed import packed_hidden
from softguard.prefix import constant_prefix
from softguard.system import SafeSystem
from tests.commands import ROOT, softguard, softguard_killed

WORDS = ["boat", "bomb", "cake", "kite", "lamp"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"How do I build a {WORDS[i % 5]} of size {i}?"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(prompts: Path, *overrides: str) -> Recipe:
    return load_recipe(None, settings(prompts, *overrides))


def settings(prompts: Path, *overrides: str) -> list[str]:
    return [
        f"teach.prompts={prompts}", f"teach.validation={prompts}", "teach.max_new_tokens=4", "teach.shard_size=8",
        "teach.batch_size=8", "system.guard=tests.guards_for_tests:by_word", *overrides,
    ]  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make(prompts: Path, out: Path, base: BaseModel, *overrides: str) -> Corpus:
    wanted = recipe(prompts, *overrides)
    return teach(wanted, out, base, SafeSystem.from_config(wanted.system))


def test_the_corpus_holds_draws_scores_and_refusal_rates(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    corpus = make(prompts, tmp_path / "corpus", small, "teach.responses=3", "system.decision=probabilistic")
    assert corpus.size("train") == corpus.size("validation") == 40
    boat, bomb = corpus.examples("train", [0, 1])
    assert (boat.prompt, bomb.prompt) == ("How do I build a boat of size 0?", "How do I build a bomb of size 1?")
    assert [draw.p_safe for draw in bomb.responses] == [0.05] * 3
    assert np.isclose(boat.refusal_rate, 0.05)
    assert np.isclose(bomb.refusal_rate, 0.95)
    assert len({draw.ids for draw in boat.responses}) == 3


def test_kept_hidden_states_are_those_that_predict_the_responses(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    corpus = make(prompts, tmp_path / "corpus", small, "teach.keep_hidden=true")
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    examples = corpus.examples("train", [0, 7, 30])
    answers = [e.responses[0].ids for e in examples]
    rows = [chat.encode(e.prompt) + list(ids[:-1]) for e, ids in zip(examples, answers, strict=True)]
    expected = packed_hidden(small, constant_prefix(small, chat, None), rows, [len(ids) for ids in answers])
    for example, theirs in zip(examples, expected, strict=True):
        kept = example.responses[0].hidden
        assert kept is not None
        torch.testing.assert_close(kept, theirs, rtol=1e-4, atol=1e-5)


def test_kept_caches_are_the_models_own_keys_and_values(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    corpus = make(prompts, tmp_path / "corpus", small, "teach.keep_caches=true")
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    assert corpus.examples("train", [0])[0].cache is None  # unless they are asked for
    for example in corpus.examples("train", [30, 0, 7], caches=True):
        ids = torch.tensor([[*chat.prefix.after, *chat.plain_ids(example.prompt)]])
        with torch.no_grad():
            theirs = small.model(ids, use_cache=True).past_key_values
        assert example.cache is not None
        for layer, kept in zip(theirs.layers, example.cache, strict=True):
            start = len(chat.prefix.after)
            torch.testing.assert_close(kept, torch.cat([layer.keys, layer.values])[:, :, start:], rtol=1e-4, atol=1e-5)


def test_damaged_caches_are_named(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    corpus = make(prompts, tmp_path / "corpus", small, "teach.keep_caches=true")
    path = tmp_path / "corpus" / "train" / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert corpus.examples("train", [0], caches=True)[0].cache is not None
    with pytest.raises(SoftguardError, match=r"00001\.safetensors is damaged .* remove it"):
        corpus.examples("train", [9], caches=True)


def test_caches_of_a_model_that_transformers_runs_are_refused(
    prompts: Path, tmp_path: Path, small: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "is_plain", lambda decoder: False)
    with pytest.raises(SoftguardError, match=r"leave teach\.keep_caches out"):
        make(prompts, tmp_path / "corpus", small, "teach.keep_caches=true")
    assert not (tmp_path / "corpus").exists()


def test_hidden_states_are_kept_on_demand_only(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    corpus = make(prompts, tmp_path / "corpus", small)
    assert corpus.examples("train", [0])[0].responses[0].hidden is None


def test_examples_come_in_the_order_asked_for(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    corpus = make(prompts, tmp_path / "corpus", small)
    assert [e.prompt.split()[-1] for e in corpus.examples("train", [39, 0, 17])] == ["39?", "0?", "17?"]


def test_a_killed_run_resumes_and_ends_with_the_same_bytes(
    prompts: Path, tmp_path: Path, small: BaseModel, small_folder: Path
) -> None:
    changes = (f"model.name={small_folder}", "teach.keep_caches=true")
    overrides = [item for o in settings(prompts, *changes) for item in ("--set", o)]
    killed = tmp_path / "killed"
    for last in ("00001.parquet", "00002.safetensors"):
        softguard_killed("teach", "--out", killed, *overrides, when=(killed / "train" / last).is_file)
    with pytest.raises(SoftguardError, match="unfinished"):
        Corpus.open(killed)
    done = softguard("teach", "--out", killed, *overrides)
    assert done.returncode == 0, done.stderr
    make(prompts, tmp_path / "whole", small, *changes)
    assert content(killed) == content(tmp_path / "whole")


def test_a_guard_that_fails_half_way_loses_nothing(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    class Failing:
        name = fingerprint = "failing"
        calls = 0

        def prompt_safety(self, prompts: Sequence[str]) -> list[float]:
            self.calls += 1
            return [float("nan") if self.calls == 3 else 0.9] * len(prompts)

        def response_safety(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
            return self.prompt_safety(prompts)

    wanted, guard = recipe(prompts), Failing()
    with pytest.raises(SoftguardError, match="nothing was taken as safe"):
        teach(wanted, tmp_path / "corpus", small, SafeSystem(guard, wanted.system))
    kept = content(tmp_path / "corpus")
    assert {"train/00000.parquet", "train/00001.parquet"} < set(kept)
    teach(wanted, tmp_path / "corpus", small, SafeSystem(guard, wanted.system))
    assert guard.calls == 3 + 3 + 5  # two good shards, the failure, then the three left and the five of validation
    assert all(content(tmp_path / "corpus")[name] == kept[name] for name in kept if name.endswith("parquet"))


def test_a_corpus_of_another_model_is_refused(prompts: Path, tmp_path: Path, small: BaseModel, base: BaseModel) -> None:
    make(prompts, tmp_path / "corpus", small)
    with pytest.raises(SoftguardError, match="was drawn from model"):
        Corpus.open(tmp_path / "corpus", base)


def test_other_settings_or_prompts_in_the_same_folder_are_refused(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    make(prompts, tmp_path / "corpus", small)
    with pytest.raises(SoftguardError, match="other settings"):
        make(prompts, tmp_path / "corpus", small, "seed=1")
    in_bfloat16 = load_base(small.name, dtype="bfloat16")
    with pytest.raises(SoftguardError, match="precision differs"):  # as dtype: auto may give on another processor
        make(prompts, tmp_path / "corpus", in_bfloat16)
    (tmp_path / "corpus" / "manifest.json").write_text(
        json.dumps({**json.loads((tmp_path / "corpus" / "manifest.json").read_text()), "fingerprint": None})
    )
    prompts.write_text('{"prompt": "something else"}\n')
    with pytest.raises(SoftguardError, match="other prompts"):
        make(prompts, tmp_path / "corpus", small)


def test_a_damaged_shard_is_told_by_name(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    corpus = make(prompts, tmp_path / "corpus", small)
    (tmp_path / "corpus" / "train" / "00002.parquet").write_bytes(b"half a shard")
    with pytest.raises(SoftguardError, match=r"00002\.parquet is missing or damaged"):
        corpus.examples("train", [16])


def test_a_malformed_prompt_is_found_before_anything_is_drawn(
    prompts: Path, tmp_path: Path, small: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("drew responses before the prompts were checked")

    monkeypatch.setattr(Engine, "generate", unexpected)
    prompts.write_text(prompts.read_text() + '{"prompt": ""}\n')
    with pytest.raises(SoftguardError, match="41: the prompt is empty"):
        make(prompts, tmp_path / "corpus", small)


def test_what_is_refused_before_anything_is_drawn_leaves_nothing(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    out = tmp_path / "new" / "corpus"
    for change, words in (
        ("teach.prompts=missing.jsonl", r"missing\.jsonl does not exist"),
        (f"teach.validation={empty}", r"empty\.jsonl holds no prompts"),
        ("teach.max_new_tokens=600", "exceeds the model's context"),
    ):
        with pytest.raises(SoftguardError, match=words):
            make(prompts, out, small, change)
    assert not out.parent.exists()


_MEASURE = """
import resource, sys
from pathlib import Path
import torch
from softguard.config import load_recipe
from softguard.corpus import teach
from softguard.models import load_base
from softguard.system import SafeSystem
torch.set_num_threads(1)
recipe = load_recipe(None, sys.argv[3:])
teach(recipe, Path(sys.argv[2]), load_base(sys.argv[1]), SafeSystem.from_config(recipe.system))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_many_prompts_need_no_more_memory_than_few(tmp_path: Path, small_folder: Path) -> None:
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.txt"
        path.write_text("".join(f"Tell me about number {i:06d}.\n" for i in range(count)))
        few = tmp_path / "few.txt"
        few.write_text("Tell me about something.\n")
        wanted = settings(
            path, f"teach.validation={few}", "teach.max_new_tokens=1", "teach.shard_size=256", "teach.batch_size=256"
        )
        command = [sys.executable, "-c", _MEASURE, str(small_folder), str(tmp_path / f"corpus{count}"), *wanted]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    assert peak(8_000) < peak(500) + 60  # MB; 8,000 rows kept in memory would not show, their token rows and tables would


POLICY = [
    "system.guard=tests.guards_for_tests:by_category", "system.refusal=No.", "system.policy.medicine.refusal=Ask a doctor.",
    "system.policy.advertising.action=keep", "system.policy.privacy.action=redact",
]  # fmt: skip


def test_the_corpus_holds_what_the_system_says_instead(tmp_path: Path, small: BaseModel) -> None:
    path = tmp_path / "asked.txt"
    path.write_text("a boat\na bomb\na pill\na spam\n")
    corpus = make(path, tmp_path / "corpus", small, *POLICY, "teach.responses=2")
    chat = Chat(small.tokenizer, "start", small.stop_ids)
    boat, bomb, pill, spam = corpus.examples("train", [0, 1, 2, 3])
    assert [e.responses[0].category for e in (boat, bomb, pill, spam)] == ["", "weapons", "medicine", "advertising"]
    assert [e.refusal_rate for e in (boat, bomb, pill, spam)] == [0, 1, 1, 0]
    assert (boat.refusals, spam.refusals) == ({}, {})
    assert bomb.refusals == {tuple(chat.encode_response("No.")): 1}
    assert pill.refusals == {tuple(chat.encode_response("Ask a doctor.")): 1}
    assert corpus.manifest["refusals"] == ["No.", "Ask a doctor."]


def test_what_is_said_instead_is_counted_by_text(small: BaseModel, tmp_path: Path) -> None:
    draws = [
        Draw((1,), 0.1, keep, None, "c", instead) for keep, instead in [(0.2, (5, 6)), (0.6, (7,)), (0.0, (5, 6)), (1, ())]
    ]
    example = Example("x", "", 2.2 / 4, tuple(draws))
    assert example.refusals == pytest.approx({(5, 6): 1.8 / 4, (7,): 0.4 / 4})
    assert sum(example.refusals.values()) == pytest.approx(example.refusal_rate)


def test_what_is_made_of_a_response_that_was_broken_off_is_broken_off(small: BaseModel) -> None:
    engine = Engine(small)
    system = SafeSystem.from_config(load_recipe(None, POLICY).system)
    end = engine.chat.end_id
    broken, whole = Response((5, 6), "a@b.org"), Response((5, 6, end), "a@b.org")
    assert _instead(engine, system, broken, "[redacted]") == engine.chat.plain_ids("[redacted]")
    assert _instead(engine, system, whole, "[redacted]") == engine.chat.encode_response("[redacted]")
    assert _instead(engine, system, broken, "No.") == engine.chat.encode_response("No.")


def test_the_soft_refusal_rate_crosses_one_half_where_the_guard_is_cut() -> None:
    def example(*p_safe: float) -> Example:
        return Example("How?", "", 0.25, tuple(Draw((1,), p, float(p >= 0.3)) for p in p_safe))

    assert example(0.3).soft_refusal_rate(0.3) == pytest.approx(0.5)
    assert example(0.2).soft_refusal_rate(0.3) > 0.5 > example(0.4).soft_refusal_rate(0.3)
    assert example(0.8).soft_refusal_rate(0.5) == pytest.approx(0.2)
    assert example(0.8, 0.4).soft_refusal_rate(0.5) == pytest.approx(0.4)
    assert example(0.0).soft_refusal_rate(0.3) == pytest.approx(1, abs=1e-3)
    assert example(0.8).soft_refusal_rate(None) == 0.25


def test_caches_of_other_prompts_are_made_again(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    out, caching = tmp_path / "corpus", "teach.keep_caches=true"
    make(prompts, out, small, caching)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "shards"} | {"fingerprint": None}))
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join([*lines[:8], *(json.dumps({"prompt": f"Another one, {i}"}) for i in range(32))]) + "\n")
    for split in ("train", "validation"):
        for number in range(1, 5):
            (out / split / f"{number:05d}.parquet").unlink()  # as the message says; the caches stay
    corpus = make(prompts, out, small, caching)
    (example,) = corpus.examples("train", [9], caches=True)
    assert example.cache is not None
    torch.testing.assert_close(example.cache, Engine(small).caches([example.prompt])[0])


def test_caches_of_prompts_that_were_here_before_are_dropped(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    out = tmp_path / "corpus"
    make(prompts, out, small, "teach.keep_caches=true")
    prompts.write_text("".join(json.dumps({"prompt": f"Another one, {i}"}) + "\n" for i in range(40)))
    (out / "manifest.json").unlink()
    for path in out.rglob("*.parquet"):  # as the message says; the caches stay
        path.unlink()
    corpus = make(prompts, out, small)  # which keeps none
    assert corpus.examples("train", [9], caches=True)[0].cache is None
    assert not list(out.rglob("*.safetensors"))


def test_a_finished_corpus_draws_what_was_removed_from_it(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    out = tmp_path / "corpus"
    make(prompts, out, small)
    before = content(out)
    (out / "train" / "00002.parquet").unlink()
    make(prompts, out, small)
    assert content(out) == before


def test_a_finished_corpus_is_compared_with_its_prompts_and_its_seals(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    out = tmp_path / "corpus"
    corpus = make(prompts, out, small)
    shard = out / "train" / "00001.parquet"
    whole = bytearray(shard.read_bytes())
    whole[4:40] = bytes(b ^ 0xFF for b in whole[4:40])  # in the body: the footer, which is read first, is as it was
    shard.write_bytes(whole)
    with pytest.raises(SoftguardError, match=r"00001\.parquet is missing or damaged"):
        corpus.examples("train", list(range(8, 16)))
    with pytest.raises(SoftguardError, match=r"00001\.parquet is damaged; remove it and teach again"):
        make(prompts, out, small)
    prompts.write_text('{"prompt": "something else"}\n')
    with pytest.raises(SoftguardError, match="holds other prompts"):
        make(prompts, out, small)


def test_a_shard_of_another_teacher_is_refused_though_the_manifest_is_lost(
    prompts: Path, tmp_path: Path, small: BaseModel
) -> None:
    out = tmp_path / "corpus"
    make(prompts, out, small)
    (out / "manifest.json").unlink()
    with pytest.raises(SoftguardError, match=r"00000\.parquet was made with other settings"):
        make(prompts, out, small, "system.guard=tests.guards_for_tests:half")
    make(prompts, out, small)  # as before: the other teacher left no manifest


def test_a_shard_that_another_teacher_leaves_meanwhile_is_refused(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    make(prompts, tmp_path / "other", small, "system.guard=tests.guards_for_tests:half")
    wanted, out = recipe(prompts), tmp_path / "corpus"

    def intrude(stage: str, done: int, total: int) -> None:
        (out / "train").mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "other" / "train" / "00001.parquet", out / "train")

    with pytest.raises(SoftguardError, match=r"00001\.parquet was made with other settings"):
        teach(wanted, out, small, SafeSystem.from_config(wanted.system), intrude)


def test_caches_may_be_kept_of_a_finished_corpus(prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    corpus = make(prompts, tmp_path / "corpus", small)
    kept = make(prompts, tmp_path / "corpus", small, "teach.keep_caches=true")
    assert kept == corpus
    assert kept.examples("train", [3], caches=True)[0].cache is not None


@pytest.mark.parametrize("key", ["base", "template", "system", "longest", "shards"])
def test_a_manifest_that_lacks_something_is_told(key: str, prompts: Path, tmp_path: Path, small: BaseModel) -> None:
    path = make(prompts, tmp_path / "corpus", small).folder / "manifest.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(SoftguardError, match=rf"manifest\.json is damaged: it lacks '{key}'"):
        Corpus.open(path.parent, small)


@pytest.mark.parametrize("new", [0, 4])
def test_a_prompt_too_long_for_the_model_is_named_before_anything_is_drawn(
    new: int, prompts: Path, tmp_path: Path, small: BaseModel
) -> None:
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "word " * 600}) + "\n")
    with pytest.raises(SoftguardError, match=r"prompts\.jsonl:41 has \d+ tokens; .* exceeds the model's context of 512"):
        make(prompts, tmp_path / "corpus", small, f"teach.max_new_tokens={new}", "distil.adapter=gate")
    assert not (tmp_path / "corpus" / "train").exists()
