"""The sum over a node's neighbours as one operator of PyTorch, with a gradient of its own.

An implementation is a module with ``forward`` and ``backward``: ``native`` in C++ and ``portable``
in PyTorch. ``reference`` is the equation as it stands. ``torch.compile`` sees opaque operators.
"""

from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from . import native, portable, reference
from .edges import EdgeIndex

Impl = Literal["auto", "reference", "portable", "native"]


def relational_sum(
    basis: Tensor,
    att: Tensor,
    root: Tensor,
    bias: Tensor,
    edges: EdgeIndex,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Vectors of all nodes from those of their neighbours, for one-hot inputs.

    H[i] = sum_{(j, i, r)} c_{i,r} sum_b att[r, b] basis[j, b] + root[i] + bias (Chen et al. 2019,
    section 3.2, with the basis decomposition of Schlichtkrull et al. 2018).

    Memory: one row for each group of edges besides the output, never the weights of all relations,
    (R, N, d), which ``reference`` does write out. The result does not depend on the number of
    threads. It can be differentiated once; ``reference`` any number of times.

    Args:
        basis: Bases of each node side by side, (N, B, d).
        att: Share of each base in each relation, (R, B).
        root: Each node's own vector, (N, d).
        bias: Added to every node, (d).
        edges: The graph with its weights c.
        impl: What computes it. ``auto`` is ``native`` for float32 on a CPU with a compiler and
            ``portable`` elsewhere.

    Returns:
        H, (N, d).

    Raises:
        ValueError: Shapes do not fit, or the named implementation cannot serve this call.
    """
    N, B, d = basis.shape
    wanted = ((edges.num_nodes, B, d), (edges.num_relations, B), (N, d), (d,))
    for name, tensor, shape in zip(
        ("basis", "att", "root", "bias"), (basis, att, root, bias), wanted, strict=True
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, the graph needs {shape}")
    if impl == "reference":
        return reference.relational_sum(basis, att, root, bias, edges.tensors)
    H: Tensor = neighbours(basis, att, root, bias, *edges.tensors, impl)
    return H


def _choose(impl: str, basis: Tensor) -> ModuleType:
    """The module that computes with these bases.

    Raises:
        ValueError: The named implementation cannot.
    """
    if impl not in ("auto", "native"):
        return portable
    reason = native.supports(basis)
    if reason is None and (impl == "native" or native.available()):
        return native
    if impl == "native":
        raise ValueError(f"impl 'native' cannot serve this call: {reason}")
    return portable


@torch.library.custom_op("separata::kbrd_neighbours", mutates_args=())
def neighbours(
    basis: Tensor,
    att: Tensor,
    root: Tensor,
    bias: Tensor,
    node_groups: Tensor,
    group_relation: Tensor,
    group_edges: Tensor,
    edge_target: Tensor,
    edge_weight: Tensor,
    row_edges: Tensor,
    row_group: Tensor,
    row_weight: Tensor,
    impl: str,
) -> Tensor:
    """``relational_sum`` with the tensors of an ``EdgeIndex``."""
    columns = (node_groups, group_relation, group_edges, edge_target, edge_weight)
    edges = (*columns, row_edges, row_group, row_weight)
    H: Tensor = _choose(impl, basis).forward(basis, att, root, bias, edges)
    return H


@neighbours.register_fake
def _(basis: Tensor, att: Tensor, root: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(root, memory_format=torch.contiguous_format)


@torch.library.custom_op("separata::kbrd_neighbours_backward", mutates_args=())
def neighbours_backward(
    grad: Tensor,
    basis: Tensor,
    att: Tensor,
    node_groups: Tensor,
    group_relation: Tensor,
    group_edges: Tensor,
    edge_target: Tensor,
    edge_weight: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``basis`` and ``att``."""
    edges = (node_groups, group_relation, group_edges, edge_target, edge_weight)
    gradients: tuple[Tensor, Tensor] = _choose(impl, basis).backward(grad, basis, att, edges)
    return gradients


@neighbours_backward.register_fake
def _(grad: Tensor, basis: Tensor, att: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    form = torch.contiguous_format
    return torch.empty_like(basis, memory_format=form), torch.empty_like(att, memory_format=form)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    basis, att, _, _, *columns = inputs[:9]
    ctx.impl = inputs[-1]
    ctx.save_for_backward(basis, att, *columns)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    basis, att, *columns = ctx.saved_tensors
    grad_basis = grad_att = None
    if any(ctx.needs_input_grad[:2]):
        grad_basis, grad_att = neighbours_backward(grad, basis, att, *columns, ctx.impl)
    return grad_basis, grad_att, grad, grad.sum(dim=0), *[None] * 9


neighbours.register_autograd(_differentiate, setup_context=_keep)
