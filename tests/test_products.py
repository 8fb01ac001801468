"""Products in either order, and of weights laid out beforehand, beside the plain ones in float64."""

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


def wide(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


@pytest.fixture(params=["laid out", "as they are"])
def laid_out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Weights in bfloat16 in the library's own layout, where this processor has one, and as the model has them."""
    monkeypatch.setattr(products, "_LAYS_OUT", products._LAYS_OUT and request.param == "laid out")
    return bool(products._LAYS_OUT)


def close(found: Tensor, exact: Tensor) -> bool:
    assert found.dtype == torch.bfloat16
    return torch.allclose(found.double(), exact, rtol=2**-6, atol=2**-6)  # rounded to eight bits, up to three times


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_products_in_bfloat16(tokens: int, bias: bool, laid_out: bool) -> None:
    one, other = layer(bias).to(torch.bfloat16), layer(bias).to(torch.bfloat16)
    other.weight.data = wide(random(40, 24, seed=9))
    x, rest = wide(random(tokens, 24, seed=3)), wide(random(tokens, 40, seed=4))
    exact, beside = (x.double() @ each.weight.double().T + (each.bias.double() if bias else 0) for each in (one, other))
    for given in (x, x.T.contiguous().T):
        assert close(products.linear(one, given), exact)
        assert torch.equal(products.linear(one, given), one(given))  # laid out, it is the same product
        assert close(products.linear_plus(one, given, rest.clone()), exact + rest.double())
        assert close(products.gated(one, other, given), exact / (1 + (-exact).exp()) * beside)
        for found, product in zip(products.side_by_side((one, other, one), given), (exact, beside, exact), strict=True):
            assert close(found, product)
    assert (one.weight in products._laid_out) == laid_out


def test_layers_that_differ_in_having_a_bias_side_by_side() -> None:
    layers = [layer(bias).to(torch.bfloat16) for bias in (True, False)]
    x = wide(random(5, 24, seed=3))
    for found, one in zip(products.side_by_side(layers, x), layers, strict=True):
        assert close(found, one(x).double())


def test_a_weight_that_changed_is_laid_out_anew() -> None:
    one, x = layer(bias=False).to(torch.bfloat16), wide(random(5, 24, seed=3))
    products.linear(one, x)
    one.weight.data = wide(random(40, 24, seed=5))  # another one in its place
    assert torch.equal(products.linear(one, x), one(x))
    with torch.no_grad():
        one.weight.mul_(2)  # and in place
    assert torch.equal(products.linear(one, x), one(x))


def test_the_memory_of_a_laid_out_weight_is_not_given_to_another() -> None:
    one, x = layer(bias=False).to(torch.bfloat16), wide(random(5, 24, seed=3))
    products.linear(one, x)
    for seed in range(20):
        one.weight.data = wide(random(40, 24, seed=100 + seed))
        one.weight.data = wide(random(40, 24, seed=200 + seed))  # where the one laid out lay, if it were free
        assert torch.equal(products.linear(one, x), one(x))


def test_weights_for_many_rows_stay_as_they_are() -> None:
    one, x = layer(bias=False).to(torch.bfloat16), wide(random(513, 24, seed=3))
    assert torch.equal(products.linear(one, x), one(x))
    assert one.weight not in products._laid_out


def test_large_weights_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_LARGE", 40 * 24 * 2 - 1)
    one, x = layer(bias=False).to(torch.bfloat16), wide(random(5, 24, seed=3))
    assert torch.equal(products.linear(one, x), one(x))
    assert one.weight not in products._laid_out


def test_gradients_pass_a_layer_in_bfloat16() -> None:
    one, x = layer(bias=False).to(torch.bfloat16), wide(random(5, 24, seed=3)).requires_grad_()
    products.linear(one, x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert close(x.grad, one.weight.double().sum(0).expand(5, -1))


def test_logits_in_bfloat16_and_their_gradient(laid_out: bool) -> None:
    weight, hidden, outer = (wide(random(*shape, seed=7)) for shape in ((WIDE, 24), (5, 24), (5, WIDE)))
    found = products.logits(hidden.requires_grad_(), weight)
    assert close(found.detach(), hidden.detach().double() @ weight.double().T)
    found.backward(outer)  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad.double(), outer.double() @ weight.double(), rtol=2**-7, atol=0.2)  # of 1,100 terms
