"""The graph of a catalogue out of DBpedia's dumps, as the authors build it, but reproducible.

A film's name is looked up among the abstracts by title and year; from the films found, two steps
along the mapping-based facts give the graph. Numbers come from sorted names: URIs first, then the
films that were not found, by their identifier. The dumps are read line by line and may be
compressed (``.bz2``, ``.gz``, ``.xz``).
"""

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import networkx as nx
import numpy as np

from .graph import SELF_LOOP, Triples
from .graph_files import ITEM_TABLE, Graph, catalogue_of
from .linking import split_title
from .redial import read_item_table

ABSTRACTS = "short_abstracts_en.ttl"
FACTS = "mappingbased_objects_en.ttl"
HOPS = 2

Film = tuple[str, int | None]
"""Title and year."""

_OPEN = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open}
_ABSTRACT = re.compile(r'^(<[^<>\s]+>)\s+<[^<>\s]+>\s+"(.*)"(?:@[\w-]+)?\s*\.\s*$')
_FACT = re.compile(r"^(<[^<>\s]+>)\s+(<[^<>\s]+>)\s+(<[^<>\s]+>)\s*\.\s*$")
_FOUR_DIGITS = re.compile(r"[0-9]{4}")
_IN_PARENTHESES = re.compile(r"\([^()]*\)")


def find_dump(raw: Path, name: str) -> Path | None:
    """A dump in a directory, plain or compressed."""
    candidates = (raw / f"{name}{ending}" for ending in ("", *_OPEN))
    return next((path for path in candidates if path.is_file()), None)


def has_dumps(raw: Path) -> bool:
    """Whether a directory has the dump of facts."""
    return find_dump(raw, FACTS) is not None


def read_dumps(raw: Path) -> Graph:
    """Build the graph of ReDial's films from the two dumps.

    Raises:
        ValueError: A file is missing or damaged, a line is not what it should be, or no film is
            found; the message names the file.
    """
    abstracts, facts = (find_dump(raw, name) for name in (ABSTRACTS, FACTS))
    if abstracts is None or facts is None:
        missing = ABSTRACTS if abstracts is None else FACTS
        raise ValueError(f"{raw / missing}: no such file (nor {missing}.bz2, .gz or .xz)")
    table_path = raw / ITEM_TABLE
    table = read_item_table(table_path)
    uri_of = match_items({item: name for item, (name, _) in table.items()}, abstracts)
    graph = subgraph(facts, set(uri_of.values()))
    if not graph.number_of_edges():
        raise ValueError(f"{facts}: says nothing about a film of {table_path.name}")
    # A film without facts is not in the graph; it stands alone, as one that was not found.
    key_of = {item: uri_of[item] if uri_of.get(item) in graph else item for item in table}
    triples = number_sorted(graph, key_of)
    node = {key: number for number, key in enumerate(triples.nodes)}
    rows = [(item, key_of[item], name, mentions) for item, (name, mentions) in table.items()]
    return triples, catalogue_of(rows, node, table_path), (abstracts, facts, table_path)


def match_items(names: Mapping[str, str], abstracts: Path) -> dict[str, str]:
    """URI of each film that is found by title and year.

    Args:
        names: Name of each film by its identifier.
        abstracts: The dump of abstracts.
    """
    wanted = {split_title(name) for name in names.values()}
    found: dict[Film, tuple[str, bool]] = {}
    for line in read_dump(abstracts):
        match = _ABSTRACT.match(line)
        if match is None:
            raise ValueError(f"{abstracts}: {line[:60].strip()!r} is no URI with a text")
        film, is_film = film_of(match[1], match[2])
        if film in wanted and (is_film or film not in found):
            found[film] = (match[1], is_film)
    uri_of: dict[str, str] = {}
    taken: set[str] = set()
    for item, name in names.items():
        uri, _ = found.get(split_title(name), ("", False))
        if uri and uri not in taken:
            uri_of[item] = uri
            taken.add(uri)
    return uri_of


def film_of(uri: str, abstract: str) -> tuple[Film, bool]:
    """Title and year of a resource, and whether its name says that it is a film.

    >>> film_of("<http://dbpedia.org/resource/Heat_(1995_film)>", "Heat is an American film.")
    (('Heat', 1995), True)
    """
    name = uri.strip("<>").rpartition("/")[2].replace("_", " ")
    year: int | None = None
    in_title = _FOUR_DIGITS.search(name)
    if in_title:
        year = int(in_title[0])
    else:
        in_text = _FOUR_DIGITS.search(abstract)
        if in_text and 1900 < int(in_text[0]) < 2020:
            year = int(in_text[0])
    is_film = any("film" in part for part in _IN_PARENTHESES.findall(name))
    return (_IN_PARENTHESES.sub("", name).strip(), year), is_film


def subgraph(facts: Path, films: set[str]) -> "nx.MultiDiGraph[str]":
    """What is said about films and, in a second step, about what that names.

    The dump is read once for each step, so only the result is in memory.

    Args:
        facts: The dump of facts.
        films: URIs to begin with.
    """
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    heads, seen = set(films), set[str]()
    for _ in range(HOPS):
        for line in read_dump(facts):
            match = _FACT.match(line)
            if match is None:
                raise ValueError(f"{facts}: {line[:60].strip()!r} is not three URIs")
            head, relation, tail = match.groups()
            if head in heads and "ontology" in relation:
                graph.add_edge(head, tail, key=relation)
        seen |= heads
        heads = set(graph) - seen
    return graph


def number_sorted(graph: "nx.MultiDiGraph[str]", key_of: Mapping[str, str]) -> Triples:
    """Triples with numbers in the order of the names, a self loop for every film.

    Args:
        graph: Facts about URIs; the key of an edge is its relation.
        key_of: URI of each film, or its identifier where it has none in the graph.
    """
    alone = sorted((key for key in key_of.values() if key not in graph), key=int)
    nodes = [*sorted(graph), *alone]
    node = {key: number for number, key in enumerate(nodes)}
    relations = [*sorted({relation for _, _, relation in graph.edges(keys=True)}), SELF_LOOP]
    number = {name: place for place, name in enumerate(relations)}
    rows = sorted((node[h], number[r], node[t]) for h, t, r in graph.edges(keys=True))
    rows += [(node[key], number[SELF_LOOP], node[key]) for key in sorted(key_of.values())]
    return Triples(
        rows=np.array(rows, dtype=np.int64).reshape(-1, 3),
        nodes=tuple(nodes),
        relations=tuple(relations),
        self_loop=number[SELF_LOOP],
    )


def read_dump(path: Path) -> Iterator[str]:
    """Lines of a dump without comments.

    Raises:
        ValueError: The file is damaged or not valid UTF-8; the message names it.
    """
    opened: IO[bytes] = _OPEN.get(path.suffix, Path.open)(path, "rb")  # type: ignore[operator]
    number = 0
    try:
        with opened as file:
            for line in file:
                number += 1
                text = line.decode("utf-8")
                if text.strip() and not text.startswith("#"):
                    yield text
    except UnicodeDecodeError:
        raise ValueError(f"{path}: line {number} is not valid UTF-8") from None
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, OSError) as error:
        raise ValueError(f"{path}: cannot be decompressed ({error})") from None
