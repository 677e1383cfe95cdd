"""Why something is recommended: the part of the graph behind it, and the words it brings.

The verb ``explain`` draws a picture and prints a table.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from separata_shared.files import atomic_write

from .conversation import Conversation
from .graph import KnowledgeGraph, readable
from .system import Reply, System, load_system

PATHS_PER_PAIR = 2
MOST_MENTIONED = 5
MOST_BETWEEN = 2
"""Nodes between a mentioned node and a recommended item on the paths that are looked for."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """The part of the graph that joins what was mentioned to what is recommended."""

    mentioned: dict[int, float]
    """Weight of each mentioned node in the user vector."""
    recommended: tuple[int, ...]
    """Nodes of the items."""
    edges: tuple[tuple[int, int, str], ...]
    """Edges of the paths between them, with the names of their relations."""

    @property
    def nodes(self) -> list[int]:
        """All nodes, each once."""
        on_paths = (node for edge in self.edges for node in edge[:2])
        return list(dict.fromkeys([*self.mentioned, *self.recommended, *on_paths]))


class Explainer:
    """Finds reasons in a knowledge graph.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: KnowledgeGraph) -> None:
        self._graph = graph

    @cached_property
    def _network(self) -> Any:
        """The graph for searching: undirected, without self loops."""
        head, tail, _ = rows = self._graph.edges.T
        chosen = rows[:, head < tail]
        network = nx.Graph()
        network.add_edges_from(
            (one, other, {"relation": relation}) for one, other, relation in chosen.T.tolist()
        )
        return network

    def reason(self, attention: Sequence[tuple[int, float]], items: Sequence[int]) -> Reason:
        """The shortest paths from what weighs most to each item.

        Args:
            attention: Mentioned nodes and their weights.
            items: Nodes of recommended items.
        """
        weights: dict[int, float] = {}
        for node, weight in attention:  # a node that was mentioned twice stands there twice
            weights[node] = weights.get(node, 0.0) + weight
        strongest = sorted(weights, key=lambda node: -weights[node])[:MOST_MENTIONED]
        found: dict[tuple[int, int], str] = {}
        for node in strongest:
            for item in items:
                paths = self._paths(node, item)
                for path in paths:
                    if set(path[1:-1]) & weights.keys():
                        continue  # its parts are shown where they begin
                    for one, other in pairwise(path):
                        found[min(one, other), max(one, other)] = self._relation(one, other)
        return Reason(
            mentioned={node: weights[node] for node in strongest},
            recommended=tuple(items),
            edges=tuple((one, other, name) for (one, other), name in found.items()),
        )

    def _paths(self, node: int, item: int) -> list[list[int]]:
        network = self._network
        if node == item or node not in network or item not in network:
            return []
        try:
            shortest = nx.bidirectional_shortest_path(network, node, item)
        except nx.NetworkXNoPath:
            return []
        if len(shortest) > MOST_BETWEEN + 2:
            return []
        return list(islice(nx.all_shortest_paths(network, node, item), PATHS_PER_PAIR))

    def _relation(self, one: int, other: int) -> str:
        relation: int = self._network.edges[one, other]["relation"]
        key = self._graph.relations[relation]
        return key.rstrip(">").rsplit("/", 1)[-1]


def draw(reason: Reason, names: dict[int, str]) -> bytes:
    """A PNG of a reason: what was mentioned on the left, what is recommended on the right.

    Args:
        reason: What to draw.
        names: Names of the nodes.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need: pip install 'separata-kbrd[plot]'") from None
    places = layout(reason)
    columns = [x for x, _ in places.values()]
    rows = max(columns.count(x) for x in set(columns)) if columns else 1
    figure = Figure(figsize=(10.0, max(3.0, 0.85 * rows + 1.2)), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.9))
    axes.set_axis_off()
    axes.set_xlim(-0.28, 1.28)
    axes.set_ylim(-0.08, 1.08)
    axes.set_title("From what you mentioned to what is recommended", fontsize=12, color="#333333")
    for number, (one, other, relation) in enumerate(reason.edges):
        (x1, y1), (x2, y2) = sorted((places[one], places[other]))
        share = 0.35 + 0.12 * (number % 3)  # labels of edges that cross stand apart
        axes.plot([x1, x2], [y1, y2], color="#b9c4cf", linewidth=1.4, zorder=1)
        axes.text(
            x1 + share * (x2 - x1), y1 + share * (y2 - y1), relation, fontsize=7, color="#6b7885",
            zorder=2, ha="center", va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    for node, (x, y) in places.items():
        name = _short(names[node])
        color = "#e8eef4"
        if node in reason.mentioned:
            color = "#bcd9f5"
            name = f"{name}\n{100 * reason.mentioned[node]:.0f} %"
        if node in reason.recommended:
            color = "#c9ebc5"
        axes.text(
            x, y, name, fontsize=9, color="#1f2933", zorder=3, ha="center", va="center",
            bbox={"boxstyle": "round,pad=0.45", "facecolor": color, "edgecolor": "#8a99a8"},
        )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def layout(reason: Reason) -> dict[int, tuple[float, float]]:
    """Places of the nodes in the unit square: mentioned, between, recommended, from left to right.

    A mentioned node that is also recommended stands on the right.
    """
    network = nx.Graph()
    network.add_nodes_from(reason.nodes)
    network.add_edges_from(edge[:2] for edge in reason.edges)
    sources = {node for node in reason.mentioned if node not in reason.recommended}
    distance = nx.multi_source_dijkstra_path_length(network, sources) if sources else {}
    between = {
        node: max(int(distance.get(node, 1)), 1)
        for node in reason.nodes
        if node not in reason.mentioned and node not in reason.recommended
    }
    last = max(between.values(), default=0) + 1
    columns: dict[float, list[int]] = {}
    for node in reason.nodes:
        column = last if node in reason.recommended else between.get(node, 0)
        columns.setdefault(column / last, []).append(node)
    places = {}
    for x, nodes in columns.items():
        for number, node in enumerate(nodes):
            places[node] = (x, 1 - (number + 0.5) / len(nodes))
    return places


def _short(name: str, most: int = 34) -> str:
    # A dollar sign would begin a formula.
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return name.replace("$", r"\$")


def node_names(system: System) -> dict[int, str]:
    """Readable names of all nodes, items by their titles."""
    nodes = system.recommender.corpus.graph.nodes
    return {**{node: readable(key) for node, key in enumerate(nodes)}, **system.item_names}


@torch.inference_mode()
def top_words(system: System, nodes: Sequence[int], count: int) -> list[list[tuple[str, float]]]:
    """The words that a user who mentioned one node alone gets pushed most, for each node.

    The bias is compared with its mean over these users and over all items, so that words which
    every user gets do not hide what is special to one.
    """
    frozen, network = system.recommender.model, system.network
    items = torch.from_numpy(system.recommender.corpus.graph.items)
    average = network.bias(frozen.H[items]).mean(dim=0)
    # The user vector of a single node is the vector of that node.
    bias = network.bias(frozen.H[torch.tensor(list(nodes))]) - average
    best = bias.topk(min(count, bias.size(1)), dim=1)
    pieces = system.vocabulary.pieces
    return [
        [(pieces[token], value) for token, value in zip(tokens, values, strict=True)]
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def explain(
    *,
    run: Path = Path("runs/tiny"),
    text: str | None = None,
    items: int = 3,
    words: int = 8,
    output: Path = Path("explanation.png"),
) -> dict[str, list[tuple[str, float]]]:
    """Draw why items are recommended, and print the words that the dialog model connects with them.

    Args:
        run: Run directory.
        text: What a person says; default: the first test dialog that mentions something.
        items: Number of recommended items to explain.
        words: Number of words for each.
        output: PNG file to write.

    Returns:
        The words and their biases for each item that was mentioned or is recommended.

    Raises:
        ValueError: The run cannot be read, nothing in the text is known, or matplotlib is missing.
    """
    for name, number in (("items", items), ("words", words)):
        if number < 1:
            raise ValueError(f"{name}: must be at least 1, got {number}")
    system = load_system(run)
    reply = _reply(system, text)
    if not reply.attention:
        raise ValueError("text: mentions nothing that the graph knows")
    reason = Explainer(system.recommender.corpus.graph).reason(
        reply.attention, reply.suggestions[:items]
    )
    names = node_names(system)
    picture = draw(reason, names)
    with atomic_write(output) as temporary:
        temporary.write_bytes(picture)
    nodes = [node for node in (*reason.mentioned, *reason.recommended) if node in names]
    table = {
        names[node]: found
        for node, found in zip(nodes, top_words(system, nodes, words), strict=True)
    }
    width = max(map(len, table))
    for name, found in table.items():
        print(f"{name:<{width}}  " + " ".join(f"{word} {value:+.2f}" for word, value in found))
    print(output)
    return table


def _reply(system: System, text: str | None) -> Reply:
    """The answer to a text, or to the first test dialog that mentions something."""
    if text is None:
        pairs = (pair for pair in system.recommender.corpus.test if pair.items or pair.entities)
        first = next(pairs, None)
        if first is None:
            raise ValueError("no test dialog mentions anything; give a text")
        text = first.text
        print(text)
    conversation = Conversation(system)
    turn = conversation.say(text)
    while turn.choices:  # the first of the list is the most mentioned one
        turn = conversation.say("1")
    if turn.reply is None:
        raise ValueError("text: is empty")
    return turn.reply
