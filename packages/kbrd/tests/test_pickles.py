"""Hostile, damaged and real pickles."""

import collections
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_kbrd.pickles import load_pickle, read_link_pickle, read_pickles

PLAIN = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
)


@settings(max_examples=30)
@given(value=PLAIN, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_containers_come_back(tmp_path_factory, value, protocol):
    path = tmp_path_factory.mktemp("p") / "x.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert load_pickle(path) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_sets_and_default_dicts_come_back(tmp_path, protocol):
    value = collections.defaultdict(list, {1: [(2, 3)], "s": {4, 5}})
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol))
    found = load_pickle(tmp_path / "x.pkl")
    assert type(found) is collections.defaultdict
    assert found == value
    assert found["new"] == []


class Runs:
    """Unpickling this calls a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "system": lambda mark: Runs(os.system, f"touch {mark}"),
    "Popen": lambda mark: Runs(subprocess.Popen, ["touch", str(mark)]),
    "eval": lambda mark: Runs(eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Runs(exec, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Runs(open, str(mark), "w"),
    "getattr": lambda mark: Runs(getattr, "", "join"),
    "__import__": lambda mark: Runs(__import__, "antigravity"),
    "touch": lambda mark: Runs(Path.touch, mark),
    "partial": lambda mark: __import__("functools").partial(print, "x"),
    "OrderedDict": lambda mark: collections.OrderedDict(a=1),
    "Counter": lambda mark: collections.Counter("ab"),
    "_reconstruct": lambda mark: np.zeros(3),
    "frozenset": lambda mark: frozenset({1}),
    "complex": lambda mark: 1j,
    "bytearray": lambda mark: bytearray(b"x"),
    "bytes": lambda mark: b"\xff",
    "float": lambda mark: 0.5,
    "bool": lambda mark: True,
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name_and_runs_nothing(tmp_path, name, protocol):
    mark, path = tmp_path / "executed", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"films": [HOSTILE[name](mark)]}, protocol))
    loaded = set(sys.modules)
    with pytest.raises(
        ValueError, match=r"evil\.pkl: refused, the pickle holds \w+\.\w+"
    ) as caught:
        load_pickle(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    assert set(sys.modules) == loaded  # nothing was imported either


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch executed'\ntR.",  # by the oldest opcodes
        b"(S'touch executed'\nios\nsystem\n.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch executed\x85R.",
        b"\x80\x02cbuiltins\neval\nX\x04\x00\x00\x00exit\x85R.",
        b"\x80\x04\x8c\x08builtins\x8c\x0cdict.mro\x93.",  # an attribute of an allowed name
        b"\x80\x04\x8c\x0bcollections\x8c\x17defaultdict.__class__\x93.",
        b"Pfile on a server\n.",
        b"\x80\x02\x82\x01.",  # an extension code
    ],
)
def test_hand_made_attacks_end_in_one_line(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"evil\.pkl: (refused|not a readable pickle)") as caught:
        load_pickle(path)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["evil.pkl"]


def test_a_container_that_holds_itself_is_no_endless_loop(tmp_path):
    value = [1]
    value.append(value)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
    assert load_pickle(tmp_path / "x.pkl")[0] == 1


def test_a_pickle_cut_off_anywhere_is_named(tmp_path):
    whole = pickle.dumps({"a": [1, 2, (3, "b")], 7: {8}})
    for length in range(len(whole)):
        (tmp_path / "cut.pkl").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pkl: not a readable pickle"):
            load_pickle(tmp_path / "cut.pkl")


@settings(max_examples=60)
@given(content=st.binary(max_size=60))
def test_noise_never_raises_anything_else(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("noise") / "x.pkl"
    path.write_bytes(content)
    with suppress(ValueError):
        load_pickle(path)


NAMES = {"<u:heat>": 0, 42: 1, "<u:pacino>": 2}
FILES = {
    "subkg.pkl": collections.defaultdict(list, {0: [(0, 2), (1, 0)], 1: [(1, 1)]}),
    "entity2entityId.pkl": NAMES,
    "id2entity.pkl": {7: "<u:heat>", 42: None},
    "movie_ids.pkl": [1, 0],
    "relation2relationId.pkl": {"stars": 0, "self_loop": 1},
}


@pytest.fixture
def raw(tmp_path):
    for name, value in FILES.items():
        (tmp_path / name).write_bytes(pickle.dumps(value))
    table = "movieId,movieName,nbMentions\n7,Heat (1995),3\n42,Other,0\n"
    (tmp_path / "movies_with_mentions.csv").write_text(table)
    return tmp_path


def test_the_authors_files_give_a_graph(raw):
    triples, items, files = read_pickles(raw, None)
    assert triples.nodes == ("<u:heat>", "42", "<u:pacino>")
    assert triples.relations == ("stars", "self_loop")
    assert triples.self_loop == 1
    assert triples.rows.tolist() == [[0, 0, 2], [0, 1, 0], [1, 1, 1]]
    assert items.ids == ("42", "7")  # the order of movie_ids.pkl
    assert items.nodes.tolist() == [1, 0]
    assert len(files) == 6
    (raw / "relation2relationId.pkl").unlink()
    assert read_pickles(raw, None)[0].self_loop == 1  # two triples of a node with itself


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("subkg.pkl", [1, 2], "not a table from head"),
        ("subkg.pkl", {0: [(0, 1, 2)]}, "not a table from head"),
        ("subkg.pkl", {0: [(0, "x")]}, "not a number"),
        ("subkg.pkl", {0: [(0, None)]}, "not a number"),
        ("subkg.pkl", {0: [(0, 1 << 70)]}, "too large"),
        ("subkg.pkl", {0: [(0, 9)]}, "the tail of triple 1 is 9"),
        ("entity2entityId.pkl", {"a": 0, "b": 2}, "0, 1, 2 and so on"),
        ("entity2entityId.pkl", {"a": 0, "b": "c"}, "0, 1, 2 and so on"),
        ("entity2entityId.pkl", {"4": 0, 4: 1}, "as a text and as a number"),
        ("id2entity.pkl", {7: "<u:none>"}, "film 7 is '<u:none>'"),
        ("id2entity.pkl", {7: "<u:heat>", 8: "<u:heat>"}, "films 7 and 8 are both"),
        ("id2entity.pkl", [7], "not a table from film"),
        ("movie_ids.pkl", [0], "other films"),
        ("movie_ids.pkl", {0: 1}, "not a list of numbers"),
    ],
)
def test_files_that_do_not_fit_are_named(raw, name, value, words):
    (raw / name).write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        read_pickles(raw, None)
    assert name in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_of_links_is_checked(tmp_path):
    path = tmp_path / "text_dict.pkl"
    path.write_bytes(pickle.dumps({"hi": ["<u:a>"], "": []}))
    assert read_link_pickle(path)["hi"] == ["<u:a>"]
    path.write_bytes(pickle.dumps({"hi": [3]}))
    with pytest.raises(ValueError, match=r"text_dict\.pkl: the entry 'hi'"):
        read_link_pickle(path)
