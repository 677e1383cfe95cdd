"""Nodes of the graph that a message speaks of: by a table, by their names, or by DBpedia Spotlight.

The authors link every message with DBpedia Spotlight and keep the answers in a table.
"""

import http.client
import json
import re
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from separata_shared.files import read_json

from .graph import KnowledgeGraph, readable
from .names import Names, Text, is_ordinary, words_of
from .redial import Link

LinkUris = Callable[[str], Sequence[str]]
"""URIs in angle brackets that a message speaks of, in order, with repeats."""

CONFIDENCE = 0.1
"""Of Spotlight in the authors' script."""

_PARENTHESES = re.compile(r"\s*\([^)]*\)")
_GENRE = re.compile(r"^(.+?)(?: film| fiction| \((?:modern )?genre\))$")
_NOT_GENRES = frozenset(("feature", "short", "television", "genre", "young", "silent", "crowd"))
_PLURALS = ("{}", "{} film", "{} films", "{} movie", "{} movies")
_SCIENCE_FICTION = ("sci fi", "scifi", "sci fi movie", "sci fi movies")


def nodes_of(link: LinkUris, number: Mapping[str, int]) -> Link:
    """From URIs to nodes, given the node of each key; a URI that is not a node is left out."""
    return lambda text: [number[uri] for uri in link(text) if uri in number]


def read_link_table(path: Path) -> dict[str, list[str]]:
    """A table from a message's text to the URIs it speaks of.

    Args:
        path: JSON ``{text: [uri, ...]}``, plain or compressed.

    Raises:
        ValueError: The file cannot be read or is not such a table; the message names it.
    """
    return check_link_table(read_json(path), path)


def check_link_table(table: object, path: Path) -> dict[str, list[str]]:
    """The value itself, if it is a table from text to URIs.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"{path}: not a table from text to URIs")
    for text, uris in table.items():
        good = isinstance(text, str) and isinstance(uris, list | tuple)
        if not good or not all(isinstance(uri, str) for uri in uris):
            raise ValueError(f"{path}: the entry {str(text)[:40]!r} is not text and a list of URIs")
    return dict(table)


def table_linker(table: Mapping[str, Sequence[str]]) -> LinkUris:
    """Looks a message up; what the table does not hold has no links."""
    return lambda text: table.get(text, ())


class NameLinker:
    """Finds nodes by the names in their keys, the longest names first; needs no network.

    A name counts if it has two words or more that are not all ordinary, or if it is that of a genre
    ("horror", "horror movies"). One other word counts if it is the key itself, not a URI, and the
    text writes it just so: DBpedia has a node for nearly every word, somebody's own table has those
    that matter to it. Of nodes with the same name the one with most edges is meant. Items are left
    out: they have titles, which ``linking.TitleLinker`` finds.

    Args:
        nodes: Key of each node.
        degrees: Number of edges of each node.
        items: Nodes of the items.
    """

    def __init__(
        self, nodes: Sequence[str], *, degrees: Sequence[int], items: Sequence[int]
    ) -> None:
        self._names = Names()
        self._as_written: dict[str, int] = {}
        left_out = set(items)
        kept = [node for node in range(len(nodes)) if node not in left_out]
        # The first node of a name is meant: of genres that of films, then the one with most edges.
        for node in sorted(
            kept, key=lambda one: (not nodes[one].endswith("_film>"), -degrees[one])
        ):
            self._add(nodes[node], node)

    def _add(self, key: str, node: int) -> None:
        name = readable(key)
        genre = _GENRE.match(name)
        if genre and genre[1].lower() not in _NOT_GENRES and not genre[1][0].isdigit():
            for form in _PLURALS:
                self._names.add(form.format(genre[1]), node, alias=True)
        if name.lower() in ("science fiction", "science fiction film"):
            for form in _SCIENCE_FICTION:
                self._names.add(form, node, alias=True)
        plain = _PARENTHESES.sub("", name)
        words = words_of(plain)
        if is_ordinary([word.form for word in words]):
            return
        if len(words) > 1:
            self._names.add(plain, node, alias=False)
        elif name == key:  # no URI
            self._as_written.setdefault(plain[words[0].start : words[0].end], node)

    def __call__(self, text: str) -> list[int]:
        """Nodes in the order of the text, with repeats."""
        read = Text(text)
        found = []
        place = 0
        while place < len(read.words):
            names = self._names.longest_first(read.words, place)
            word = read.words[place]
            node = self._as_written.get(text[word.start : word.end])
            count = 1
            if not read.between(place).endswith("@"):
                if names:
                    count, things = names[0]
                    found.append(things[0])
                elif node is not None:
                    found.append(node)
            place += count
        return found


def name_linker(graph: KnowledgeGraph) -> NameLinker:
    """The linker of a graph's nodes."""
    return NameLinker(
        graph.nodes,
        degrees=np.bincount(graph.edges[:, 0], minlength=graph.num_nodes).tolist(),
        items=graph.items.tolist(),
    )


def spotlight_linker(
    url: str, *, confidence: float = CONFIDENCE, seconds: float = 10.0
) -> LinkUris:
    """Asks a DBpedia Spotlight service; nothing is sent before the first message.

    Args:
        url: Address of the service's ``annotate``, ``http://localhost:2222/rest/annotate`` for a
            service on this machine. Messages are sent there.
        confidence: Least confidence of a link.
        seconds: Longest wait for an answer.

    Raises:
        ValueError: The address is not one of the web.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"Spotlight needs an address that begins with http, not {url!r}")

    def link(text: str) -> list[str]:
        if not text.strip():
            return []
        query = urllib.parse.urlencode({"text": text, "confidence": confidence})
        request = urllib.request.Request(
            url, data=query.encode("utf-8"), headers={"Accept": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                found = json.loads(answer.read())
            return [f"<{one['@URI']}>" for one in found.get("Resources", [])]
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{url}: Spotlight does not answer ({error})") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{url}: the answer is not that of Spotlight") from None

    return link
