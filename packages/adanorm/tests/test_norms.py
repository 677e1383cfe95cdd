"""What the specification's acceptance checks say about the norms themselves."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_adanorm import native
from separata_adanorm.build import norm_factory
from separata_adanorm.norms import (
    AdaNorm,
    ClippedLayerNorm,
    DetachNorm,
    GradNorm,
    LayerNormSimple,
    NoNorm,
    ada_norm,
    add_ada_norm,
    add_layer_norm_simple,
    clipped_layer_norm,
    detach_norm,
    grad_norm,
    layer_norm_simple,
)
from torch import Tensor
from torch.nn import functional as F

Norm = Callable[..., Tensor]
FAMILY: dict[str, Norm] = {
    "ada_norm": ada_norm,
    "layer_norm_simple": layer_norm_simple,
    "detach_norm": detach_norm,
    "detach_mean": partial(detach_norm, detach_std=False),
    "detach_std": partial(detach_norm, detach_mean=False),
    "grad_norm": grad_norm,
}
conventions = st.sampled_from(["official", "torch"])


@pytest.fixture(params=["native", "eager", "reference"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("no compiler")
    return str(request.param)


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Input and upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (3 * x + 1).to(dtype), g.to(dtype)


def both(norm: Norm, x: Tensor, g: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input."""
    x = x.detach().requires_grad_()
    output = norm(x, **options)
    (gradient,) = torch.autograd.grad(output, x, g)
    return output.detach(), gradient


def close(actual: Tensor, expected: Tensor, share: float) -> bool:
    """Whether the largest deviation is at most this share of the largest entry, or of one."""
    size = max(1.0, expected.abs().max().item())
    return bool((actual.double() - expected.double()).abs().max() <= share * size)


class TestTheScaling:
    """Acceptance checks 1, 2 and 10."""

    @given(width=st.integers(2, 200), C=st.floats(0.2, 3.0), convention=conventions)
    @settings(deadline=None, max_examples=40)
    def test_has_mean_c(self, width: int, C: float, convention: str) -> None:
        x, _ = data(3, width, dtype=torch.float64, seed=width)
        y = layer_norm_simple(x, convention=convention)  # type: ignore[arg-type]
        z = ada_norm(x, C=C, convention=convention)  # type: ignore[arg-type]
        phi = z / y
        assert torch.allclose(phi.mean(dim=1), phi.new_tensor(C), atol=1e-6)
        assert torch.allclose(z.mean(dim=1), -C * 0.1 * y.square().mean(dim=1), atol=1e-6)

    def test_mean_of_the_output_in_the_torch_convention_is_minus_c_k(self, impl: str) -> None:
        x, _ = data(4, 64)
        z = ada_norm(x, C=1.5, k=0.2, eps=0.0, convention="torch", impl=impl)
        assert torch.allclose(z.mean(dim=1), torch.full((4,), -0.3), atol=1e-6)

    @pytest.mark.parametrize("convention", ["official", "torch"])
    def test_without_slope_is_layer_norm_simple(self, impl: str, convention: str) -> None:
        x, g = data(5, 48)
        options = {"convention": convention, "impl": impl}
        for found, expected in zip(
            both(ada_norm, x, g, C=1.0, k=0.0, **options),
            both(layer_norm_simple, x, g, **options),
            strict=True,
        ):
            assert torch.equal(found, expected)

    def test_c_scales_output_and_gradient(self, impl: str) -> None:
        x, g = data(5, 48)
        once, twice = (both(ada_norm, x, g, C=C, impl=impl) for C in (1.0, 2.0))
        for single, double in zip(once, twice, strict=True):
            assert torch.allclose(2 * single, double, rtol=1e-6, atol=1e-7)

    def test_flips_the_sign_above_ten(self, impl: str) -> None:
        # One feature far outside of 512 has y = 22.6.
        x = torch.zeros(2, 512)
        x[0, 0] = x[1, 0] = 40.0
        x[1, 1:26] = -40.0
        y = layer_norm_simple(x, impl=impl)
        z = ada_norm(x, C=2.0, impl=impl)
        assert y[0, 0] > 10.0 > y[1, 0] > 0.0
        assert z[0, 0] < 0.0 < z[1, 0]

    def test_peaks_at_five_with_two_and_a_half_c(self) -> None:
        # One feature outside of H has y = sqrt(H - 1), here 4, 5 and 6.
        peak = []
        for width in (17, 26, 37):
            x = torch.zeros(1, width, dtype=torch.float64)
            x[0, 0] = 1.0
            peak.append(ada_norm(x, C=2.0, eps=0.0, convention="torch")[0, 0].item())
        assert peak == pytest.approx([2.0 * y * (1 - 0.1 * y) for y in (4, 5, 6)])
        assert peak[1] == pytest.approx(2.5 * 2.0)
        assert max(peak) == peak[1]


class TestTheNormalisedRow:
    """Acceptance checks 3, 4 and 7."""

    @given(a=st.floats(0.1, 50.0), b=st.floats(-100.0, 100.0), convention=conventions)
    @settings(deadline=None, max_examples=40)
    def test_scale_and_shift_do_not_matter(self, a: float, b: float, convention: str) -> None:
        x, _ = data(3, 40, dtype=torch.float64)
        y, moved = (
            layer_norm_simple(row, eps=1e-12, convention=convention)  # type: ignore[arg-type]
            for row in (x, a * x + b)
        )
        assert torch.allclose(y, moved, atol=1e-9)

    @pytest.mark.parametrize("shape", [(7, 16), (2, 3, 4, 33), (5,)])
    def test_in_the_torch_convention_is_torchs(self, impl: str, shape: tuple[int, ...]) -> None:
        x, g = data(*shape)
        for found, expected in zip(
            both(layer_norm_simple, x, g, convention="torch", impl=impl),
            both(F.layer_norm, x, g, normalized_shape=shape[-1:]),
            strict=True,
        ):
            assert close(found, expected, 1e-6)

    def test_the_conventions_differ_by_bessels_correction(self) -> None:
        x, _ = data(4, 2, dtype=torch.float64)
        official, torchs = (
            layer_norm_simple(x, eps=0.0, convention=name) for name in ("official", "torch")
        )
        assert torch.allclose(official * math.sqrt(2), torchs)

    def test_what_is_detached_does_not_change_the_output(self, impl: str) -> None:
        x, _ = data(9, 77)
        y = layer_norm_simple(x, impl=impl)
        for mean, std in ((True, True), (True, False), (False, True)):
            detached = detach_norm(x, detach_mean=mean, detach_std=std, impl=impl)
            assert torch.equal(detached, y)


class TestGradients:
    """Acceptance checks 5 and 6; the theorem of the paper."""

    @pytest.mark.parametrize("name", ["ada_norm", "layer_norm_simple", "grad_norm"])
    @pytest.mark.parametrize("convention", ["official", "torch"])
    def test_are_orthogonal_to_one_and_to_the_row(
        self, name: str, convention: str, impl: str
    ) -> None:
        x, g = data(6, 50)
        options = {"convention": convention, "impl": impl, "eps": 1e-12}
        _, dx = both(FAMILY[name], x, g, **options)
        y = layer_norm_simple(x, **options)  # type: ignore[arg-type]
        assert close(dx.sum(dim=1), torch.zeros(6), 1e-5)
        assert close((dx * y).sum(dim=1), torch.zeros(6), 1e-5)

    def test_detached_deviation_only_centres(self, impl: str) -> None:
        x, g = data(6, 50)
        _, dx = both(FAMILY["detach_std"], x, g, impl=impl)
        s = x.std(dim=1, keepdim=True) + 1e-5
        assert close(dx.sum(dim=1), torch.zeros(6), 1e-6)
        assert close(dx, (g - g.mean(dim=1, keepdim=True)) / s, 1e-6)

    def test_detached_mean_and_deviation_only_divide(self, impl: str) -> None:
        x, g = data(6, 50)
        _, dx = both(detach_norm, x, g, impl=impl)
        assert torch.allclose(dx, g / (x.std(dim=1, keepdim=True) + 1e-5), rtol=1e-6)

    @given(width=st.integers(2, 100), seed=st.integers(0, 1000))
    @settings(deadline=None, max_examples=40)
    def test_of_the_four_cases_obey_the_theorem(self, width: int, seed: int) -> None:
        x, g = data(3, width, dtype=torch.float64, seed=seed)
        g = g + 0.5
        options = {"convention": "torch", "eps": 0.0}
        sigma = x.std(dim=1, correction=0)
        mean, variance = g.mean(dim=1), g.var(dim=1, correction=0)
        cases = {
            name: both(FAMILY[name], x, g, **options)[1]
            for name in ("layer_norm_simple", "detach_mean", "detach_std", "detach_norm")
        }
        bound = variance / sigma**2 * (1 + 1e-9)
        for name, dx in cases.items():
            kept = "mean" in name or name == "detach_norm"
            expected = mean / sigma if kept else torch.zeros(3).double()
            assert torch.allclose(dx.mean(dim=1), expected, atol=1e-7), name
            assert (dx.var(dim=1, correction=0) <= bound + 1e-12).all(), name
        for name in ("detach_norm", "detach_std"):
            spread = cases[name].var(dim=1, correction=0)
            assert torch.allclose(spread, variance / sigma**2)

    @pytest.mark.parametrize("convention", ["official", "torch"])
    def test_of_ada_norm_is_the_reweighted_one(self, convention: str, impl: str) -> None:
        x, g = data(6, 50)
        options = {"convention": convention, "impl": impl}
        y = layer_norm_simple(x, **options)  # type: ignore[arg-type]
        _, dx = both(ada_norm, x, g, C=1.5, **options)
        _, expected = both(layer_norm_simple, x, g * 1.5 * (1 - 0.1 * y), **options)
        assert close(dx, expected, 1e-6)

    def test_of_ada_norm_is_not_the_derivative_of_its_output(self, impl: str) -> None:
        def undetached(x: Tensor) -> Tensor:
            y = layer_norm_simple(x, impl="reference")
            return (1 - 0.1 * y) * y

        x, g = data(6, 50)
        output, dx = both(ada_norm, x, g, impl=impl)
        same_output, derivative = both(undetached, x, g)
        assert close(output, same_output, 1e-6)
        assert (dx - derivative).abs().max() > 0.05 * dx.abs().max()

    def test_of_grad_norm_is_that_of_layer_norm_simple(self, impl: str) -> None:
        x, g = data(6, 50)
        output, dx = both(grad_norm, x, g, impl=impl)
        y, expected = both(layer_norm_simple, x, g, impl=impl)
        assert torch.equal(output, x + y)
        assert torch.equal(dx, expected)


class TestClipping:
    def test_replaces_the_extremes_by_the_last_kept_entry(self) -> None:
        x = torch.tensor([[5.0, -9.0, 1.0, 2.0, 3.0, 80.0, -4.0, 0.0, 7.0, 6.0]])
        clipped = torch.tensor([[5.0, -4.0, 1.0, 2.0, 3.0, 7.0, -4.0, 0.0, 7.0, 6.0]])
        expected = F.layer_norm(clipped, (10,))
        assert torch.equal(clipped_layer_norm(x, fraction=0.2), expected)

    def test_clips_nothing_where_one_entry_is_kept_at_each_side(self) -> None:
        x, _ = data(4, 199)
        assert torch.equal(clipped_layer_norm(x), F.layer_norm(x, (199,)))

    @pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 1, 40)])
    def test_takes_any_rank_and_leaves_its_input(self, shape: tuple[int, ...]) -> None:
        x, _ = data(*shape)
        kept = x.clone()
        output = ClippedLayerNorm(40, fraction=0.1)(x)
        assert output.shape == shape
        assert torch.equal(x, kept)

    def test_gradient_is_the_derivative(self) -> None:
        x, _ = data(3, 12, dtype=torch.float64)
        weight, bias = (torch.rand(12, dtype=torch.float64, requires_grad=True) for _ in range(2))
        run = partial(clipped_layer_norm, fraction=0.25)
        assert torch.autograd.gradcheck(run, (x.requires_grad_(), weight, bias))

    def test_rejects_a_share_above_one_half(self) -> None:
        with pytest.raises(ValueError, match=r"fraction.*0\.6"):
            clipped_layer_norm(torch.randn(2, 8), fraction=0.6)


class TestResidual:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("width", [7, 512])
    def test_is_the_sum_and_its_norm(self, width: int, dtype: torch.dtype, impl: str) -> None:
        x, g = data(6, width, dtype=dtype)
        other, g_total = data(6, width, dtype=dtype, seed=1)
        share = 1e-6 if dtype == torch.float32 else 1e-2
        inputs = [t.clone().requires_grad_() for t in (x, other)]
        total, z = add_ada_norm(*inputs, C=2.0, impl=impl)
        gradients = torch.autograd.grad((total, z), inputs, (g_total, g))
        assert torch.equal(total, x + other)
        expected, dx = both(ada_norm, x + other, g, C=2.0, impl="eager")
        assert close(z, expected, share)
        for gradient in gradients:
            assert close(gradient, dx + g_total, share)

    def test_each_output_may_be_used_alone(self, impl: str) -> None:
        x, g = data(4, 16)
        inputs = [t.requires_grad_() for t in (x, g.clone())]
        total, y = add_layer_norm_simple(*inputs, impl=impl)
        for gradient in torch.autograd.grad(total, inputs, g, retain_graph=True):
            assert torch.equal(gradient, g)
        _, expected = both(layer_norm_simple, x + inputs[1], g, impl=impl)
        for gradient in torch.autograd.grad(y, inputs, g):
            assert torch.equal(gradient, expected)

    def test_must_look_like_the_input(self) -> None:
        with pytest.raises(ValueError, match="residual must have the shape"):
            add_ada_norm(torch.randn(2, 8), torch.randn(8))


class TestModules:
    """Acceptance check 8, shapes and precision."""

    FUNCTIONS: tuple[tuple[Callable[[Any], torch.nn.Module], Norm], ...] = (
        (partial(AdaNorm, C=2.0, k=0.2), partial(ada_norm, C=2.0, k=0.2)),
        (LayerNormSimple, layer_norm_simple),
        (DetachNorm, detach_norm),
        (partial(DetachNorm, detach_std=False), partial(detach_norm, detach_std=False)),
        (GradNorm, grad_norm),
    )

    @pytest.mark.parametrize("shape", [12, (12,), [3, 4], (3, 4)])
    def test_are_their_functions_over_the_last_dimensions(self, shape: Any) -> None:
        x = data(2, 5, 12)[0]
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        for module, function in self.FUNCTIONS:
            found = module(shape)(x.view(2, 5, *sizes))
            assert torch.equal(found.view(2, 5, 12), function(x))

    def test_have_no_parameters(self) -> None:
        for module in (AdaNorm, LayerNormSimple, DetachNorm, GradNorm, NoNorm):
            assert not list(module(8).parameters()), module
            assert not module(8).state_dict(), module
        assert {name for name, _ in ClippedLayerNorm(8).named_parameters()} == {"weight", "bias"}

    def test_can_be_copied_and_printed(self) -> None:
        for module, text in ((AdaNorm(8, C=2.0), "C=2.0"), (DetachNorm(8), "detach_mean=True")):
            assert text in repr(copy.deepcopy(module))

    def test_no_norm_is_the_identity(self) -> None:
        x = torch.randn(2, 8)
        assert NoNorm(8)(x) is x

    @pytest.mark.parametrize("module", [AdaNorm, LayerNormSimple, DetachNorm, GradNorm])
    def test_one_feature_has_no_unbiased_deviation(self, module: Any) -> None:
        with pytest.raises(ValueError, match=r"H - 1.*convention='torch'"):
            module(1)
        assert torch.isfinite(module(1, convention="torch")(torch.randn(3, 1))).all()

    def test_wrong_sizes_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"\(8,\), not \(2, 9\)"):
            AdaNorm(8)(torch.randn(2, 9))
        with pytest.raises(ValueError, match=r"one integer or several, not 4\.5"):
            AdaNorm(4.5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"eps must not be negative, but is -1e-05"):
            ada_norm(torch.ones(2, 8), eps=-1e-5)
        with pytest.raises(ValueError, match="positive"):
            AdaNorm(0)
        with pytest.raises(ValueError, match="convention"):
            AdaNorm(8, convention="paper")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"floating-point.*int64"):
            ada_norm(torch.arange(8))
        with pytest.raises(ValueError, match="impl must be one of"):
            ada_norm(torch.randn(2, 8), impl="fast")  # type: ignore[arg-type]

    @pytest.mark.parametrize("module", [AdaNorm, LayerNormSimple, DetachNorm, GradNorm])
    def test_wrong_constants_are_refused_when_it_is_made(self, module: Any) -> None:
        for eps in (-1.0, math.nan):
            with pytest.raises(ValueError, match=f"eps must .* is {eps}"):
                module(4, eps=eps)
        with pytest.raises(ValueError, match=r"impl must be one of auto, .*, not 'foo'"):
            module(4, impl="foo")

    def test_wrong_constants_of_one_kind_are_refused_when_it_is_made(self) -> None:
        for name in ("C", "k"):
            for value in (math.nan, -math.inf):
                with pytest.raises(ValueError, match=f"{name} must be a finite number.*{value}"):
                    AdaNorm(4, **{name: value})
        with pytest.raises(ValueError, match=r"fraction must lie .* not 0\.9"):
            ClippedLayerNorm(4, fraction=0.9)
        with pytest.raises(ValueError, match=r"eps must .* is -1\.0"):
            ClippedLayerNorm(4, eps=-1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ada_norm", "layer_norm_simple", "detach_norm"])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    # Around 100 bfloat16 has steps of one half: statistics in it would be far off.
    x = (data(4, 512)[0] * 0.5 + 100).to(dtype)
    g = data(4, 512)[1].to(dtype)
    found = both(FAMILY[name], x, g)
    for value, expected in zip(found, both(FAMILY[name], x.float(), g.float()), strict=True):
        assert value.dtype == dtype
        assert close(value, expected, 1e-2)


def test_autocast_changes_nothing() -> None:
    x, g = data(4, 64)
    expected = both(ada_norm, x, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = both(ada_norm, x, g)
        assert ada_norm(x.bfloat16()).dtype == torch.bfloat16
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted)


KINDS = {
    "layer_norm": torch.nn.LayerNorm,
    "layer_norm_simple": LayerNormSimple,
    "detach_norm": DetachNorm,
    "detach_mean": DetachNorm,
    "detach_std": DetachNorm,
    "ada_norm": AdaNorm,
    "grad_norm": GradNorm,
    "no_norm": NoNorm,
    "clipped": ClippedLayerNorm,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_factory_makes_every_kind(kind: str) -> None:
    module = norm_factory(kind, C=2.0, convention="torch")(8)
    assert type(module) is KINDS[kind]
    x = data(3, 8)[0]
    if kind in FAMILY:
        constant = {"C": 2.0} if kind == "ada_norm" else {}
        assert torch.equal(module(x), FAMILY[kind](x, convention="torch", **constant))
    assert module(x).shape == x.shape


def test_the_factory_lists_the_kinds_it_knows() -> None:
    with pytest.raises(ValueError, match=r"ada_norm.*not 'rms_norm'"):
        norm_factory("rms_norm")
