"""The relational graph layer on a CPU in C++ (``native.cpp``), compiled on first use; float32."""

import ctypes
import functools
import warnings
from pathlib import Path

import torch
from separata_shared import native
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
# Instructions to use, for tests: a number from 0 to the machine's best; None is the best.
LEVEL: int | None = None
# Groups of edges that are worth a thread.
THREAD_GROUPS = 2**9


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels.

    Raises:
        UnavailableError: They cannot be compiled here.
    """
    kernels = native.load(SOURCE)
    pointers, integers = ctypes.c_void_p, ctypes.c_int64
    kernels.graph_forward.argtypes = [pointers] * 12 + [integers] * 2
    kernels.graph_backward.argtypes = [pointers] * 12 + [integers] * 2
    kernels.graph_forward.restype = kernels.graph_backward.restype = None
    kernels.graph_best_level.restype = kernels.graph_block_nodes.restype = integers
    return kernels


@functools.cache
def best_level() -> int:
    """The best instructions of this machine: 0 is plain, 1 AVX2 and 2 AVX-512."""
    return int(library().graph_best_level())


@functools.cache
def available() -> bool:
    """Whether the kernels can be used; warns once, the first time, where they cannot."""
    try:
        library()
    except native.UnavailableError as error:
        warnings.warn(f"the graph layer uses slower PyTorch code: {error}", stacklevel=2)
        return False
    return True


def supports(basis: Tensor) -> str | None:
    """Give the reason why these bases cannot be used here, None where they can."""
    if basis.device.type != "cpu":
        return f"it runs on the CPU, not on {basis.device.type}"
    if basis.dtype != torch.float32:
        return f"it computes in float32, not in {basis.dtype}"
    return None


def forward(
    basis: Tensor, att: Tensor, root: Tensor, bias: Tensor, edges: tuple[Tensor, ...]
) -> Tensor:
    """Compute H; arguments as in ``relational.py``."""
    node_groups, group_relation, _, _, _, row_edges, row_group, row_weight = edges
    tensors = [t.contiguous() for t in (basis, att, root, bias)]
    messages = basis.new_empty(len(group_relation), basis.shape[2])
    H = torch.empty_like(tensors[2])
    graph = [node_groups, group_relation, row_edges, row_group, row_weight.float()]
    library().graph_forward(
        _sizes(basis, att, edges),
        *(tensor.data_ptr() for tensor in (*graph, *tensors, messages, H)),
        *_way(edges),
    )
    return H


def backward(
    grad: Tensor, basis: Tensor, att: Tensor, edges: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of ``basis`` and ``att``."""
    node_groups, group_relation, group_edges, edge_target, edge_weight, *_ = edges
    tensors = [t.contiguous() for t in (basis, att, grad)]
    grad_basis, grad_att = (torch.empty_like(t) for t in tensors[:2])
    blocks = -(-len(basis) // int(library().graph_block_nodes()))
    partial = basis.new_empty(blocks, *att.shape, dtype=torch.float64)
    graph = [node_groups, group_relation, group_edges, edge_target, edge_weight.float()]
    library().graph_backward(
        _sizes(basis, att, edges),
        *(tensor.data_ptr() for tensor in (*graph, *tensors, grad_basis, partial, grad_att)),
        *_way(edges),
    )
    return grad_basis, grad_att


def _sizes(basis: Tensor, att: Tensor, edges: tuple[Tensor, ...]) -> ctypes.Array[ctypes.c_int64]:
    """N, R, G, E, B and d."""
    N, B, d = basis.shape
    return (ctypes.c_int64 * 6)(N, len(att), len(edges[1]), len(edges[3]), B, d)


def _way(edges: tuple[Tensor, ...]) -> tuple[int, int]:
    """Threads and the level of instructions."""
    threads = max(min(torch.get_num_threads(), len(edges[1]) // THREAD_GROUPS), 1)
    return threads, best_level() if LEVEL is None else LEVEL
