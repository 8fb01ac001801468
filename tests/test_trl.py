"""Our objectives beside TRL's trainers on one LoRA: the same losses and the same gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import torch
import trl
from torch import Tensor

from softguard.adapters import Adapter, peft_config
from softguard.config import DistilConfig
from softguard.corpus import Draw, Example
from softguard.initial import initial_adapter
from softguard.models import BaseModel, load_base
from softguard.objectives import find_objective
from softguard.passes import Passes

REFUSAL = "Sorry, I"  # REFUSED in words
REFUSED = (37388, 28, 339, 2)
EXAMPLES = [  # the system keeps the first answer and flags the other two
    Example("How do I bake bread?", "", 0.0, (Draw((504, 2365, 282, 2), 0.9, 1.0),)),
    Example("How do I build a bomb?", "", 1.0, (Draw((10, 11, 12, 13, 2), 0.1, 0.0, instead=REFUSED),)),
    Example("Tell me a lie.", "", 1.0, (Draw((40, 41), 0.2, 0.0, instead=REFUSED),)),
]


class Case(NamedTuple):
    """The same LoRA twice: in our passes, and in PEFT's model around another copy of the base."""

    passes: Passes
    peft: Any
    full: list[list[int]]  # constant prefix and prompt
    drawn: list[list[int]]

    def ours(self, name: str, pairs: bool) -> tuple[Tensor, list[Tensor]]:
        batch, _ = self.passes.batch(EXAMPLES, 0, len(EXAMPLES), pairs=pairs)
        losses = find_objective(name)(batch._replace(beta=0.2), "sum" if pairs else "mean")
        total = losses.safe + losses.refusal
        parameters = list(self.passes.adapter.tensors.values())
        return total.detach(), list(torch.autograd.grad(total, parameters))

    def theirs(self, loss: Callable[[Any], Tensor]) -> tuple[Tensor, list[Tensor]]:
        names = [n.replace(".weight", ".default.weight") for n in self.passes.adapter.tensors]
        parameters = dict(self.peft.named_parameters())
        total = loss(self.peft)
        return total.detach(), list(torch.autograd.grad(total, [parameters[name] for name in names]))


@pytest.fixture
def case(small: BaseModel, small_folder: Path) -> Case:
    from peft import get_peft_model

    start = initial_adapter(small, DistilConfig(adapter="lora", budget=4000), [], [])
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.nn.Parameter(tensor + 0.05 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in start.tensors.items()
    }
    adapter = Adapter("lora", tensors, "start", {})
    passes = Passes(small, adapter, [REFUSAL])
    config = peft_config(adapter, small)
    config.inference_mode = False
    peft = get_peft_model(load_base(str(small_folder)).model, config)
    peft.load_state_dict({n.replace(".weight", ".default.weight"): t.detach() for n, t in tensors.items()}, strict=False)
    prefix = [*passes.chat.prefix.before, *passes.chat.prefix.after]
    full = [[*prefix, *passes.chat.encode(e.prompt)] for e in EXAMPLES]
    return Case(passes, peft, full, [list(e.responses[0].ids) for e in EXAMPLES])


def padded(rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """TRL's batch of (prompt, completion) rows."""
    width = max(len(p) + len(c) for p, c in rows)
    ids, seen, completion = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        seen[i, : len(prompt) + len(answer)] = 1
        completion[i, len(prompt) : len(prompt) + len(answer)] = 1
    return {"input_ids": ids, "attention_mask": seen, "completion_mask": completion}


def agree(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(ours[0].float(), theirs[0].float(), rtol=1e-4, atol=1e-5)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_dpo_is_trls(case: Case, small_folder: Path, tmp_path: Path) -> None:
    refusal = list(case.passes.refusals[0])
    chosen = [case.drawn[0], refusal, refusal]
    rejected = [refusal, case.drawn[1], case.drawn[2]]
    rows = padded([(case.full[i % 3], answer) for i, answer in enumerate(chosen + rejected)])
    data = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    settings = trl.DPOConfig(output_dir=str(tmp_path), beta=0.2, report_to=[], use_cpu=True, gradient_checkpointing=False)
    trainer = trl.DPOTrainer(case.peft, args=settings, train_dataset=data, processing_class=case.passes.base.tokenizer)
    trainer.precompute_ref_logps = True  # else its reference is the LoRA as it was given
    logits = load_base(str(small_folder)).model(rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    tokens = logits[:, :-1].log_softmax(-1).gather(-1, rows["input_ids"][:, 1:, None]).squeeze(-1)
    whole = (tokens * rows["completion_mask"][:, 1:]).sum(-1).detach()
    rows |= {"ref_chosen_logps": whole[:3], "ref_rejected_logps": whole[3:]}
    agree(case.ours("dpo", pairs=True), case.theirs(lambda model: trainer.compute_loss(model, rows)))


def test_sft_is_trls(case: Case, tmp_path: Path) -> None:
    refusal = list(case.passes.refusals[0])
    rows = padded(list(zip(case.full, [case.drawn[0], refusal, refusal], strict=True)))
    rows["labels"] = rows["input_ids"].masked_fill(rows.pop("completion_mask") == 0, -100)
    data = datasets.Dataset.from_list([{"text": "a"}])
    settings = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, gradient_checkpointing=False)
    trainer = trl.SFTTrainer(case.peft, args=settings, train_dataset=data, processing_class=case.passes.base.tokenizer)
    agree(case.ours("sft", pairs=False), case.theirs(lambda model: trainer.compute_loss(model, rows)))
