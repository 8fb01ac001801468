"""The gate against transformers' own passes, its law against enumeration."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from softguard import frozen
from softguard.adapters import VECTORS, Adapter
from softguard.chat import Chat, Turn
from softguard.decoding import gated_log_odds, keep_prefix, make_resident
from softguard.drift import measure_drift, mixture_drift
from softguard.engine import Engine, Response, _refused
from softguard.errors import SoftguardError
from softguard.gate import Gate, bias, losses
from softguard.initial import initial_vectors
from softguard.models import BaseModel
from softguard.prefix import constant_prefix
from tests.references import random_adapter, whole_row

REFUSAL = "No, I will not."
ROWS = ["How do I bake bread?", "hi", "What is the capital of France, and who lives there?"]


def gate_adapter(base: BaseModel, n_soft: int = 4, seed: int = 0) -> Adapter:
    return replace(random_adapter(base, "gate", n_soft=n_soft, seed=seed), facts={"objective": "tv", "refusal": REFUSAL})


@pytest.fixture
def chat(small: BaseModel) -> Chat:
    return Chat(small.tokenizer, "start", small.stop_ids)


def one_row(base: BaseModel, chat: Chat, adapter: Adapter, row: Sequence[int]) -> Tensor:
    """Last hidden state, (hidden,), at the row's end beside the gate: one row, no padding, keys turned plane by plane."""
    gate = Gate.of(base, chat, adapter)
    before = [*chat.prefix.after, *row[: -len(chat.closing)]]
    cache = DynamicCache()
    base.model.get_decoder()(torch.tensor([before]), past_key_values=cache)
    heads, width = base.key_heads
    vectors = adapter.vectors.view(len(adapter.vectors), -1, 2, heads, width)
    for layer in range(vectors.shape[1]):
        keys, values = vectors[:, layer, 0].clone(), vectors[:, layer, 1]
        for i in range(len(vectors)):
            for plane in range(width // 2):
                angle = (len(before) - len(vectors) + i) * 10_000.0 ** (-2 * plane / width)
                c, s = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
                a, b = vectors[i, layer, 0, :, plane], vectors[i, layer, 0, :, plane + width // 2]
                keys[i, :, plane], keys[i, :, plane + width // 2] = a * c - b * s, b * c + a * s
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
    positions = len(before) + torch.arange(len(gate.closing))
    output = base.model.get_decoder()(torch.tensor([gate.closing]), past_key_values=cache, position_ids=positions[None])
    return output.last_hidden_state[0, -1]  # type: ignore[no-any-return]


def test_a_text_stands_before_the_closing_as_the_model_itself_would_read_it_there(small: BaseModel, chat: Chat) -> None:
    text = "You are careful."
    ids = small.tokenizer.encode(text, add_special_tokens=False)
    vectors = initial_vectors(small, "gate", text, len(ids))
    gate = Gate.of(small, chat, Adapter("gate", {VECTORS: vectors}, "start", {"refusal": REFUSAL}))
    for before in (len(ids), 40):
        cache = DynamicCache()
        positions = torch.arange(before - len(ids), before)[None]
        with torch.no_grad():
            small.model(torch.tensor([ids]), position_ids=positions, past_key_values=cache)
        for (keys, values), layer in zip(gate.turned(torch.tensor([before])), cache.layers, strict=True):
            torch.testing.assert_close(keys, layer.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values, layer.values, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("make", ["written out", "by transformers"])
def test_rows_pass_the_gate_and_go_on_as_the_bases(
    make: str, small: BaseModel, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    if make == "by transformers":
        monkeypatch.setattr(frozen, "is_plain", lambda decoder: False)
    adapter = gate_adapter(small)
    rows = [chat.encode(text) for text in ROWS]
    resident = make_resident(small, chat, adapter, Gate.of(small, chat, adapter))
    assert resident.length == len(chat.prefix.after)
    output, decoding = resident.begin(rows)
    assert output.gated is not None
    prefix = constant_prefix(small, chat, None)
    for i, row in enumerate(rows):
        beside = small.model.get_output_embeddings()(one_row(small, chat, adapter, row))
        torch.testing.assert_close(output.gated[i], beside, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.hidden[i], whole_row(small, prefix, row)[-1], rtol=1e-4, atol=1e-4)
    after = decoding.step(torch.tensor([7, 17, 27]))
    assert after.gated is None
    for i, row in enumerate(rows):
        torch.testing.assert_close(after.hidden[i], whole_row(small, prefix, [*row, 7 + 10 * i])[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("made", [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
@torch.inference_mode()
def test_keys_are_unturned_where_turning_scales_them(made: tuple[Any, Any], small: BaseModel, chat: Chat) -> None:
    """YaRN turns keys and makes them longer: at their own places the gate's first keys are the model's of the text."""
    kind, model = made
    config = kind(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128
        },
    )  # fmt: skip
    base = replace(small, model=model(config).eval())
    text = "If the request is harmful, refuse."
    ids = base.tokenizer.encode(text)[:4]
    adapter = replace(gate_adapter(base), tensors={VECTORS: initial_vectors(base, "gate", text, 4)})
    gate = Gate.of(base, chat, adapter)
    cache = base.model(torch.tensor([ids]), use_cache=True).past_key_values
    scale = base.model.get_decoder().rotary_emb.attention_scaling
    assert scale > 1.1
    for (keys, values), layer in zip(gate.turned(torch.tensor([4])), cache.layers, strict=True):
        torch.testing.assert_close(keys, layer.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, layer.values)


@torch.inference_mode()
def test_a_model_without_rotary_positions_has_its_keys_as_they_are(small: BaseModel) -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=49152, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, word_embed_proj_dim=64, init_std=0.1,
    )  # fmt: skip
    base = replace(small, model=OPTForCausalLM(config).eval())
    chat = Chat(base.tokenizer, "start", base.stop_ids)
    adapter = gate_adapter(base)
    rows = [chat.encode(text) for text in ROWS]
    output, _ = make_resident(base, chat, adapter, Gate.of(base, chat, adapter)).begin(rows)
    assert output.gated is not None
    heads, width = base.key_heads
    vectors = adapter.vectors.view(len(adapter.vectors), -1, 2, heads, width)
    for row, logits in zip(rows, output.gated, strict=True):
        before, cache = [*chat.prefix.after, *row[: -len(chat.closing)]], DynamicCache()
        base.model.get_decoder()(torch.tensor([before]), past_key_values=cache)
        for layer in range(2):
            cache.update(*(vectors[:, layer, part].transpose(0, 1)[None] for part in (0, 1)), layer)
        positions = len(before) + torch.arange(len(chat.closing))
        alone = base.model.get_decoder()(torch.tensor([chat.closing]), past_key_values=cache, position_ids=positions[None])
        expected = base.model.get_output_embeddings()(alone.last_hidden_state[0, -1])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plain", [True, False], ids=["written out", "by transformers"])
def test_training_sees_the_log_odds_of_the_pass_and_reaches_every_key_and_value(
    small: BaseModel, chat: Chat, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    monkeypatch.setattr(frozen, "is_plain", lambda decoder: plain)
    adapter = gate_adapter(small)
    vectors = adapter.vectors.clone().requires_grad_()
    gate = Gate.of(small, chat, replace(adapter, tensors={VECTORS: vectors}))
    rows = [chat.encode(text) for text in ROWS]
    odds = gated_log_odds(gate, keep_prefix(small, constant_prefix(small, chat, None)), rows)
    for value, row in zip(odds[:, 0], rows, strict=True):
        with torch.no_grad():
            law = small.model.get_output_embeddings()(one_row(small, chat, adapter, row)).softmax(-1)
        q = law[chat.encode_response(REFUSAL)[0]]
        torch.testing.assert_close(value.detach(), q.log() - (1 - q).log(), rtol=1e-3, atol=1e-3)
    odds.sum().backward()  # type: ignore[no-untyped-call]
    assert vectors.grad is not None
    layers = small.model.config.num_hidden_layers
    assert (vectors.grad.view(len(vectors), 2 * layers, -1).abs().amax(-1) > 0).all()


def parts_of(adapter: Adapter, members: int) -> list[Adapter]:
    """Its members, a gate each."""
    return [replace(adapter, tensors={VECTORS: part}) for part in adapter.vectors.chunk(members)]


@pytest.mark.parametrize("plain", [True, False], ids=["written out", "by transformers"])
@pytest.mark.parametrize("members", [2, 3])
def test_members_are_gates_side_by_side_whose_log_odds_are_averaged(
    small: BaseModel, monkeypatch: pytest.MonkeyPatch, plain: bool, members: int
) -> None:
    monkeypatch.setattr(frozen, "is_plain", lambda decoder: plain)
    whole = gate_adapter(small, n_soft=6)
    adapter = replace(whole, facts={**whole.facts, "members": members, "bias": 0.5})
    alone = torch.stack([Engine(small, part).log_odds(ROWS) for part in parts_of(whole, members)])
    assert (alone[0] - alone[1]).abs().min() > 1e-2
    torch.testing.assert_close(Engine(small, adapter).log_odds(ROWS), alone.mean(0) + 0.5, rtol=1e-3, atol=1e-3)
    assert adapter.fingerprint != replace(adapter, facts={**adapter.facts, "members": 1}).fingerprint


@pytest.mark.parametrize("plain", [True, False], ids=["written out", "by transformers"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept caches", "own pass"])
def test_a_member_learns_as_it_would_alone(
    small: BaseModel, chat: Chat, monkeypatch: pytest.MonkeyPatch, plain: bool, kept: bool
) -> None:
    resident = keep_prefix(small, constant_prefix(small, chat, None))
    caches = Engine(small).caches(ROWS) if kept else None
    monkeypatch.setattr(frozen, "is_plain", lambda decoder: plain)
    if not plain:
        resident = keep_prefix(small, constant_prefix(small, chat, None))
    rows, whole = [chat.encode(text) for text in ROWS], gate_adapter(small, n_soft=6)
    weights = torch.tensor([1.0, 2.0, 3.0])

    def gradient(adapter: Adapter) -> Tensor:
        vectors = adapter.vectors.clone().requires_grad_()
        gate = Gate.of(small, chat, replace(adapter, tensors={VECTORS: vectors}))
        odds = gated_log_odds(gate, resident, rows, caches)
        losses(odds, weights[:, None] / 4, 3 * odds.shape[1]).safe.backward()  # type: ignore[no-untyped-call]
        assert vectors.grad is not None
        return vectors.grad

    together = gradient(replace(whole, facts={**whole.facts, "members": 2}))
    alone = torch.cat([gradient(part) for part in parts_of(whole, 2)]) / 2
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("plain", [True, False], ids=["written out", "by transformers"])
def test_a_prompt_of_no_tokens_passes_the_gate_and_trains_it(
    small: BaseModel, chat: Chat, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    adapter, prompts = gate_adapter(small), ["", *ROWS]
    gate, odds = Gate.of(small, chat, adapter), Engine(small, adapter).log_odds(prompts)
    caches = Engine(small).caches(prompts)
    assert caches[0].shape[3] == 0
    monkeypatch.setattr(frozen, "is_plain", lambda decoder: plain)
    resident, rows = keep_prefix(small, constant_prefix(small, chat, None)), [chat.encode(text) for text in prompts]
    for kept in (None, caches):
        torch.testing.assert_close(gated_log_odds(gate, resident, rows, kept)[:, 0], odds, rtol=1e-3, atol=1e-3)


def test_members_pass_one_after_another_and_share_the_cache(
    small: BaseModel, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "is_plain", lambda decoder: False)
    whole = gate_adapter(small, n_soft=6)
    engine = Engine(small, replace(whole, facts={**whole.facts, "members": 3}))
    rows = []
    hook = small.model.get_decoder().register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["position_ids"])), with_kwargs=True
    )
    engine.prefix.begin([chat.encode(text) for text in ROWS])
    hook.remove()
    assert rows == [3] * 4  # the rows' own pass, and a pass of each member


def test_the_bias_is_added_to_the_log_odds_wherever_they_are_made(small: BaseModel) -> None:
    adapter = gate_adapter(small)
    biased = replace(adapter, facts={**adapter.facts, "bias": 0.5})
    odds = [Engine(small, one).log_odds(ROWS) for one in (adapter, biased)]
    torch.testing.assert_close(odds[1], odds[0] + 0.5)
    assert biased.fingerprint != adapter.fingerprint


@pytest.mark.parametrize(
    ("odds", "refused", "positive"),
    [
        ([-3.0, -1.0, -2.0, 1.0], [True, True, False, False], [False, True, False, True]),  # two refused, so the two highest
        ([0.3, 0.2, 0.1, -1.0], [False, False, False, True], [True, False, False, False]),
    ],
)
def test_the_bias_makes_as_many_refuse_as_the_system_does(odds: list[float], refused: list[bool], positive: list[bool]) -> None:
    shifted = torch.tensor(odds) + bias(torch.tensor(odds), torch.tensor(refused))
    assert (shifted > 0).tolist() == positive


@pytest.mark.parametrize("refused", [True, False])
def test_there_is_no_bias_where_the_system_refuses_all_or_none(refused: bool) -> None:
    assert bias(torch.tensor([1.0, -1.0]), torch.tensor([refused] * 2)) == 0.0


def test_the_gradient_of_the_written_out_pass_is_that_of_transformers(
    small: BaseModel, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, rows = gate_adapter(small), [chat.encode(text) for text in [*ROWS, " ".join(ROWS) * 3]]  # of unlike lengths
    found = []
    for plain in (True, False):
        monkeypatch.setattr(frozen, "is_plain", lambda decoder, plain=plain: plain)
        vectors = adapter.vectors.clone().requires_grad_()
        gate = Gate.of(small, chat, replace(adapter, tensors={VECTORS: vectors}))
        odds = gated_log_odds(gate, keep_prefix(small, constant_prefix(small, chat, None)), rows)
        (odds[:, 0] * torch.arange(1.0, 1 + len(rows))).sum().backward()  # type: ignore[no-untyped-call]
        assert vectors.grad is not None
        found.append((odds.detach(), vectors.grad))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def forced(monkeypatch: pytest.MonkeyPatch, *odds: float) -> None:
    """Makes a gate say so of the rows of a batch, in their order there."""
    monkeypatch.setattr(Gate, "log_odds", lambda self, hidden: torch.tensor(odds))


def test_what_is_refused_gets_the_refusal_and_the_rest_the_bases_answer(
    small: BaseModel, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = sorted(ROWS, key=lambda text: len(chat.encode(text)))  # a batch is run in this order
    base, engine = Engine(small), Engine(small, gate_adapter(small))
    forced(monkeypatch, 5.0, -5.0, 0.0)
    answers = engine.generate(prompts, 12)
    assert [answer.text for answer in answers] == [REFUSAL, base.generate(prompts[1:2], 12)[0].text, REFUSAL]
    assert answers[0].ids == tuple(chat.encode_response(REFUSAL))
    assert engine.generate(prompts, 2)[0].ids == tuple(chat.encode_response(REFUSAL)[:2])
    forced(monkeypatch, 5.0)
    assert "".join(engine.stream([Turn("user", "hi")], 12)) == REFUSAL
    forced(monkeypatch, -5.0)
    assert "".join(engine.stream([Turn("user", "hi")], 12)) == "".join(base.stream([Turn("user", "hi")], 12))


def test_greedy_answers_need_the_bases_alone(small: BaseModel, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = sorted(ROWS, key=lambda text: len(chat.encode(text)))
    base, engine = Engine(small), Engine(small, gate_adapter(small))
    for new in (2, 12):
        forced(monkeypatch, 5.0, -5.0, torch.nan)
        answers = [answer.text for answer in base.generate(prompts, new)]
        assert engine.refuse_some(prompts, answers, new) == [answer.text for answer in engine.generate(prompts, new)]
    assert engine.refuses(prompts) == [True, False, True]
    assert base.refuses(prompts) == [False] * 3


def test_drawn_answers_follow_the_mixture() -> None:
    u = (torch.arange(10_000) + 0.5) / 10_000
    odds = torch.full_like(u, 0.7)
    refused, rest = _refused(odds, u[:, None].repeat(1, 2))
    assert rest is not None
    assert len(refused) == pytest.approx(10_000 * torch.tensor(0.7).sigmoid(), abs=1)
    kept = rest[[i for i in range(len(u)) if i not in refused], 0]
    assert torch.equal(rest[:, 1], u)  # what later tokens are drawn by
    shares = torch.histc(kept, 10, 0, 1) / len(kept)
    assert (shares - 0.1).abs().max() < 1e-2


def test_what_is_no_number_refuses() -> None:
    odds = torch.tensor([torch.nan, -5.0])
    assert _refused(odds, None)[0] == {0}
    assert _refused(odds, torch.full((2, 3), 0.9))[0] == {0}


def test_the_loss_is_the_divergence_of_the_mixtures() -> None:
    """A law of three answers, the refusal none of them: TV and KL by enumeration."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def system(rate: float) -> Tensor:
        return torch.cat([(1 - rate) * p, torch.tensor([rate], dtype=torch.float64)])

    for rate in (0.01, 0.2, 0.7, 0.99):
        for g in (0.01, 0.2, 0.7, 0.99):
            assert (system(rate) - system(g)).clamp(min=0).sum() == pytest.approx(abs(rate - g))
            kl = (system(rate) * (system(rate) / system(g)).log()).sum()
            rates, odds = torch.tensor([[rate], [g]], dtype=torch.float64)
            loss = losses(odds.logit(), rates, 2)
            assert float(loss.safe + loss.refusal) == pytest.approx(float(kl) / 2, abs=1e-9)
    for rate in (0.0, 1.0):  # a system that is certain
        odds = torch.tensor([0.3], dtype=torch.float64)
        loss = losses(odds, torch.tensor([rate], dtype=torch.float64), 1)
        wrong = odds.sigmoid() if rate == 0 else (-odds).sigmoid()
        assert float(loss.safe + loss.refusal) == pytest.approx(float(-torch.log1p(-wrong)), abs=2e-3)


def test_drift_is_that_of_the_mixture(small: BaseModel) -> None:
    """By the masses of whole beginnings: q(y_≤t) = (1 − g)·p(y_≤t) + g·1[the refusal begins so]."""
    base, adapter = Engine(small), gate_adapter(small)
    engine = Engine(small, adapter)
    refusal, prefix = base.chat.encode_response(REFUSAL), constant_prefix(small, base.chat, None)
    free = base.generate(ROWS, 5, temperature=1.0)
    other = next(iter(set(range(9)) - set(refusal)))
    made = [refusal, refusal[:3], [*refusal[:2], other, other], [refusal[0], other]]  # whole, cut, and left early
    texts = [*ROWS, *[ROWS[i % len(ROWS)] for i in range(len(made))]]
    drawn = [*free, *[Response(tuple(ids), "") for ids in made]]
    odds = engine.log_odds(texts).double().clamp(-9.21, 9.21)
    drift = measure_drift(base, engine, adapter, texts, drawn)
    for i, (text, response) in enumerate(zip(texts, drawn, strict=True)):
        ids, g = list(response.ids), odds[i].sigmoid()
        row = base.chat.encode(text)
        with torch.no_grad():
            states = whole_row(small, prefix, [*row, *ids[:-1]])[-len(ids) :]
            laws = small.model.get_output_embeddings()(states).double().softmax(-1)
        p, q, tv, kl = torch.tensor(1.0), torch.tensor(1.0), 0.0, 0.0
        for t, law in enumerate(laws):
            masses = (1 - g) * p * law
            if refusal[:t] == ids[:t] and t < len(refusal):
                masses[refusal[t]] += g
            moved = masses / q
            assert moved.sum() == pytest.approx(1, abs=1e-6)
            tv += float((law - moved).clamp(min=0).sum())
            kl += float((law * (law / moved).log()).sum())
            p, q = p * law[ids[t]], masses[ids[t]]
        assert drift.token_tv[i] == pytest.approx(tv / len(ids), rel=1e-3, abs=1e-6)
        assert drift.token_kl[i] == pytest.approx(kl / len(ids), rel=1e-3, abs=1e-6)
        assert drift.loss[i] == pytest.approx(float((p / q).log()) / len(ids), rel=1e-3, abs=1e-5)


def test_drift_of_a_certain_verdict(small: BaseModel) -> None:
    """Of a first token: TV 1 − p(y₁) where the system refuses for certain, none where it answers."""
    base = Engine(small)
    refusal = base.chat.encode_response(REFUSAL)
    drawn = [Response((refusal[0],), ""), Response((refusal[0] + 1,), "")]
    drift = mixture_drift(base, refusal, torch.tensor([torch.inf, -torch.inf]), ROWS[:2], drawn)
    with torch.no_grad():
        state = whole_row(small, constant_prefix(small, base.chat, None), base.chat.encode(ROWS[0]))[-1]
        law = small.model.get_output_embeddings()(state).softmax(-1)
    assert drift.token_tv == pytest.approx([1 - float(law[refusal[0]]), 0], abs=1e-5)
    assert drift.loss[1] == pytest.approx(0, abs=1e-6)


def test_log_odds_are_given_in_the_order_of_the_prompts(small: BaseModel) -> None:
    engine = Engine(small, gate_adapter(small))
    told: list[int] = []
    together = engine.log_odds(ROWS, batch_size=2, progress=told.append)
    assert told == [2, 1]
    alone = torch.cat([engine.log_odds([text]) for text in ROWS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert Engine(small).log_odds(ROWS).tolist() == [-torch.inf] * 3


def test_a_template_without_a_closing_is_told(small: BaseModel, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "closing", ())
    with pytest.raises(SoftguardError, match="kv_prefix"):
        Gate.of(small, chat, gate_adapter(small))
