"""Packed attention against attention computed token by token."""

import pytest
import torch
from torch import Tensor

from softguard.attention import Layout, attend, attend_backward

WIDTH = 4


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_by_token(q: Tensor, k: Tensor, v: Tensor, scaling: float, prefix: int, lengths: list[int]) -> Tensor:
    """Every token sees the prefix up to itself, and its own row up to itself.

    Keys and values may be more than queries: what they are ahead stands before the prefix and is seen by all.
    """
    before = len(k) - len(q)
    rows = [list(range(prefix))]
    for length in lengths:
        begin = rows[-1][-1] + 1
        rows.append(list(range(begin, begin + length)))
    share = q.shape[1] // k.shape[1]
    out = []
    for number, row in enumerate(rows):
        for token in row:
            seen = [t for t in row if t <= token] if number == 0 else rows[0] + [t for t in row if t <= token]
            seen = [*range(before), *(t + before for t in seen)]
            heads = []
            for head in range(q.shape[1]):
                scores = torch.stack([(q[token, head] * k[t, head // share]).sum() * scaling for t in seen])
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(w * v[t, head // share] for w, t in zip(weights, seen, strict=True)))
            out.append(torch.stack([torch.as_tensor(h) for h in heads]))
    return torch.stack(out)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("lengths", [[3], [2, 2, 2], [1, 5, 3]])
@pytest.mark.parametrize("before", [0, 2])
def test_values_and_gradients_are_those_of_attention(lengths: list[int], heads: tuple[int, int], before: int) -> None:
    prefix, tokens = 3, 3 + sum(lengths)
    q = random(tokens, heads[0], WIDTH, seed=0).requires_grad_()
    k, v = (random(before + tokens, heads[1], WIDTH, seed=i).requires_grad_() for i in (1, 2))
    expected = token_by_token(q, k, v, 0.7, prefix, lengths)
    outer = random(*expected.shape, seed=9)
    at = Layout(prefix, lengths, q, before)
    with torch.no_grad():
        ahead = (k[:before].transpose(0, 1), v[:before].transpose(0, 1)) if before else None
        ours, kept = attend(q, k[before:], v[before:], 0.7, at, ahead)
        dq, dk, dv, *dahead = attend_backward(outer, kept, 0.7, at)
    torch.testing.assert_close(ours, expected)
    gradients = dq, *(torch.cat([x.transpose(0, 1), own]) for x, own in zip(dahead, (dk, dv), strict=True))
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
