"""The relational graph layer as the equations have it; this is its specification."""

import torch
from torch import Tensor


def edge_list(
    node_groups: Tensor, group_relation: Tensor, group_edges: Tensor
) -> tuple[Tensor, Tensor]:
    """Source and relation of each edge in the order of columns, (E) each, int64."""
    nodes = torch.arange(len(node_groups) - 1, device=node_groups.device)
    sizes = group_edges.diff().long()
    source = nodes.repeat_interleave(node_groups.diff().long()).repeat_interleave(sizes)
    return source, group_relation.long().repeat_interleave(sizes)


def relational_sum(
    basis: Tensor, att: Tensor, root: Tensor, bias: Tensor, edges: tuple[Tensor, ...]
) -> Tensor:
    """Compute H with the weights of every relation written out, (R, N, d).

    ``edges`` are the tensors of an ``EdgeIndex``; the others are those of ``relational.py``.
    """
    node_groups, group_relation, group_edges, target, c, *_ = edges
    source, relation = edge_list(node_groups, group_relation, group_edges)
    W = torch.einsum("rb,nbd->rnd", att, basis)
    messages = c.to(W.dtype)[:, None] * W[relation, source]
    H = torch.zeros_like(root).index_add(0, target.long(), messages)
    return H + root + bias
