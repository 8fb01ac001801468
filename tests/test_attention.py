"""Packed attention against attention computed token by token."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from softguard import attention
from softguard.attention import LONG, Beside, Group, Layout, alike, attend, attend_backward

WIDTH = 4


@pytest.fixture(params=["short", "long"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few tokens by either path."""
    monkeypatch.setattr(attention, "LONG", 0 if request.param == "long" else LONG)


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


def ours(
    q: Tensor, k: Tensor, v: Tensor, outer: Tensor, scaling: float, prefix: int, *groups: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `token_by_token` gives and its gradients of q, k and v, keys and values before the prefix with the others."""
    before = len(k) - len(q)
    at = Layout(prefix, groups, q, before)
    with torch.no_grad():
        ahead = (k[:before].transpose(0, 1), v[:before].transpose(0, 1)) if before else None
        out, kept = attend(q, k[before:], v[before:], scaling, at, ahead)
        dq, dk, dv, *dahead = attend_backward(outer, kept, scaling, at)
    dk, dv = (torch.cat([x.transpose(0, 1), own]) for x, own in zip(dahead, (dk, dv), strict=True))
    return out, dq, dk, dv


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("groups", [[[3]], [[2, 2, 2]], [[1, 5, 3]], [[2, 1], [5], [3, 4]]])
@pytest.mark.parametrize("before", [0, 2])
def test_values_and_gradients_are_those_of_attention(groups: list[list[int]], heads: tuple[int, int], before: int) -> None:
    lengths = [length for group in groups for length in group]
    prefix, tokens = 3, 3 + sum(lengths)
    q = random(tokens, heads[0], WIDTH, seed=0).requires_grad_()
    k, v = (random(before + tokens, heads[1], WIDTH, seed=i).requires_grad_() for i in (1, 2))
    expected = token_by_token(q, k, v, 0.7, prefix, lengths)
    outer = random(*expected.shape, seed=9)
    theirs = expected, *torch.autograd.grad((outer * expected).sum(), (q, k, v))
    torch.testing.assert_close(ours(q, k, v, outer, 0.7, prefix, *groups), theirs)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_precisions_are_as_near_as_they_can_be(dtype: torch.dtype, tolerance: float) -> None:
    q, outer = (random(12, 4, WIDTH, seed=i).to(dtype) for i in (0, 3))
    k, v = (random(14, 2, WIDTH, seed=i).to(dtype) for i in (1, 2))
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected = token_by_token(wide[0], wide[1], wide[2], 0.5, 3, [1, 5, 3])
    theirs = expected, *torch.autograd.grad((outer * expected).sum(), wide)
    mine = ours(q, k, v, outer, 0.5, 3, [1, 5, 3])
    torch.testing.assert_close([x.double() for x in mine], list(theirs), rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("path")
def test_padding_gives_and_takes_nothing() -> None:
    """A row padded beside a longer one comes out as alone, whatever the gradient at the longer one."""
    q, k, v = (random(13, 2, WIDTH, seed=i) for i in range(3))
    outer = random(13, 2, WIDTH, seed=3)
    outer[5:] = 0
    together = ours(q, k, v, outer, 1.0, 3, [2, 8])
    alone = ours(q[:5], k[:5], v[:5], outer[:5], 1.0, 3, [2])
    torch.testing.assert_close([x[:5] for x in together], list(alone))
    assert not any(x[5:].any() for x in together[1:])


@pytest.mark.usefixtures("path")
def test_what_rows_keep_grows_with_their_length() -> None:
    kept = []
    for length in (50, 150, 250):
        q, k, v = (random(1 + length, heads, WIDTH, seed=0) for heads in (4, 2, 2))
        kept.append(sum(x.nbytes for x in attend(q, k, v, 1.0, Layout(1, [[length]], q))[1]))
    assert kept[2] - kept[1] == kept[1] - kept[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_run_fused_both_ways(dtype: torch.dtype) -> None:
    q, k, v = (random(LONG + 9, heads, 16, seed=0).to(dtype) for heads in (4, 2, 2))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        ours(q, k, v, q, 1.0, 4, [4], [LONG + 1])
    names = {event.key for event in seen.key_averages()}
    assert {f"aten::_scaled_dot_product_flash_attention_for_cpu{end}" for end in ("", "_backward")} <= names


@pytest.mark.usefixtures("path")
def test_queries_may_be_turned() -> None:
    """Models that run by their own code hand over what they have transposed."""
    q, outer = random(4, 9, WIDTH, seed=0), random(9, 4, WIDTH, seed=3)
    k, v = (random(2, 9, WIDTH, seed=i).transpose(0, 1) for i in (1, 2))
    flat = q.transpose(0, 1).contiguous()
    turned = ours(q.transpose(0, 1), k, v, outer.transpose(0, 1).contiguous().transpose(0, 1), 1.0, 3, [2, 4])
    torch.testing.assert_close(turned, ours(flat, k.contiguous(), v.contiguous(), outer, 1.0, 3, [2, 4]))


@pytest.mark.usefixtures("path")
def test_short_rows_are_not_padded_to_long_ones() -> None:
    q, k, v = (random(3 + 8 * 5 + 100, heads, WIDTH, seed=0) for heads in (4, 2, 2))
    _, kept = attend(q, k, v, 1.0, Layout(3, [[5] * 8, [100]], q))
    assert sum(x.nbytes for x in kept) == sum(x.nbytes for x in (q, k, v))


@pytest.mark.usefixtures("path")
def test_rows_do_not_see_each_other() -> None:
    q, k, v = (random(9, 2, WIDTH, seed=i) for i in range(3))
    at = Layout(3, [[2, 4]], q)
    before, _ = attend(q, k, v, 1.0, at)
    k[3:5], v[3:5] = 7.0, 7.0  # the first row's
    after, _ = attend(q, k, v, 1.0, at)
    assert torch.equal(before[5:], after[5:])
    assert not torch.equal(before[3:5], after[3:5])


@pytest.mark.parametrize("parts", [[slice(3)], [slice(2), slice(2, 3)]])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_tokens_beside_a_gate_see_their_row_the_gate_and_each_other(heads: tuple[int, int], parts: list[slice]) -> None:
    lengths, gates, tokens = [3, 5, 1], 2, 4  # of the rows, of the gate, of what stands beside it
    count = len(lengths)
    rows = [random(count, heads[1], 5, WIDTH, seed=i) for i in (1, 2)]  # padded with what must not be seen
    gate = [random(count, heads[1], gates, WIDTH, seed=i).requires_grad_() for i in (3, 4)]
    q = random(count * tokens, heads[0], WIDTH, seed=5).requires_grad_()
    own = [random(count * tokens, heads[1], WIDTH, seed=i).requires_grad_() for i in (6, 7)]

    def seen(part: int, i: int) -> Tensor:
        mine = own[part][i * tokens :][:tokens]
        return torch.cat([rows[part][i, :, : lengths[i]].transpose(0, 1), gate[part][i].transpose(0, 1), mine])

    expected = torch.cat(
        [token_by_token(q[i * tokens :][:tokens], seen(0, i), seen(1, i), 0.7, tokens, []) for i in range(count)]
    )
    outer = random(*expected.shape, seed=9)
    theirs = torch.autograd.grad((outer * expected).sum(), (q, *own, *gate))
    there = (torch.arange(5) < torch.tensor(lengths)[:, None])[:, None].expand(-1, tokens, -1)
    later = torch.ones(tokens, gates + tokens, dtype=torch.bool).tril(gates).expand(count, -1, -1)
    seen_by = torch.cat([there, later], dim=-1)
    beside = Beside([Group(*(x[part] for x in (*rows, seen_by))) for part in parts])
    with torch.no_grad():
        out, kept = beside.attend(q, own[0], own[1], 0.7, (gate[0], gate[1]))
        gradients = beside.backward(outer, kept, 0.7)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, theirs)


def test_rows_alike_in_length_run_together_with_little_padding() -> None:
    lengths = [30, 9, 300, 10, 28, 11, 290]
    groups = alike(lengths)
    assert groups == [[1, 3, 5], [4, 0], [6, 2]]
    for group in groups:
        assert len(group) * max(lengths[i] for i in group) <= 1.25 * sum(lengths[i] for i in group)
    assert alike([]) == []
