"""Device code of ``triton.py``, which imports it when it is first needed.

``R`` is the number of query rows ``B H T``, counted through in this order, ``L`` of keys
``B H_kv S``. Blocks are powers of two: ``M`` query rows by ``N`` keys where scores are products of
matrices, ``BLOCK_R`` rows by ``C`` listed keys where keys are gathered.
"""

from separata_shared.attention.topk.triton_kernels.backward import (
    dense_keys_backward_kernel,
    dense_queries_backward_kernel,
    keys_backward_kernel,
    lists_backward_kernel,
)
from separata_shared.attention.topk.triton_kernels.forward import (
    dense_kernel,
    search_kernel,
    select_kernel,
)
from separata_shared.attention.topk.triton_kernels.scores import Dropout, Limits, Problem, Strided

__all__ = [
    "Dropout",
    "Limits",
    "Problem",
    "Strided",
    "dense_kernel",
    "dense_keys_backward_kernel",
    "dense_queries_backward_kernel",
    "keys_backward_kernel",
    "lists_backward_kernel",
    "search_kernel",
    "select_kernel",
]
