import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from softguard.chat import Chat
from softguard.errors import SoftguardError
from softguard.kernels import log_law
from softguard.models import BaseModel, fingerprint, load_base
from tests.references import made


def test_the_base_is_frozen_and_in_evaluation_mode(base: BaseModel) -> None:
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    assert (base.hidden, base.context) == (576, 8192)


def test_the_same_weights_in_bfloat16_are_the_same_model(small: BaseModel, small_folder: Path) -> None:
    assert load_base(str(small_folder), dtype="bfloat16").fingerprint == small.fingerprint


def test_other_weights_are_another_model(small: BaseModel) -> None:
    weight = next(small.model.parameters())
    with torch.no_grad():
        weight[0, 0] += 1
    changed = fingerprint(small.model, small.tokenizer)
    with torch.no_grad():
        weight[0, 0] -= 1
    assert changed != small.fingerprint


def test_the_same_weights_behind_scaled_positions_are_another_model(small_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_folder, tmp_path / "scaled")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {**config["rope_parameters"], "rope_type": "linear", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_base(str(folder)).fingerprint != load_base(str(small_folder)).fingerprint


def test_the_head_gives_the_same_logits_for_rows_and_for_their_flat_tokens(small: BaseModel) -> None:
    head = small.model.get_output_embeddings()
    hidden = torch.randn(2, 3, small.hidden)
    expected = hidden @ head.weight.T
    assert head(hidden).shape == expected.shape
    torch.testing.assert_close(head(hidden), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("missing/model.gguf", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("./nowhere", "does not exist"),
        ("no-such-model-anywhere", "could not be loaded"),
    ],
)
def test_a_missing_model_is_told_in_one_line(spec: str, words: str) -> None:
    with pytest.raises(SoftguardError, match=words) as caught:
        load_base(spec)
    assert "\n" not in str(caught.value)
    assert spec in str(caught.value)


@pytest.mark.parametrize("device", ["banana", "meta"])
def test_a_device_that_holds_no_model_is_told(device: str, small_folder: Path) -> None:
    with pytest.raises(SoftguardError, match=rf"^model\.device is '{device}' \(.*\); use auto or cpu$"):
        load_base(str(small_folder), device=device)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SoftguardError, match=r"config\.json"):
        load_base(str(tmp_path))


def test_pickled_weights_are_refused(small: BaseModel, small_folder: Path, tmp_path: Path) -> None:
    for file in small_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(small.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SoftguardError, match="could not be loaded"):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda own: {k: v for k, v in own.items() if "layers.1." not in k}, r"lacks 9 of its weights, model\.layers\.1\."),
        (lambda own: {f"base_model.{k}": v for k, v in own.items()}, "lacks 21 of its weights"),
        (
            lambda own: own | {"model.norm.weight": torch.ones(3)},
            r"lacks 1 of its weights, model\.norm\.weight .* another shape",
        ),
        (lambda own: own | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, r"no place for, .*q_proj\.bias"),
    ],
)
def test_a_folder_whose_weights_are_not_the_models_is_refused(
    change: Callable[[dict[str, Any]], dict[str, Any]], told: str, small_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small_folder, tmp_path / "changed")
    changed = change(load_file(folder / "model.safetensors"))
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SoftguardError, match=told):
        load_base(str(folder))


@pytest.mark.parametrize("quantize", ["q8_0", "q4_0"])
def test_rounded_weights_are_the_same_model_in_either_precision(quantize: str, small_folder: Path) -> None:
    exact, coarse = (load_base(str(small_folder), dtype, quantize=quantize) for dtype in ("float32", "bfloat16"))
    assert exact.fingerprint == coarse.fingerprint
    for ours, theirs in zip(exact.model.parameters(), coarse.model.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), theirs)
    assert coarse.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_damaged_gguf_file_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but no model")
    with pytest.raises(SoftguardError, match="could not be loaded") as caught:
        load_base(str(tmp_path / "broken.gguf"))
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(SoftguardError, match="float32, bfloat16"):
        load_base("smollm2", dtype="float8")


def with_rows(small: BaseModel, small_folder: Path, tmp_path: Path, tokenizer: Any, rows: int) -> Path:
    """A copy of the small model with so many embeddings, and that tokenizer."""
    folder = shutil.copytree(small_folder, tmp_path / "rows")
    model = copy.deepcopy(small.model)
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("token", "special", "template", "told"),
    [
        ("<image>", True, "", None),  # Gemma 3's: no text gives it
        ("<|image|>", False, "", None),
        ("<image>", False, "", "49152 ('<image>')"),
        ("<image>", True, "<image>", "49152 ('<image>')"),
        ("<image>", False, "{% if tools %}<image>{% endif %}", None),  # a control token that no chat here has
    ],
)
def test_ids_beyond_the_embeddings_are_refused_where_something_gives_them(
    token: str, special: bool, template: str, told: str | None, small: BaseModel, small_folder: Path, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(small.tokenizer)
    tokenizer.add_tokens([token], special_tokens=special)
    tokenizer.chat_template = template + tokenizer.chat_template
    folder = with_rows(small, small_folder, tmp_path, tokenizer, 49152)
    if told is None:
        base = load_base(str(folder))
        assert max(Chat(base.tokenizer).encode(f"{token} {token}")) < 49152
        return
    with pytest.raises(SoftguardError, match=rf"has 49,152 embeddings, but its tokenizer gives id {re.escape(told)}; resize"):
        load_base(str(folder))


def test_ids_beyond_the_embeddings_are_refused_where_nothing_ends_a_turn(
    small: BaseModel, small_folder: Path, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(small.tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.eos_token = None
    tokenizer.chat_template = "<image>{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
    assert not Chat(tokenizer).stop_ids
    with pytest.raises(SoftguardError, match=r"has 49,152 embeddings, but its tokenizer gives id 49152 \('<image>'\); resize"):
        load_base(str(with_rows(small, small_folder, tmp_path, tokenizer, 49152)))


def test_a_vocabulary_beyond_the_embeddings_is_refused(small: BaseModel, small_folder: Path, tmp_path: Path) -> None:
    folder = with_rows(small, small_folder, tmp_path, small.tokenizer, 300)
    with pytest.raises(SoftguardError, match=r"^model .* has 300 embeddings, but its tokenizer gives id 300 \(.*tokenizer$"):
        load_base(str(folder))


def test_padding_has_an_embedding(small: BaseModel) -> None:
    tokenizer = copy.deepcopy(small.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert replace(small, tokenizer=tokenizer).pad_id == tokenizer.eos_token_id < tokenizer.pad_token_id


@pytest.mark.parametrize("family", ["Gemma2", "Granite", "Cohere", "Llama"])
def test_laws_at_the_head_are_the_model_s_own_whatever_it_makes_of_its_logits(family: str, small: BaseModel) -> None:
    import transformers

    torch.manual_seed(0)
    special = {
        "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
        "Granite": {"logits_scaling": 4.0},
        "Cohere": {"logit_scale": 0.25},
    }
    config = getattr(transformers, f"{family}Config")(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.5, **special.get(family, {}),
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    output = model(torch.tensor([[3, 4, 5]]), output_hidden_states=True)
    law = log_law(output.hidden_states[-1][0], replace(small, model=model).head)
    torch.testing.assert_close(law, output.logits[0].log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_a_head_with_a_bias_is_refused(small: BaseModel) -> None:
    head = torch.nn.Linear(4, 5)
    model = SimpleNamespace(get_output_embeddings=lambda: head, config=small.model.config)
    with pytest.raises(SoftguardError, match="a bias"):
        _ = replace(small, model=model).head


@pytest.mark.parametrize(("quantize", "levels"), [("q8_0", 256), ("q4_0", 16), ("q4_1", 16)])
def test_quantised_weights_have_few_levels_a_block_and_are_another_model(
    quantize: str, levels: int, small: BaseModel, small_folder: Path
) -> None:
    full, rounded = load_base(str(small_folder)), load_base(str(small_folder), quantize=quantize)
    for before, after in zip(full.model.model.layers, rounded.model.model.layers, strict=True):
        for name in ("q_proj", "v_proj"):
            old, new = getattr(before.self_attn, name).weight, getattr(after.self_attn, name).weight
            blocks, kept = old.reshape(-1, 32), new.reshape(-1, 32)
            assert max(len(block.unique()) for block in kept) <= levels
            widest = (blocks.amax(-1) - blocks.amin(-1)).clamp(min=1e-6)
            # half a level of the block's scale; q4_0 and q8_0 are symmetric about 0, which costs them up to a whole one
            assert ((kept - blocks).abs().amax(-1) <= 1.1 * 2 * blocks.abs().amax(-1) / levels).all()
            assert ((kept - blocks).abs().amax(-1) / widest).max() > 0
    assert rounded.fingerprint != full.fingerprint
    assert torch.equal(rounded.model.lm_head.weight, full.model.lm_head.weight)  # as on devices, the head keeps its precision


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("Mixtral", {"num_local_experts": 2}, "keeps weights of several experts as one; give a GGUF file"),
        ("Llama", {"intermediate_size": 40}, "layers.0.mlp.down_proj of .* has rows of 40; leave it out"),
    ],
)
def test_weights_that_would_stay_as_they_are_are_not_called_quantised(
    family: str, changes: dict[str, int], words: str, base: BaseModel, tmp_path: Path
) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, **changes,
        }
    )  # fmt: skip
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SoftguardError, match=words):
        load_base(str(tmp_path), quantize="q4_0")


@pytest.mark.parametrize(
    "change",
    [{"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rms_norm_eps": 1.0}, {"hidden_act": "gelu"}],
)
def test_the_same_weights_in_another_computation_are_another_model(
    change: dict[str, Any], small: BaseModel, small_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small_folder, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert load_base(str(folder)).fingerprint != small.fingerprint


def test_the_same_weights_behind_another_tokenizer_are_another_model(
    small: BaseModel, small_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small_folder, tmp_path / "changed")
    told = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**told, "normalizer": {"type": "Lowercase"}}))
    assert load_base(str(folder)).fingerprint != small.fingerprint


@pytest.mark.parametrize("row", [0, 3, 1234])
def test_one_other_row_of_embeddings_makes_another_model(row: int, small: BaseModel) -> None:
    weight = small.model.get_input_embeddings().weight
    own = weight[row].clone()
    with torch.no_grad():
        weight[row] = torch.randn(len(own), generator=torch.Generator().manual_seed(0))
        changed = fingerprint(small.model, small.tokenizer)
        weight[row] = own
    assert changed != small.fingerprint == fingerprint(small.model, small.tokenizer)


def test_an_adapter_beside_a_model_is_refused(small_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_folder, tmp_path / "both")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "a.gguf").write_text("")
    for spec in (folder, folder / "a.gguf"):
        with pytest.raises(SoftguardError, match=r"both holds an adapter beside the model \(adapter_config\.json\); move it"):
            load_base(str(spec))


def test_an_unknown_quantisation_is_told(small_folder: Path) -> None:
    with pytest.raises(SoftguardError, match="quantize 'q5' is unknown; use one of none, q8_0, q4_0, q4_1"):
        load_base(str(small_folder), quantize="q5")


def test_weights_that_no_one_trains_and_rarer_settings_count(small: BaseModel) -> None:
    def identity(bias: float = 0.0, **settings: Any) -> str:
        base = made(small, "Olmo", **settings)
        base.model.get_decoder().register_buffer("offset", torch.tensor([bias]))
        return fingerprint(base.model, base.tokenizer)

    assert len({identity(), identity(bias=1.0), identity(clip_qkv=0.5)}) == 3


def test_makes_that_compute_the_same_are_the_same_model(small: BaseModel) -> None:
    one, other = (made(small, make) for make in ("Llama", "Mistral"))
    other.model.config.sliding_window = None
    other.model.load_state_dict(one.model.state_dict())
    assert fingerprint(one.model, one.tokenizer) == fingerprint(other.model, other.tokenizer)


def test_a_tokenizer_that_fails_on_some_texts_has_an_identity(small: BaseModel) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("no token for what is unknown")

    assert fingerprint(small.model, fails) != small.fingerprint
