"""Rows and numbers at the edge of what a norm can be given, for every implementation on a CPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_adanorm import native
from separata_adanorm.norms import ada_norm, detach_norm, grad_norm, layer_norm_simple
from torch import Tensor

NORMS: dict[str, Callable[..., Tensor]] = {
    "ada_norm": partial(ada_norm, C=0.7),
    "layer_norm_simple": layer_norm_simple,
    "detach_norm": detach_norm,
    "detach_mean": partial(detach_norm, detach_std=False),
    "detach_std": partial(detach_norm, detach_mean=False),
    "grad_norm": grad_norm,
}
EPS = 1e-5


@pytest.fixture(params=["native", "eager", "reference"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("no compiler")
    return str(request.param)


def both(norm: Callable[..., Tensor], x: Tensor, g: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Output and gradient."""
    x = x.detach().requires_grad_()
    output = norm(x, **options)
    return output.detach(), *torch.autograd.grad(output, x, g)


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows(name: str, shape: tuple[int, ...], impl: str) -> None:
    output, gradient = both(NORMS[name], torch.empty(shape), torch.empty(shape), impl=impl)
    assert output.shape == gradient.shape == shape


@pytest.mark.parametrize("name", NORMS)
def test_a_single_feature_is_zero(name: str, impl: str) -> None:
    x, g = torch.randn(50, 1), torch.randn(50, 1)
    output, gradient = both(NORMS[name], x, g, convention="torch", impl=impl)
    assert torch.equal(output, x if name == "grad_norm" else torch.zeros(50, 1))
    if name in ("detach_norm", "detach_mean"):
        assert torch.allclose(gradient, g / EPS**0.5, rtol=1e-6)
    else:
        assert torch.equal(gradient, torch.zeros(50, 1))


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
@pytest.mark.parametrize("convention", ["official", "torch"])
@pytest.mark.parametrize("name", NORMS)
def test_constant_rows(name: str, convention: str, value: float, impl: str) -> None:
    x, g = torch.full((3, 37), value), torch.randn(3, 37)
    output, gradient = both(NORMS[name], x, g, convention=convention, impl=impl)
    assert torch.equal(output, x if name == "grad_norm" else torch.zeros(3, 37))
    s = EPS if convention == "official" else EPS**0.5
    centre = 0 if name in ("detach_norm", "detach_mean") else g.mean(dim=1, keepdim=True)
    expected = (0.7 if name == "ada_norm" else 1.0) * (g - centre) / s
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-6 / s)


@settings(deadline=None, max_examples=120)
@given(
    name=st.sampled_from(sorted(NORMS)),
    width=st.sampled_from([2, 3, 7, 31, 64, 129, 1000]),
    # The largest of so many numbers is some five times as large: about 3e38 is all that there is.
    scale=st.sampled_from([1e-30, 1e-25, 1e-20, 1e-12, 1e-3, 1.0, 1e4, 1e19, 1e36, 1e37, 5e37]),
    eps=st.sampled_from([EPS, 0.0]),
    convention=st.sampled_from(["official", "torch"]),
    impl=st.sampled_from(["native", "eager", "reference"]),
    seed=st.integers(0, 2**16),
)
def test_any_scale(
    name: str, width: int, scale: float, eps: float, convention: str, impl: str, seed: int
) -> None:
    if impl == "native" and not native.available():
        pytest.skip("no compiler")
    random = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(4, width, generator=random) for _ in range(2))
    x = scale * x
    options = {"eps": eps, "convention": convention}
    found = both(NORMS[name], x, g, impl=impl, **options)
    exact = both(NORMS[name], x.double(), g.double(), impl="reference", **options)
    official = convention == "official"
    sigma = x.double().std(dim=1, correction=int(official), keepdim=True)
    s = sigma + eps if official else (sigma.square() + eps).sqrt()
    largest = 10 + scale if name == "grad_norm" else 10
    # What is left of a gradient can be small beside what it is the rest of.
    for value, expected, unit in zip(found, exact, (largest, g / s), strict=True):
        size = torch.as_tensor(unit).abs().max().double()
        assert (value.double() - expected).abs().max() <= 2e-5 * size


@pytest.mark.parametrize("value", [1e-30, 1.0, 3e38])
@pytest.mark.parametrize("name", NORMS)
def test_rows_of_one_size_and_both_signs(name: str, value: float, impl: str) -> None:
    x = torch.tensor([[value, -value] * 20])
    g = torch.randn(1, 40)
    output, gradient = both(NORMS[name], x, g, eps=0.0, convention="torch", impl=impl)
    y = x.sign()
    h = g * (0.7 - 0.07 * y) if name == "ada_norm" else g
    expected = {"ada_norm": (0.7 - 0.07 * y) * y, "grad_norm": x + y}.get(name, y)
    assert torch.allclose(output, expected, rtol=1e-6)
    dx = h - h.mean() if name not in ("detach_norm", "detach_mean") else h
    if name not in ("detach_norm", "detach_std"):
        dx = dx - y * (h * y).mean()
    assert torch.allclose(gradient * value, dx, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_strides_do_not_matter(name: str, impl: str) -> None:
    x, g = torch.randn(6, 9, 16).transpose(0, 1), torch.randn(16, 6, 9).permute(2, 1, 0)
    for found, expected in zip(
        both(NORMS[name], x, g, impl=impl),
        both(NORMS[name], x.contiguous(), g.contiguous(), impl=impl),
        strict=True,
    ):
        assert torch.equal(found, expected)
