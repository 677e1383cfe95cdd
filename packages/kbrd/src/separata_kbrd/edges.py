"""The edges of a knowledge graph, sorted once for both directions of the graph layer.

Shapes: N nodes, R relations, E edges, G groups. A group is what the edges that leave one node under
one relation have in common: they all carry the same message.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Normaliser = Callable[[Tensor, Tensor], Tensor]
"""Weights c_{i,r} of edges, (E) in float64, from their targets i and relations r, both (E)."""


def neighbour_sum(target: Tensor, relation: Tensor) -> Tensor:
    """c_{i,r} = 1: a node adds up its neighbours. The published numbers come from this."""
    return torch.ones(len(target), dtype=torch.float64, device=target.device)


def neighbour_mean(target: Tensor, relation: Tensor) -> Tensor:
    """c_{i,r} = 1 / |N_i^r|: a node averages its neighbours of each relation."""
    pair = target * (relation.max() + 1) + relation
    _, place, counts = torch.unique(pair, return_inverse=True, return_counts=True)
    weights: Tensor = counts[place].double().reciprocal()
    return weights


NORMALISERS: dict[str, Normaliser] = {"sum": neighbour_sum, "mean": neighbour_mean}


class EdgeIndex(nn.Module):
    """Edges compressed by row, for the sum over what reaches a node, and by column, for gradients.

    It is a module so that it moves with the model that owns it; its tensors are not in the state of
    that model, since the graph is data.

    Args:
        edges: Rows (source, target, relation), (E, 3); each stands once.
        num_nodes: N.
        num_relations: R.
        normaliser: Weights of the edges.

    Raises:
        ValueError: The rows are no edges of such a graph, or one stands twice.
    """

    node_groups: Tensor
    """Groups of node j are node_groups[j] to node_groups[j + 1] - 1, (N + 1), int32."""
    group_relation: Tensor
    """Relation of a group, (G), int32."""
    group_edges: Tensor
    """Edges of group g, in the order of columns, begin at group_edges[g], (G + 1), int32."""
    edge_target: Tensor
    """Target of each edge in the order of columns, (E), int32."""
    edge_weight: Tensor
    """c of each edge in the order of columns, (E), float64."""
    row_edges: Tensor
    """Edges that reach node i, in the order of rows, begin at row_edges[i], (N + 1), int32."""
    row_group: Tensor
    """Group of each edge in the order of rows, (E), int32."""
    row_weight: Tensor
    """c of each edge in the order of rows, (E), float64."""

    def __init__(
        self,
        edges: Tensor,
        *,
        num_nodes: int,
        num_relations: int,
        normaliser: Normaliser = neighbour_sum,
    ) -> None:
        super().__init__()
        self.num_nodes, self.num_relations = num_nodes, num_relations
        _check(edges, num_nodes, num_relations)
        source, target, relation = edges.long().unbind(dim=1)
        # One number for an edge, in the order of source, relation, target.
        key, counts = torch.unique(
            (source * num_relations + relation) * num_nodes + target, return_counts=True
        )
        if len(key) < len(edges):
            raise ValueError(f"edges: {_row(key[counts > 1][0], num_nodes, num_relations)} twice")
        target, column = key % num_nodes, key // num_nodes
        groups, group, sizes = column.unique_consecutive(return_inverse=True, return_counts=True)
        weight = normaliser(target, column % num_relations)
        by_row = target.argsort(stable=True)
        parts = {
            "node_groups": _starts((groups // num_relations).bincount(minlength=num_nodes)),
            "group_relation": groups % num_relations,
            "group_edges": _starts(sizes),
            "edge_target": target,
            "row_edges": _starts(target.bincount(minlength=num_nodes)),
            "row_group": group[by_row],
        }
        for name, part in parts.items():
            self.register_buffer(name, part.int().contiguous(), persistent=False)
        self.register_buffer("edge_weight", weight, persistent=False)
        self.register_buffer("row_weight", weight[by_row], persistent=False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of columns, then those of rows, in the order of the class."""
        return (
            *(self.node_groups, self.group_relation, self.group_edges),
            *(self.edge_target, self.edge_weight),
            *(self.row_edges, self.row_group, self.row_weight),
        )


def _starts(counts: Tensor) -> Tensor:
    """Where parts of these sizes begin, and where the last one ends."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _row(key: Tensor, num_nodes: int, num_relations: int) -> str:
    """An edge's number as the row that it came from."""
    column = int(key) // num_nodes
    source, relation = divmod(column, num_relations)
    return f"({source}, {int(key) % num_nodes}, {relation}) stands"


def _check(edges: Tensor, num_nodes: int, num_relations: int) -> None:
    if edges.dim() != 2 or edges.shape[1] != 3 or edges.is_floating_point():
        raise ValueError(f"edges: integers (E, 3) are needed, got {tuple(edges.shape)}")
    if not len(edges):
        raise ValueError("edges: the graph has none")
    if len(edges) >= 2**31 or num_nodes**2 * num_relations >= 2**63:
        raise ValueError(f"edges: too large a graph: {len(edges)} edges, {num_nodes} nodes")
    for name, column, size in (
        ("source", 0, num_nodes),
        ("target", 1, num_nodes),
        ("relation", 2, num_relations),
    ):
        low, high = int(edges[:, column].min()), int(edges[:, column].max())
        if not 0 <= low <= high < size:
            raise ValueError(f"edges: a {name} lies outside 0 to {size - 1}: {low} to {high}")
