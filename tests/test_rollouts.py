from itertools import product

import torch
from torch import Tensor

from softguard.rollouts import CLIP, GAMMA, LAMBDA, Rollouts, advantages, ppo, reinforce, shortfall, token_rewards


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_reinforce_is_on_average_the_gradient_of_the_expected_reward() -> None:
    logits = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([0.9, 0.2, 0.5], dtype=torch.float64)
    law = logits.softmax(-1)
    (exact,) = torch.autograd.grad(-(law * rewards).sum(), logits, retain_graph=True)
    expected = torch.zeros(3, dtype=torch.float64)
    for drawn in product(range(3), repeat=2):  # every pair of one-token answers
        answers = torch.tensor(drawn)
        loss = reinforce(law.log()[answers][:, None], torch.ones(2, 1), rewards[answers])
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        expected += law[answers].prod().detach() * gradient
    torch.testing.assert_close(expected, exact)


def test_a_single_answer_has_no_baseline() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, 0.0]])
    loss = reinforce(log_probs, torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([0.5]))
    torch.testing.assert_close(loss, torch.tensor(1.5))


def test_advantages_are_the_discounted_sum_of_errors() -> None:
    lengths = [4, 2]
    mask = torch.tensor([[1.0, 1, 1, 1], [1.0, 1, 0, 0]])
    rewards, values = (torch.randn(2, 4, generator=generator(i)) * mask for i in (0, 1))
    found, returns = advantages(rewards, values, mask)
    for row, length in enumerate(lengths):
        for t in range(length):
            total = 0.0
            for k in range(t, length):
                after = values[row, k + 1].item() if k + 1 < length else 0.0
                total += (GAMMA * LAMBDA) ** (k - t) * (rewards[row, k].item() + GAMMA * after - values[row, k].item())
            torch.testing.assert_close(found[row, t], torch.tensor(total))
            torch.testing.assert_close(returns[row, t], torch.tensor(total) + values[row, t])
    assert not found[1, 2:].any()


def test_padding_that_holds_values_changes_nothing() -> None:
    mask = torch.tensor([[1.0, 1, 0]])
    rewards, values = torch.tensor([[0.1, 0.9, 0.0]]), torch.tensor([[0.2, 0.4, 0.0]])
    dirty = values + torch.tensor([[0.0, 0.0, 7.0]])
    torch.testing.assert_close(advantages(rewards, dirty, mask), advantages(rewards, values, mask))


def test_straying_is_paid_for_at_every_token_and_safety_at_the_last() -> None:
    old, base = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([[-1.5, -1.0], [-2.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    rollouts = Rollouts([], [], mask, torch.tensor([0.7, 0.2]), old, base)
    expected = torch.tensor([[-0.1 * 0.5, 0.1 * 1.0 + 0.7], [0.1 * 1.0 + 0.2, 0.0]])
    torch.testing.assert_close(token_rewards(rollouts, 0.1), expected)
    torch.testing.assert_close(shortfall("ppo", rollouts, 0.1), -expected.sum(-1))
    torch.testing.assert_close(shortfall("reinforce", rollouts, 0.1), -rollouts.reward)


def test_ppo_is_the_policy_gradient_where_the_policy_has_not_moved() -> None:
    log_probs = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]], requires_grad=True)
    advantage, mask = torch.tensor([[2.0, -1.0], [0.5, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    (gradient,) = torch.autograd.grad(ppo(log_probs, log_probs.detach(), advantage, mask), log_probs)
    torch.testing.assert_close(gradient, -advantage * mask / 3)


def test_ppo_stops_where_the_policy_has_moved_far_in_the_wanted_direction() -> None:
    def slope(moved: float, advantage: float) -> float:
        log_probs = torch.tensor([[moved]], requires_grad=True)
        loss = ppo(log_probs, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1))
        gradient: Tensor = torch.autograd.grad(loss, log_probs)[0]
        return gradient.item()

    far = 2 * CLIP
    assert slope(far, 1.0) == slope(-far, -1.0) == 0
    assert slope(far, -1.0) > 0 > slope(-far, 1.0)
