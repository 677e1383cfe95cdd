"""From raw material to numbers: what every data set is turned into, and its files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from separata_shared.data.prepared import read_array
from separata_shared.files import read_lines, write_text

from .config import DataConfig
from .graph import Catalogue, KnowledgeGraph, Triples, build_graph
from .graph_files import catalogue_of, read_items
from .pairs import Part
from .redial import Dialog, Link, TurnPair, turn_pairs
from .words import Vocabulary, learn_vocabulary, read_dictionary, split_words

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Raw material: a graph, its items, and dialogs in three parts."""

    triples: Triples
    catalogue: Catalogue
    train: Sequence[Dialog]
    valid: Sequence[Dialog]
    test: Sequence[Dialog]
    link: Link
    """Nodes that a message speaks of."""
    files: tuple[Path, ...] = ()
    """What it was read from."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The graph and the three parts as numbers."""

    graph: KnowledgeGraph
    vocabulary: Vocabulary
    train: Part
    valid: Part
    test: Part

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}


def make_corpus(source: Source, data: DataConfig) -> Corpus:
    """Number words and nodes of raw material.

    Raises:
        ValueError: A part holds no turn pair, the graph does not fit, or the dictionary cannot be
            read.
    """
    graph = build_graph(source.triples, source.catalogue, threshold=data.threshold)
    node_of_item = dict(zip(graph.catalogue.ids, graph.items.tolist(), strict=True))
    pairs: dict[str, list[TurnPair]] = {
        name: [
            pair
            for dialog in getattr(source, name)
            for pair in turn_pairs(dialog, node_of_item, source.link)
        ]
        for name in SPLITS
    }
    for name, found in pairs.items():
        if not found:
            raise ValueError(f"the {name} part has no dialog in which the recommender speaks")
    words: dict[str, list[str]] = {}
    for found in pairs.values():
        for text in (text for pair in found for text in (pair.text, pair.label)):
            if text not in words:
                words[text] = split_words(text)
    if data.dictionary is not None:
        vocabulary = read_dictionary(Path(data.dictionary), slots=data.slots)
    else:
        vocabulary = learn_vocabulary(
            (words[text] for pair in pairs["train"] for text in (pair.text, pair.label)),
            slots=data.slots,
        )

    def encode(text: str) -> list[int]:
        return vocabulary.numbers(words[text])

    parts = {name: Part.of(found, encode) for name, found in pairs.items()}
    return Corpus(graph=graph, vocabulary=vocabulary, **parts)


def save_corpus(corpus: Corpus, directory: Path) -> None:
    """Write the files of a corpus into a directory.

    Raises:
        ValueError: A name has a tab or a line break.
    """
    graph, catalogue = corpus.graph, corpus.graph.catalogue
    np.save(directory / "edges.npy", graph.edges)
    _write_rows(directory / "nodes.txt", [[key] for key in graph.nodes])
    _write_rows(directory / "relations.txt", [[name] for name in graph.relations])
    columns = zip(
        catalogue.ids,
        map(str, catalogue.nodes.tolist()),
        catalogue.names,
        map(str, catalogue.mentions.tolist()),
        strict=True,
    )
    _write_rows(directory / "items.tsv", [["item", "node", "name", "mentions"], *columns])
    corpus.vocabulary.save(directory / "vocabulary.txt")
    for name, part in corpus.parts.items():
        part.save(directory, name)


def load_corpus(directory: Path) -> Corpus:
    """Read the files that ``save_corpus`` wrote.

    Raises:
        ValueError: A file is missing or damaged; the message names it.
    """
    items = read_items(directory / "items.tsv")
    nodes = tuple(read_lines(directory / "nodes.txt"))
    relations = tuple(read_lines(directory / "relations.txt"))
    graph = KnowledgeGraph(
        num_nodes=len(nodes),
        num_relations=len(relations),
        edges=read_array(directory / "edges.npy"),
        nodes=nodes,
        relations=relations,
        catalogue=catalogue_of(items, {row[1]: int(row[1]) for row in items}, directory),
    )
    parts = {name: Part.load(directory, name) for name in SPLITS}
    vocabulary = Vocabulary.load(directory / "vocabulary.txt")
    return Corpus(graph=graph, vocabulary=vocabulary, **parts)


def counts_of(corpus: Corpus) -> dict[str, Any]:
    """Sizes of the graph and of every part."""
    graph = corpus.graph
    sizes: dict[str, Any] = {
        "graph": {
            "nodes": graph.num_nodes,
            "edges": len(graph.edges),
            "relations": graph.num_relations,
            "items": len(graph.items),
        },
        "vocabulary": {"tokens": len(corpus.vocabulary)},
    }
    for name, part in corpus.parts.items():
        sizes[name] = {
            "dialogs": int((part.turns == 1).sum()),
            "pairs": len(part),
            "empty questions": sum(not text for text, _ in part.texts),
            "pairs with a target": len(part.with_target),
            "instances": part.num_instances,
            "linked nodes": len(part.entities.values),
        }
    return sizes


def _write_rows(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write rows of columns separated by tabs."""
    for row in rows:
        for value in row:
            if "\t" in value or "\n" in value or "\r" in value:
                raise ValueError(f"{path.name}: the name {value!r} has a tab or a line break")
    write_text(path, "".join("\t".join(row) + "\n" for row in rows))
