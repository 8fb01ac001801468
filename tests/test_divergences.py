"""Divergences against enumeration: toy bases over responses of one to three tokens, whose systems are written out whole."""

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from softguard.divergences import (
    P_SAFE_RANGE,
    log_hinge,
    refusal_mixture,
    selected,
    system_hinge,
    system_tv,
    token_jsd,
    token_kl,
    token_tv,
    tv_bound_from_kl,
)

torch.set_num_threads(1)

END, VOCABULARY, LONGEST = 0, 4, 3
REFUSAL = (3, 1, END)
SEEDS = range(5)

Tokens = tuple[int, ...]
Guard = Callable[[Tokens], float]
RESPONSES: list[Tokens] = [
    (*words, END) for length in range(LONGEST) for words in product(range(1, VOCABULARY), repeat=length)
]  # 13 responses, the end token included


class Toy(NamedTuple):
    """A base as next-token laws; α of every response; the system and a student as laws over responses."""

    laws: dict[Tokens, list[float]]
    base: dict[Tokens, float]
    alpha: dict[Tokens, float]
    refusal_rate: float
    system: dict[Tokens, float]
    student_laws: dict[Tokens, list[float]]
    student: dict[Tokens, float]


def next_token_laws(rng: np.random.Generator) -> dict[Tokens, list[float]]:
    """A random law after every prefix; the last token must be the end."""
    laws: dict[Tokens, list[float]] = {}
    for length in range(LONGEST):
        for prefix in product(range(1, VOCABULARY), repeat=length):
            law = rng.dirichlet(np.ones(VOCABULARY)) if length < LONGEST - 1 else np.eye(VOCABULARY)[END]
            laws[prefix] = law.tolist()
    return laws


def probability(laws: dict[Tokens, list[float]], response: Tokens) -> float:
    return math.prod(laws[response[:t]][token] for t, token in enumerate(response))


def toy(seed: int, guard: Guard | None = None) -> Toy:
    """`guard` gives α of a response; without one α is drawn for each response apart."""
    rng = np.random.default_rng(seed)
    laws, student_laws = next_token_laws(rng), next_token_laws(rng)
    law = np.array(laws[REFUSAL[:1]])
    law[REFUSAL[1]] = 0  # p(y_r) = 0, although the base may begin as the refusal does
    laws[REFUSAL[:1]] = (law / law.sum()).tolist()
    base = {y: probability(laws, y) for y in RESPONSES}
    alpha = {y: guard(y) if guard else float(rng.uniform(0.01, 0.99)) for y in RESPONSES}
    rate = sum(base[y] * (1 - alpha[y]) for y in RESPONSES)
    system = {y: base[y] * alpha[y] + (rate if y == REFUSAL else 0.0) for y in RESPONSES}
    return Toy(laws, base, alpha, rate, system, student_laws, {y: probability(student_laws, y) for y in RESPONSES})


def true_tv(p: dict[Tokens, float], q: dict[Tokens, float]) -> float:
    return sum(abs(p[y] - q[y]) for y in p) / 2


def true_kl(p: dict[Tokens, float], q: dict[Tokens, float]) -> float:
    return sum(p[y] * math.log(p[y] / q[y]) for y in p if p[y] > 0)


def mass(law: dict[Tokens, float], prefix: Tokens) -> float:
    return sum(probability for y, probability in law.items() if y[: len(prefix)] == prefix)


def conditioned(law: dict[Tokens, float], prefix: Tokens) -> list[float]:
    return [mass(law, (*prefix, token)) / mass(law, prefix) for token in range(VOCABULARY)]


def logs(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def random_log_law(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


def equal_samples(seed: int) -> tuple[Toy, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A toy whose base is made of n/24 ths, and arguments of `system_tv` whose plain mean is the expectation over it."""
    made = toy(seed)
    rng = np.random.default_rng(seed)
    answers = [y for y in RESPONSES if y != REFUSAL]
    counts = dict(zip(answers, rng.multinomial(24, np.ones(len(answers)) / len(answers)).tolist(), strict=True))
    base = {y: counts.get(y, 0) / 24 for y in RESPONSES}
    rate = sum(base[y] * (1 - made.alpha[y]) for y in RESPONSES)
    system = {y: base[y] * made.alpha[y] + (rate if y == REFUSAL else 0.0) for y in RESPONSES}
    made = made._replace(base=base, refusal_rate=rate, system=system)
    drawn = [y for y in answers for _ in range(counts[y])]
    return made, (
        torch.tensor([made.alpha[y] for y in drawn], dtype=torch.float64),
        torch.tensor([math.log(made.student[y] / base[y]) for y in drawn], dtype=torch.float64),
        torch.tensor(rate, dtype=torch.float64),
        torch.tensor(math.log(made.student[REFUSAL]), dtype=torch.float64),
    )


def test_the_toys_are_laws() -> None:
    for seed in SEEDS:
        made = toy(seed)
        for law in (made.base, made.system, made.student):
            assert sum(law.values()) == pytest.approx(1)
        assert made.base[REFUSAL] == 0
        assert made.system[REFUSAL] == pytest.approx(made.refusal_rate)


@pytest.mark.parametrize("seed", SEEDS)
def test_token_tv_and_kl_are_their_sums(seed: int) -> None:
    log_p, log_q = random_log_law(seed, 2, 3, 7), random_log_law(seed + 100, 2, 3, 7)
    tv, kl = token_tv(log_p, log_q), token_kl(log_p, log_q)
    assert tv.shape == kl.shape == (2, 3)
    for i, t in product(range(2), range(3)):
        p, q = log_p[i, t].exp().tolist(), log_q[i, t].exp().tolist()
        assert tv[i, t].item() == pytest.approx(sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2)
        assert kl[i, t].item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


@pytest.mark.parametrize("seed", SEEDS)
def test_token_tv_is_symmetric_and_kl_is_not(seed: int) -> None:
    log_p, log_q = random_log_law(seed, 5), random_log_law(seed + 100, 5)
    assert token_tv(log_p, log_q).item() == pytest.approx(token_tv(log_q, log_p).item())
    assert abs(token_kl(log_p, log_q) - token_kl(log_q, log_p)) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_of_token_tv_is_the_derived_one(seed: int) -> None:
    log_p = random_log_law(seed, 6)
    z = random_log_law(seed + 100, 6).requires_grad_()
    token_tv(log_p, z.log_softmax(-1)).backward()  # type: ignore[no-untyped-call]
    p, q = log_p.exp().tolist(), z.detach().softmax(-1).tolist()
    below = sum(q[v] for v in range(6) if q[v] < p[v])
    expected = [-q[k] * (float(q[k] < p[k]) - below) for k in range(6)]
    assert z.grad is not None
    assert z.grad.tolist() == pytest.approx(expected, abs=1e-12)


def test_token_tv_cannot_start_a_refusal_the_student_gives_no_mass() -> None:
    refuse = torch.tensor([0.0, -1e4, -1e4])
    z = torch.tensor([-30.0, 1.0, 0.0], requires_grad=True)
    loss = token_tv(refuse.log_softmax(-1), z.log_softmax(-1))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(1)
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-12


def test_impossible_tokens_leave_values_and_gradients_finite() -> None:
    log_p = torch.tensor([-1e4, 0.5, 0.0]).log_softmax(-1)
    z = torch.tensor([0.3, -1e4, 0.1], requires_grad=True)
    tv, kl = token_tv(log_p, z.log_softmax(-1)), token_kl(log_p, z.log_softmax(-1))
    (tv + kl).backward()  # type: ignore[no-untyped-call]
    assert tv.item() == pytest.approx(
        log_p[1].exp().item() + max(log_p[2].exp().item() - math.exp(0.1) / (math.exp(0.3) + math.exp(0.1)), 0)
    )
    assert 5e3 < kl.item() < 1e4
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_a_token_forbidden_to_the_student_alone_is_infinitely_far_and_its_slope_finite() -> None:
    log_p = torch.tensor([[1.0, 0.5, 0.0], [1.0, -200.0, 0.0]]).log_softmax(-1)  # the second gives it nothing within rounding
    log_q = torch.tensor([1.0, -torch.inf, 0.0]).log_softmax(-1).expand(2, -1).clone().requires_grad_()
    kl = token_kl(log_p, log_q)
    assert kl[0] == torch.inf
    assert kl[1].item() == pytest.approx(0, abs=1e-6)
    (slope,) = torch.autograd.grad(kl.sum(), log_q)
    torch.testing.assert_close(slope, log_q.exp().detach() - log_p.exp())


def test_a_token_forbidden_to_both_laws_adds_nothing() -> None:
    forbidden = -torch.inf  # models mask vocabulary they do not use
    log_p = torch.tensor([forbidden, 0.5, 0.0]).log_softmax(-1)
    log_q = torch.tensor([forbidden, 0.2, 1.0]).log_softmax(-1).requires_grad_()
    for divergence in (token_tv, token_kl, token_jsd):
        whole, rest = divergence(log_p, log_q), divergence(log_p[1:], log_q[1:])
        assert whole.item() == pytest.approx(rest.item())
        assert torch.autograd.grad(whole, log_q)[0].tolist() == [0, *torch.autograd.grad(rest, log_q)[0][1:].tolist()]


@pytest.mark.parametrize("divergence", [token_tv, token_kl, token_jsd])
def test_logits_that_are_no_numbers_never_look_like_no_divergence(divergence: Callable[[Tensor, Tensor], Tensor]) -> None:
    broken, whole = torch.tensor([0.1, torch.nan, 0.3]), torch.tensor([0.1, 0.2, 0.3])
    assert divergence(broken, whole).isnan()
    assert divergence(whole, broken).isnan()
    assert divergence(broken, broken).isnan()


@pytest.mark.parametrize("divergence", [token_tv, token_kl, token_jsd])
@pytest.mark.parametrize("seed", SEEDS)
def test_divergences_are_of_laws_whatever_their_logits_add_up_to(
    divergence: Callable[[Tensor, Tensor], Tensor], seed: int
) -> None:
    log_p, log_q = random_log_law(seed, 3, 7), random_log_law(seed + 100, 3, 7).requires_grad_()
    z_p, z_q = log_p + 3.5, (log_q - 11.25).detach().requires_grad_()
    of_laws, of_logits = divergence(log_p, log_q), divergence(z_p, z_q)
    torch.testing.assert_close(of_logits, of_laws, rtol=1e-10, atol=1e-12)
    slopes = (torch.autograd.grad(v.sum(), x)[0] for v, x in ((of_logits, z_q), (of_laws, log_q)))
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_slopes_at_the_logits_are_those_of_small_changes(seed: int) -> None:
    z_p, z_q = random_log_law(seed, 2, 7), random_log_law(seed + 100, 2, 7).requires_grad_()
    for divergence in (token_tv, token_kl, token_jsd):
        assert torch.autograd.gradcheck(divergence, (z_p, z_q), raise_exception=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_selected_picks_the_tokens_log_probabilities(seed: int) -> None:
    log_probs = random_log_law(seed, 2, 3, 5)
    ids = torch.tensor([[0, 4, 2], [1, 1, 3]])
    picked = selected(log_probs, ids)
    assert picked.tolist() == [[log_probs[i, t, ids[i, t]].item() for t in range(3)] for i in range(2)]


def test_selected_of_no_rows_is_empty() -> None:
    assert selected(torch.zeros(0, 2, 5), torch.zeros(0, 2, dtype=torch.long)).shape == (0, 2)


@pytest.mark.parametrize(("q", "target"), product([1e-9, 0.2, 0.5, 0.9, 1.0], [1e-4, 0.3, 0.5, 1.0]))
def test_log_hinge_bounds_one_minus_the_ratio_and_ends_at_the_target(q: float, target: float) -> None:
    hinge = log_hinge(torch.tensor(target).log(), torch.tensor(q).log()).item()
    assert hinge >= max(1 - q / target, 0) - 1e-6
    if q >= target:
        assert hinge == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_system_tv_is_the_total_variation_of_the_enumerated_system(seed: int) -> None:
    made, arguments = equal_samples(seed)
    assert system_tv(*arguments).item() == pytest.approx(true_tv(made.system, made.student))


def test_system_tv_of_the_system_itself_is_zero_and_of_the_base_the_refusal_rate() -> None:
    alpha = torch.tensor([0.2, 1.0, 0.0, 0.5], dtype=torch.float64)
    rate = (1 - alpha).mean()
    assert system_tv(alpha, alpha.log(), rate, rate.log()).item() == pytest.approx(0, abs=1e-12)
    never = torch.tensor(-torch.inf, dtype=torch.float64)
    assert system_tv(alpha, torch.zeros(4, dtype=torch.float64), rate, never).item() == pytest.approx(rate.item())


@pytest.mark.parametrize("seed", range(20))
def test_system_hinge_bounds_the_total_variation(seed: int) -> None:
    made, arguments = equal_samples(seed)
    assert system_hinge(*arguments).item() >= true_tv(made.system, made.student) - 1e-12


def test_system_hinge_bounds_the_total_variation_up_to_its_clamp_for_sure_guards() -> None:
    slack = 2 * P_SAFE_RANGE[0]  # a branch each
    for alpha, ratio, refusal in product([0.0, 1.0], [1e-6, 0.5, 0.9999, 0.99999, 1.0], [1e-6, 0.5, 0.9999, 1.0]):
        samples = torch.tensor([alpha], dtype=torch.float64)
        log_ratio = torch.tensor([ratio], dtype=torch.float64).log()
        log_refusal = torch.tensor(refusal, dtype=torch.float64).log()
        arguments = (samples, log_ratio, 1 - samples[0], log_refusal)
        assert system_hinge(*arguments) >= system_tv(*arguments) - slack


@pytest.mark.parametrize("seed", SEEDS)
def test_system_hinge_is_its_equation(seed: int) -> None:
    made, arguments = equal_samples(seed)
    answered = sum(
        p * made.alpha[y] * max(math.log(made.alpha[y] * p / made.student[y]), 0) for y, p in made.base.items() if p > 0
    )
    refused = made.refusal_rate * max(math.log(made.refusal_rate / made.student[REFUSAL]), 0)
    assert system_hinge(*arguments).item() == pytest.approx(answered + refused)


@pytest.mark.parametrize("seed", SEEDS)
def test_system_hinge_is_zero_at_the_system(seed: int) -> None:
    _, (alpha, _, rate, _) = equal_samples(seed)
    assert system_hinge(alpha, alpha.log(), rate, rate.log()).item() == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_chain_bound_total_variation_is_at_most_the_sum_over_tokens(seed: int) -> None:
    made = toy(seed)
    prefixes = [prefix for prefix in made.laws if mass(made.system, prefix) > 0]
    teacher = torch.stack([logs(conditioned(made.system, prefix)) for prefix in prefixes])
    student = torch.stack([logs(made.student_laws[prefix]) for prefix in prefixes])
    weights = torch.tensor([mass(made.system, prefix) for prefix in prefixes], dtype=torch.float64)
    bound = (weights * token_tv(teacher, student)).sum().item()
    assert true_tv(made.system, made.student) <= bound + 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_chain_rule_kl_is_the_sum_over_tokens(seed: int) -> None:
    made = toy(seed)
    total = 0.0
    for prefix in made.laws:
        if len(prefix) < LONGEST - 1 and mass(made.system, prefix) > 0:
            law, student = conditioned(made.system, prefix), made.student_laws[prefix]
            support = [v for v in range(VOCABULARY) if law[v] > 0]
            kl = sum(law[v] * math.log(law[v] / student[v]) for v in support)
            total += mass(made.system, prefix) * kl
    assert total == pytest.approx(true_kl(made.system, made.student))


@pytest.mark.parametrize("seed", SEEDS)
def test_total_variation_is_below_both_bounds_from_kl(seed: int) -> None:
    made = toy(seed)
    kl, tv = true_kl(made.system, made.student), true_tv(made.system, made.student)
    assert tv <= math.sqrt(kl / 2)
    assert tv <= math.sqrt(1 - math.exp(-kl))
    bound = tv_bound_from_kl(torch.tensor(kl, dtype=torch.float64)).item()
    assert bound == pytest.approx(min(math.sqrt(kl / 2), math.sqrt(1 - math.exp(-kl))))


@pytest.mark.parametrize("kl", [1e-6, 0.01, 0.5, 1.5, 1.7, 4.0])
def test_bound_from_kl_is_the_smaller_of_the_two(kl: float) -> None:
    bound = tv_bound_from_kl(torch.tensor(kl, dtype=torch.float64)).item()
    assert bound == pytest.approx(math.sqrt(kl / 2) if kl < 1.6 else math.sqrt(1 - math.exp(-kl)))  # they cross at 1.59


def test_bound_from_kl_runs_from_zero_to_one() -> None:
    bounds = tv_bound_from_kl(torch.tensor([0.0, 1e-8, 0.1, 1.0, 50.0, torch.inf]))
    assert bounds[0] == 0
    assert bounds[-1] == 1
    assert (bounds.diff() >= 0).all()


def test_bound_from_kl_survives_the_rounding_of_equal_laws() -> None:
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))
    kl = token_kl(logits.log_softmax(-1), (logits + 7.3).log_softmax(-1))  # in float32 some come out below 0
    assert kl.min() < 0
    assert tv_bound_from_kl(kl).isfinite().all()


@pytest.mark.parametrize("seed", SEEDS)
def test_expectations_differ_by_at_most_the_total_variation(seed: int) -> None:
    made = toy(seed)
    tv = true_tv(made.system, made.student)

    def difference(phi: dict[Tokens, float]) -> float:
        return sum(phi[y] * (made.system[y] - made.student[y]) for y in RESPONSES)

    rng = np.random.default_rng(seed)
    for _ in range(50):
        assert abs(difference({y: float(rng.uniform()) for y in RESPONSES})) <= tv + 1e-12
    assert difference({y: float(made.system[y] > made.student[y]) for y in RESPONSES}) == pytest.approx(tv)


@pytest.mark.parametrize("seed", SEEDS)
def test_next_token_law_of_a_response_guards_system_is_the_derived_formula(seed: int) -> None:
    made = toy(seed)
    kept = {y: made.base[y] * made.alpha[y] for y in RESPONSES}
    for prefix in made.laws:
        on_path = REFUSAL[: len(prefix)] == prefix
        p_prefix = mass(made.base, prefix)
        s_prefix = mass(kept, prefix) / p_prefix if p_prefix else 0.0
        whole = p_prefix * s_prefix + made.refusal_rate * on_path
        w = made.refusal_rate * on_path / whole
        law = []
        for v in range(VOCABULARY):
            p_next = mass(made.base, (*prefix, v))
            s_next = mass(kept, (*prefix, v)) / p_next if p_next else 0.0
            ratio = s_next / s_prefix if s_prefix else 0.0
            law.append((1 - w) * made.laws[prefix][v] * ratio + w * (on_path and v == REFUSAL[len(prefix)]))
        assert law == pytest.approx(conditioned(made.system, prefix), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_refusal_mixture_is_a_prompt_guards_law_at_every_prefix_of_the_refusal(seed: int, alpha: float) -> None:
    made = toy(seed, lambda y: alpha)
    for t, token in enumerate(REFUSAL):
        prefix = REFUSAL[:t]
        if not mass(made.system, prefix):  # the system never comes here
            assert alpha == 1
            continue
        w = made.refusal_rate / (alpha * mass(made.base, prefix) + made.refusal_rate)
        mixed = refusal_mixture(logs(made.laws[prefix]), torch.tensor(w, dtype=torch.float64), torch.tensor(token))
        assert mixed.exp().tolist() == pytest.approx(conditioned(made.system, prefix), abs=1e-10)


def test_refusal_mixture_is_the_bases_law_off_the_path_of_a_prompt_guard() -> None:
    made = toy(0, lambda y: 0.3)
    for prefix, law in made.laws.items():
        if REFUSAL[: len(prefix)] != prefix:
            assert conditioned(made.system, prefix) == pytest.approx(law)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refusal_mixture_is_the_base_at_weight_zero_and_the_refusal_at_one(dtype: torch.dtype) -> None:
    log_p = random_log_law(0, 2, 5).to(dtype)
    mixed = refusal_mixture(log_p, torch.tensor([0.0, 1.0], dtype=dtype), torch.tensor([3, 3]))
    assert mixed[0].tolist() == pytest.approx(log_p[0].tolist())
    assert mixed[1].exp().tolist() == pytest.approx([0, 0, 0, 1, 0], abs=1e-11)
    assert not mixed.isnan().any()


def test_refusal_mixture_gives_mass_to_a_token_the_base_never_gives() -> None:
    log_p = torch.tensor([-1e4, 0.0, 0.0]).log_softmax(-1)
    mixed = refusal_mixture(log_p, torch.tensor(0.25), torch.tensor(0)).exp()
    assert mixed.tolist() == pytest.approx([0.25, 0.375, 0.375])


def test_refusal_mixture_broadcasts_over_rows() -> None:
    log_p = random_log_law(1, 3, 4)
    weights, tokens = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), torch.tensor([0, 2, 3])
    mixed = refusal_mixture(log_p, weights, tokens)
    for i in range(3):
        expected = [(1 - weights[i].item()) * log_p[i, v].exp().item() for v in range(4)]
        expected[int(tokens[i])] += weights[i].item()
        assert mixed[i].exp().tolist() == pytest.approx(expected)
