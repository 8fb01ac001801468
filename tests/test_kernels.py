"""Kernels against whole laws in float64: values, gradients, and the memory they take."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from softguard import kernels
from softguard.divergences import log_avoids, selected, token_jsd, token_kl, token_tv
from softguard.kernels import Head, law_of, log_law, per_token, per_token_between, selected_log_probs

TOKENS, HIDDEN, VOCABULARY = 13, 8, 50


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_TILE", 5 * VOCABULARY * 8)  # tiles of 5 float64 tokens: two whole ones and a rest
    monkeypatch.setattr(kernels, "_LEAST", 1)
    monkeypatch.setattr(kernels, "_BLOCK", 2 * VOCABULARY)  # in blocks of 2, 2 and 1


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.5, 0.0), (1.5, 3.0)])
@pytest.mark.parametrize("name", ["tv", "kl", "jsd", "selected", "avoids", "selected_log_probs"])
def test_tiles_give_the_values_and_gradients_of_whole_laws(name: str, scale: float, cap: float, dtype: torch.dtype) -> None:
    head, teacher, hidden = random(VOCABULARY, HIDDEN, seed=0), random(TOKENS, HIDDEN, seed=1), random(TOKENS, HIDDEN, seed=2)
    ids, outer = torch.arange(TOKENS) % VOCABULARY, random(TOKENS, seed=3)
    p, q = (scale * x @ head.T for x in (teacher, hidden.requires_grad_()))
    p, q = (cap * (x / cap).tanh() if cap else x for x in (p, q))
    log_p, log_q = p - p.exp().sum(-1, keepdim=True).log(), q - q.exp().sum(-1, keepdim=True).log()
    log_m = (log_p.exp() / 2 + log_q.exp() / 2).log()
    expected = {
        "jsd": (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2,
        "selected_log_probs": log_q[torch.arange(TOKENS), ids],
        "tv": (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "selected": log_q[torch.arange(TOKENS), ids],
        "avoids": (1 - log_q[:, 5].exp()).log(),
    }[name]
    (gradient,) = torch.autograd.grad((outer * expected).sum(), hidden)

    near, rest, small = hidden.detach().to(dtype).requires_grad_(), teacher.to(dtype), Head(head.to(dtype), scale, cap)
    values = {
        "tv": lambda: per_token_between(token_tv, rest, near, small),
        "kl": lambda: per_token(lambda z_q, z_p, at: token_kl(z_p, z_q), near, small, rest),
        "jsd": lambda: per_token(lambda z_q, at: token_jsd(log_law(rest[at], small), z_q), near, small),
        "selected": lambda: per_token(lambda z_q, at: selected(law_of(z_q), ids[at]), near, small),
        "avoids": lambda: per_token(lambda z_q, at: log_avoids(law_of(z_q), torch.tensor(5)), near, small),
        "selected_log_probs": lambda: selected_log_probs(near, ids, small),
    }[name]()
    (ours,) = torch.autograd.grad((outer.to(dtype) * values).sum(), near)
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (1e-10, 1e-12)
    torch.testing.assert_close(values.double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(ours.double(), gradient, rtol=rtol, atol=atol)


def test_no_tokens_have_no_values_and_an_empty_gradient() -> None:
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    values = per_token(lambda z_q, at: z_q.sum(-1), hidden, Head(torch.zeros(VOCABULARY, HIDDEN)))
    assert values.shape == (0,)
    values.sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


def test_low_precision_laws_are_normalised_in_float32() -> None:
    law = log_law(random(TOKENS, HIDDEN, seed=0).bfloat16(), Head(random(VOCABULARY, HIDDEN, seed=1).bfloat16()))
    assert law.dtype == torch.float32
    assert law.exp().sum(-1).tolist() == pytest.approx([1] * TOKENS, abs=1e-5)


@pytest.mark.parametrize(("tokens", "tile"), [(50, 10), (36, 9)])  # at most 10 tokens, all alike
def test_no_tensor_holds_more_than_a_tile_of_logits(tokens: int, tile: int) -> None:
    largest = 0
    head, teacher = Head(torch.randn(VOCABULARY, HIDDEN)), torch.randn(tokens, HIDDEN)
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():  # type: ignore[no-untyped-call]
        per_token_between(token_tv, teacher, hidden, head).sum().backward()  # type: ignore[no-untyped-call]
    assert largest == max(tokens * HIDDEN, tile * VOCABULARY)  # whole laws would be tokens * VOCABULARY
