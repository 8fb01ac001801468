"""Written-out layers against transformers' own, one by one."""

import pytest
import torch
from torch import Tensor

from softguard.attention import Layout
from softguard.frozen import _norm, _norm_backward, _turn, is_plain
from softguard.models import BaseModel


class Norm:
    """What an RMS norm module holds."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.variance_epsilon = weight, 1e-5


def test_the_norm_and_its_gradient() -> None:
    torch.manual_seed(0)
    x, outer = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), torch.randn(5, 6, dtype=torch.float64)
    norm = Norm(torch.randn(6, dtype=torch.float64))
    expected = torch.stack([norm.weight * row / (row.square().mean() + 1e-5).sqrt() for row in x])
    with torch.no_grad():
        ours, scale = _norm(x, norm)
        gradient = _norm_backward(outer, x, scale, norm)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad((outer * expected).sum(), x)[0])


def test_turning_back_undoes_turning() -> None:
    x, angle = torch.randn(5, 2, 6), torch.randn(5, 1, 3)
    turned = _turn(x, angle.cos(), angle.sin())
    plane = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(turned, torch.cat([plane.real, plane.imag], dim=-1))
    torch.testing.assert_close(_turn(turned, angle.cos(), -angle.sin()), x)


@pytest.mark.parametrize("change", ["hidden_act", "mlp_bias", "sliding_window"])
def test_a_layer_of_another_make_is_left_to_transformers(
    change: str, small: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = small.model.get_decoder()
    assert is_plain(decoder)
    value = {"hidden_act": "gelu", "mlp_bias": True, "sliding_window": 16}[change]
    monkeypatch.setattr(decoder.config, change, value, raising=False)
    assert not is_plain(decoder)


def test_a_layout_knows_its_tokens() -> None:
    assert Layout(3, [[2, 4]], torch.zeros(1)).tokens == 9
