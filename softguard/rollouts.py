"""Objectives that learn from the student's own answers and what the guard says of them: REINFORCE (§3.2) and PPO (B.3).

The reward is the guard's p(safe) of prompt and answer, also where the system's own guard reads prompts alone: that says the
same of every answer, and would teach nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from softguard.corpus import Example
from softguard.engine import Engine
from softguard.guards import Guard, response_safety
from softguard.passes import Passes, padded_ids, spread

ON_POLICY = ("reinforce", "ppo")
CLIP, GAMMA, LAMBDA = 0.2, 1.0, 0.95  # B.3
UPDATES = 4  # of one batch of answers, by ppo
_VALUE_WEIGHT = 0.1  # of the value head's squared error beside the policy's loss


class Rollouts(NamedTuple):
    """Answers drawn from the student. S rows, T tokens."""

    rows: list[list[int]]  # prompt and answer, the last token left out
    answers: list[list[int]]
    mask: Tensor  # (S, T), 1 on the answers' tokens
    reward: Tensor  # (S,), p(safe) of the answer
    old: Tensor  # (S, T) log-probabilities when they were drawn, 0 on padding
    base: Tensor  # (S, T), the base's


@torch.no_grad()
def draw(passes: Passes, examples: Sequence[Example], guard: Guard, max_new_tokens: int, seed: int) -> Rollouts:
    """One answer a prompt from the student as it is, and its reward.

    Raises SoftguardError if the guard fails.
    """
    prompts = [example.prompt for example in examples]
    drawn = Engine(passes.base, passes.adapter).generate(prompts, max_new_tokens, len(prompts), temperature=1.0, seed=seed)
    answers = [list(response.ids) for response in drawn]
    rows = [passes.chat.encode(prompt) + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    _, mask = padded_ids(answers, passes.base.device)
    reward = torch.tensor(response_safety(guard, prompts, [response.text for response in drawn]), dtype=torch.float32)
    wanted = [len(answer) for answer in answers]
    old, base = (spread(passes.log_probs(run(rows, wanted), answers), mask) for run in (passes.student, passes.teacher))
    return Rollouts(rows, answers, mask, reward.to(passes.base.device), old, base)


def reinforce(log_probs: Tensor, mask: Tensor, reward: Tensor) -> Tensor:
    """−mean (α_i − b_i)·ℓ_i with ℓ_i summed over tokens (S, T); its gradient is an unbiased one of −E_q[α].

    The baseline b_i is the mean reward of the other answers, (S,) rewards.
    """
    count = len(reward)
    baseline = (reward.sum() - reward) / (count - 1) if count > 1 else torch.zeros_like(reward)
    return -((reward - baseline) * (log_probs * mask).sum(-1)).mean()


def advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ·V_{t+1} − V_t, and the returns A + V.

    All (S, T); V is 0 after the last token. Zero on padding.
    """
    values = values * mask
    after = torch.nn.functional.pad(values[:, 1:], (0, 1))
    delta = (rewards + GAMMA * after - values) * mask
    result, running = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])
    for t in range(delta.shape[1] - 1, -1, -1):
        running = delta[:, t] + GAMMA * LAMBDA * running
        result[:, t] = running
    return result, result + values


def token_rewards(rollouts: Rollouts, beta: float) -> Tensor:
    """r_t = −β·(log q(y_t) − log p(y_t)), and α besides at the last token: (S, T)."""
    rewards = -beta * (rollouts.old - rollouts.base) * rollouts.mask
    last = rollouts.mask.sum(-1).long() - 1
    return rewards.scatter_add(1, last[:, None], rollouts.reward[:, None])


def shortfall(objective: str, rollouts: Rollouts, beta: float) -> Tensor:
    """What the objective minimises of each answer, (S,): −α, and for ppo β times the log-ratio to the base besides."""
    return -token_rewards(rollouts, beta if objective == "ppo" else 0.0).sum(-1)


def ppo(log_probs: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """−E min(ρA, clip(ρ, 1 ± ε)A), ρ = q/q_old, a mean over the answers' tokens; all (S, T)."""
    ratio = (log_probs - old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return -(surrogate * mask).sum() / mask.sum()


def losses(
    objective: str, passes: Passes, rollouts: Rollouts, value_head: nn.Parameter, beta: float
) -> list[Callable[[], Tensor]]:
    """What to minimise, one function an update, each to be called after the update before it.

    `value_head`: (hidden + 1,), linear in the student's last hidden states, and a constant; ppo alone trains it.
    """
    wanted = [len(answer) for answer in rollouts.answers]

    def now() -> tuple[Tensor, Tensor]:
        hidden = passes.student(rollouts.rows, wanted)
        values = torch.cat(hidden).detach().float() @ value_head[:-1] + value_head[-1]
        log_probs = passes.log_probs(hidden, rollouts.answers)
        return spread(log_probs, rollouts.mask), spread(values, rollouts.mask)

    if objective == "reinforce":
        return [lambda: reinforce(now()[0], rollouts.mask, rollouts.reward)]
    with torch.no_grad():
        advantage, returns = advantages(token_rewards(rollouts, beta), now()[1], rollouts.mask)
        real = advantage[rollouts.mask > 0]
        scaled = (advantage - real.mean()) / (real.std() + 1e-8) if len(real) > 1 else advantage

    def update() -> Tensor:
        log_probs, values = now()
        error = ((values - returns).square() * rollouts.mask).sum() / rollouts.mask.sum()
        return ppo(log_probs, rollouts.old, scaled, rollouts.mask) + _VALUE_WEIGHT * error

    return [update] * UPDATES
