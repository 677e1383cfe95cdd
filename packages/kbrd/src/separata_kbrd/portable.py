"""The relational graph layer in PyTorch: weighted sums of rows in both directions.

Every pass is an ``embedding_bag``, which reads rows and adds them up without writing them out. What
is stored besides the output is one row for each group of edges, never one for each relation and
node.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(
    basis: Tensor, att: Tensor, root: Tensor, bias: Tensor, edges: tuple[Tensor, ...]
) -> Tensor:
    """Compute H; arguments as in ``relational.py``."""
    node_groups, group_relation, _, _, _, row_edges, row_group, row_weight = edges
    N, B, d = basis.shape
    bases = _group_nodes(node_groups)[:, None] * B + torch.arange(B, device=basis.device)
    messages = F.embedding_bag(
        bases, basis.view(N * B, d), mode="sum", per_sample_weights=att[group_relation]
    )
    H = _weighted_sum(messages, row_group, row_edges, row_weight)
    return H.add_(root).add_(bias)


def backward(
    grad: Tensor, basis: Tensor, att: Tensor, edges: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of ``basis`` and ``att``."""
    node_groups, group_relation, group_edges, edge_target, edge_weight, *_ = edges
    N, B, d = basis.shape
    R = len(att)
    grad_messages = _weighted_sum(grad, edge_target, group_edges, edge_weight)

    # Bag (j, b) holds the groups of node j, weighted with att[r, b].
    sizes = node_groups.diff().repeat_interleave(B)
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    first = node_groups[:-1].repeat_interleave(B) - starts[:-1]
    places = torch.arange(int(starts[-1]), device=grad.device, dtype=first.dtype)
    groups = places + first.repeat_interleave(sizes.long())
    base = torch.arange(B, device=grad.device).repeat(N).repeat_interleave(sizes.long())
    weights = att.flatten()[group_relation[groups].long() * B + base]
    grad_basis = _weighted_sum(grad_messages, groups, starts, weights).view(N, B, d)

    # The products of a group's gradient with its node's bases, a part of the nodes at a time.
    products = grad.new_empty(len(group_relation), B)
    nodes = _group_nodes(node_groups)
    for start in range(0, len(nodes), _CHUNK):
        part = slice(start, start + _CHUNK)
        torch.bmm(
            basis[nodes[part]],
            grad_messages[part, :, None],
            out=products[part, :, None],
        )
    grad_att = att.new_zeros(R, B).index_add_(0, group_relation, products)
    return grad_basis, grad_att


# Groups whose bases are copied at a time: a few MiB.
_CHUNK = 2048


def _group_nodes(node_groups: Tensor) -> Tensor:
    """Node of each group, (G), int64."""
    nodes = torch.arange(len(node_groups) - 1, device=node_groups.device)
    return nodes.repeat_interleave(node_groups.diff().long())


def _weighted_sum(rows: Tensor, places: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """For each bag the weighted sum of the rows at its places, (bags, d)."""
    return F.embedding_bag(
        places,
        rows,
        starts,
        mode="sum",
        per_sample_weights=weights.to(rows.dtype),
        include_last_offset=True,
    )
