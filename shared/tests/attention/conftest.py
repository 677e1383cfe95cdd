from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from separata_shared.testing.strategies import AttentionInputs
from torch import Tensor


@pytest.fixture(autouse=True, scope="module")
def _fresh_memory_holds_nan() -> Iterator[None]:
    """Deterministic algorithms fill new memory with NaN, so reading it before writing shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def results(attend: Callable[..., Any], inputs: AttentionInputs, **options: Any) -> list[Tensor]:
    """Output and the gradients of query, key, value and bias for a fixed upstream gradient."""
    inputs = inputs.leaves()
    tensors = [*inputs.tensors]
    if inputs.bias is not None:
        tensors.append(inputs.bias.detach().clone().requires_grad_())
        options["bias"] = tensors[-1]
    output = attend(*inputs.tensors, **{**inputs.options, **options})
    random = torch.Generator().manual_seed(0)
    upstream = torch.randn(output.shape, generator=random, dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, tensors, upstream)]


@pytest.fixture(scope="session")
def results_of() -> Callable[..., list[Tensor]]:
    return results


@pytest.fixture(scope="session")
def assert_as_good_as() -> Callable[..., None]:
    """Compare with the reference; what is allowed comes from the reference's own error.

    Exact values are the reference's in float64. An implementation may be four times as far away as
    the reference is in the same dtype, plus four roundings of the largest number that goes in
    or comes out: products in half precision round on the way.
    """

    def check(
        attend: Callable[..., Any],
        reference: Callable[..., Any],
        inputs: AttentionInputs,
        **options: Any,
    ) -> None:
        actual = results(attend, inputs, **options)
        expected = results(reference, inputs, **options)
        exact = results(reference, inputs.to(torch.float64), **options)
        largest = max(float(x.abs().max()) for x in (*inputs.tensors, *exact))
        for name, found, wanted, true in zip(
            ("output", "query", "key", "value", "bias"), actual, expected, exact, strict=False
        ):
            error = (wanted.double() - true).abs().max()
            rounding = torch.finfo(found.dtype).eps * largest
            deviation = (found.double() - true).abs().max()
            assert deviation <= 4 * error + 4 * rounding, name

    return check
