"""The knowledge graph: triples, the edges that the network sees, and the catalogue of items.

N is the number of nodes, R of relations, E of edges, M of items, T of triples.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]

SELF_LOOP = "self_loop"
"""Name of the relation between a node and itself."""

_RESOURCE = re.compile(r"^<?https?://[^>]*?/(?:resource|entity|page)/([^>]+)>?$")


@dataclass(frozen=True, kw_only=True)
class Triples:
    """What is known, before the filter: (head, relation, tail), in the order of the source."""

    rows: Ints
    """Node, relation, node, (T, 3)."""

    nodes: tuple[str, ...]
    """Key of each node: a URI, or the identifier of an item that has none."""

    relations: tuple[str, ...]
    """Name of each relation."""

    self_loop: int
    """The relation that stands for a node's own vector."""

    def __post_init__(self) -> None:
        """Check that every number means something.

        Raises:
            ValueError: A number lies outside its range, or there is no node.
        """
        if not self.nodes:
            raise ValueError("the graph has no node")
        if self.rows.ndim != 2 or self.rows.shape[1] != 3:
            raise ValueError(f"triples have the shape {self.rows.shape} instead of (T, 3)")
        for column, (name, count) in enumerate(
            (("head", self.num_nodes), ("relation", len(self.relations)), ("tail", self.num_nodes))
        ):
            check_range(self.rows[:, column], count, f"the {name} of triple")
        if not 0 <= self.self_loop < len(self.relations):
            raise ValueError(
                f"the self loop is relation {self.self_loop}, there are {len(self.relations)}"
            )

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.nodes)


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The items that can be recommended, in their official order."""

    ids: tuple[str, ...]
    """Identifier of each item, as dialogs write it after ``@``."""

    nodes: Ints
    """Node of each item, (M,)."""

    names: tuple[str, ...]
    """Name of each item, such as ``Heat (1995)``."""

    mentions: Ints
    """How often each item is mentioned according to the source, (M,); 0 where it does not say."""

    def __post_init__(self) -> None:
        """Check that the columns belong together.

        Raises:
            ValueError: Lengths differ, there is no item, or two share an identifier or node.
        """
        lengths = {len(self.ids), len(self.nodes), len(self.names), len(self.mentions)}
        if len(lengths) > 1:
            raise ValueError(f"columns of the catalogue have different lengths: {sorted(lengths)}")
        if not self.ids:
            raise ValueError("the catalogue is empty")
        for values, what in ((self.ids, "identifier"), (self.nodes.tolist(), "node")):
            twice = _first_repeat(values)
            if twice is not None:
                raise ValueError(f"two items of the catalogue have the {what} {twice!r}")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class KnowledgeGraph:
    """The graph as the network sees it, with its catalogue."""

    num_nodes: int
    """N."""

    num_relations: int
    """R, the self loop included."""

    edges: Ints
    """Head, tail, relation, (E, 3): in ascending order, every edge once."""

    nodes: tuple[str, ...]
    """Key of each node."""

    relations: tuple[str, ...]
    """Name of each relation that is left."""

    catalogue: Catalogue
    """The items."""

    @property
    def items(self) -> Ints:
        """Nodes of the catalogue in official order, (M,)."""
        return self.catalogue.nodes

    @property
    def item_names(self) -> tuple[str, ...]:
        """Names of the catalogue in official order."""
        return self.catalogue.names

    def node_name(self, node: int) -> str:
        """A node's key for people: of an item its name, of a URI its last part."""
        if node in self._name_of_item:
            return self._name_of_item[node]
        return readable(self.nodes[node])

    @cached_property
    def _name_of_item(self) -> dict[int, str]:
        return dict(zip(self.items.tolist(), self.item_names, strict=True))


def build_graph(triples: Triples, catalogue: Catalogue, *, threshold: int) -> KnowledgeGraph:
    """The graph of the triples, filtered by frequent relations.

    Args:
        triples: Everything that is known.
        catalogue: The items, whose nodes are among those of the triples.
        threshold: Relations need more edges than this.

    Raises:
        ValueError: An item's node is not a node, or no relation is frequent enough.
    """
    check_range(catalogue.nodes, triples.num_nodes, "the node of item")
    edges, kept = edge_list(
        triples.rows,
        num_nodes=triples.num_nodes,
        self_loop=triples.self_loop,
        threshold=threshold,
    )
    if not len(edges):
        raise ValueError(f"data.threshold: no relation has more than {threshold} edges")
    return KnowledgeGraph(
        num_nodes=triples.num_nodes,
        num_relations=len(kept),
        edges=edges,
        nodes=triples.nodes,
        relations=tuple(triples.relations[relation] for relation in kept),
        catalogue=catalogue,
    )


def edge_list(
    triples: ArrayLike, *, num_nodes: int, self_loop: int, threshold: int
) -> tuple[Ints, Ints]:
    """The edges that the network sees.

    The rule of the authors' code: heads in ascending order, the triples of a head in theirs; each
    triple of two different nodes gives an edge both ways under the same relation; then every node
    gets a self loop. Relations with at most ``threshold`` edges (repeated ones counted) are left
    out, those that stay are numbered as they first appear, repeated edges become one.

    Args:
        triples: Head, relation, tail, (T, 3).
        num_nodes: N.
        self_loop: Relation of the self loops. The authors' code guesses it from triples of a node
            with itself; those are only left out here.
        threshold: Relations need more edges than this.

    Returns:
        Edges (E, 3) as head, tail and new relation, in ascending order; and the old number of each
        new relation (R,).
    """
    rows = np.asarray(triples, dtype=np.int64).reshape(-1, 3)
    rows = rows[rows[:, 0] != rows[:, 2]]
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    heads, relations, tails = rows.T
    both = np.empty((len(rows), 2, 3), dtype=np.int64)
    both[:, 0] = np.stack([heads, tails, relations], axis=1)
    both[:, 1] = np.stack([tails, heads, relations], axis=1)
    every = np.arange(num_nodes, dtype=np.int64)
    loops = np.stack([every, every, np.full_like(every, self_loop)], axis=1)
    edges = np.concatenate([both.reshape(-1, 3), loops])

    frequent = np.bincount(edges[:, 2]) > threshold
    edges = edges[frequent[edges[:, 2]]]
    old, first = np.unique(edges[:, 2], return_index=True)
    kept = old[np.argsort(first)]
    number = np.empty(len(frequent), dtype=np.int64)
    number[kept] = np.arange(len(kept))
    edges[:, 2] = number[edges[:, 2]]
    return _distinct_rows(edges), kept


def _distinct_rows(edges: Ints) -> Ints:
    """Rows in ascending order, each once."""
    edges = edges[np.lexsort(edges.T[::-1])]
    new = np.ones(len(edges), dtype=bool)
    new[1:] = (edges[1:] != edges[:-1]).any(axis=1)
    return edges[new]


def readable(key: str) -> str:
    """A node's key for people.

    >>> readable("<http://dbpedia.org/resource/Heat_(1995_film)>")
    'Heat (1995 film)'
    >>> readable("114341")
    '114341'
    """
    found = _RESOURCE.match(key)
    return found[1].replace("_", " ") if found else key


def check_range(numbers: Ints, count: int, what: str) -> None:
    """Check that numbers lie in [0, count).

    Raises:
        ValueError: One does not; the message gives its place, counted from 1, and the range.
    """
    wrong = (numbers < 0) | (numbers >= count)
    if wrong.any():
        place = int(wrong.argmax())
        raise ValueError(f"{what} {place + 1} is {numbers[place]}, outside 0 to {count - 1}")


def _first_repeat(values: Sequence[object]) -> object | None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
