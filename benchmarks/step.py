"""One training step beside PEFT prompt tuning with TRL's losses, and beside its own matrix products.

    python -m benchmarks.step [--rounds 5] [--threads 2] [--batch 8] [--prompt 60] [--response 64]

Every side: SmolLM2-135M-Instruct, the same tokens, 32 soft vectors, answers alone (no refusals), forward KL to the frozen
base, backward and optimiser step; drawing is in none. "kept": the base's hidden states are in the corpus, so that no side
of ours runs the base. "in two parts": one half of the rows after the other (`distil.accumulate`), as every side could do it.
"products" replays the matrix products our step made, shape by shape and in its precision, alone.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.record import alternate, arguments, keep, machine, multiplies_bfloat16
from softguard.config import load_recipe
from softguard.corpus import Corpus, Draw, Example
from softguard.distill import _Trainer
from softguard.models import BaseModel, load_base

N_SOFT = 32
_PRODUCTS = [
    getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul")
]  # what linear layers and attention come down to; in inference mode layers and matmul stay one
_LAID_OUT = "mkldnn::_linear_pointwise"  # the same of weights laid out beforehand, where PyTorch has that library


class Shape(NamedTuple):
    """Rows, tokens of a prompt with its template, tokens of a response."""

    batch: int
    prompt: int
    response: int


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=60)
    parser.add_argument("--response", type=int, default=64)
    options = parser.parse_args()
    before = machine(options.threads)
    shape = Shape(options.batch, options.prompt, options.response)
    rows = []
    for dtype in ("bfloat16", "float32") if multiplies_bfloat16(before) else ("float32",):
        sides = _sides(shape, dtype)
        timings = alternate(sides, options.rounds)
        for name, timing in timings.items():
            rows.append(
                {
                    "dtype": dtype,
                    "side": name,
                    **timing.row(),
                    "over_softguard": round(timing.median / timings["softguard"].median, 2),
                    "memory_over_softguard": round(timing.memory / max(timings["softguard"].memory, 1), 2),
                }
            )
            print(rows[-1], flush=True)
    keep("step", rows, before, **shape._asdict(), n_soft=N_SOFT)


def _sides(shape: Shape, dtype: str) -> dict[str, Callable[[], Any]]:
    base = load_base(dtype=dtype)
    trainers = our_trainer(base, shape, False), our_trainer(base, shape, True), our_trainer(base, shape, True, parts=2)
    ours, from_corpus, parted = (partial(trainer._train_step, list(range(shape.batch)), 0) for trainer in trainers)
    return {
        "softguard": ours,
        "softguard, kept": from_corpus,
        "softguard, kept, in two parts": parted,
        "products of softguard": products(base, ours),
        "products of softguard, kept": products(base, from_corpus),
        "peft + trl GKD loss": peft_gkd(_fastest(dtype), shape),
        "peft + trl SDFTTrainer": sdft(_fastest(dtype), shape),
    }


def _fastest(dtype: str) -> BaseModel:
    """The base with the attention that trains faster on processors in bfloat16; elsewhere with transformers' choice."""
    base = load_base(dtype=dtype)
    if (base.device.type, dtype) == ("cpu", "bfloat16"):
        base.model.set_attn_implementation("eager")
    return base


def our_trainer(base: BaseModel, shape: Shape, keep_hidden: bool, parts: int = 1) -> _Trainer:
    """A trainer whose corpus is `shape.batch` random answers to prompts of one length."""
    sizes = [f"distil.n_soft={N_SOFT}", f"distil.batch_size={shape.batch}", f"distil.accumulate={parts}"]
    recipe = load_recipe(None, ["distil.adapter=soft_prompt", "distil.objective=kl", *sizes])
    trainer = _Trainer(recipe, cast(Corpus, Answers([], base.precision)), Path("unused"), base)
    chat = trainer.passes.chat
    prompt = next(t for n in range(shape.prompt) if len(chat.encode(t := " ".join(["the"] * n))) == shape.prompt)
    answers = random_ids(shape.batch, shape.response)
    states: list[Tensor | None] = [None] * shape.batch
    if keep_hidden:
        rows = [chat.encode(prompt) + ids[:-1] for ids in answers]
        states = list(trainer.passes.teacher(rows, [shape.response] * shape.batch))
    examples = [Example(prompt, "", 0.0, (Draw(tuple(ids), 1.0, 1.0, h),)) for ids, h in zip(answers, states, strict=True)]
    trainer.corpus = cast(Corpus, Answers(examples, base.precision))
    return trainer


@dataclass
class Answers:
    """As much of a corpus as a step asks for."""

    all: list[Example]
    precision: str  # in which the base's states and caches were kept
    fingerprint: str = ""

    @property
    def manifest(self) -> Mapping[str, Any]:
        made: dict[str, Any] = {"guard": "", "guard_fingerprint": "", "system": {}, "refusals": ["No."], "threshold": None}
        return {**made, "precision": self.precision}

    def examples(self, split: str, indices: list[int], caches: bool = False) -> list[Example]:
        return [self.all[i] for i in indices]

    def size(self, split: str) -> int:
        return len(self.all)


def random_ids(rows: int, tokens: int) -> list[list[int]]:
    """Ids that are no control tokens."""
    return torch.randint(100, 40_000, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()


def products(base: BaseModel, step: Callable[[], Any]) -> Callable[[], None]:
    """The matrix products `step` makes, to be made again with random numbers of the same shapes, strides and dtypes.

    Weights stay the model's own: read from memory in turn, as the step reads them.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in base.model.parameters()}
    made: dict[Any, Tensor] = {}
    calls: list[Callable[[], Any]] = []

    def like(tensor: Tensor) -> Tensor:
        key = (tensor.shape, tensor.stride(), tensor.dtype)
        if key not in made:
            # an expanded tensor's elements share memory, which nothing random can be written to in place
            room = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            made[key] = torch.randn(room, dtype=tensor.dtype, device=tensor.device).as_strided(*key[:2])
        return made[key]

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in _PRODUCTS:
                tensors = [a.detach() for a in args if isinstance(a, Tensor)]
                calls.append(partial(function, *(a if a.untyped_storage().data_ptr() in weights else like(a) for a in tensors)))
            elif function.name().startswith(_LAID_OUT):  # what it finishes besides is no product
                weight, bias = args[2:4] if function.name().endswith("binary") else args[1:3]
                alone = torch.ops.mkldnn._linear_pointwise
                calls.append(partial(alone, like(args[0].detach()), weight, bias, "none", [], ""))
            return function(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        step()

    @torch.no_grad()
    def replay() -> None:
        for call in calls:
            call()

    return replay


def peft_gkd(base: BaseModel, shape: Shape) -> Callable[[], None]:
    """Student and base with logits at all positions, and TRL's GKD loss at those of the responses."""
    from trl.experimental.gkd import GKDTrainer

    model, optimiser = _prompt_tuned(base)
    prompts, responses = _prompts_and_responses(base, shape)
    ids = torch.cat([prompts, responses], dim=1)
    mask = torch.ones_like(ids)

    def step() -> None:
        optimiser.zero_grad()
        student = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, N_SOFT:]
        with torch.no_grad(), model.disable_adapter():
            teacher = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        answers = slice(prompts.shape[1] - 1, -1)
        loss = GKDTrainer.generalized_jsd_loss(student[:, answers], teacher[:, answers], beta=0.0)
        loss.backward()
        optimiser.step()

    return step


def sdft(base: BaseModel, shape: Shape) -> Callable[[], None]:
    """TRL's trainer on a batch that is already drawn: full logits at the responses, the base as teacher."""
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    base.model.is_quantized = False  # its weights are floats since it was loaded; the trainer goes by the file they came from
    model, optimiser = _prompt_tuned(base)
    prompts, answers = _prompts_and_responses(base, shape)
    whole = torch.cat([prompts, answers], dim=1)
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": answers,
        "completion_mask": torch.ones_like(answers),
        "teacher_input_ids": whole,
        "teacher_attention_mask": torch.ones_like(whole),
    }
    args = SDFTConfig(
        output_dir=tempfile.mkdtemp(),
        distillation_mode="full_logits",
        distillation_alpha=0.0,
        per_device_train_batch_size=shape.batch,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
    )
    rows = Dataset.from_list([{"prompt": "x", "privileged_context": "x"}] * shape.batch)
    trainer = SDFTTrainer(model=model, args=args, train_dataset=rows, processing_class=base.tokenizer)
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        optimiser.zero_grad()
        trainer.compute_loss(model, batch).backward()
        optimiser.step()

    return step


def _prompt_tuned(base: BaseModel) -> tuple[Any, torch.optim.Optimizer]:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(base.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N_SOFT))
    return model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def _prompts_and_responses(base: BaseModel, shape: Shape) -> tuple[Tensor, Tensor]:
    """Ids, (batch, tokens) each; to a prompt's come those of the template before it, which peers run once a row."""
    from softguard.chat import Chat

    prefix = Chat(base.tokenizer, "start", base.stop_ids).prefix
    lengths = len(prefix.before) + len(prefix.after) + shape.prompt, shape.response
    prompts, responses = (torch.tensor(random_ids(shape.batch, n), device=base.device) for n in lengths)
    return prompts, responses


if __name__ == "__main__":
    main()
