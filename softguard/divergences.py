"""Divergences between a teacher and a student, as pure functions on log-probabilities.

P is the teacher, q the student, p the base model, α the guard's p(safe), U the teacher's refusal rate, y_r the refusal.
Equation numbers are those of arXiv 2606.09388.
"""

import math

import torch
from torch import Tensor

P_SAFE_RANGE = (1e-4, 1 - 1e-4)  # keeps log α and log U finite


def token_tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation of next-token laws, Σ_v (p(v) − q(v))₊: (..., vocabulary) log-probabilities to (...) in [0, 1]."""
    return (log_p.exp() - log_q.exp()).clamp(min=0).sum(-1)


def token_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Forward KL(p‖q) of next-token laws in nats: (..., vocabulary) log-probabilities to (...) ≥ 0."""
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -torch.inf, 0.0, terms).sum(-1)  # 0·log 0 = 0, also where the student forbids the token too


def token_jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen–Shannon divergence, ½KL(p‖m) + ½KL(q‖m) with m = (p + q)/2, in nats: (..., vocabulary) to (...) in [0, log 2]."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (token_kl(log_p, log_m) + token_kl(log_q, log_m)) / 2


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
