"""The authors' pickles, read by an unpickler that can make nothing but plain containers.

A pickle is a program; this one may call ``dict``, ``defaultdict``, ``list``, ``set``, ``int`` and
``str`` and nothing else. Whatever else it names is refused before anything is imported or called.
"""

import io
import pickle
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Never

import numpy as np
from separata_shared.files import find_file, need_file, read_bytes

from .entities import check_link_table
from .graph import Ints
from .graph_files import ITEM_TABLE, Graph, catalogue_of, with_self_loop
from .redial import read_item_table

_ALLOWED = {
    (module, name): made
    for modules, name, made in (
        (("collections",), "defaultdict", defaultdict),
        (("builtins", "__builtin__"), "dict", dict),
        (("builtins", "__builtin__"), "list", list),
        (("builtins", "__builtin__"), "set", set),
        (("builtins", "__builtin__"), "int", int),
        (("builtins", "__builtin__"), "str", str),
        (("__builtin__",), "long", int),
        (("__builtin__",), "unicode", str),
    )
    for module in modules
}


class _RefusedError(Exception):
    """The pickle names something that it may not."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Never:
        raise _RefusedError("an object outside the file")


def load_pickle(path: Path) -> Any:
    """What a pickle of plain containers holds.

    Raises:
        ValueError: The file is missing, damaged, or names anything else; the message says what.
    """
    content = read_bytes(path)
    try:
        value = _Unpickler(io.BytesIO(content)).load()
        _check_plain(value)
        return value
    except _RefusedError as error:
        raise ValueError(f"{path}: refused, the pickle holds {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable pickle ({reason})") from None


def _check_plain(value: Any) -> None:
    """Refuse what the opcodes themselves can make besides the containers, such as bytes."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if type(one) in (int, str, type(None)):
            continue
        if type(one) not in (dict, defaultdict, list, set, tuple):
            raise _RefusedError(f"builtins.{type(one).__name__}")
        if id(one) not in seen:
            seen.add(id(one))  # a container may hold itself
            waiting += one
            if isinstance(one, dict):
                waiting += one.values()


def has_pickles(raw: Path) -> bool:
    """Whether a directory has the authors' graph."""
    return find_file(raw, "subkg.pkl") is not None


def read_pickles(raw: Path, self_loop: int | None) -> Graph:
    """The authors' graph, ``subkg.pkl`` with its tables, and ReDial's table of films.

    Args:
        raw: Directory of the files.
        self_loop: The relation of self loops, unless ``relation2relationId.pkl`` names it; None for
            the one with most triples of a node with itself.

    Raises:
        ValueError: A file is missing, damaged or does not fit the others; the message names it.
    """
    names = ("subkg.pkl", "entity2entityId.pkl", "id2entity.pkl", "movie_ids.pkl")
    paths = {name: need_file(raw, name) for name in names}
    node_of, nodes = _numbered(paths["entity2entityId.pkl"])
    rows = _triples(paths["subkg.pkl"])
    relations_path = find_file(raw, "relation2relationId.pkl")
    if relations_path is not None:
        _, relations = _numbered(relations_path)
    else:
        relations = tuple(map(str, range(int(rows[:, 1].max(initial=-1)) + 1)))
    try:
        triples = with_self_loop(rows, nodes, relations, self_loop)
    except ValueError as error:
        raise ValueError(f"{paths['subkg.pkl']}: {error}") from None

    table_path = need_file(raw, ITEM_TABLE)
    items = _items(paths["id2entity.pkl"], node_of)
    order = _list_of_numbers(paths["movie_ids.pkl"])
    if sorted(order) != sorted(items):
        raise ValueError(f"{paths['movie_ids.pkl']}: holds other films than id2entity.pkl")
    table = read_item_table(table_path)
    unknown = [items[node] for node in order if items[node] not in table]
    if unknown:
        raise ValueError(f"{table_path}: has no film {unknown[0]}, which id2entity.pkl has")
    found = [(items[node], nodes[node], *table[items[node]]) for node in order]
    catalogue = catalogue_of(found, dict(zip(nodes, range(len(nodes)), strict=True)), table_path)
    optional = () if relations_path is None else (relations_path,)
    return triples, catalogue, (*paths.values(), *optional, table_path)


def read_link_pickle(path: Path) -> dict[str, list[str]]:
    """The authors' ``text_dict.pkl``: from a message's text to the URIs it speaks of.

    Raises:
        ValueError: The file is missing, damaged or not such a table; the message names it.
    """
    return check_link_table(load_pickle(path), path)


def _numbered(path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """A table from names to 0, 1, ... and the names in that order."""
    table = load_pickle(path)
    good = isinstance(table, Mapping) and all(
        _is(name, str, int) and _is(number, int) for name, number in table.items()
    )
    if not good or sorted(table.values()) != list(range(len(table))):
        raise ValueError(f"{path}: not a table from names to 0, 1, 2 and so on")
    number_of = {str(name): number for name, number in table.items()}
    if len(number_of) < len(table):
        raise ValueError(f"{path}: a name is there as a text and as a number")
    return number_of, tuple(sorted(number_of, key=number_of.__getitem__))


def _triples(path: Path) -> Ints:
    """Head, relation, tail in the order of the file, (T, 3)."""
    graph = load_pickle(path)
    try:
        rows = [(head, relation, tail) for head, known in graph.items() for relation, tail in known]
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path}: not a table from head to pairs of relation and tail") from None
    if not all(_is(number, int) for row in rows for number in row):
        raise ValueError(f"{path}: a head, relation or tail is not a number")
    try:
        return np.array(rows, dtype=np.int64).reshape(-1, 3)
    except OverflowError:
        raise ValueError(f"{path}: a head, relation or tail is too large") from None


def _items(path: Path, node_of: Mapping[str, int]) -> dict[int, str]:
    """Identifier of the film of each node that is one."""
    table = load_pickle(path)
    good = isinstance(table, Mapping) and all(
        _is(item, int, str) and (uri is None or isinstance(uri, str)) for item, uri in table.items()
    )
    if not good:
        raise ValueError(f"{path}: not a table from film to URI or None")
    items: dict[int, str] = {}
    for item, uri in table.items():
        key = str(item) if uri is None else uri
        node = node_of.get(key)
        if node is None:
            raise ValueError(f"{path}: film {item} is {key!r}, which entity2entityId.pkl lacks")
        if node in items:
            raise ValueError(f"{path}: films {items[node]} and {item} are both {key!r}")
        items[node] = str(item)
    return items


def _list_of_numbers(path: Path) -> list[int]:
    numbers = load_pickle(path)
    if not isinstance(numbers, list) or not all(_is(number, int) for number in numbers):
        raise ValueError(f"{path}: not a list of numbers")
    return numbers


def _is(value: object, *kinds: type) -> bool:
    """Whether a value is of one of the kinds; True and False are no numbers."""
    return isinstance(value, kinds) and not isinstance(value, bool)
