"""Divergences between a teacher and a student, as pure functions on log-probabilities.

P is the teacher, q the student, p the base model, α the guard's p(safe), U the teacher's refusal rate, y_r the refusal.
Equation numbers are those of arXiv 2606.09388.
"""

from typing import Any

import torch
from torch import Tensor

P_SAFE_RANGE = (1e-4, 1 - 1e-4)  # keeps log α and log U finite


def token_tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation of next-token laws, Σ_v (p(v) − q(v))₊: (..., vocabulary) log-probabilities to (...) in [0, 1].

    Gradients reach `log_q` alone, here and in `token_kl` and `token_jsd`: they are written out, −q·1[q < p] here.
    """
    return _TV.apply(log_p, log_q)  # type: ignore[no-any-return,no-untyped-call]


def token_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Forward KL(p‖q) of next-token laws in nats: (..., vocabulary) log-probabilities to (...) ≥ 0."""
    return _KL.apply(log_p, log_q)  # type: ignore[no-any-return,no-untyped-call]


def token_jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen–Shannon divergence, ½KL(p‖m) + ½KL(q‖m) with m = (p + q)/2, in nats: (..., vocabulary) to (...) in [0, log 2]."""
    return _JSD.apply(log_p, log_q)  # type: ignore[no-any-return,no-untyped-call]


def selected(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of the given ids: (..., vocabulary) and (...) int64 to (...)."""
    return log_probs.gather(-1, ids[..., None]).squeeze(-1)


def log_avoids(log_probs: Tensor, token: Tensor) -> Tensor:
    """log(1 − Σ q(token)): (..., vocabulary) log-probabilities and one id (), or several (tokens,), to (...)."""
    return log_probs.index_fill(-1, token.reshape(-1), -torch.inf).logsumexp(-1)


def log_hinge(log_target: Tensor, log_q: Tensor) -> Tensor:
    """(log target − log q)₊, the log-hinge; at least 1 − q/target, and 0 as soon as q reaches its target."""
    return (log_target - log_q).clamp(min=0)


def refusal_mixture(log_p: Tensor, weight: Tensor, token: Tensor) -> Tensor:
    """The system's next-token law on the refusal's path, (1 − w)·p(v) + w·1[v = token], as log-probabilities.

    `log_p` (..., vocabulary), `weight` w (...) in [0, 1], `token` (...) the refusal's next id. This is METHOD's law
    with S-ratios 1: exact for a prompt guard, and for a response guard where the next token says nothing of safety.
    """
    w = weight[..., None]
    kept = log_p + torch.log1p(-w.clamp(max=1 - 1e-12))
    at_token = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, token[..., None], True)
    return torch.where(at_token, torch.logaddexp(kept, w.clamp(min=1e-30).log().expand_as(kept)), kept)


def system_tv(p_safe: Tensor, log_ratio: Tensor, refusal_rate: Tensor, log_q_refusal: Tensor) -> Tensor:
    """Estimate of TV(P, q) = E_{y~p}[(α(x,y) − ρ(y))₊] + (U(x) − q(y_r))₊ for one prompt, ρ(y) = q(y)/p(y).

    Exact where p(y_r) = 0 and the samples enumerate p. `p_safe` and `log_ratio` = log ρ: (samples,); the others scalars.
    """
    answered = (p_safe - log_ratio.exp()).clamp(min=0).mean()
    return answered + (refusal_rate - log_q_refusal.exp()).clamp(min=0)


def system_hinge(p_safe: Tensor, log_ratio: Tensor, refusal_rate: Tensor, log_q_refusal: Tensor) -> Tensor:
    """Log-hinge bound on `system_tv`: E_{y~p}[α·(log α − log ρ)₊] + U·(log U − log q(y_r))₊; same arguments.

    α and U are clamped to `P_SAFE_RANGE`, so it is a bound up to 1e-4 a branch.
    """
    low, high = P_SAFE_RANGE
    alpha, rate = p_safe.clamp(low, high), refusal_rate.clamp(low, high)
    return (alpha * log_hinge(alpha.log(), log_ratio)).mean() + rate * log_hinge(rate.log(), log_q_refusal)


def tv_bound_from_kl(kl: Tensor) -> Tensor:
    """The smaller of Pinsker's √(KL/2) and Bretagnolle–Huber's √(1 − e^−KL), upper bounds on the TV; (...) to (...)."""
    kl = kl.clamp(min=0)  # rounding brings the KL of equal laws below zero
    return torch.minimum((kl / 2).sqrt(), (-torch.expm1(-kl)).sqrt())


class _TV(torch.autograd.Function):
    """Σ_v (p(v) − q(v))₊; its gradient is −q·1[q < p]."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
        q = log_q.exp()
        over = log_p.exp().sub_(q).clamp_(min=0)
        value = over.sum(-1)
        ctx.save_for_backward(over.sign_().mul_(q))
        return value

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, slope * -outer[..., None]


class _KL(torch.autograd.Function):
    """Σ_v p(v)·(log p(v) − log q(v)); its gradient is −p."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
        low = torch.finfo(log_p.dtype).min / 2
        p = log_p.exp()
        value = log_p.clamp(min=low).sub_(log_q.clamp(min=low)).mul_(p).sum(-1)  # 0·log 0 = 0
        ctx.save_for_backward(p)
        return value

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[None, Tensor]:
        (p,) = ctx.saved_tensors
        return None, p * -outer[..., None]


class _JSD(torch.autograd.Function):
    """½Σ_v p·(log p − log m) + q·(log q − log m); its gradient is ½q·(log q − log m)."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
        low = torch.finfo(log_p.dtype).min / 2
        log_p, log_q = log_p.clamp(min=low), log_q.clamp(min=low)
        p, q = log_p.exp(), log_q.exp()
        log_m = (p + q).mul_(0.5).clamp_(min=torch.finfo(p.dtype).tiny).log_()
        slope = log_q.sub_(log_m).mul_(q).mul_(0.5)
        value = log_p.sub_(log_m).mul_(p).mul_(0.5).add_(slope).sum(-1)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, slope * outer[..., None]
