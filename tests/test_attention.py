"""Packed attention against attention computed token by token."""

import pytest
import torch
from torch import Tensor

from softguard.attention import Layout, attend, attend_backward

WIDTH = 4


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_by_token(q: Tensor, k: Tensor, v: Tensor, scaling: float, prefix: int, lengths: list[int]) -> Tensor:
    """Every token sees the prefix up to itself, and its own row up to itself."""
    rows = [list(range(prefix))]
    for length in lengths:
        begin = rows[-1][-1] + 1
        rows.append(list(range(begin, begin + length)))
    share = q.shape[1] // k.shape[1]
    out = []
    for number, row in enumerate(rows):
        for token in row:
            seen = [t for t in row if t <= token] if number == 0 else rows[0] + [t for t in row if t <= token]
            heads = []
            for head in range(q.shape[1]):
                scores = torch.stack([(q[token, head] * k[t, head // share]).sum() * scaling for t in seen])
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(w * v[t, head // share] for w, t in zip(weights, seen, strict=True)))
            out.append(torch.stack([torch.as_tensor(h) for h in heads]))
    return torch.stack(out)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("lengths", [[3], [2, 2, 2], [1, 5, 3]])
def test_values_and_gradients_are_those_of_attention(lengths: list[int], heads: tuple[int, int]) -> None:
    prefix, tokens = 3, 3 + sum(lengths)
    q, k, v = (random(tokens, n, WIDTH, seed=i).requires_grad_() for i, n in enumerate((heads[0], heads[1], heads[1])))
    expected = token_by_token(q, k, v, 0.7, prefix, lengths)
    outer = random(*expected.shape, seed=9)
    at = Layout(prefix, lengths, q)
    with torch.no_grad():
        ours, kept = attend(q, k, v, 0.7, at)
        gradients = attend_backward(outer, kept, 0.7, at)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(gradients, torch.autograd.grad((outer * expected).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_rows_do_not_see_each_other() -> None:
    q, k, v = (random(9, 2, WIDTH, seed=i) for i in range(3))
    at = Layout(3, [2, 4], q)
    before, _ = attend(q, k, v, 1.0, at)
    k[3:5], v[3:5] = 7.0, 7.0  # the first row's
    after, _ = attend(q, k, v, 1.0, at)
    assert torch.equal(before[5:], after[5:])
    assert not torch.equal(before[3:5], after[3:5])
