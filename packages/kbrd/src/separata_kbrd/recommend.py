"""Items for a text or a list of items, with what in it they rest on: the verb ``recommend``."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from separata_shared.files import write_json

from .entities import NameLinker, name_linker
from .generate import standard_input
from .linking import TitleLinker
from .pairs import pad_nodes
from .runs import TrainedRecommender, load_recommender

NOTHING_RECOGNISED = (
    "nothing in it was recognised; the list is the one for everybody, "
    "ordered by the bias that training gave each item"
)


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """An item that is recommended."""

    id: str
    """Its identifier in the catalogue."""
    name: str
    """Its name."""
    score: float
    """Its score; the best one is first."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """Items for one request."""

    items: tuple[Suggestion, ...]
    """The best items that were not mentioned, best first."""
    attention: tuple[tuple[str, float], ...]
    """Mentioned nodes of the graph and their weights in the user vector, which sum to one, largest
    first; empty where nothing was recognised."""
    notes: tuple[str, ...] = ()
    """What to know about how the text was read."""


class Suggester:
    """Answers requests with a trained recommender; the vectors of all nodes are computed already.

    Args:
        trained: The recommender and its data.
    """

    def __init__(self, trained: TrainedRecommender) -> None:
        self.trained = trained
        self._graph = trained.corpus.graph
        self._items = torch.tensor(self._graph.items)
        self._place = {int(node): place for place, node in enumerate(self._graph.items)}

    @cached_property
    def titles(self) -> TitleLinker:
        """Finds items in text."""
        return TitleLinker(self._graph.catalogue)

    @cached_property
    def names(self) -> NameLinker:
        """Finds other nodes in text."""
        return name_linker(self._graph)

    def read(self, text: str) -> tuple[list[int], tuple[str, ...]]:
        """Nodes that a text mentions, items first, and notes about what was not clear.

        Of several items with one title the most mentioned one is taken.
        """
        nodes, notes, rest, place = [], [], [], 0
        for mention in self.titles.find(text):
            if mention.other_year is not None:
                notes.append(f"there is no {mention.text!r} in the catalogue")
                continue
            if len(mention.candidates) > 1:
                name = self._graph.item_names[mention.candidates[0]]
                notes.append(f"{mention.text!r} was taken for {name}")
            nodes.append(int(self._graph.items[mention.candidates[0]]))
            rest.append(text[place : mention.start])
            place = mention.end
        rest.append(text[place:])
        return nodes + self.names(" . ".join(rest)), tuple(notes)

    def node_of(self, item: str) -> int:
        """Node of an item given by its identifier or name.

        Raises:
            ValueError: The catalogue has no such item.
        """
        catalogue = self._graph.catalogue
        if item in catalogue.ids:
            return int(catalogue.nodes[catalogue.ids.index(item)])
        for mention in self.titles.find(item):
            if mention.other_year is None and (mention.start, mention.end) == (0, len(item)):
                return int(catalogue.nodes[mention.candidates[0]])
        raise ValueError(f"items: {item!r} is not in the catalogue of {len(catalogue)} items")

    @torch.inference_mode()
    def recommend(self, requests: Sequence[Sequence[int]], k: int = 10) -> list[Recommendation]:
        """Best items for each request; the answer to one does not depend on the others.

        Args:
            requests: Mentioned nodes of each; none means that nothing is known about the person.
            k: Number of items, fewer where all others were mentioned.

        Raises:
            ValueError: ``k`` is not positive.
        """
        if k < 1:
            raise ValueError(f"k: must be at least 1, got {k}")
        if not requests:
            return []
        once = self.trained.config.mentions == "set"
        seen = [sorted(set(request)) if once else list(request) for request in requests]
        nodes, mask = pad_nodes(seen)
        model = self.trained.model
        users, weights = model.users(nodes, mask)
        scores = model.scores(users, self._items)
        for row, request in zip(scores, seen, strict=True):
            known = [self._place[node] for node in request if node in self._place]
            row[known] = -torch.inf
        values, places = scores.topk(min(k, len(self._items)), dim=1)
        return [
            Recommendation(
                items=self._suggestions(order, row), attention=self._attention(request, weight)
            )
            for order, row, request, weight in zip(
                places.tolist(), values.tolist(), seen, weights.tolist(), strict=True
            )
        ]

    def _suggestions(self, places: list[int], scores: list[float]) -> tuple[Suggestion, ...]:
        catalogue = self._graph.catalogue
        return tuple(
            Suggestion(id=catalogue.ids[place], name=catalogue.names[place], score=score)
            for place, score in zip(places, scores, strict=True)
            if score > -torch.inf
        )

    def _attention(self, nodes: list[int], weights: list[float]) -> tuple[tuple[str, float], ...]:
        total: dict[int, float] = {}
        for node, weight in zip(nodes, weights, strict=False):
            total[node] = total.get(node, 0.0) + weight
        ranked = sorted(total.items(), key=lambda pair: -pair[1])
        return tuple((self._graph.node_name(node), weight) for node, weight in ranked)


def recommend(
    *,
    run: Path = Path("runs/tiny"),
    text: str | None = None,
    items: list[str | int] | str | int | None = None,
    k: int = 10,
    output: Path | None = None,
) -> list[Recommendation]:
    """Recommend items for a text or a list of items, and show what they rest on.

    Without both, every line of standard input is a request. Where nothing is recognised, a line on
    standard error says so.

    Args:
        run: Run directory with a trained recommender.
        text: What somebody says; items and other nodes of the graph are found in it.
        items: Items that somebody likes, by identifier or name: ``101``, ``[101, 102]`` or
            ``["Heat (1995)", 101]``.
        k: Number of items.
        output: JSON file to write besides what is printed.

    Returns:
        The recommendations, one for each request.

    Raises:
        ValueError: The run cannot be read, or an item is not in the catalogue.
    """
    suggester = Suggester(load_recommender(run))
    from_input = text is None and items is None
    texts = standard_input(sys.stdin.buffer) if from_input else [text or ""]
    read = [suggester.read(one) for one in texts]
    listed = [items] if isinstance(items, str | int) else items or []
    liked = [suggester.node_of(str(item)) for item in listed]
    found = suggester.recommend([liked + nodes for nodes, _ in read], k)
    answers = [
        Recommendation(items=one.items, attention=one.attention, notes=notes)
        for one, (_, notes) in zip(found, read, strict=True)
    ]
    for number, answer in enumerate(answers, start=1):
        if not answer.attention:
            which = f"request {number}" if from_input else "the request"
            print(f"{which}: {NOTHING_RECOGNISED}", file=sys.stderr)
        print("\n".join(lines_of(answer)))
    if output is not None:
        write_json(output, [asdict(answer) for answer in answers])
        print(output)
    return answers


def lines_of(answer: Recommendation) -> list[str]:
    """A recommendation as lines of text."""
    lines = [f"note: {note}" for note in answer.notes]
    lines += [f"{place:>3}. {item.name}" for place, item in enumerate(answer.items, start=1)]
    if answer.attention:
        shown = ", ".join(f"{name} {weight:.0%}" for name, weight in answer.attention)
        lines.append(f"     because of: {shown}")
    return lines
