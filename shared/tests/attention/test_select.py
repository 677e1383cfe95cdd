"""Which implementation "auto" means."""

import pytest
import torch
from separata_shared.attention import _select


@pytest.mark.parametrize(
    ("device", "dtype", "source", "return_weights", "name"),
    [
        ("cpu", torch.float32, 30, False, "eager"),
        ("cpu", torch.float32, 100, False, "sdpa"),
        ("cpu", torch.bfloat16, 100, False, "eager"),
        ("cpu", torch.bfloat16, 5000, False, "sdpa"),
        ("cuda", torch.bfloat16, 30, False, "sdpa"),
        ("cpu", torch.float32, 100, True, "reference"),
    ],
)
def test_dense(
    device: str, dtype: torch.dtype, source: int, return_weights: bool, name: str
) -> None:
    chosen = _select.dense(device=device, dtype=dtype, source=source, return_weights=return_weights)
    assert chosen == name


@pytest.mark.parametrize(
    ("device", "source", "most_keys", "reason", "name"),
    [
        ("cpu", 30, 8, None, "eager"),
        ("cpu", 4096, 8, None, "blocked"),
        ("cpu", 4096, None, None, "blocked"),
        ("cpu", 4096, 2048, None, "eager"),
        ("cpu", 4096, 8, "weights are asked for", "eager"),
        ("cuda", 512, 8, None, "eager"),
        ("cuda", 4096, 8, None, "blocked"),
    ],
)
def test_topk(
    device: str, source: int, most_keys: int | None, reason: str | None, name: str
) -> None:
    chosen = _select.topk(device=device, source=source, most_keys=most_keys, reason=reason)
    assert chosen == name
