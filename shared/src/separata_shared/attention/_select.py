"""Which implementation ``"auto"`` means: one pure function for each operation."""

from collections.abc import Mapping

import torch

# Keys up to which whole matrices of scores are faster than fused kernels, forward and backward;
# read off ``shared/benchmarks/attention.py`` on one core of a CPU.
DENSE_EAGER_KEYS = {
    ("cpu", torch.float32): 32,
    ("cpu", torch.bfloat16): 1024,
    ("cpu", torch.float16): 1024,
}
# Implementations of top-k attention from the fastest to the one that serves every call.
TOPK = ("native", "triton", "blocked", "eager")
# Up to which k an implementation is faster than the ones after it, from a number of keys on.
# Written by ``python shared/benchmarks/choose.py``; GPUs are estimated.
TOPK_LIMITS: dict[tuple[str, str, str], dict[str, dict[int, int]]] = {
    ("cpu", "training", "float32"): {
        "native": {32: 16, 64: 32, 128: 64, 256: 128, 512: 256, 1024: 512},
        "blocked": {128: 4, 256: 16, 512: 32, 1024: 64, 2048: 128, 4096: 256, 8192: 512},
    },
    ("cpu", "training", "bfloat16"): {
        "native": {32: 8, 64: 16, 128: 32, 256: 128, 512: 256, 1024: 512},
        "blocked": {512: 8, 1024: 32, 2048: 128, 8192: 512},
    },
    ("cpu", "decoding", "float32"): {
        "native": {128: 64, 512: 256, 2048: 512},
        "blocked": {8192: 4},
    },
    ("cpu", "decoding", "bfloat16"): {
        "native": {128: 64, 512: 256, 2048: 512},
        "blocked": {},
    },
}
TOPK_LIMITS_ELSEWHERE = {
    "triton": {512: 128, 2048: 512},
    "blocked": {1024: 256, 2048: 512, 4096: 1024},
}


def dense(*, device: str, dtype: torch.dtype, source: int, return_weights: bool) -> str:
    """Name the implementation of dense attention.

    Args:
        device: Type of the device.
        dtype: Precision of the values.
        source: Number of keys.
        return_weights: Whether the weights are asked for.
    """
    if return_weights:
        return "reference"
    return "eager" if source <= DENSE_EAGER_KEYS.get((device, dtype), 0) else "sdpa"


def topk(
    *,
    device: str,
    dtype: torch.dtype,
    target: int,
    source: int,
    most_keys: int | None,
    unsupported: Mapping[str, str | None],
) -> str:
    """Name the implementation of top-k attention.

    Args:
        device: Type of the device.
        dtype: Precision of the values.
        target: Number of queries.
        source: Number of keys.
        most_keys: Largest k of a row, None if unknown.
        unsupported: For each implementation why it cannot serve the call, None where it can.
    """
    precision = "float32" if dtype.itemsize >= 4 else "bfloat16"
    phase = "decoding" if target == 1 else "training"
    table = TOPK_LIMITS.get((device, phase, precision), TOPK_LIMITS_ELSEWHERE)
    for name in TOPK:
        limits = table.get(name, {})
        # A list, because torch.compile does not know ``max(..., default=0)``.
        limit = limits.get(max([0, *(size for size in limits if size <= source)]), 0)
        if unsupported.get(name, "unknown") is None and (most_keys or 1) <= limit:
            return name
    return "eager"
