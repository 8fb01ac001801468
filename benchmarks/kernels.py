"""Frozen-head kernels beside TRL's chunked functions, Liger's losses and plain PyTorch: forward and backward.

    python -m benchmarks.kernels [--rounds 5] [--threads 2] [--tokens 512]

TRL and Liger have no total variation: their forward KL, which reads the same two heads, stands beside it. Errors are the
largest of a token's value, relative to the same inputs in float64 (absolute where that is below 1). Liger's Triton kernels need
a GPU; its total variation is of two laws, which are made before it. Its chunked losses make the head's gradient, too, which a
frozen head does not need.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import alternate, arguments, keep, machine, multiplies_bfloat16
from softguard.divergences import selected, token_jsd, token_kl, token_tv
from softguard.kernels import Head, log_law, per_token_between, selected_log_probs

HIDDEN = 576
VOCABULARIES = (49_152, 151_936, 262_144)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Values = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # student, teacher, head, ids to one value a token


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    before = machine(options.threads)
    rows = []
    for vocabulary in VOCABULARIES:
        for dtype in DTYPES if multiplies_bfloat16(before) else ("fp32",):
            for kernel in KERNELS:
                rows += measure(kernel, vocabulary, dtype, options.tokens, options.rounds)
    keep("kernels", rows, before, tokens=options.tokens, hidden=HIDDEN)


def measure(kernel: str, vocabulary: int, dtype: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, DTYPES[dtype])

    teacher, head = random(tokens, HIDDEN, scale=1), random(vocabulary, HIDDEN, scale=0.1)
    student = (teacher + random(tokens, HIDDEN, scale=0.3)).requires_grad_()  # a student near its teacher
    ids = torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE)

    def run(values: Values) -> None:
        student.grad = None
        values(student, teacher, head, ids).sum().backward()  # type: ignore[no-untyped-call]

    sides = KERNELS[kernel]
    timings = alternate({name: partial(run, values) for name, values in sides.items()}, rounds)
    with torch.no_grad():
        some = slice(0, 32)
        exact = plain(kernel)(student[some].double(), teacher[some].double(), head.double(), ids[some])
    rows = []
    for name, values in sides.items():
        same = "(KL)" not in name and "liger" not in name  # the others give another divergence, or only a mean
        with torch.no_grad():
            error = ((values(student, teacher, head, ids)[some] - exact).abs() / exact.abs().clamp(min=1)).max()
        other = next((t for n, t in timings.items() if n.startswith("trl")), timings["softguard"])
        rows.append(
            {
                "kernel": kernel,
                "vocabulary": vocabulary,
                "dtype": dtype,
                "side": name,
                **timings[name].row(),
                "trl_over_this": round(other.median / timings[name].median, 2),
                "error": float(f"{error.item():.2e}") if same else "",
            }
        )
        print(rows[-1], flush=True)
    return rows


def ours(kernel: str) -> Values:
    def values(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> Tensor:
        if kernel == "selected":
            return selected_log_probs(student, ids, Head(head))
        divergence = {"tv": token_tv, "kl": token_kl, "jsd": token_jsd}[kernel]
        return per_token_between(divergence, teacher, student, Head(head))

    return values


def plain(kernel: str) -> Values:
    def values(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> Tensor:
        if kernel == "selected":
            return selected(log_law(student, Head(head)), ids)
        p, q = (Head(head).logits(x).to(torch.promote_types(head.dtype, torch.float32)) for x in (teacher, student))
        return {"tv": token_tv, "kl": token_kl, "jsd": token_jsd}[kernel](p, q)

    return values


def trl_selected(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(student, head, None, ids, 1.0, 8192, None, 1.0, ())[0]  # type: ignore[no-any-return]


def trl_divergence(beta: float) -> Values:
    def values(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return ChunkedDivergenceFunction.apply(student, head, None, teacher, head, None, beta)[0]  # type: ignore[no-any-return]

    return values


def liger_divergence(beta: float) -> Values:
    def values(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
        # its loss is a mean over tokens: shown as one value a token so that the sum is the same
        return loss(student, head, teacher, head, ids).expand(len(student))  # type: ignore[no-any-return]

    return values


def liger_triton(kernel: str) -> Values:
    def values(student: Tensor, teacher: Tensor, head: Tensor, ids: Tensor) -> Tensor:
        from liger_kernel import transformers as liger

        if kernel == "selected":
            return -liger.LigerFusedLinearCrossEntropyLoss()(head, student, ids).expand(len(student))  # type: ignore[no-any-return]
        if kernel == "tv":
            laws = ((x @ head.mT).softmax(-1) for x in (student, teacher))
            return liger.LigerTVDLoss()(*laws).expand(len(student))  # type: ignore[no-any-return]
        loss = liger.LigerFusedLinearJSD(jsd_beta={"kl": 0.0, "jsd": 0.5}[kernel])
        return loss(student, head, teacher, head, None).expand(len(student))  # type: ignore[no-any-return]

    return values


KERNELS: dict[str, dict[str, Values]] = {
    "selected": {"softguard": ours("selected"), "trl ChunkedLogProb": trl_selected, "pytorch": plain("selected")},
    "tv": {"softguard": ours("tv"), "trl ChunkedDivergence (KL)": trl_divergence(0.0), "pytorch": plain("tv")},
    "kl": {
        "softguard": ours("kl"),
        "trl ChunkedDivergence": trl_divergence(0.0),
        "liger chunked JSD, beta 0": liger_divergence(0.0),
        "pytorch": plain("kl"),
    },
    "jsd": {
        "softguard": ours("jsd"),
        "trl ChunkedDivergence": trl_divergence(0.5),
        "liger chunked JSD": liger_divergence(0.5),
        "pytorch": plain("jsd"),
    },
}
if DEVICE == "cuda":
    for name, sides in KERNELS.items():
        sides["liger Triton"] = liger_triton(name)

if __name__ == "__main__":
    main()
