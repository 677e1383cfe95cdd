"""The operator and its implementations: they agree, in every graph and on every processor."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_adanorm import fused, native
from separata_adanorm.norms import AdaNorm, ada_norm, add_ada_norm, detach_norm, layer_norm_simple
from separata_adanorm.options import Options
from separata_shared import native as machinery
from torch import Tensor
from torch.nn import functional as F

DETACHED = [(False, False), (True, False), (False, True), (True, True)]
WIDTHS = [1, 2, 7, 31, 512, 1000, 4096, 8192]
needs_compiler = pytest.mark.skipif(not native.available(), reason="no compiler")


@pytest.fixture(params=range(3))
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every set of instructions that this machine has."""
    if not native.available() or request.param > native.best_level():
        pytest.skip("not on this machine")
    monkeypatch.setattr(native, "LEVEL", request.param)
    return int(request.param)


def run(
    x: Tensor, g: Tensor, detached: tuple[bool, bool], **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, sum and gradients of the norm of ``x`` and of its sum with ``g``."""
    constants: dict[str, Any] = {"C": 1.5, "k": 0.1, "eps": 1e-5, **options}
    norm = Options(width=x.shape[-1], detach_mean=detached[0], detach_std=detached[1], **constants)
    x, other = x.detach().requires_grad_(), g.detach().requires_grad_()
    output, _ = fused.apply(x, None, norm)
    (alone,) = torch.autograd.grad(output, x, g)
    summed, total = fused.apply(x, other, norm)
    gradients = torch.autograd.grad((summed, total), (x, other), (g, g))
    assert torch.equal(*gradients)
    return output.detach(), alone, summed.detach(), gradients[0]


def scale(x: Tensor, g: Tensor, official: bool) -> Tensor:
    """Size of a gradient before its parts cancel."""
    rows = x.double()
    sigma = rows.std(dim=-1, correction=int(official), keepdim=True)
    s = sigma + 1e-5 if official else (sigma.square() + 1e-5).sqrt()
    return (4 * g.double() / s).abs().max()


@pytest.mark.parametrize("detached", DETACHED)
@pytest.mark.parametrize("official", [True, False], ids=["official", "torch"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_instruction_set_agrees(
    width: int, official: bool, detached: tuple[bool, bool], level: int
) -> None:
    if width == 1 and official:
        return  # refused before an implementation is chosen
    torch.manual_seed(width)
    for dtype, share in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        # Every second entry of a row twice as wide: not contiguous.
        x, g = (torch.randn(3, 2 * width).to(dtype)[:, ::2] for _ in range(2))
        size = scale(x, g, official)
        sizes = (10.0, size, 10.0, size)
        found = run(x, g, detached, official=official, impl="native")
        exact = run(x.double(), g.double(), detached, official=official, impl="eager")
        # The sum is rounded before it is normalised.
        rounded = run(x, g, detached, official=official, impl="eager")
        for n, (value, unit) in enumerate(zip(found, sizes, strict=True)):
            expected = exact[n] if n < 2 else rounded[n]
            assert (value.double() - expected.double()).abs().max() <= share * unit


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_outputs_that_pass_the_caches_are_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    torch.manual_seed(0)
    x, g = (torch.randn(40, 512).to(dtype) for _ in range(2))
    expected = run(x, g, (False, False), official=True, impl="native")
    monkeypatch.setattr(native, "STREAM_BYTES", 0)
    found = run(x, g, (False, False), official=True, impl="native")
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted)


@needs_compiler
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(2, 301, 128).unbind()
    one = run(x, g, (False, False), official=True, impl="native")
    monkeypatch.setattr(native, "THREAD_NUMBERS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for value, expected in zip(
        run(x, g, (False, False), official=True, impl="native"), one, strict=True
    ):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("residual", [False, True])
def test_operator_keeps_the_rules_of_torch(residual: bool) -> None:
    x, other = (torch.randn(3, 4, 6, requires_grad=True) for _ in range(2))
    options = (6, 1.0, 0.1, 1e-5, True, False, False, "auto")
    torch.library.opcheck(fused.norm, (x, other if residual else None, *options))
    statistics = fused.norm(x.detach(), None, *options)[2]
    saved = (torch.randn_like(x), torch.randn_like(x) if residual else None, x, statistics)
    torch.library.opcheck(fused.norm_backward, (*saved, *options))


def test_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    norm = AdaNorm(16)

    def block(x: Tensor, other: Tensor) -> Tensor:
        total, normed = add_ada_norm(norm(x), other)
        return total + normed.square() + layer_norm_simple(x)

    inputs = [torch.randn(2, 3, 16, requires_grad=True) for _ in range(2)]
    expected = torch.autograd.grad(block(*inputs).sum(), inputs)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    for value, wanted in zip(found, expected, strict=True):
        assert torch.allclose(value, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("convention", ["official", "torch"])
@pytest.mark.parametrize("rows", ["any", "constant", "single"])
@pytest.mark.parametrize("detached", DETACHED)
def test_second_derivative_is_that_of_the_detached_graph(
    detached: tuple[bool, bool], rows: str, convention: str
) -> None:
    if rows == "single" and convention == "official":
        return  # refused before an implementation is chosen
    x, g, v = some_rows(rows)

    def second(impl: str) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"convention": convention, "impl": impl}
        mean, std = detached
        if mean or std:
            z = detach_norm(x, detach_mean=mean, detach_std=std, **options)
        else:
            z = ada_norm(x, **options)
        (dx,) = torch.autograd.grad(z, x, g, create_graph=True)
        return torch.autograd.grad(dx, (x, g), v, allow_unused=True, materialize_grads=True)

    for found, expected in zip(second("eager"), second("reference"), strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("rows", ["any", "constant", "single"])
def test_second_derivative_in_the_torch_convention_is_torchs(rows: str) -> None:
    x, g, v = some_rows(rows)

    def second(z: Tensor) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(z, x, g, create_graph=True)
        return torch.autograd.grad(dx, (x, g), v)

    ours = second(layer_norm_simple(x, convention="torch"))
    for found, expected in zip(ours, second(F.layer_norm(x, x.shape[1:])), strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


def some_rows(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of that kind in double precision, and two gradients for them."""
    torch.manual_seed(0)
    x, g, v = torch.randn(3, 3, 1 if kind == "single" else 8, dtype=torch.float64)
    if kind == "constant":
        x[1:] = torch.tensor([[0.1], [-3e7]])
    return x.requires_grad_(), g.requires_grad_(), v


def test_derivatives_by_finite_differences() -> None:
    # Nothing is detached in LayerNorm-simple.
    torch.manual_seed(0)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer_norm_simple, x)
    assert torch.autograd.gradgradcheck(layer_norm_simple, x)


def test_transforms_of_torch_func() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    y = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ada_norm(y).square().sum(), y)
    found = torch.func.grad(lambda x: ada_norm(x).square().sum())(x)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(torch.func.vmap(ada_norm)(x), ada_norm(x), atol=1e-6)


def test_backward_keeps_the_input_and_two_numbers_of_each_row() -> None:
    x = torch.randn(64, 128, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ada_norm(x)
    assert sorted(t.numel() for t in saved) == [2 * 64, 64 * 128]
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


def test_changing_the_input_before_the_backward_is_noticed() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    kept = x * 1
    z = ada_norm(kept)
    kept.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_without_a_compiler_warns_once_and_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 8)
    expected = ada_norm(x, impl="eager")

    def load(source: Path) -> None:
        raise machinery.UnavailableError("there is no compiler")

    monkeypatch.setattr(machinery, "load", load)
    for function in (native.library, native.available):
        function.cache_clear()
    try:
        with pytest.warns(UserWarning, match="slower PyTorch code: there is no compiler"):
            assert torch.equal(ada_norm(x), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(ada_norm(x), expected)
    finally:
        for function in (native.library, native.available):
            function.cache_clear()


@needs_compiler
def test_an_implementation_that_cannot_says_why() -> None:
    with pytest.raises(ValueError, match=r"'native'.*float32 and bfloat16, not in torch.float64"):
        ada_norm(torch.randn(2, 8, dtype=torch.float64), impl="native")
    with pytest.raises(ValueError, match="'triton'"):
        ada_norm(torch.randn(2, 8, dtype=torch.float64), impl="triton")
