"""What training minimises: one function an objective, found by name in `OBJECTIVES`.

Every objective sees the same `Batch`: for each prompt x the *safe branch*, a response y drawn from the base, which the
system keeps with probability α(x, y); and the *refusal branch*, the refusal y_r, which the system gives with
probability U(x). Rows whose branch has no weight are left out of the batch, since they would add nothing.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from softguard.divergences import P_SAFE_RANGE, log_avoids, log_hinge, refusal_mixture, token_jsd, token_kl, token_tv
from softguard.errors import SoftguardError
from softguard.kernels import per_token, per_token_between, selected_log_probs

Length = Literal["sum", "mean"]


class Batch(NamedTuple):
    """What the laws of one training step are made of. S safe-branch rows, R refusal rows, T tokens, H hidden, V vocabulary.

    student, teacher: (S, T, H) last hidden states of the student and of the base that predict the response's tokens.
    head: (V, H) frozen output head that makes next-token laws of them.
    response: (S, T) ids of y; mask: (S, T), 1 on real tokens; p_safe: (S,) α; first_rate: (S,) U of the row's prompt.
    refusal: (R, T_r) student's log-probabilities of the refusal's tokens; refusal_rate: (R,) U of the row's prompt.
    refusal_token: () first id of y_r. prompts: how many prompts the rows stand for; losses are means over prompts.
    drift_weight: λ, what the dense objectives multiply the divergence between answers by; whether to answer has weight 1.
    """

    student: Tensor
    teacher: Tensor
    head: Tensor
    response: Tensor
    mask: Tensor
    p_safe: Tensor
    first_rate: Tensor
    refusal: Tensor
    refusal_rate: Tensor
    refusal_token: Tensor
    prompts: float
    drift_weight: float = 1.0


class Losses(NamedTuple):
    """The two branches' contributions; training minimises their weighted sum."""

    safe: Tensor
    refusal: Tensor


Objective = Callable[[Batch, Length], Losses]


def tv(batch: Batch, length: Length) -> Losses:
    """Dense total variation to the system, with log-hinges where total variation alone cannot move (METHOD §3).

    safe branch: α·(log(1 − P(r₁|∅)) − log(1 − q(r₁)))₊ + λ·(TV(P(·|∅), q(·|∅)) + Σ_{t>1} α·TV(p_t, q_t))
    refusal branch: U·(log U − log q(y_r))₊

    P(·|∅) = (1 − U)·p + U·1[r₁] is the system's law of the first token and r₁ the refusal's first token. TV is flat both
    where a refusal has no mass yet and where it has nearly all of it; the log-hinges on refusing and on answering bound
    the TV of that decision from above and pull in both places.
    """
    return _decided(batch, length, token_tv)


def jsd(batch: Batch, length: Length) -> Losses:
    """`tv` with the Jensen–Shannon divergence in total variation's place; its gradient fades as the student nears the system.

    safe branch: α·(log(1 − P(r₁|∅)) − log(1 − q(r₁)))₊ + λ·(JSD(P(·|∅), q(·|∅)) + Σ_{t>1} α·JSD(p_t, q_t))
    refusal branch: U·(log U − log q(y_r))₊
    """
    return _decided(batch, length, token_jsd)


def _decided(batch: Batch, length: Length, divergence: Callable[[Tensor, Tensor], Tensor]) -> Losses:
    """Log-hinges on the decision whether to answer, and λ times a divergence from the system's laws."""
    real = batch.mask > 0
    first = torch.zeros_like(real).index_fill(1, batch.refusal_token.new_zeros(1), True)
    later = real[:, 1:].sum(-1).clamp(min=1) if length == "mean" else torch.ones_like(batch.p_safe)
    weight = batch.drift_weight * torch.where(first, 1.0, (batch.p_safe / later)[:, None])[real]
    rate = batch.first_rate[:, None].expand(real.shape)[real]
    alpha = batch.p_safe[:, None].expand(real.shape)[real]
    begins = first[real]

    def terms(log_q: Tensor, log_p: Tensor, at: slice) -> Tensor:
        where = begins[at].nonzero().squeeze(-1)
        if not len(where):  # so most blocks are, and each step below would copy the law
            return weight[at] * divergence(log_p, log_q)
        log_first, rates = log_p[where], rate[at][where]
        system = log_p.index_copy(0, where, refusal_mixture(log_first, rates, batch.refusal_token.expand(len(where))))
        answers = (1 - rates).clamp(min=P_SAFE_RANGE[0]).log() + log_avoids(log_first, batch.refusal_token)
        decision = alpha[at][where] * log_hinge(answers, log_avoids(log_q[where], batch.refusal_token))
        return (weight[at] * divergence(system, log_q)).index_add(0, where, decision)

    safe = per_token(terms, batch.student[real], batch.head, batch.teacher[real])
    rate = _clamped(batch.refusal_rate)
    refusal = batch.refusal_rate * log_hinge(rate.log(), batch.refusal.sum(-1))
    return Losses(safe.sum() / batch.prompts, refusal.sum() / batch.prompts)


def kl(batch: Batch, length: Length) -> Losses:
    """Dense forward KL(P‖q) to the system, calibrated by summed log-probabilities.

    safe branch: α·(log α + KL(p_1‖q_1) + λ·Σ_{t>1} KL(p_t‖q_t)); refusal branch: U·(log U − log q(y_r)). Where p(y_r) = 0 and
    λ = 1 their expectation over y ~ p is KL(P‖q) itself for a prompt guard.
    """
    weight = torch.full_like(batch.mask, batch.drift_weight).index_fill(1, batch.refusal_token.new_zeros(1), 1.0)
    tokens = _over_tokens(weight * divergences(token_kl, batch), batch.mask, length)
    safe = batch.p_safe * (_clamped(batch.p_safe).log() + tokens)
    refusal = batch.refusal_rate * (_clamped(batch.refusal_rate).log() - _over_refusal(batch.refusal, length))
    return Losses(safe.sum() / batch.prompts, refusal.sum() / batch.prompts)


def tv_paper(batch: Batch, length: Length) -> Losses:
    """TV-DiSP, eq. 4: −α·min(0, ℓ_y − log α) − (1 − α)·min(0, ℓ_r − log(1 − α)).

    ℓ_y and ℓ_r are the student's log-probabilities of y and y_r; length "mean" averages them over tokens, as the
    published loss curves imply, "sum" adds them up. α and 1 − α are `p_safe` of safe rows and `refusal_rate` of refusal rows.
    """
    response = _over_tokens(_response(batch), batch.mask, length)
    safe = batch.p_safe * log_hinge(_clamped(batch.p_safe).log(), response)
    refusal = batch.refusal_rate * log_hinge(_clamped(batch.refusal_rate).log(), _over_refusal(batch.refusal, length))
    return Losses(safe.sum() / batch.prompts, refusal.sum() / batch.prompts)


def kl_paper(batch: Batch, length: Length) -> Losses:
    """KL-DiSP: eq. 4 without its two gates, −α·(ℓ_y − log α) − (1 − α)·(ℓ_r − log(1 − α)); `length` as in `tv_paper`."""
    response = _over_tokens(_response(batch), batch.mask, length)
    safe = batch.p_safe * (_clamped(batch.p_safe).log() - response)
    refusal = batch.refusal_rate * (_clamped(batch.refusal_rate).log() - _over_refusal(batch.refusal, length))
    return Losses(safe.sum() / batch.prompts, refusal.sum() / batch.prompts)


OBJECTIVES: dict[str, Objective] = {"tv": tv, "jsd": jsd, "kl": kl, "tv-paper": tv_paper, "kl-paper": kl_paper}


def find_objective(name: str) -> Objective:
    """The objective called `name`. Raises SoftguardError naming the known ones."""
    if name not in OBJECTIVES:
        raise SoftguardError(f"objective {name!r} is unknown; use one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def _clamped(probability: Tensor) -> Tensor:
    return probability.clamp(*P_SAFE_RANGE)


def divergences(divergence: Callable[[Tensor, Tensor], Tensor], batch: Batch) -> Tensor:
    """Divergence of base and student at the response's tokens, (S, T); 0 where there is none."""
    real = batch.mask > 0
    values = per_token_between(divergence, batch.teacher[real], batch.student[real], batch.head)
    return torch.zeros_like(batch.mask).masked_scatter(real, values)


def _response(batch: Batch) -> Tensor:
    """The student's log-probabilities of the response's tokens, (S, T); 0 where there is none."""
    real = batch.mask > 0
    values = selected_log_probs(batch.student[real], batch.response[real], batch.head)
    return torch.zeros_like(batch.mask).masked_scatter(real, values)


def _over_tokens(values: Tensor, mask: Tensor, length: Length) -> Tensor:
    total = (values * mask).sum(-1)
    return total if length == "sum" else total / mask.sum(-1).clamp(min=1)


def _over_refusal(log_probs: Tensor, length: Length) -> Tensor:
    return log_probs.sum(-1) if length == "sum" else log_probs.mean(-1)
