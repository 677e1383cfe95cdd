"""Graphs in files: numbers in an array (npz), or names in a table (TSV).

**npz**: the file ``triples.npz`` with one array ``triples`` of integers (T, 3), head, relation,
tail; ``nodes.txt``, whose line i is the key of node i; ``items.tsv``. There may be
``relations.txt``, whose line r is the name of relation r. The names ``subkg_triples.npz`` and
``entities.txt`` are read as well.

**TSV**: ``graph.tsv`` without a heading, ``head<TAB>relation<TAB>tail``, keys of nodes and names of
relations; nodes are numbered as they first appear. ``items.tsv`` with keys in the column ``node``.

**items.tsv** has the heading ``item<TAB>node<TAB>name`` and perhaps ``<TAB>mentions``: the
identifier that dialogs write after ``@``, the node (in npz its number), a name, and how often the
item is mentioned. With TSV an item whose node is ``-`` becomes a node of its own; any other key
must stand in ``graph.tsv``. The table ``movies.tsv`` (``movieId``, ``entity_id``, ``uri``) beside
ReDial's ``movies_with_mentions.csv`` is read as well.

Any of the texts may be compressed (``.gz``, ``.xz``).
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from separata_shared.files import find_file, need_file, read_lines

from .graph import SELF_LOOP, Catalogue, Ints, Triples
from .redial import read_item_table

TRIPLES = ("triples.npz", "subkg_triples.npz")
NO_NODE = "-"
ITEM_TABLE = "movies_with_mentions.csv"

Graph = tuple[Triples, Catalogue, tuple[Path, ...]]
"""Triples, items, and the files they come from."""


def find_any(raw: Path, names: Sequence[str]) -> Path | None:
    """The first file of ``names`` in a directory, plain or compressed."""
    return next((path for name in names if (path := find_file(raw, name))), None)


def need_any(raw: Path, names: Sequence[str]) -> Path:
    """The first file of ``names`` in a directory, plain or compressed.

    Raises:
        ValueError: None is there.
    """
    path = find_any(raw, names)
    if path is None:
        raise ValueError(f"{raw}: holds no {' nor '.join(names)}, plain, .gz or .xz")
    return path


def has_npz(raw: Path) -> bool:
    """Whether a directory has a graph as an array."""
    return find_any(raw, TRIPLES) is not None


def has_tsv(raw: Path) -> bool:
    """Whether a directory has a graph as a table."""
    return find_any(raw, ("graph.tsv",)) is not None


def read_npz(raw: Path, self_loop: int | None) -> Graph:
    """A graph as an array.

    Args:
        raw: Directory of the files.
        self_loop: The relation of self loops, unless ``relations.txt`` names it ``self_loop``; None
            for the one with most triples of a node with itself.

    Raises:
        ValueError: A file is missing, damaged or does not fit the others; the message names it.
    """
    path = need_any(raw, TRIPLES)
    nodes_path = need_any(raw, ("nodes.txt", "entities.txt"))
    relations_path = find_file(raw, "relations.txt")
    rows = read_triples(path)
    nodes = tuple(read_lines(nodes_path))
    if relations_path is not None:
        relations = tuple(read_lines(relations_path))
    else:
        # Looked at first: a huge number in a damaged file must not make so many names.
        _check_below(rows[:, 1], max(len(rows), 1 << 16), path)
        relations = tuple(map(str, range(int(rows[:, 1].max(initial=-1)) + 1)))
    try:
        triples = with_self_loop(rows, nodes, relations, self_loop)
        catalogue, files = _items_by_number(raw)
    except ValueError as error:
        raise ValueError(_naming(error, path)) from None
    outside = np.flatnonzero((catalogue.nodes < 0) | (catalogue.nodes >= len(nodes)))
    if len(outside):
        node = catalogue.nodes[outside[0]]
        raise ValueError(f"{files[0]}: item {outside[0] + 1} has node {node} of {len(nodes)}")
    named = () if relations_path is None else (relations_path,)
    return triples, catalogue, (path, nodes_path, *named, *files)


def read_triples(path: Path) -> Ints:
    """The array ``triples`` of a file, (T, 3).

    Raises:
        ValueError: The file is missing, damaged, or holds something else; the message names it.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            array: NDArray[np.generic] = stored["triples"]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except KeyError:
        raise ValueError(f"{path}: has no array named triples") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        # The last two: a bare array, or a file that is cut off in its first bytes.
        raise ValueError(f"{path}: not a readable npz file ({error})") from None
    except Exception as error:  # zlib.error and what else a damaged member raises
        raise ValueError(f"{path}: not a readable npz file ({error})") from None
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{path}: triples are {array.dtype}, not integers")
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"{path}: triples have the shape {array.shape} instead of (T, 3)")
    return array.astype(np.int64)


def with_self_loop(
    rows: Ints, nodes: tuple[str, ...], relations: tuple[str, ...], self_loop: int | None
) -> Triples:
    """Triples whose self loop is named, given, guessed or new, in that order."""
    if SELF_LOOP in relations:
        self_loop = relations.index(SELF_LOOP)
    elif self_loop is None:
        own = rows[rows[:, 0] == rows[:, 2], 1]
        if len(own) and own.min() >= 0:
            self_loop = int(np.bincount(own).argmax())
        else:
            self_loop = len(relations)
            relations = (*relations, SELF_LOOP)
    return Triples(rows=rows, nodes=nodes, relations=relations, self_loop=self_loop)


def _check_below(numbers: Ints, count: int, path: Path) -> None:
    if len(numbers) and numbers.max() >= count:
        raise ValueError(f"{path}: relation {numbers.max()} is no number of a relation")


def _naming(error: ValueError, path: Path) -> str:
    """The message, with the file in front unless it names one."""
    return str(error) if str(error).startswith(str(path.parent)) else f"{path}: {error}"


def _items_by_number(raw: Path) -> tuple[Catalogue, tuple[Path, ...]]:
    path = find_file(raw, "items.tsv")
    if path is not None:
        rows = read_items(path)
        for row, (_, node, _, _) in enumerate(rows, start=2):
            _number(node, path, row)
        return catalogue_of(rows, {node: int(node) for _, node, _, _ in rows}, path), (path,)
    path = need_any(raw, ("movies.tsv", "items.tsv"))
    table_path = need_file(raw, ITEM_TABLE)
    table = read_item_table(table_path)
    lines = [line.split("\t") for line in read_lines(path)]
    if lines[0] != ["movieId", "entity_id", "uri"]:
        raise ValueError(f"{path}: does not begin with movieId, entity_id and uri")
    rows = []
    for row, line in enumerate(lines[1:], start=2):
        if len(line) != 3 or line[0] not in table:
            raise ValueError(f"{path}: row {row} is no film of {ITEM_TABLE} with node and URI")
        _number(line[1], path, row)
        rows.append((line[0], line[1], *table[line[0]]))
    return catalogue_of(rows, {node: int(node) for _, node, _, _ in rows}, path), (path, table_path)


def _number(text: str, path: Path, row: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise ValueError(f"{path}: row {row}: {text!r} is no number of a node")
    return int(text)


ItemRow = tuple[str, str, str, int]
"""Identifier, node (key or number), name and mentions of an item."""


def read_items(path: Path) -> list[ItemRow]:
    """Rows of ``items.tsv``.

    Raises:
        ValueError: The file cannot be read or is not such a table; the message names it.
    """
    lines = [line.split("\t") for line in read_lines(path)]
    if lines[0] not in (["item", "node", "name"], ["item", "node", "name", "mentions"]):
        raise ValueError(f"{path}: does not begin with item, node, name (and mentions)")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        mentions = line[3] if len(line) == 4 else "0"
        if len(line) != len(lines[0]) or not (mentions.isascii() and mentions.isdecimal()):
            raise ValueError(f"{path}: row {number} has other columns than the heading")
        rows.append((line[0], line[1], line[2], int(mentions)))
    if not rows:
        raise ValueError(f"{path}: holds no item")
    return rows


def catalogue_of(rows: Sequence[ItemRow], node_of: dict[str, int], path: Path) -> Catalogue:
    """The catalogue of rows and the number of the node of each.

    Raises:
        ValueError: Two items share an identifier or a node; the message names ``path``.
    """
    try:
        return Catalogue(
            ids=tuple(row[0] for row in rows),
            nodes=np.array([node_of[row[1]] for row in rows], dtype=np.int64),
            # ReDial's table has two blanks before some years.
            names=tuple(" ".join(row[2].split()) for row in rows),
            mentions=np.array([row[3] for row in rows], dtype=np.int64),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_tsv(raw: Path) -> Graph:
    """A graph as a table of names.

    Raises:
        ValueError: A file is missing or damaged, or an item's node is not in the graph; the message
            names the file and the line.
    """
    path, items_path = need_file(raw, "graph.tsv"), need_file(raw, "items.tsv")
    keys: list[tuple[str, str, str]] = []
    for number, line in enumerate(read_lines(path), start=1):
        columns = line.split("\t")
        if len(columns) != 3 or not all(columns):
            raise ValueError(f"{path}: line {number} is not head, relation and tail")
        keys.append((columns[0], columns[1], columns[2]))
    rows = read_items(items_path)
    known = {key for head, _, tail in keys for key in (head, tail)}
    for number, (_, key, _, _) in enumerate(rows, start=2):
        # A slip of the pen would else be one more node, about which nothing is known.
        if key != NO_NODE and key not in known:
            raise ValueError(
                f"{items_path}: row {number}: the node {key!r} is not in {path.name}; "
                f"write {NO_NODE} for an item that the graph does not know"
            )
    rows = [(row[0], row[0] if row[1] == NO_NODE else row[1], *row[2:]) for row in rows]
    triples = number_triples(keys, [row[1] for row in rows])
    node_of = {key: node for node, key in enumerate(triples.nodes)}
    return triples, catalogue_of(rows, node_of, items_path), (path, items_path)


def number_triples(keys: Sequence[tuple[str, str, str]], more_nodes: Sequence[str]) -> Triples:
    """Number nodes and relations as they first appear.

    Args:
        keys: Head, relation and tail of each triple, by name.
        more_nodes: Further nodes, which may have no triple.
    """
    ends = (key for head, _, tail in keys for key in (head, tail))
    nodes = {key: node for node, key in enumerate(dict.fromkeys([*ends, *more_nodes]))}
    names = dict.fromkeys(relation for _, relation, _ in keys)
    relations = {name: number for number, name in enumerate(names)}
    numbered = [(nodes[head], relations[name], nodes[tail]) for head, name, tail in keys]
    rows = np.array(numbered, dtype=np.int64).reshape(-1, 3)
    if SELF_LOOP not in relations:
        relations[SELF_LOOP] = len(relations)
    return Triples(
        rows=rows, nodes=tuple(nodes), relations=tuple(relations), self_loop=relations[SELF_LOOP]
    )
