"""Which implementation ``"auto"`` means: one pure function for each operation.

The limits were read off ``shared/benchmarks/attention.py`` on one core of a CPU; those of GPUs are
estimates.
"""

import torch

# Keys up to which whole matrices of scores are faster than fused kernels, forward and backward.
DENSE_EAGER_KEYS = {
    ("cpu", torch.float32): 32,
    ("cpu", torch.bfloat16): 1024,
    ("cpu", torch.float16): 1024,
}
# Keys from which top-k attention in blocks beats whole matrices.
TOPK_BLOCKED_KEYS = {"cpu": 256}
TOPK_BLOCKED_KEYS_ELSEWHERE = 1024
# Keys for each kept one below which blocks win nothing.
TOPK_BLOCKED_RATIO = 4


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


def topk(*, device: str, source: int, most_keys: int | None, reason: str | None) -> str:
    """Name the implementation of top-k attention.

    Args:
        device: Type of the device.
        source: Number of keys.
        most_keys: Largest k of a row, None if unknown.
        reason: Why the blocked implementation cannot serve the call, if it cannot.
    """
    long = source >= TOPK_BLOCKED_KEYS.get(device, TOPK_BLOCKED_KEYS_ELSEWHERE)
    sparse = most_keys is None or TOPK_BLOCKED_RATIO * most_keys <= source
    return "blocked" if reason is None and long and sparse else "eager"
