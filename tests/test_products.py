"""Products in either order beside the plain ones in float64."""

import pytest
import torch
from torch import Tensor, nn

from softguard import products

WIDE = 1_100  # a head of more than two blocks, the last of them short


@pytest.fixture(autouse=True, params=["turned", "plain"])
def turned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Few rows as on processors with AVX2 alone, and as on others."""
    monkeypatch.setattr(products, "_TURNED", request.param == "turned")
    return bool(request.param == "turned")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(bias: bool) -> nn.Linear:
    made = nn.Linear(24, 40, bias=bias)
    made.weight.data = random(40, 24, seed=1)
    if bias:
        made.bias.data = random(40, seed=2)
    return made.requires_grad_(False)


def near(found: Tensor, exact: Tensor) -> bool:
    return torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-4)  # of sums of up to 1,100 terms


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 512, 513])
def test_a_linear_layer_is_its_product(tokens: int, bias: bool) -> None:
    one, x = layer(bias), random(tokens, 24, seed=3)
    exact = x.double() @ one.weight.double().T + (one.bias.double() if bias else 0)
    for given in (x, x.T.contiguous().T):  # in rows, and in columns as an earlier product leaves it
        assert near(products.linear(one, given), exact)


@pytest.mark.parametrize("tokens", [1, 2, 512, 513])
def test_the_gradient_of_a_layers_input_and_what_is_added_to_it(tokens: int) -> None:
    weight, outer, plus = random(40, 24, seed=1), random(tokens, 40, seed=4), random(tokens, 24, seed=5)
    exact = outer.double() @ weight.double()
    assert near(products.into_input(outer, weight), exact)
    assert near(products.into_input(outer, weight, plus), exact + plus.double())


@pytest.mark.parametrize(("tokens", "in_rows"), [(8, True), (63, True), (64, False)])
def test_long_sums_of_few_rows_are_not_turned(tokens: int, in_rows: bool, turned: bool) -> None:
    weight, outer = random(products._LONG, 24, seed=1), random(tokens, products._LONG, seed=4)
    found, exact = products.into_input(outer, weight), outer.double() @ weight.double()
    assert found.is_contiguous() == (in_rows or not turned)
    assert (found - exact).norm() < 2e-6 * exact.norm()


def test_what_stands_in_a_layers_place_is_asked_itself() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    one = Doubled(24, 40)
    assert torch.equal(products.linear(one, (x := random(8, 24, seed=3))), one(x))


@pytest.mark.parametrize("tokens", [1, 2, 512, 513])
def test_logits_and_their_gradient(tokens: int) -> None:
    weight, hidden, outer = random(WIDE, 24, seed=6), random(tokens, 24, seed=7), random(tokens, WIDE, seed=8)
    found = products.logits(hidden.requires_grad_(), weight)
    assert near(found.detach(), hidden.detach().double() @ weight.double().T)
    assert found.is_contiguous()  # laws are made of rows
    found.backward(outer)  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert near(hidden.grad, outer.double() @ weight.double())


def test_few_rows_in_float32_alone_are_turned(turned: bool) -> None:
    one = layer(bias=False)
    assert products.linear(one, random(8, 24, seed=3)).mT.is_contiguous() == turned
    assert products.linear(one, random(513, 24, seed=3)).is_contiguous()
    assert products.linear(one.to(torch.bfloat16), random(8, 24, seed=3).to(torch.bfloat16)).is_contiguous()
