"""What training minimises: one function an objective, found by name in `OBJECTIVES`.

Every objective sees the same `Batch`: for each prompt x the *safe branch*, a response y drawn from the base, which the
system keeps with probability α(x, y); and the *refusal branch*, the refusal y_r, which the system gives with
probability U(x). Rows whose branch has no weight are left out of the batch, since they would add nothing; `PAIRED`
objectives compare both answers of every prompt instead. Objectives that learn from the student's own answers are in `rollouts`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from softguard.divergences import P_SAFE_RANGE, log_avoids, log_hinge, refusal_mixture, token_jsd, token_kl, token_tv
from softguard.errors import SoftguardError
from softguard.kernels import Head, law_of, per_token, per_token_between, selected_log_probs

Length = Literal["sum", "mean"]


class Batch(NamedTuple):
    """What the laws of one training step are made of. S safe-branch rows, R refusal rows, T tokens, H hidden, V vocabulary.

    student, teacher: (S, T, H) last hidden states of the student and of the base that predict the response's tokens.
    head: frozen output head, V × H, that makes next-token laws of them.
    response: (S, T) ids of y; mask: (S, T), 1 on real tokens; p_safe: (S,) α; first_rate: (S,) U of the row's prompt.
    refusal: (R, T_r) student's log-probabilities of the refusal's tokens; refusal_rate: (R,) U, how often the
    system says it to the row's prompt.
    refusal_token: first id of what the system says instead, (S,) or, where it is the same for all rows, ().
    prompts: how many prompts the rows stand for; losses are means over prompts.
    drift_weight: λ, what the dense objectives multiply the divergence between answers by; whether to answer has weight 1.
    scale: of `sft`'s mean, the weights of the whole batch over its weighted tokens; none: of these rows.
    base_refusal: (R, T_r) as `refusal`, of the base; for pairs alone, where row i of both branches is prompt i.
    beta: what straying from the base costs `dpo`.
    begins: (F,) first ids of all the system's refusals; none: refusal_token. refusal_mask: (R, T_r), 1 on real tokens; none:
    all are.
    """

    student: Tensor
    teacher: Tensor
    head: Head
    response: Tensor
    mask: Tensor
    p_safe: Tensor
    first_rate: Tensor
    refusal: Tensor
    refusal_rate: Tensor
    refusal_token: Tensor
    prompts: float
    drift_weight: float = 1.0
    base_refusal: Tensor | None = None
    beta: float = 0.1
    scale: float | None = None
    begins: Tensor | None = None
    refusal_mask: Tensor | None = None


class Losses(NamedTuple):
    """The two branches' contributions; training minimises their weighted sum."""

    safe: Tensor
    refusal: Tensor


Objective = Callable[[Batch, Length], Losses]


def tv(batch: Batch, length: Length) -> Losses:
    """Dense total variation to the system, with log-hinges where total variation alone cannot move.

    safe branch: α·(log(1 − P(R₁|∅)) − log(1 − q(R₁)))₊ + λ·(TV(P(·|∅), q(·|∅)) + Σ_{t>1} α·TV(p_t, q_t))
    refusal branch: U·(log U − log q(y_r))₊

    The safe branch is of responses the system may keep, α > 10⁻³. P(·|∅) = (1 − U)·p + U·1[r₁] is the system's law of the
    first token, r₁ the first token of the row's refusal and R₁ those of all refusals. TV is flat both where a refusal has no
    mass yet and where it has nearly all of it; the log-hinges on refusing and on answering bound the TV of that decision from
    above and pull in both places.
    """
    return _decided(batch, length, token_tv)


def jsd(batch: Batch, length: Length) -> Losses:
    """`tv` with the Jensen–Shannon divergence in total variation's place; its gradient fades as the student nears the system.

    safe branch: α·(log(1 − P(R₁|∅)) − log(1 − q(R₁)))₊ + λ·(JSD(P(·|∅), q(·|∅)) + Σ_{t>1} α·JSD(p_t, q_t))
    refusal branch: U·(log U − log q(y_r))₊
    """
    return _decided(batch, length, token_jsd)


def _decided(batch: Batch, length: Length, divergence: Callable[[Tensor, Tensor], Tensor]) -> Losses:
    """Log-hinges on the decision whether to answer, and λ times a divergence from the system's laws."""
    real = batch.mask > 0
    first = torch.zeros_like(real)
    first[:, :1] = True
    tokens = batch.refusal_token.expand(len(real))
    avoided = batch.refusal_token if batch.begins is None else batch.begins
    later = real[:, 1:].sum(-1).clamp(min=1) if length == "mean" else torch.ones_like(batch.p_safe)
    weight = batch.drift_weight * torch.where(first, 1.0, (batch.p_safe / later)[:, None])[real]
    rate = batch.first_rate[:, None].expand(real.shape)[real]
    alpha = batch.p_safe[:, None].expand(real.shape)[real]
    begins, token = first[real], tokens[:, None].expand(real.shape)[real]

    def terms(z_q: Tensor, z_p: Tensor, at: slice) -> Tensor:
        where = begins[at].nonzero().squeeze(-1)
        if not len(where):  # so most blocks are, and each step below would copy the law
            return weight[at] * divergence(z_p, z_q)
        rates = rate[at][where]
        system_first = refusal_mixture(law_of(z_p[where]), rates, token[at][where])
        system = z_p.index_copy(0, where, system_first)
        answers = log_avoids(system_first, avoided).clamp(min=math.log(P_SAFE_RANGE[0]))
        decision = alpha[at][where] * log_hinge(answers, log_avoids(law_of(z_q[where]), avoided))
        return (weight[at] * divergence(system, z_q)).index_add(0, where, decision)

    safe = per_token(terms, batch.student[real], batch.head, batch.teacher[real])
    rate = _clamped(batch.refusal_rate)
    refusal = batch.refusal_rate * log_hinge(rate.log(), _over_refusal(batch, "sum"))
    return Losses(safe.sum() / batch.prompts, refusal.sum() / batch.prompts)


def kl(batch: Batch, length: Length) -> Losses:
    """Dense forward KL(P‖q) to the system, calibrated by summed log-probabilities.

    safe branch: α·(log α + KL(p_1‖q_1) + λ·Σ_{t>1} KL(p_t‖q_t)); refusal branch: U·(log U − log q(y_r)). Where p(y_r) = 0 and
    λ = 1 their expectation over y ~ p is KL(P‖q) itself for a prompt guard.
    """
    weight = torch.full_like(batch.mask, batch.drift_weight)
    weight[:, :1] = 1.0
    tokens = _over_tokens(weight * divergences(token_kl, batch), batch.mask, length)
    safe = batch.p_safe * (_clamped(batch.p_safe).log() + tokens)
    refusal = batch.refusal_rate * (_clamped(batch.refusal_rate).log() - _over_refusal(batch, length))
    return Losses(safe.sum() / batch.prompts, refusal.sum() / batch.prompts)


def tv_paper(batch: Batch, length: Length) -> Losses:
    """TV-DiSP, eq. 4: −α·min(0, ℓ_y − log α) − (1 − α)·min(0, ℓ_r − log(1 − α)).

    ℓ_y and ℓ_r are the student's log-probabilities of y and y_r; length "mean" averages them over tokens, as the
    published loss curves imply, "sum" adds them up. α and 1 − α are `p_safe` of safe rows and `refusal_rate` of refusal rows.
    """
    response = _over_tokens(_response(batch), batch.mask, length)
    safe = batch.p_safe * log_hinge(_clamped(batch.p_safe).log(), response)
    refusal = batch.refusal_rate * log_hinge(_clamped(batch.refusal_rate).log(), _over_refusal(batch, length))
    return Losses(safe.sum() / batch.prompts, refusal.sum() / batch.prompts)


def kl_paper(batch: Batch, length: Length) -> Losses:
    """KL-DiSP: eq. 4 without its two gates, −α·(ℓ_y − log α) − (1 − α)·(ℓ_r − log(1 − α)); `length` as in `tv_paper`."""
    response = _over_tokens(_response(batch), batch.mask, length)
    safe = batch.p_safe * (_clamped(batch.p_safe).log() - response)
    refusal = batch.refusal_rate * (_clamped(batch.refusal_rate).log() - _over_refusal(batch, length))
    return Losses(safe.sum() / batch.prompts, refusal.sum() / batch.prompts)


def perplexity(batch: Batch, length: Length) -> Losses:
    """Direct optimisation on safe data (§3.2): −α·ℓ_y, the next-token loss of answers the system keeps; no refusals."""
    safe = -batch.p_safe * _over_tokens(_response(batch), batch.mask, length)
    return Losses(safe.sum() / batch.prompts, batch.refusal.new_zeros(()))


def sft(batch: Batch, length: Length) -> Losses:
    """Cross-entropy on the system's own answers, y with weight α and y_r with weight U, a mean over all their tokens.

    The mean is the usual one of supervised fine-tuning, over a batch's tokens whatever row they are in; `length` "sum" adds
    a row's up instead.
    """
    safe = batch.p_safe * (_response(batch) * batch.mask).sum(-1)
    refusal = batch.refusal_rate * _over_refusal(batch, "sum")
    scale: Tensor | float = 1.0
    if length == "mean" and batch.scale is not None:
        scale = batch.scale
    elif length == "mean":
        tokens = (batch.p_safe * batch.mask.sum(-1)).sum() + (batch.refusal_rate * _refusal_mask(batch).sum(-1)).sum()
        scale = (batch.p_safe.sum() + batch.refusal_rate.sum()) / tokens.clamp(min=1)
    return Losses(-scale * safe.sum() / batch.prompts, -scale * refusal.sum() / batch.prompts)


def dpo(batch: Batch, length: Length) -> Losses:
    """Direct preference optimisation (Rafailov et al., 2023) of the system's choice between the base's answer and the refusal.

    −α·log σ(m) − (1 − α)·log σ(−m), m = β·((ℓ_y − ℓ_y⁰) − (ℓ_r − ℓ_r⁰)) with ℓ⁰ of the base: where the system keeps y, y is
    preferred, where it flags y, the refusal is. α between 0 and 1 is a preference that is not certain.
    """
    if batch.base_refusal is None:
        raise ValueError("dpo needs pairs")
    real = batch.mask > 0
    of_base = selected_log_probs(batch.teacher[real], batch.response[real], batch.head)
    gained = _response(batch) - torch.zeros_like(batch.mask).masked_scatter(real, of_base)
    answer = _over_tokens(gained, batch.mask, length)
    refused = _over_refusal(batch._replace(refusal=batch.refusal - batch.base_refusal), length)
    margin = batch.beta * (answer - refused)
    log_sigmoid = torch.nn.functional.logsigmoid
    safe, refusal = -batch.p_safe * log_sigmoid(margin), -(1 - batch.p_safe) * log_sigmoid(-margin)
    return Losses(safe.sum() / batch.prompts, refusal.sum() / batch.prompts)


OBJECTIVES: dict[str, Objective] = {
    "tv": tv, "jsd": jsd, "kl": kl, "tv-paper": tv_paper, "kl-paper": kl_paper, "perplexity": perplexity, "sft": sft, "dpo": dpo
}  # fmt: skip
PAIRED = ("dpo",)


def find_objective(name: str, others: Sequence[str] = ()) -> Objective:
    """The objective called `name`. Raises SoftguardError naming the known ones, `others` found elsewhere among them."""
    if name not in OBJECTIVES:
        raise SoftguardError(f"objective {name!r} is unknown; use one of {', '.join((*OBJECTIVES, *others))}")
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


def _over_refusal(batch: Batch, length: Length) -> Tensor:
    return _over_tokens(batch.refusal, _refusal_mask(batch), length)


def _refusal_mask(batch: Batch) -> Tensor:
    return torch.ones_like(batch.refusal) if batch.refusal_mask is None else batch.refusal_mask
