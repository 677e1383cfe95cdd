"""The contract of top-k attention, for every implementation."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_shared.attention import dense_attention, topk_attention
from separata_shared.testing.strategies import AttentionInputs, attention_inputs
from torch import Tensor
from torch.nn import functional as F

IMPLEMENTATIONS = ["reference", "eager", "blocked", "native"]
# Selection jumps where scores are equal, so implementations are compared where they are not.
GAP = 1e-4
every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
few = settings(max_examples=15, deadline=None)


def weights_of(inputs: AttentionInputs, **options: Any) -> Tensor:
    options = {"top_k": inputs.top_k, **inputs.options, **options}
    _, weights = topk_attention(*inputs.tensors, return_weights=True, **options)
    return weights


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("impl", ["eager", "blocked", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", ["keep", "exact"])
@few
@given(data=st.data())
def test_output_and_gradients_are_as_good_as_the_reference(
    assert_as_good_as: Callable[..., None],
    impl: str,
    dtype: torch.dtype,
    ties: str,
    data: st.DataObject,
) -> None:
    inputs = data.draw(attention_inputs(dtypes=[dtype], gap=GAP))
    call = partial(topk_attention, top_k=inputs.top_k, ties=ties)
    assert_as_good_as(partial(call, impl=impl), partial(call, impl="reference"), inputs)


@pytest.mark.parametrize("impl", ["eager", "blocked", "native"])
@pytest.mark.parametrize(
    "shape",
    # H, H_kv, T, S, D, D_v: head sizes 5 to 128, one query, several groups of keys, no whole group
    [(2, 1, 3, 300, 5, 7), (1, 1, 1, 65, 128, 128), (4, 2, 5, 513, 64, 3), (2, 2, 70, 64, 33, 33)],
)
@pytest.mark.parametrize("top_k", [1, 3, 9, 40])
def test_larger_shapes(
    assert_as_good_as: Callable[..., None], impl: str, shape: tuple[int, ...], top_k: int
) -> None:
    heads, kv_heads, target, source, width, value_width = shape
    inputs = AttentionInputs(
        query=normal(2, heads, target, width),
        key=normal(2, kv_heads, source, width, seed=1),
        value=normal(2, kv_heads, source, value_width, seed=2),
        top_k=top_k,
        mask=torch.arange(source) < torch.tensor([source, source - 9]).view(2, 1, 1, 1),
        bias=None,
        causal=target > 1,
    )
    # measured for these seeds: the selection of every row is the same in float32 and float64
    assert inputs.gap() > 1e-7
    call = partial(topk_attention, top_k=top_k)
    assert_as_good_as(partial(call, impl=impl), partial(call, impl="reference"), inputs)


@pytest.mark.parametrize("impl", ["reference", "eager", "blocked"])  # those of float64
@settings(max_examples=4, deadline=None)
@given(inputs=attention_inputs(max_length=5, dtypes=[torch.float64], gap=GAP))
def test_gradients_are_derivatives(impl: str, inputs: AttentionInputs) -> None:
    inputs = inputs.leaves()
    call = partial(topk_attention, top_k=inputs.top_k, impl=impl, **inputs.options)
    # Steps of 1e-6 on inputs of order 1 stay far below the gap.
    torch.autograd.gradcheck(call, inputs.tensors, fast_mode=True)


@every_implementation
@few
@given(inputs=attention_inputs())
def test_k_of_all_keys_is_dense_attention(
    results_of: Callable[..., list[Tensor]], impl: str, inputs: AttentionInputs
) -> None:
    source = inputs.key.shape[2]
    sparse = results_of(partial(topk_attention, top_k=source + 2, impl=impl), inputs)
    dense = results_of(dense_attention, inputs)
    for found, wanted in zip(sparse, dense, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # acceptance check 4


@every_implementation
def test_k_of_all_keys_is_torchs_attention(impl: str) -> None:
    query, key, value = (normal(2, 3, 6, 8, seed=seed) for seed in range(3))
    output = topk_attention(query, key, value, top_k=6, impl=impl)
    torch.testing.assert_close(
        output, F.scaled_dot_product_attention(query, key, value), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("ties", ["keep", "exact"])
@few
@given(data=st.data())
def test_weights_are_the_dense_softmax_renormalised_on_the_k_best(
    impl: str, ties: str, data: st.DataObject
) -> None:
    inputs = data.draw(attention_inputs(gap=GAP))
    weights = weights_of(inputs, impl=impl, ties=ties)
    allowed = inputs.allowed()
    count = allowed.sum(-1)
    kept = weights > 0
    torch.testing.assert_close(weights.sum(-1), (count > 0).float(), rtol=0, atol=1e-6)
    assert ((weights >= 0) & (weights <= 1)).all()
    assert torch.equal(kept.sum(-1), count.clamp(max=inputs.top_k))
    assert not (kept & ~allowed).any()
    scores = inputs.scores()
    worst = scores.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    assert (scores.masked_fill(kept, -torch.inf) <= worst).all()
    dense = scores.masked_fill(~kept, -torch.inf).softmax(-1).nan_to_num(nan=0.0)
    torch.testing.assert_close(weights.double(), dense, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@few
@given(inputs=attention_inputs(gap=GAP))
def test_selections_are_nested_in_k(impl: str, inputs: AttentionInputs) -> None:
    fewer = weights_of(inputs, impl=impl) > 0
    more = weights_of(inputs, impl=impl, top_k=inputs.top_k + 1) > 0
    assert not (fewer & ~more).any()


@pytest.mark.parametrize("impl", ["reference", "eager"])
@few
@given(inputs=attention_inputs(gap=1e-3), constant=st.floats(-3, 3), factor=st.floats(0.5, 4))
def test_selection_knows_the_order_of_scores_only(
    impl: str, inputs: AttentionInputs, constant: float, factor: float
) -> None:
    bias = torch.zeros(1) if inputs.bias is None else inputs.bias
    weights = weights_of(inputs, impl=impl)
    shifted = weights_of(inputs, impl=impl, bias=bias + constant)
    torch.testing.assert_close(shifted, weights, rtol=0, atol=1e-5)
    query, key, value = inputs.tensors
    _, scaled = topk_attention(
        query * factor,
        key,
        value,
        top_k=inputs.top_k,
        impl=impl,
        return_weights=True,
        **{**inputs.options, "bias": bias * factor},
    )
    assert torch.equal(scaled > 0, weights > 0)


@every_implementation
@few
@given(inputs=attention_inputs(gap=GAP))
def test_removed_and_masked_scores_get_no_gradient(
    results_of: Callable[..., list[Tensor]], impl: str, inputs: AttentionInputs
) -> None:
    # The gradient of a full bias is that of the scores.
    bias = torch.zeros(()) if inputs.bias is None else inputs.bias
    full = bias.expand(inputs.allowed().shape).clone()
    kept = weights_of(inputs, impl="reference") > 0
    call = partial(topk_attention, top_k=inputs.top_k, impl=impl)
    with_bias = AttentionInputs(*inputs.tensors, inputs.top_k, inputs.mask, full, inputs.causal)
    gradient = results_of(call, with_bias)[4]
    assert (gradient[~kept] == 0).all()


@every_implementation
def test_one_key_is_hard_attention_and_its_score_gets_no_gradient(impl: str) -> None:
    query, key, value = (normal(2, 2, 5, 4, seed=seed).requires_grad_() for seed in range(3))
    output = topk_attention(query, key, value, top_k=1, impl=impl)
    best = (query @ key.mT).argmax(-1)
    torch.testing.assert_close(
        output, value.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, 4)), rtol=0, atol=0
    )
    grads = torch.autograd.grad(output.sum(), (query, key, value))
    assert (grads[0] == 0).all()
    assert (grads[1] == 0).all()
    assert grads[2].sum() == output.numel()


@every_implementation
def test_masked_keys_have_no_influence(results_of: Callable[..., list[Tensor]], impl: str) -> None:
    query, key, value = normal(2, 2, 4, 5), normal(2, 2, 9, 5, seed=1), normal(2, 2, 9, 3, seed=2)
    mask = torch.arange(9) < torch.tensor([6, 9]).view(2, 1, 1, 1)
    call = partial(topk_attention, top_k=3, impl=impl)
    before = results_of(call, AttentionInputs(query, key, value, 3, mask, None, False))
    key[0, :, 6:] = 1e6
    value[0, :, 6:] = -1e6
    after = results_of(call, AttentionInputs(query, key, value, 3, mask, None, False))
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert (after[2][0, :, 6:] == 0).all()
    assert (after[3][0, :, 6:] == 0).all()


@every_implementation
@pytest.mark.parametrize("rule", [{"top_k": 3}, {"ratio": 2, "min_keys": 2}])
def test_cached_decoding_and_padding_equal_teacher_forcing(impl: str, rule: dict[str, int]) -> None:
    query, key, value = (normal(2, 2, 9, 5, seed=seed) for seed in range(3))
    call = partial(topk_attention, impl=impl, causal=True, **rule)
    taught = call(query, key, value)
    for step in range(9):
        seen = slice(0, step + 1)
        one = call(query[:, :, step : step + 1], key[:, :, seen], value[:, :, seen])
        torch.testing.assert_close(one, taught[:, :, step : step + 1], rtol=1e-5, atol=1e-6)
    padded = [F.pad(x, (0, 0, 4, 0), value=9.0) for x in (key, value)]
    mask = torch.arange(13) >= 4
    torch.testing.assert_close(call(query, *padded, mask=mask), taught, rtol=1e-5, atol=1e-6)


@every_implementation
@few
@given(inputs=attention_inputs(gap=GAP), seed=st.integers(0, 99))
def test_order_of_keys_heads_and_batch_means_nothing(
    impl: str, inputs: AttentionInputs, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    mask, top_k = inputs.allowed(), inputs.top_k
    bias = torch.zeros(mask.shape) if inputs.bias is None else inputs.bias.expand(mask.shape)
    query, key, value = inputs.tensors
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    call = partial(topk_attention, top_k=top_k, impl=impl)
    output = call(query, key, value, mask=mask, bias=bias)
    keys = torch.randperm(key.shape[2], generator=random)
    again = call(
        query, key[:, :, keys], value[:, :, keys], mask=mask[..., keys], bias=bias[..., keys]
    )
    torch.testing.assert_close(again, output, rtol=1e-5, atol=1e-5)
    for dim in (0, 1):
        order = torch.randperm(query.shape[dim], generator=random)
        tensors = (x.index_select(dim, order) for x in (query, key, value))
        moved = call(
            *tensors, mask=mask.index_select(dim, order), bias=bias.index_select(dim, order)
        )
        torch.testing.assert_close(moved, output.index_select(dim, order), rtol=1e-5, atol=1e-5)


@every_implementation
def test_a_batch_is_its_sentences_one_by_one(impl: str) -> None:
    query, key, value = (normal(3, 2, 7, 5, seed=seed) for seed in range(3))
    mask = torch.arange(7) < torch.tensor([3, 7, 1]).view(3, 1, 1, 1)
    call = partial(topk_attention, top_k=3, impl=impl)
    together = call(query, key, value, mask=mask)
    for b in range(3):
        alone = call(*(x[b : b + 1] for x in (query, key, value)), mask=mask[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-6, atol=1e-6)


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
    found = results_of(partial(topk_attention, top_k=2, impl=impl), inputs)
    for tensor in found:
        assert tensor.isfinite().all()
    for tensor in found[:4]:
        assert (tensor[0] == 0).all()
        assert (tensor[1] != 0).any()


@every_implementation
@pytest.mark.parametrize("where", ["query", "key", "infinite key", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", ["keep", "exact"])
def test_what_is_no_number_shows_in_the_rows_of_dense_attention(
    impl: str, where: str, dtype: torch.dtype, ties: str
) -> None:
    query, key, value = (normal(2, 2, 40, 8, seed=seed).to(dtype) for seed in range(3))
    bias = normal(1, 2, 40, 40, seed=3).masked_fill(normal(1, 2, 40, 40, seed=4) > 1, -torch.inf)
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[0, ..., 30] = False
    if where == "bias":
        bias[0, 0, 20, 11] = torch.nan
    elif where == "query":
        query[1, 0, 17, 2] = torch.nan
    else:  # one that is hidden in the first sentence, and one that late queries alone may attend
        key[0, :, 30] = torch.nan
        key[1, 0, 25] = torch.nan if where == "key" else torch.inf
    options: dict[str, Any] = {"mask": mask, "bias": bias.to(dtype), "causal": True}
    found = topk_attention(query, key, value, top_k=3, ties=ties, impl=impl, **options)
    expected = dense_attention(query, key, value, impl="reference", **options)
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    rows = expected.isnan().any(dim=-1)
    assert rows.any()
    assert not rows.all()
    assert torch.equal(found.isnan().any(dim=-1), rows)


@every_implementation
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty_batches_queries_and_keys(impl: str, shape: tuple[int, int, int, int]) -> None:
    batch, heads, target, source = shape
    query = normal(batch, heads, target, 5).requires_grad_()
    key, value = normal(batch, heads, source, 5), normal(batch, heads, source, 3)
    output = topk_attention(query, key, value, top_k=2, impl=impl)
    assert output.shape == (batch, heads, target, 3)
    assert (output == 0).all()
    (gradient,) = torch.autograd.grad(output.sum(), query)
    assert (gradient == 0).all()


@every_implementation
@pytest.mark.parametrize(
    ("ties", "expected"), [("keep", [1 / 3, 0, 1 / 3, 1 / 3]), ("exact", [0.5, 0, 0.5, 0])]
)
def test_ties_keep_all_equals_or_the_lowest_index(
    impl: str, ties: str, expected: list[float]
) -> None:
    key = torch.tensor([1.0, 0.0, 1.0, 1.0]).view(1, 1, 4, 1)
    value = torch.eye(4).view(1, 1, 4, 4)  # the output is the row of weights
    output = topk_attention(torch.ones(1, 1, 1, 1), key, value, top_k=2, ties=ties, impl=impl)
    torch.testing.assert_close(output.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("impl", ["eager", "blocked", "native"])
@pytest.mark.parametrize("ties", ["keep", "exact"])
@pytest.mark.parametrize("source", [12, 300])
def test_many_ties_are_the_references(
    results_of: Callable[..., list[Tensor]], impl: str, ties: str, source: int
) -> None:
    # Products of small integers, halved (D = 4), are exact in every order of summation.
    query, key = normal(2, 2, 9, 4).round(), normal(2, 2, source, 4, seed=1).round()
    value = normal(2, 2, source, 3, seed=2)
    for mask in (None, normal(2, 1, 9, source, seed=3) > 0.5):
        inputs = AttentionInputs(query, key, value, 4, mask, None, False)
        assert inputs.gap() == 0
        call = partial(topk_attention, top_k=4, ties=ties)
        found = results_of(partial(call, impl=impl), inputs)
        wanted = results_of(partial(call, impl="reference"), inputs)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@every_implementation
def test_each_head_may_have_its_own_k(impl: str) -> None:
    query, key, value = normal(2, 3, 4, 5), normal(2, 3, 70, 5, seed=1), normal(2, 3, 70, 5, seed=2)
    each = [1, 5, 99]
    output = topk_attention(query, key, value, top_k=torch.tensor(each).view(3, 1), impl=impl)
    for head, k in enumerate(each):
        one = slice(head, head + 1)
        alone = topk_attention(query[:, one], key[:, one], value[:, one], top_k=k, impl=impl)
        torch.testing.assert_close(output[:, one], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@few
@given(
    inputs=attention_inputs(), ratio=st.sampled_from([1, 1.5, 2, 3, 100]), least=st.integers(1, 4)
)
def test_ratio_counts_the_allowed_keys_of_each_row(
    impl: str, inputs: AttentionInputs, ratio: float, least: int
) -> None:
    weights = weights_of(inputs, impl=impl, top_k=None, ratio=ratio, min_keys=least, ties="exact")
    count = inputs.allowed().sum(-1)
    expected = [min(max(math.ceil(n / ratio), least), n) for n in count.flatten().tolist()]
    # Weights that underflow would not count; the scores of these inputs are too small for that.
    assert (weights > 0).sum(-1).flatten().tolist() == expected


@every_implementation
def test_dropout_drops_the_same_weights_forward_and_backward(impl: str) -> None:
    torch.manual_seed(0)
    query, key = normal(1, 2, 40, 5), normal(1, 2, 40, 5, seed=1)
    value = torch.eye(40).expand(1, 2, 40, 40).clone().requires_grad_()  # shows the weights
    call = partial(topk_attention, query, key, value, top_k=8, impl=impl)
    kept = call()
    dropped = call(dropout=0.25)
    survivors = dropped > 0
    torch.testing.assert_close(dropped[survivors], kept[survivors] / 0.75)
    # 640 weights: the share that survives has a standard deviation of 0.017
    assert abs(survivors.sum() / (kept > 0).sum() - 0.75) < 0.07
    upstream = normal(1, 2, 40, 40, seed=2)
    (gradient,) = torch.autograd.grad(dropped, value, upstream)
    torch.testing.assert_close(gradient, dropped.detach().mT @ upstream, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "eager", "blocked"])  # those of float64
def test_dropout_gradient_of_scores(impl: str) -> None:
    query, key, value = (normal(1, 2, 6, 4, seed=seed, dtype=torch.float64) for seed in range(3))

    def call(query: Tensor, key: Tensor) -> Tensor:
        torch.manual_seed(3)
        output = topk_attention(query, key, value, top_k=3, dropout=0.4, impl=impl)
        assert isinstance(output, Tensor)
        return output

    torch.autograd.gradcheck(call, (query.requires_grad_(), key.requires_grad_()), fast_mode=True)


def test_weights_are_before_dropout_and_differentiable() -> None:
    query, key, value = (normal(1, 2, 6, 4, seed=seed) for seed in range(3))
    query.requires_grad_()
    call = partial(topk_attention, query, key, value, top_k=3, return_weights=True)
    torch.testing.assert_close(call(dropout=0.5, impl="eager")[1], call(impl="eager")[1])
    found, wanted = (
        torch.autograd.grad(call(impl=impl)[1].square().sum(), query)[0]
        for impl in ("eager", "reference")
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@every_implementation
def test_autocast_changes_nothing_and_output_has_the_values_dtype(impl: str) -> None:
    query, key, value = (normal(1, 2, 6, 4, seed=seed).bfloat16() for seed in range(3))
    for tensors in ((query, key, value), (query, key, value.float()), (query.float(), key, value)):
        leaves = [x.clone().requires_grad_() for x in tensors]
        outside = topk_attention(*leaves, top_k=2, impl=impl)
        assert isinstance(outside, Tensor)
        assert outside.dtype == tensors[2].dtype
        wanted = torch.autograd.grad(outside.sum(), leaves)
        with torch.autocast("cpu", torch.bfloat16):
            inside = topk_attention(*leaves, top_k=2, impl=impl)
            assert isinstance(inside, Tensor)
            found = torch.autograd.grad(inside.sum(), leaves)
        assert torch.equal(inside, outside)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("impl", ["eager", "blocked", "native"])
def test_second_derivatives_are_refused(impl: str) -> None:
    query, key, value = (normal(1, 1, 6, 4, seed=seed).requires_grad_() for seed in range(3))
    output = topk_attention(query, key, value, top_k=2, impl=impl)
    assert isinstance(output, Tensor)
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", "eager", "blocked", "native"])
def test_compiled_equals_eager(results_of: Callable[..., list[Tensor]], impl: str) -> None:
    query, key, value = (normal(1, 2, 40, 8, seed=seed) for seed in range(3))
    inputs = AttentionInputs(query, key, value, 3, None, None, True)
    call = partial(topk_attention, top_k=3, impl=impl)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(results_of(compiled, inputs), results_of(call, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "top_k and ratio"),
        ({"top_k": 2, "ratio": 2.0}, "top_k and ratio"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_k": torch.tensor([1.0])}, "top_k"),
        ({"top_k": torch.tensor([0, 1, 1])}, "top_k"),
        ({"top_k": torch.ones(7, dtype=torch.long)}, "top_k"),
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"ratio": 2.0, "min_keys": 0}, "min_keys"),
        ({"top_k": 2, "ties": "first"}, "ties"),
        ({"top_k": 2, "impl": "fast"}, "impl"),
        ({"top_k": 2, "impl": "blocked", "return_weights": True}, "weights"),
        ({"top_k": 2, "dropout": 1.0}, "dropout"),
        ({"top_k": 2, "mask": torch.ones(3, 4)}, "mask"),
        ({"top_k": 2, "mask": torch.ones(3, 5, dtype=torch.bool)}, "mask"),
        ({"top_k": 2, "bias": torch.ones(3, 4, dtype=torch.long)}, "bias"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], word: str) -> None:
    query, key = normal(2, 2, 3, 5), normal(2, 2, 4, 5)
    with pytest.raises(ValueError, match=word):
        topk_attention(query, key, key, **options)
