"""What is particular to the blocked implementation: blocks, groups, kept state, operators."""

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_shared.attention import topk_attention
from separata_shared.attention.topk import blocked
from separata_shared.testing.strategies import AttentionInputs, attention_inputs
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scores", [1, 40, 200])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_result_does_not_depend_on_the_size_of_blocks(
    results_of: Callable[..., list[Tensor]], scores: int, data: st.DataObject
) -> None:
    inputs = data.draw(attention_inputs(gap=1e-4))
    call = partial(topk_attention, top_k=inputs.top_k, impl="blocked")
    whole = results_of(call, inputs)
    with patch.object(blocked, "CPU_BLOCK", scores), patch.object(blocked, "CPU_CHUNK", 3):
        parts = results_of(call, inputs)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 40).map(lambda groups: blocked.GROUP * groups),
    top_k=st.integers(1, 40),
    levels=st.sampled_from([1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_candidates_hold_all_scores_that_may_be_kept(
    width: int, top_k: int, levels: float, seed: int
) -> None:
    scores = normal(6, width, seed=seed).mul(levels).round()  # with ties
    scores[0] = -torch.inf
    scores[1, width // 3 :] = -torch.inf
    values, rows, columns = blocked._candidates(scores, top_k)
    assert torch.equal(scores[rows, columns], values)
    places = rows * width + columns
    assert (places.diff() > 0).all()  # each once, in the order of rows and keys
    threshold = scores.sort(dim=1, descending=True).values[:, min(top_k, width) - 1, None]
    wanted = ((scores >= threshold) & (scores > -torch.inf)).flatten().nonzero().flatten()
    assert torch.isin(wanted, places).all()
    assert (values > -torch.inf).all()


@pytest.mark.parametrize(
    ("width", "top_k", "size"), [(2048, 8, 32), (512, 8, 32), (1024, 32, 16), (512, 40, 1)]
)
def test_candidates_are_few(width: int, top_k: int, size: int) -> None:
    assert blocked._group_size(width, top_k) == size
    values, _, _ = blocked._candidates(normal(100, width), top_k)
    # 9 candidates for k = 8 where the groups are many; never more than twice the kept keys here
    assert len(values) <= 100 * 2 * top_k


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kept_state_grows_with_k_not_with_keys(dropout: float) -> None:
    query, key, value = (normal(1, 1, 300, 8, seed=seed).requires_grad_() for seed in range(3))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        topk_attention(query, key, value, top_k=4, impl="blocked", dropout=dropout)
    own = [x for x in kept if not any(x.data_ptr() == y.data_ptr() for y in (query, key, value))]
    # a column, a weight and with dropout a factor for each entry; an offset for each row
    entries = 300 * 4
    assert sum(x.numel() for x in own) == entries * (3 if dropout else 2) + 301


def test_a_tied_row_widens_its_block_only() -> None:
    """Keys that are all equal keep every key in all rows of one head, k in the other."""
    query = normal(1, 2, 3, 4)
    key = normal(1, 2, 200, 4, seed=1)
    key[:, 1] = 1.0
    value = normal(1, 2, 200, 4, seed=2)
    call = partial(topk_attention, query, key, value, top_k=5)
    with patch.object(blocked, "CPU_BLOCK", 1):
        torch.testing.assert_close(call(impl="blocked"), call(impl="reference"))
    exact = call(impl="blocked", ties="exact")
    assert isinstance(exact, Tensor)
    torch.testing.assert_close(exact[0, 1], value[0, 1, :5].mean(0).expand(3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("with_bias", [False, True])
def test_operators_are_sound_for_the_compiler(with_bias: bool) -> None:
    query, key, value = (normal(1, 2, 70, 8, seed=seed).requires_grad_() for seed in range(3))
    bias = normal(2, 70, 70).requires_grad_() if with_bias else None
    arguments = (query, key, value, torch.tensor(3), None, bias, True, "keep", 0.0)
    torch.library.opcheck(blocked._forward, arguments)


def test_inputs_are_left_alone() -> None:
    query, key, value, bias = (normal(1, 2, 64, 8, seed=seed) for seed in range(4))
    bias = bias @ bias.mT
    before = [x.clone() for x in (query, key, value, bias)]
    topk_attention(query, key, value, bias=bias, causal=True, top_k=3, impl="blocked")
    for one, other in zip((query, key, value, bias), before, strict=True):
        assert torch.equal(one, other)


def test_too_many_entries_are_refused_with_a_reason() -> None:
    sizes = {"rows": 2**20, "keys": 2**20, "return_weights": False}
    assert blocked.supports(most_keys=8, **sizes) is None
    reason = blocked.supports(most_keys=2**11, **sizes)
    assert reason is not None
    assert "32 bits" in reason


def test_inputs_of_every_layout_and_gradients_of_every_layout(
    results_of: Callable[..., list[Tensor]],
) -> None:
    query, key, value = (normal(2, 70, 2, 8, seed=seed).transpose(1, 2) for seed in range(3))
    inputs = AttentionInputs(query, key, value, 3, None, None, True)
    found = results_of(partial(topk_attention, top_k=3, impl="blocked"), inputs)
    wanted = results_of(partial(topk_attention, top_k=3, impl="reference"), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
