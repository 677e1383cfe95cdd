"""What is particular to the eager implementation: enough rows for networks, lowered scores."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from separata_shared.attention import topk_attention
from separata_shared.attention.topk import kth_largest
from separata_shared.testing.strategies import AttentionInputs
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ties", ["keep", "exact"])
@pytest.mark.parametrize("top_k", [1, 6, 20, torch.tensor([[2], [9]])], ids=str)
def test_many_rows(results_of: Callable[..., list[Tensor]], ties: str, top_k: int | Tensor) -> None:
    # Products of small integers, halved (D = 4), are exact in every order of summation.
    query, key = normal(4, 2, 80, 4).round(), normal(4, 1, 50, 4, seed=1).round()
    assert query[..., 0].numel() >= kth_largest.NETWORK_ROWS
    value = normal(4, 1, 50, 3, seed=2)
    mask = normal(4, 1, 80, 50, seed=3) > 0.5
    inputs = AttentionInputs(query, key, value, 1, mask, None, True)
    call = partial(topk_attention, top_k=top_k, ties=ties)
    found = results_of(partial(call, impl="eager"), inputs)
    wanted = results_of(partial(call, impl="reference"), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [-torch.finfo(torch.float32).max, -1e30, 1e30])
def test_removed_keys_have_no_weight_at_any_level_of_scores(level: float) -> None:
    query, key, value = (normal(1, 1, 4, 8, seed=seed) for seed in range(3))
    bias = torch.tensor([level, level, level / 2, level / 2])
    for ties in ("keep", "exact"):
        call = partial(topk_attention, query, key, value, bias=bias, top_k=1, return_weights=True)
        _, found = call(impl="eager", ties=ties)
        _, wanted = call(impl="reference", ties=ties)
        assert torch.equal(found > 0, wanted > 0)
