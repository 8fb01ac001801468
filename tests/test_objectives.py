"""Objectives against plain Python, enumeration of toy systems, and finite differences."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from softguard.errors import SoftguardError
from softguard.kernels import Head
from softguard.objectives import OBJECTIVES, Batch, Length, Losses, Objective, find_objective, jsd, kl, kl_paper, tv, tv_paper

torch.set_num_threads(1)

NEVER = -1e3  # log-probability whose exponential is 0
LENGTHS: tuple[Length, Length] = ("sum", "mean")
Law = Sequence[float]


class Case(NamedTuple):
    """A batch in plain lists: probabilities of S = 3 safe rows of 4, 2 and 1 tokens and of R = 2 refusals of 3 tokens."""

    teacher: list[list[list[float]]]
    student: list[list[list[float]]]
    response: list[list[int]]
    lengths: list[int]
    p_safe: list[float]
    refusal: list[list[float]]
    refusal_rate: list[float]
    token: int
    prompts: int
    drift_weight: float


def make_case(seed: int) -> Case:
    """The base never begins as the refusal does, and α = 1 − U, so that a prompt guard's equations are exact."""
    generator = torch.Generator().manual_seed(seed)
    token = 2

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher = random(3, 4, 5)
    teacher[:, 0, token] = -torch.inf
    return Case(
        teacher=teacher.softmax(-1).tolist(),
        student=random(3, 4, 5).softmax(-1).tolist(),
        response=torch.randint(5, (3, 4), generator=generator).tolist(),
        lengths=[4, 2, 1],
        p_safe=[0.9, 0.35, 0.6],
        refusal=random(2, 3).sigmoid().tolist(),
        refusal_rate=[0.65, 0.4],
        token=token,
        prompts=4,
        drift_weight=(1.0, 0.0, 0.3, 2.0, 0.05)[seed],
    )


def to_batch(case: Case) -> Batch:
    def number(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return Batch(
        student=number(case.student).log(),
        teacher=number(case.teacher).log().clamp(min=NEVER),
        head=Head(torch.eye(5, dtype=torch.float64)),  # hidden states are log-probabilities here
        response=torch.tensor(case.response),
        mask=number([[float(t < n) for t in range(4)] for n in case.lengths]),
        p_safe=number(case.p_safe),
        first_rate=1 - number(case.p_safe),
        refusal=number(case.refusal).log(),
        refusal_rate=number(case.refusal_rate),
        refusal_token=torch.tensor(case.token),
        prompts=case.prompts,
        drift_weight=case.drift_weight,
    )


def hinge(target: float, log_q: float) -> float:
    return max(math.log(target) - log_q, 0)


def plain_tv(p: Law, q: Law) -> float:
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def plain_kl(p: Law, q: Law) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def plain_jsd(p: Law, q: Law) -> float:
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (plain_kl(p, m) + plain_kl(q, m)) / 2


def average(values: list[float], length: Length) -> float:
    return sum(values) if length == "sum" else sum(values) / max(len(values), 1)


def expected_decided(case: Case, length: Length, divergence: Callable[[Law, Law], float]) -> tuple[float, float]:
    safe = 0.0
    for p, q, n, alpha in zip(case.teacher, case.student, case.lengths, case.p_safe, strict=True):
        system = [alpha * v for v in p[0]]
        system[case.token] += 1 - alpha
        drift = divergence(system, q[0]) + alpha * average([divergence(p[t], q[t]) for t in range(1, n)], length)
        safe += case.drift_weight * drift
        safe += alpha * hinge(alpha, math.log(1 - q[0][case.token]))
    refusal = sum(u * hinge(u, math.log(math.prod(r))) for r, u in zip(case.refusal, case.refusal_rate, strict=True))
    return safe / case.prompts, refusal / case.prompts


def expected_kl(case: Case, length: Length) -> tuple[float, float]:
    safe = sum(
        alpha * (math.log(alpha) + average([(case.drift_weight if t else 1) * plain_kl(p[t], q[t]) for t in range(n)], length))
        for p, q, n, alpha in zip(case.teacher, case.student, case.lengths, case.p_safe, strict=True)
    )
    refusal = sum(
        u * (math.log(u) - average([math.log(v) for v in r], length))
        for r, u in zip(case.refusal, case.refusal_rate, strict=True)
    )
    return safe / case.prompts, refusal / case.prompts


def expected_paper(case: Case, length: Length, gated: bool) -> tuple[float, float]:
    def term(weight: float, log_q: float) -> float:
        inside = log_q - math.log(weight)
        return -weight * (min(0, inside) if gated else inside)

    safe = sum(
        term(alpha, average([math.log(q[t][y[t]]) for t in range(n)], length))
        for q, y, n, alpha in zip(case.student, case.response, case.lengths, case.p_safe, strict=True)
    )
    refusal = sum(
        term(u, average([math.log(v) for v in r], length)) for r, u in zip(case.refusal, case.refusal_rate, strict=True)
    )
    return safe / case.prompts, refusal / case.prompts


def log_likelihoods(case: Case) -> list[list[float]]:
    return [[math.log(q[t][y[t]]) for t in range(n)] for q, y, n in zip(case.student, case.response, case.lengths, strict=True)]


def expected_perplexity(case: Case, length: Length) -> tuple[float, float]:
    rows = zip(case.p_safe, log_likelihoods(case), strict=True)
    return -sum(alpha * average(row, length) for alpha, row in rows) / case.prompts, 0.0


def expected_sft(case: Case, length: Length) -> tuple[float, float]:
    answers = list(zip(case.p_safe, log_likelihoods(case), strict=True))
    refusals = [(u, [math.log(v) for v in r]) for u, r in zip(case.refusal_rate, case.refusal, strict=True)]
    weighted = [sum(weight * sum(row) for weight, row in rows) for rows in (answers, refusals)]
    tokens = sum(weight * len(row) for weight, row in answers + refusals)
    rows = sum(weight for weight, _ in answers + refusals)
    scale = rows / tokens if length == "mean" else 1.0
    return -scale * weighted[0] / case.prompts, -scale * weighted[1] / case.prompts


EXPECTED: dict[str, Callable[[Case, Length], tuple[float, float]]] = {
    "tv": partial(expected_decided, divergence=plain_tv),
    "jsd": partial(expected_decided, divergence=plain_jsd),
    "kl": expected_kl,
    "tv-paper": partial(expected_paper, gated=True),
    "kl-paper": partial(expected_paper, gated=False),
    "perplexity": expected_perplexity,
    "sft": expected_sft,
}
DIVERGENCES = ["tv", "jsd", "kl", "tv-paper", "kl-paper"]  # those whose minimum is the system


def test_every_objective_is_compared_with_its_equation() -> None:
    assert set(OBJECTIVES) == {*EXPECTED, "dpo"}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("seed", range(5))
def test_objective_is_its_equation(seed: int, name: str, length: Length) -> None:
    case = make_case(seed)
    losses = find_objective(name)(to_batch(case), length)
    assert (losses.safe.item(), losses.refusal.item()) == pytest.approx(EXPECTED[name](case, length))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", EXPECTED)
def test_gradients_match_finite_differences(name: str, length: Length) -> None:
    batch = to_batch(make_case(0))

    def losses(student: Tensor, refusal: Tensor) -> Losses:
        made = batch._replace(student=student.log_softmax(-1), refusal=torch.nn.functional.logsigmoid(refusal))
        return find_objective(name)(made, length)

    student, refusal = batch.student.clone().requires_grad_(), batch.refusal.exp().logit().requires_grad_()
    assert torch.autograd.gradcheck(losses, (student, refusal))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", EXPECTED)
def test_padding_changes_nothing(name: str, length: Length) -> None:
    batch = to_batch(make_case(0))
    other = torch.randn(batch.student.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).log_softmax(-1)
    padded = batch.mask[..., None] == 0
    changed = batch._replace(
        student=torch.where(padded, other, batch.student),
        teacher=torch.where(padded, other.flip(-1), batch.teacher),
        response=torch.where(batch.mask == 0, 0, batch.response),
    )
    objective = find_objective(name)
    assert objective(changed, length).safe.item() == pytest.approx(objective(batch, length).safe.item())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_micro_batches_add_up_to_the_batch(name: str) -> None:
    batch = to_batch(make_case(0))
    objective = find_objective(name)
    first = batch._replace(
        **{field: getattr(batch, field)[:1] for field in ("student", "teacher", "response", "mask", "p_safe", "first_rate")},
        refusal=batch.refusal[:0],
        refusal_rate=batch.refusal_rate[:0],
    )
    rest = batch._replace(
        **{field: getattr(batch, field)[1:] for field in ("student", "teacher", "response", "mask", "p_safe", "first_rate")},
    )
    parts = [objective(part, "sum") for part in (first, rest)]
    whole = objective(batch, "sum")
    assert sum(float(p.safe) for p in parts) == pytest.approx(float(whole.safe))
    assert sum(float(p.refusal) for p in parts) == pytest.approx(float(whole.refusal))


class Gradients(NamedTuple):
    student: Tensor
    refusal: Tensor


def gradients(name: str, batch: Batch, length: Length = "sum") -> Gradients:
    """Gradients of the whole loss with respect to the student's log-probabilities."""
    student, refusal = batch.student.clone().requires_grad_(), batch.refusal.clone().requires_grad_()
    losses = find_objective(name)(batch._replace(student=student, refusal=refusal), length)
    (losses.safe + losses.refusal).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert refusal.grad is not None
    return Gradients(student.grad, refusal.grad)


@pytest.mark.parametrize("length", LENGTHS)
def test_published_losses_differ_by_their_gates_alone(length: Length) -> None:
    case = make_case(0)
    high = [[[0.01, 0.01, 0.01, 0.01, 0.96]] * 4, *case.student[1:]]  # row 0 is above α = 0.9, its gate shut
    case = case._replace(student=high, response=[[4] * 4, *case.response[1:]], refusal=[[0.99] * 3, [0.1] * 3])
    gated, open_ = (gradients(name, to_batch(case), length) for name in ("tv-paper", "kl-paper"))
    assert torch.equal(gated.student[1:], open_.student[1:])
    assert torch.equal(gated.refusal[1:], open_.refusal[1:])
    assert open_.student[0].abs().sum() > 0
    assert open_.refusal[0].abs().sum() > 0
    if length == "mean":  # a sum over four tokens, log 0.96⁴ < log 0.9, leaves the gate open
        assert gated.student[0].abs().sum() == 0
    else:
        assert torch.equal(gated.student[0], open_.student[0])
    assert gated.refusal[0].abs().sum() == 0


class Toy(NamedTuple):
    """A prompt guard's system over the responses (a, b): the base's counts c(a, b)/n, and the student's logits."""

    counts: list[list[int]]
    refusal: tuple[int, int]
    alpha: float
    first: Tensor  # (V,)
    second: Tensor  # (V, V), row a the logits after a


def make_toy(seed: int, alpha: float) -> Toy:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
    second = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    return Toy([[3, 1, 2], [4, 1, 1], [2, 0, 2]], (2, 1), alpha, first, second)  # p(y_r) = 0 although p(r₁) > 0


def toy_batch(toy: Toy, log_first: Tensor, log_second: Tensor) -> Batch:
    """Rows that enumerate the base, so that a mean over them is the expectation."""
    counts = torch.tensor(toy.counts, dtype=torch.float64)
    pairs = [(a, b) for a in range(3) for b in range(3) for _ in range(toy.counts[a][b])]
    n = len(pairs)
    p_first = (counts.sum(1) / n).log().clamp(min=NEVER)
    p_second = (counts / counts.sum(1, keepdim=True)).log().clamp(min=NEVER)
    heads = [a for a, _ in pairs]
    r1, r2 = toy.refusal
    rate = torch.full((n,), 1 - toy.alpha, dtype=torch.float64)
    return Batch(
        student=torch.stack([log_first.expand(n, -1), log_second[heads]], dim=1),
        teacher=torch.stack([p_first.expand(n, -1), p_second[heads]], dim=1),
        head=Head(torch.eye(3, dtype=torch.float64)),
        response=torch.tensor(pairs),
        mask=torch.ones(n, 2, dtype=torch.float64),
        p_safe=1 - rate,
        first_rate=rate,
        refusal=torch.stack([log_first[r1], log_second[r1, r2]]).expand(n, -1),
        refusal_rate=rate,
        refusal_token=torch.tensor(r1),
        prompts=n,
    )


def toy_system(toy: Toy) -> dict[tuple[int, int], float]:
    n = sum(map(sum, toy.counts))
    system = {(a, b): toy.alpha * toy.counts[a][b] / n for a in range(3) for b in range(3)}
    system[toy.refusal] += 1 - toy.alpha
    return system


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_kl_is_the_divergence_of_the_enumerated_system(seed: int, alpha: float) -> None:
    toy = make_toy(seed, alpha)
    log_first, log_second = toy.first.log_softmax(-1), toy.second.log_softmax(-1)
    losses = kl(toy_batch(toy, log_first, log_second), "sum")
    true = sum(
        p * (math.log(p) - log_first[a].item() - log_second[a, b].item()) for (a, b), p in toy_system(toy).items() if p > 0
    )
    assert (losses.safe + losses.refusal).item() == pytest.approx(true)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_kl_is_the_divergence_of_single_token_systems(seed: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.tensor([0.25, 0.5, 0.25, 0.0], dtype=torch.float64)
    log_q = torch.randn(4, generator=generator, dtype=torch.float64).log_softmax(-1)
    batch = Batch(
        student=log_q[None, None],
        teacher=p.log().clamp(min=NEVER)[None, None],
        head=Head(torch.eye(4, dtype=torch.float64)),
        response=torch.tensor([[1]]),
        mask=torch.ones(1, 1, dtype=torch.float64),
        p_safe=torch.tensor([alpha], dtype=torch.float64),
        first_rate=torch.tensor([1 - alpha], dtype=torch.float64),
        refusal=log_q[3].reshape(1, 1),
        refusal_rate=torch.tensor([1 - alpha], dtype=torch.float64),
        refusal_token=torch.tensor(3),
        prompts=1,
    )
    system = [alpha * v for v in p.tolist()[:3]] + [1 - alpha]
    losses = kl(batch, "sum")
    assert (losses.safe + losses.refusal).item() == pytest.approx(plain_kl(system, log_q.exp().tolist()))


@pytest.mark.parametrize("objective", [kl_paper, kl])
@pytest.mark.parametrize("seed", range(3))
def test_unclipped_losses_have_the_gradient_of_the_divergence(seed: int, objective: Objective) -> None:
    toy = make_toy(seed, 0.4)
    losses = objective(toy_batch(toy, toy.first.log_softmax(-1), toy.second.log_softmax(-1)), "sum")
    ours = torch.autograd.grad(losses.safe + losses.refusal, [toy.first, toy.second])
    log_first, log_second = toy.first.log_softmax(-1), toy.second.log_softmax(-1)
    terms = [p * (math.log(p) - log_first[a] - log_second[a, b]) for (a, b), p in toy_system(toy).items() if p > 0]
    true = torch.autograd.grad(torch.stack(terms).sum(), [toy.first, toy.second])
    for mine, right in zip(ours, true, strict=True):
        assert mine.flatten().tolist() == pytest.approx(right.flatten().tolist(), abs=1e-12)


def test_kl_is_zero_at_the_system_with_a_base_that_begins_as_the_refusal() -> None:
    toy = make_toy(0, 0.4)
    table = torch.tensor([[toy_system(toy)[a, b] for b in range(3)] for a in range(3)], dtype=torch.float64)
    log_first = table.sum(1).log()
    log_second = (table / table.sum(1, keepdim=True)).log().clamp(min=NEVER)
    losses = kl(toy_batch(toy, log_first, log_second), "sum")
    assert (losses.safe + losses.refusal).item() == pytest.approx(0, abs=1e-12)


def two_answers(refuse: float, alpha: float, y_tokens: int, r_tokens: int) -> Batch:
    """A student that refuses with probability `refuse` and otherwise gives the base's only response."""
    y, r, size = 0, 1, 2
    student = torch.full((1, y_tokens, size), NEVER, dtype=torch.float64)
    student[0, 0] = torch.tensor([1 - refuse, refuse], dtype=torch.float64).log()
    student[0, 1:, y] = 0
    teacher = torch.full((1, y_tokens, size), NEVER, dtype=torch.float64)
    teacher[0, :, y] = 0
    rate = torch.tensor([1 - alpha], dtype=torch.float64)
    return Batch(
        student=student,
        teacher=teacher,
        head=Head(torch.eye(size, dtype=torch.float64)),
        response=torch.full((1, y_tokens), y),
        mask=torch.ones(1, y_tokens, dtype=torch.float64),
        p_safe=1 - rate,
        first_rate=rate,
        refusal=torch.tensor([[math.log(refuse), *[0.0] * (r_tokens - 1)]], dtype=torch.float64),
        refusal_rate=rate,
        refusal_token=torch.tensor(r),
        prompts=1,
    )


def best_refusal(name: str, length: Length, alpha: float, y_tokens: int, r_tokens: int) -> float:
    from scipy.optimize import minimize_scalar

    def loss(refuse: float) -> float:
        losses = find_objective(name)(two_answers(refuse, alpha, y_tokens, r_tokens), length)
        return (losses.safe + losses.refusal).item()

    found = minimize_scalar(loss, bounds=(1e-6, 1 - 1e-6), method="bounded", options={"xatol": 1e-9})
    return float(found.x)


@pytest.mark.parametrize(("alpha", "y_tokens", "r_tokens"), [(0.5, 20, 4), (0.9, 100, 10), (0.3, 3, 7)])
def test_token_mean_inflates_refusals_as_derived(alpha: float, y_tokens: int, r_tokens: int) -> None:
    optimum = ((1 - alpha) / r_tokens) / ((1 - alpha) / r_tokens + alpha / y_tokens)
    assert best_refusal("kl-paper", "mean", alpha, y_tokens, r_tokens) == pytest.approx(optimum, abs=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("alpha", "y_tokens", "r_tokens"), [(0.5, 20, 4), (0.9, 100, 10), (0.3, 3, 7)])
def test_summed_log_probabilities_are_calibrated(name: str, alpha: float, y_tokens: int, r_tokens: int) -> None:
    assert best_refusal(name, "sum", alpha, y_tokens, r_tokens) == pytest.approx(1 - alpha, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_system_itself_has_no_loss(name: str, alpha: float) -> None:
    losses = find_objective(name)(two_answers(1 - alpha, alpha, 5, 3), "sum")
    assert (losses.safe + losses.refusal).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_off_the_system_has_a_loss(name: str) -> None:
    for refuse in (0.1, 0.9):
        losses = find_objective(name)(two_answers(refuse, 0.5, 5, 3), "sum")
        assert (losses.safe + losses.refusal).item() > 0.05


def sure_batch(alpha: float, rate: float) -> Batch:
    batch = to_batch(make_case(0))
    return batch._replace(
        p_safe=torch.full_like(batch.p_safe, alpha),
        first_rate=torch.full_like(batch.first_rate, rate),
        refusal_rate=torch.full_like(batch.refusal_rate, rate),
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_without_refusals_the_refusal_branch_has_neither_loss_nor_gradient(name: str, length: Length) -> None:
    batch = sure_batch(1.0, 0.0)
    losses, gradient = find_objective(name)(batch, length), gradients(name, batch, length)
    assert losses.refusal == 0
    assert losses.safe.isfinite()
    assert not gradient.refusal.any()
    assert gradient.student.isfinite().all()
    assert gradient.student.any()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_without_answers_the_response_has_no_gradient(name: str, length: Length) -> None:
    batch = sure_batch(0.0, 1.0)
    gradient = gradients(name, batch, length)
    decided = name in ("tv", "jsd")  # their first position is the system's: refuse
    later = gradient.student[:, 1:] if decided else gradient.student
    assert not later.any()
    assert gradient.student.isfinite().all()
    assert gradient.refusal.isfinite().all()
    assert gradient.refusal.any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_sure_systems_have_no_loss_at_themselves_but_the_clamp(name: str) -> None:
    for alpha in (0.0, 1.0):
        refuse = min(max(1 - alpha, 1e-12), 1 - 1e-12)
        losses = find_objective(name)(two_answers(refuse, alpha, 5, 3), "sum")
        assert (losses.safe + losses.refusal).item() == pytest.approx(0, abs=1.1e-4)


def test_tv_leaves_the_base_alone_where_the_system_never_refuses() -> None:
    case = make_case(0)
    laws = [[[0.2, 0.2, 0.3, 0.2, 0.1]] * 4] * 3  # the base begins as the refusal does, with probability 0.3
    batch = to_batch(case._replace(teacher=laws, student=laws))
    batch = batch._replace(p_safe=torch.ones_like(batch.p_safe), first_rate=torch.zeros_like(batch.first_rate))
    assert tv(batch, "sum").safe.item() == pytest.approx(0, abs=1e-3)


def test_tv_of_a_response_guard_asks_for_answers_no_more_often_than_its_system_gives_them() -> None:
    laws = [[[0.25, 0.25, 0.0, 0.25, 0.25]] * 4] * 2
    batch = to_batch(make_case(0)._replace(teacher=[*laws, laws[0]], student=[*laws, laws[0]]))
    alpha = torch.tensor([1.0, 0.0], dtype=torch.float64)  # of two responses to one prompt, U = 1/2
    system = torch.tensor([0.125, 0.125, 0.5, 0.125, 0.125], dtype=torch.float64).log()
    student = batch.student[:2].clamp(min=NEVER)
    student[:, 0] = system
    batch = batch._replace(
        student=student,
        teacher=batch.teacher[:2],
        response=batch.response[:2],
        mask=batch.mask[:2],
        p_safe=alpha,
        first_rate=torch.full((2,), 0.5, dtype=torch.float64),
    )
    assert tv(batch, "sum").safe.item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_impossible_log_probabilities_leave_losses_and_gradients_finite(name: str, length: Length) -> None:
    batch = to_batch(make_case(0))
    logits = torch.zeros(3, 4, 5)
    logits[..., 2] = 1e4  # the student always gives token 2, the refusal's first
    logits.requires_grad_()
    refusal = torch.full((2, 3), -1e4, requires_grad=True)
    made = batch._replace(
        student=logits.log_softmax(-1),
        teacher=batch.teacher.float(),
        head=Head(batch.head.weight.float()),
        mask=batch.mask.float(),
        p_safe=torch.tensor([0.0, 0.5, 1.0]),
        first_rate=torch.tensor([1.0, 0.5, 0.0]),
        refusal=refusal,
        refusal_rate=batch.refusal_rate.float(),
    )
    losses = find_objective(name)(made, length)
    (losses.safe + losses.refusal).backward()  # type: ignore[no-untyped-call]
    assert losses.safe.isfinite()
    assert losses.refusal.isfinite()
    assert logits.grad is not None
    assert refusal.grad is not None
    assert logits.grad.isfinite().all()
    assert refusal.grad.isfinite().all()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_batch_without_answers_has_the_refusals_loss_alone(name: str, length: Length) -> None:
    batch = to_batch(make_case(0))
    empty = batch._replace(
        **{field: getattr(batch, field)[:0, :1] for field in ("student", "teacher", "response", "mask")},
        p_safe=batch.p_safe[:0],
        first_rate=batch.first_rate[:0],
    )
    losses, gradient = find_objective(name)(empty, length), gradients(name, empty, length)
    assert losses.safe == 0
    assert losses.refusal == find_objective(name)(batch, length).refusal
    assert gradient.refusal.any()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_batch_without_refusals_has_the_answers_loss_alone(name: str, length: Length) -> None:
    batch = to_batch(make_case(0))
    empty = batch._replace(refusal=batch.refusal[:0], refusal_rate=batch.refusal_rate[:0])
    losses, gradient = find_objective(name)(empty, length), gradients(name, empty, length)
    assert losses.refusal == 0
    assert losses.safe == find_objective(name)(batch, length).safe
    assert gradient.student.any()


def paired(seed: int) -> tuple[Case, Batch]:
    """Two prompts with both answers, and the base's log-probabilities of the refusals."""
    case = make_case(seed)
    two = {field: getattr(case, field)[:2] for field in ("teacher", "student", "response", "lengths", "p_safe")}
    case = case._replace(**two, refusal_rate=[1 - p for p in case.p_safe[:2]], prompts=2)
    base = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)
    teacher = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    case = case._replace(teacher=(teacher / teacher.sum(-1, keepdim=True)).tolist())
    return case, to_batch(case)._replace(base_refusal=torch.nn.functional.logsigmoid(base), beta=0.3)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("seed", range(3))
def test_dpo_is_its_equation(seed: int, length: Length) -> None:
    case, batch = paired(seed)
    assert batch.base_refusal is not None
    base_refusal = batch.base_refusal.tolist()
    safe = refusal = 0.0
    for i, (alpha, n) in enumerate(zip(case.p_safe, case.lengths, strict=True)):
        y = case.response[i]
        answer = average([math.log(case.student[i][t][y[t]] / case.teacher[i][t][y[t]]) for t in range(n)], length)
        refused = average([math.log(a) - b for a, b in zip(case.refusal[i], base_refusal[i], strict=True)], length)
        margin = 0.3 * (answer - refused)
        safe -= alpha * math.log(1 / (1 + math.exp(-margin))) / 2
        refusal -= (1 - alpha) * math.log(1 / (1 + math.exp(margin))) / 2
    losses = find_objective("dpo")(batch, length)
    assert (losses.safe.item(), losses.refusal.item()) == pytest.approx((safe, refusal))


def test_dpo_at_the_base_is_undecided() -> None:
    _, batch = paired(0)
    losses = find_objective("dpo")(batch._replace(student=batch.teacher, base_refusal=batch.refusal), "sum")
    assert (losses.safe + losses.refusal).item() == pytest.approx(math.log(2))


def test_dpo_of_batches_without_pairs_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="pairs"):
        find_objective("dpo")(to_batch(make_case(0)), "sum")


def test_unknown_objective_names_the_known_ones() -> None:
    with pytest.raises(SoftguardError, match=r"'tv_paper' is unknown; use one of tv, jsd, kl, tv-paper, kl-paper"):
        find_objective("tv_paper")


def test_objectives_are_found_by_name() -> None:
    assert [find_objective(name) for name in DIVERGENCES] == [tv, jsd, kl, tv_paper, kl_paper]


class TwoRefusals(NamedTuple):
    """Outcomes of one prompt: answers ab with a, b < 3, and the refusals 21, which the base never says, and 3, of one token."""

    counts: list[list[int]]  # of the base's answers
    alpha: float
    rates: tuple[float, float]  # of the refusals 21 and 3
    first: Tensor  # (4,) logits
    second: Tensor  # (4, 4) logits


def make_two_refusals(seed: int, alpha: float) -> TwoRefusals:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(4, generator=generator, dtype=torch.float64)
    second = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    return TwoRefusals([[3, 1, 2], [4, 1, 1], [2, 0, 2]], alpha, (0.3 * (1 - alpha), 0.7 * (1 - alpha)), first, second)


def two_refusals_batch(toy: TwoRefusals, log_first: Tensor, log_second: Tensor) -> Batch:
    """Rows that enumerate the base, and for each both refusals, the shorter one padded."""
    counts = torch.nn.functional.pad(torch.tensor(toy.counts, dtype=torch.float64), (0, 1, 0, 1))
    pairs = [(a, b) for a in range(3) for b in range(3) for _ in range(toy.counts[a][b])]
    n, heads = len(pairs), [a for a, _ in pairs]
    p_first = (counts.sum(1) / n).log().clamp(min=NEVER)
    p_second = (counts / counts.sum(1, keepdim=True).clamp(min=1)).log().clamp(min=NEVER)
    rate = torch.full((n,), 1 - toy.alpha, dtype=torch.float64)
    padding = torch.zeros((), dtype=torch.float64)
    refusals = [torch.stack([log_first[2], log_second[2, 1]]), torch.stack([log_first[3], padding])]
    return Batch(
        student=torch.stack([log_first.expand(n, -1), log_second[heads]], dim=1),
        teacher=torch.stack([p_first.expand(n, -1), p_second[heads]], dim=1),
        head=Head(torch.eye(4, dtype=torch.float64)),
        response=torch.tensor(pairs),
        mask=torch.ones(n, 2, dtype=torch.float64),
        p_safe=1 - rate,
        first_rate=rate,
        refusal=torch.stack(refusals).repeat(n, 1),
        refusal_rate=torch.tensor(toy.rates, dtype=torch.float64).repeat(n),
        refusal_token=torch.full((n,), 3),
        prompts=n,
        begins=torch.tensor([2, 3]),
        refusal_mask=torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64).repeat(n, 1),
    )


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_kl_is_the_divergence_of_a_system_with_two_refusals(seed: int, alpha: float) -> None:
    toy = make_two_refusals(seed, alpha)
    log_first, log_second = toy.first.log_softmax(-1), toy.second.log_softmax(-1)
    n = sum(map(sum, toy.counts))
    system = {(a, b): alpha * toy.counts[a][b] / n for a in range(3) for b in range(3)}
    system[2, 1] += toy.rates[0]
    true = sum(
        p * (math.log(p) - log_first[a].item() - log_second[a, b].item()) for (a, b), p in system.items() if p > 0
    ) + toy.rates[1] * (math.log(toy.rates[1]) - log_first[3].item())
    losses = kl(two_refusals_batch(toy, log_first, log_second), "sum")
    assert (losses.safe + losses.refusal).item() == pytest.approx(true)


def test_the_mean_over_a_refusal_leaves_out_its_padding() -> None:
    toy = make_two_refusals(0, 0.5)
    log_first, log_second = toy.first.log_softmax(-1), toy.second.log_softmax(-1)
    refusal = kl_paper(two_refusals_batch(toy, log_first, log_second), "mean").refusal.item()
    means = [(log_first[2] + log_second[2, 1]).item() / 2, log_first[3].item()]
    assert refusal == pytest.approx(sum(u * (math.log(u) - m) for u, m in zip(toy.rates, means, strict=True)))


@pytest.mark.parametrize(("objective", "divergence"), [(tv, plain_tv), (jsd, plain_jsd)])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_has_the_first_token_of_its_own_refusal(
    seed: int, objective: Objective, divergence: Callable[[Law, Law], float]
) -> None:
    """Row 0 would begin with 2 and row 1 with 3, both refusals; row 2 with 1, as a redacted answer may."""
    case, own, begins = make_case(seed), [2, 3, 1], [2, 3]
    batch = to_batch(case)._replace(refusal_token=torch.tensor(own), begins=torch.tensor(begins))
    expected = 0.0
    for p, q, n, alpha, token in zip(case.teacher, case.student, case.lengths, case.p_safe, own, strict=True):
        system = [alpha * v for v in p[0]]
        system[token] += 1 - alpha
        drift = divergence(system, q[0]) + alpha * sum(divergence(p[t], q[t]) for t in range(1, n))
        answers, theirs = (1 - sum(law[t] for t in begins) for law in (system, q[0]))
        expected += case.drift_weight * drift + alpha * hinge(answers, math.log(theirs))
    assert objective(batch, "sum").safe.item() == pytest.approx(expected / case.prompts)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_system_with_a_refusal_for_each_prompt_has_no_loss(name: str) -> None:
    """Two prompts that the base answers with 0: the system refuses the first with 1 and the second with 2."""
    rates = torch.tensor([0.3, 0.6], dtype=torch.float64)
    student = torch.tensor([[[0.7, 0.3, 0.0]], [[0.4, 0.0, 0.6]]], dtype=torch.float64).log().clamp(min=NEVER)
    batch = Batch(
        student=student,
        teacher=torch.tensor([[[0.0, NEVER, NEVER]]] * 2, dtype=torch.float64),
        head=Head(torch.eye(3, dtype=torch.float64)),
        response=torch.zeros(2, 1, dtype=torch.long),
        mask=torch.ones(2, 1, dtype=torch.float64),
        p_safe=1 - rates,
        first_rate=rates,
        refusal=rates.log()[:, None],
        refusal_rate=rates,
        refusal_token=torch.tensor([1, 2]),
        prompts=2,
        begins=torch.tensor([1, 2]),
    )
    losses = find_objective(name)(batch, "sum")
    assert (losses.safe + losses.refusal).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("seed", range(3))
def test_published_losses_have_one_gradient_where_the_system_decides_by_a_threshold(seed: int, length: Length) -> None:
    """log-probabilities are below log 1, so neither gate ever closes."""
    sure = to_batch(make_case(seed))
    sure = sure._replace(p_safe=torch.tensor([1.0, 1.0, 1.0]).double(), refusal_rate=torch.tensor([1.0, 1.0]).double())
    gated, open_ = gradients("tv-paper", sure, length), gradients("kl-paper", sure, length)
    assert torch.equal(gated.student, open_.student)
    assert torch.equal(gated.refusal, open_.refusal)
