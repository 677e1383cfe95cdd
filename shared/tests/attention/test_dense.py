"""The contract of dense attention, for every implementation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from separata_shared.attention import dense_attention
from separata_shared.testing.strategies import AttentionInputs, attention_inputs
from torch import Tensor

IMPLEMENTATIONS = ["reference", "eager", "sdpa"]
every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
few = settings(max_examples=15, deadline=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("impl", ["eager", "sdpa"])
@few
@given(inputs=attention_inputs())
def test_output_and_gradients_are_as_good_as_the_reference(
    assert_as_good_as: Callable[..., None], impl: str, inputs: AttentionInputs
) -> None:
    assert_as_good_as(
        partial(dense_attention, impl=impl), partial(dense_attention, impl="reference"), inputs
    )


@pytest.mark.parametrize("impl", ["eager", "sdpa"])
@few
@given(inputs=attention_inputs(dtypes=[torch.bfloat16]))
def test_half_precision_output(impl: str, inputs: AttentionInputs) -> None:
    found, exact = (
        dense_attention(*x.tensors, impl=name, **x.options)
        for x, name in ((inputs, impl), (inputs.to(torch.float64), "reference"))
    )
    assert isinstance(found, Tensor)
    assert isinstance(exact, Tensor)
    # Scores are rounded to 8 bits: a score of size s is off by s / 256, and so, relatively, is the
    # weight exp(s) of its key. Twice, for the sum that divides it, and one rounding at the end.
    scores = inputs.scores()
    size = scores.masked_fill(scores.isinf(), 0.0).abs().max()
    allowed = (2 * size + 2) / 256 * inputs.value.abs().max()
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= allowed


@every_implementation
@settings(max_examples=4, deadline=None)
@given(inputs=attention_inputs(max_length=5, dtypes=[torch.float64]))
def test_gradients_are_derivatives(impl: str, inputs: AttentionInputs) -> None:
    inputs = inputs.leaves()
    call = partial(dense_attention, impl=impl, **inputs.options)
    torch.autograd.gradcheck(call, inputs.tensors, fast_mode=True)


@few
@given(inputs=attention_inputs())
def test_weights_are_a_softmax_over_the_allowed_keys(inputs: AttentionInputs) -> None:
    _, weights = dense_attention(*inputs.tensors, return_weights=True, **inputs.options)
    allowed = inputs.allowed()
    torch.testing.assert_close(weights.sum(-1), allowed.any(-1).float(), rtol=0, atol=1e-6)
    assert (weights[~allowed] == 0).all()
    expected = inputs.scores().softmax(-1).nan_to_num(nan=0.0)
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)


@every_implementation
def test_causal_is_aligned_to_the_last_key(impl: str) -> None:
    query, key = normal(1, 1, 2, 4), normal(1, 1, 5, 4, seed=1)
    value = torch.eye(5).view(1, 1, 5, 5)  # the output is the weights
    output = dense_attention(query, key, value, causal=True, impl=impl)
    assert isinstance(output, Tensor)
    assert torch.equal(output[0, 0] > 0, torch.ones(2, 5).tril(3).bool())


@every_implementation
@pytest.mark.parametrize("hidden_by", ["mask", "bias"])
def test_a_row_without_keys_is_zero_and_has_no_gradient(
    results_of: Callable[..., list[Tensor]], impl: str, hidden_by: str
) -> None:
    query, key, value = (normal(2, 2, 4, 5, seed=seed) for seed in range(3))
    mask = torch.tensor([False, True]).view(2, 1, 1, 1).expand(2, 1, 1, 4)
    bias = torch.zeros(2, 1, 1, 4).masked_fill(~mask, -torch.inf)
    inputs = AttentionInputs(query, key, value, 2, mask, None, False)
    if hidden_by == "bias":
        inputs = AttentionInputs(query, key, value, 2, None, bias, False)
    found = results_of(partial(dense_attention, impl=impl), inputs)
    for tensor in found:
        assert tensor.isfinite().all()
    for tensor in found[:4]:
        assert (tensor[0] == 0).all()
        assert (tensor[1] != 0).any()


@every_implementation
def test_masked_keys_have_no_influence(impl: str) -> None:
    query, key, value = normal(2, 2, 4, 5), normal(2, 2, 9, 5, seed=1), normal(2, 2, 9, 3, seed=2)
    mask = torch.arange(9) < torch.tensor([6, 9]).view(2, 1, 1, 1)
    before = dense_attention(query, key, value, mask=mask, impl=impl)
    key[0, :, 6:], value[0, :, 6:] = 1e6, -1e6
    assert torch.equal(dense_attention(query, key, value, mask=mask, impl=impl), before)


@every_implementation
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty_batches_queries_and_keys(impl: str, shape: tuple[int, int, int, int]) -> None:
    batch, heads, target, source = shape
    query = normal(batch, heads, target, 5).requires_grad_()
    key, value = normal(batch, heads, source, 5), normal(batch, heads, source, 3)
    output = dense_attention(query, key, value, impl=impl)
    assert isinstance(output, Tensor)
    assert output.shape == (batch, heads, target, 3)
    assert (output == 0).all()
    (gradient,) = torch.autograd.grad(output.sum(), query)
    assert (gradient == 0).all()


@every_implementation
def test_dropout_scales_what_survives(impl: str) -> None:
    torch.manual_seed(0)
    query, key = normal(1, 2, 40, 5), normal(1, 2, 40, 5, seed=1)
    value = torch.eye(40).expand(1, 2, 40, 40)  # shows the weights
    call = partial(dense_attention, query, key, value, impl=impl)
    kept, dropped = call(), call(dropout=0.25)
    survivors = dropped > 0
    torch.testing.assert_close(dropped[survivors], kept[survivors] / 0.75)
    # 3200 weights: the share that survives has a standard deviation of 0.008
    assert abs(survivors.float().mean() - 0.75) < 0.04


@every_implementation
def test_autocast_changes_nothing_and_output_has_the_values_dtype(impl: str) -> None:
    query, key, value = (normal(1, 2, 6, 4, seed=seed) for seed in range(3))
    for value_dtype in (torch.float32, torch.bfloat16):
        call = partial(dense_attention, query, key, value.to(value_dtype), impl=impl)
        outside = call()
        with torch.autocast("cpu", torch.bfloat16):
            inside = call()
        assert torch.equal(inside, outside)
        assert outside.dtype == value_dtype


@pytest.mark.parametrize(
    ("change", "options", "word"),
    [
        (lambda q, k, v: (q[0], k, v), {}, "query"),
        (lambda q, k, v: (q.long(), k, v), {}, "query"),
        (lambda q, k, v: (q, k[..., :2], v), {}, "key"),
        (lambda q, k, v: (q, k[:1], v), {}, "key"),
        (lambda q, k, v: (q, k, v[:, :, :1]), {}, "value"),
        (lambda q, k, v: (q[:, :3], k, v), {}, "heads"),
        (lambda q, k, v: (q, k, v), {"mask": torch.ones(5, 3, 4).bool()}, "mask"),
        (lambda q, k, v: (q, k, v), {"bias": torch.ones(3, 5)}, "bias"),
        (lambda q, k, v: (q, k, v), {"dropout": -0.1}, "dropout"),
        (lambda q, k, v: (q, k, v), {"impl": "flash"}, "impl"),
        (lambda q, k, v: (q, k, v), {"impl": "sdpa", "return_weights": True}, "weights"),
    ],
)
def test_wrong_arguments_are_named(
    change: Callable[..., tuple[Tensor, ...]], options: dict[str, Any], word: str
) -> None:
    tensors = change(normal(2, 4, 3, 5), normal(2, 2, 4, 5), normal(2, 2, 4, 5))
    with pytest.raises(ValueError, match=word):
        dense_attention(*tensors, **options)


@every_implementation
@pytest.mark.parametrize("shape", [(), (9,), (1,), (7, 9), (2, 1, 1)])
def test_masks_and_biases_of_few_dimensions_broadcast(impl: str, shape: tuple[int, ...]) -> None:
    query, memory = normal(3, 2, 7, 8), normal(3, 2, 9, 8, seed=1)
    mask, bias = normal(*shape, seed=2) > -0.5, normal(*shape, seed=3)
    full = (3, 2, 7, 9)
    found = dense_attention(query, memory, memory, mask=mask, bias=bias, impl=impl)
    expected = dense_attention(
        query, memory, memory, mask=mask.expand(full), bias=bias.expand(full), impl="reference"
    )
    torch.testing.assert_close(found, expected)
    alone = dense_attention(query, memory, memory, mask=mask, impl=impl)
    torch.testing.assert_close(
        alone, dense_attention(query, memory, memory, mask=mask.expand(full), impl="reference")
    )
