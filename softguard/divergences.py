"""Divergences between a teacher and a student, as pure functions on logits and log-probabilities.

P is the teacher, q the student, p the base model, α the guard's p(safe), U the teacher's refusal rate, y_r the refusal.
Equation numbers are those of arXiv 2606.09388.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

P_SAFE_RANGE = (1e-4, 1 - 1e-4)  # keeps log α and log U finite


def token_tv(z_p: Tensor, z_q: Tensor) -> Tensor:
    """Total variation of next-token laws, Σ_v (p(v) − q(v))₊: (..., vocabulary) logits to (...) in [0, 1].

    Logits are any that softmax makes the law of, log-probabilities among them. Gradients reach `z_q` alone, here and in
    `token_kl` and `token_jsd`, and are written out with softmax's own: q·(Σ_v q(v)·1[q(v) < p(v)] − 1[q < p]) here.
    """
    return _Written.apply(z_p, z_q, _tv)  # type: ignore[no-any-return,no-untyped-call]


def token_kl(z_p: Tensor, z_q: Tensor) -> Tensor:
    """Forward KL(p‖q) of next-token laws in nats: (..., vocabulary) logits to (...) ≥ 0."""
    return _Written.apply(z_p, z_q, _kl)  # type: ignore[no-any-return,no-untyped-call]


def token_jsd(z_p: Tensor, z_q: Tensor) -> Tensor:
    """Jensen–Shannon divergence, ½KL(p‖m) + ½KL(q‖m) of m = (p + q)/2, in nats: (..., vocabulary) logits to (...) ≤ log 2."""
    return _Written.apply(z_p, z_q, _jsd)  # type: ignore[no-any-return,no-untyped-call]


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

    `log_p` (..., vocabulary), `weight` w (...) in [0, 1], `token` (...) the refusal's next id. This is the system's law
    where the next token says nothing of safety: always behind a prompt guard, behind a response guard an approximation.
    """
    w = weight[..., None]
    kept = log_p + torch.log1p(-w)
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


class _Written(torch.autograd.Function):
    """Values and slopes at the logits z_q by `both`, a function of z_p and z_q."""

    @staticmethod
    def forward(ctx: Any, z_p: Tensor, z_q: Tensor, both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        value, slope = both(z_p, z_q)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[None, Tensor, None]:
        (slope,) = ctx.saved_tensors
        return None, slope * outer[..., None], None


def _tv(z_p: Tensor, z_q: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_v (p(v) − q(v))₊; its gradient at q's logits is q·(Σ_v q(v)·1[q(v) < p(v)] − 1[q < p])."""
    q = z_q.softmax(-1)
    over = z_p.softmax(-1).sub_(q).clamp_(min=0)
    value = over.sum(-1)
    below = over.sign_().mul_(q)
    return value, q.mul_(below.sum(-1, keepdim=True)).sub_(below)


def _kl(z_p: Tensor, z_q: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_v p(v)·(z_p(v) − z_q(v)) + log Σ e^z_q − log Σ e^z_p; its gradient at q's logits is q − p."""
    p, q = z_p.softmax(-1), z_q.softmax(-1)
    difference = (z_p - z_q).mul_(p).nan_to_num_(0.0, torch.inf).sum(-1, keepdim=True)  # 0·log 0 = 0, but 1·log(1/0) = ∞
    value = difference + _log_total(z_q, q) - _log_total(z_p, p)
    return value.squeeze(-1), q.sub_(p)


def _jsd(z_p: Tensor, z_q: Tensor) -> tuple[Tensor, Tensor]:
    """½Σ_v p·(log p − log m) + q·(log q − log m); its gradient at q's logits is ½q·(log q − log m − KL(q‖m))."""
    p, q = z_p.softmax(-1), z_q.softmax(-1)
    log_m = (p + q).mul_(0.5).clamp_(min=torch.finfo(p.dtype).tiny).log_()
    of_p, of_q = (
        z.sub(_log_total(z, law)).sub_(log_m).nan_to_num_().mul_(law) for z, law in ((z_p, p), (z_q, q))
    )  # 0·log 0 = 0
    kl_q = of_q.sum(-1, keepdim=True)
    value = of_p.sum(-1, keepdim=True).add_(kl_q).mul_(0.5)
    return value.squeeze(-1), of_q.addcmul_(q, kl_q, value=-1).mul_(0.5)


def _log_total(logits: Tensor, law: Tensor) -> Tensor:
    """log Σ exp of the logits that `law` was made of, (..., 1), without another exponential of each."""
    return logits.amax(-1, keepdim=True) - law.amax(-1, keepdim=True).log()
