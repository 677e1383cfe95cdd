"""The edge list, the catalogue and graphs in files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from separata_kbrd.graph import (
    SELF_LOOP,
    Catalogue,
    Triples,
    build_graph,
    edge_list,
    readable,
)
from separata_kbrd.graph_files import read_npz, read_triples, read_tsv


def by_the_rule(triples, num_nodes, self_loop, threshold):
    """The rule of the authors' code step by step."""
    known = {}
    for head, relation, tail in triples:
        known.setdefault(head, []).append((relation, tail))
    edges = []
    for head in range(num_nodes):
        for relation, tail in known.get(head, []):
            if head != tail:
                edges += [(head, tail, relation), (tail, head, relation)]
    edges += [(node, node, self_loop) for node in range(num_nodes)]
    counts = {}
    for _, _, relation in edges:
        counts[relation] = counts.get(relation, 0) + 1
    number = {}
    kept = []
    for head, tail, relation in edges:
        if counts[relation] > threshold:
            kept.append((head, tail, number.setdefault(relation, len(number))))
    return sorted(set(kept)), list(number)


@given(
    triples=st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(0, 6)), max_size=40
    ),
    self_loop=st.integers(0, 5),
    threshold=st.integers(0, 12),
)
def test_edges_are_those_of_the_rule_step_by_step(triples, self_loop, threshold):
    edges, kept = edge_list(triples, num_nodes=7, self_loop=self_loop, threshold=threshold)
    expected, relations = by_the_rule(triples, 7, self_loop, threshold)
    assert [tuple(row) for row in edges.tolist()] == expected
    assert kept.tolist() == relations


def test_a_relation_with_exactly_the_threshold_goes_and_one_more_stays():
    # Each triple of two nodes is two edges: 500 triples are 1,000 edges, 501 are 1,002.
    first = [(node, 0, node + 1) for node in range(500)]
    second = [(node, 1, node + 1) for node in range(501)]
    loops = [(node, 2, node) for node in range(1001)]  # 1,001 nodes, so 1,001 self loops
    edges, kept = edge_list(first + second + loops, num_nodes=1001, self_loop=2, threshold=1000)
    assert kept.tolist() == [1, 2]
    assert np.bincount(edges[:, 2]).tolist() == [1002, 1001]
    edges, kept = edge_list(first + second + loops, num_nodes=1001, self_loop=2, threshold=999)
    assert kept.tolist() == [0, 1, 2]


def test_repeated_triples_count_for_the_threshold_but_give_one_edge():
    edges, kept = edge_list([(0, 3, 1)] * 3 + [(1, 3, 0)], num_nodes=2, self_loop=9, threshold=7)
    assert kept.tolist() == [3]  # 8 edges of relation 3, two different ones; 2 self loops
    assert edges.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_every_node_has_a_self_loop_and_loops_of_other_relations_are_left_out():
    edges, kept = edge_list([(0, 0, 0), (1, 1, 1)], num_nodes=3, self_loop=0, threshold=0)
    assert edges.tolist() == [[0, 0, 0], [1, 1, 0], [2, 2, 0]]
    assert kept.tolist() == [0]


def test_the_order_of_heads_does_not_matter_that_of_a_heads_triples_numbers_relations():
    rows = [(2, 5, 0), (0, 4, 1), (0, 5, 2)]
    _, kept = edge_list(rows, num_nodes=3, self_loop=7, threshold=0)
    assert kept.tolist() == [4, 5, 7]  # node 0 comes first, whatever the order of the file


def test_edges_stand_in_both_directions(tmp_path):
    edges, _ = edge_list([(0, 0, 1), (1, 1, 2)], num_nodes=3, self_loop=2, threshold=0)
    rows = set(map(tuple, edges.tolist()))
    assert rows == {(tail, head, relation) for head, tail, relation in rows}


def catalogue(**changes):
    values = {"ids": ("7", "8"), "names": ("A (1999)", "B"), "mentions": np.array([1, 0])}
    return Catalogue(**{"nodes": np.array([0, 2]), **values, **changes})


def triples(**changes):
    values = {"rows": np.array([(0, 0, 1)]), "nodes": ("<u:a>", "<u:b>", "8"), "self_loop": 1}
    return Triples(**{"relations": ("r", SELF_LOOP), **values, **changes})


def test_a_graph_knows_names_of_items_nodes_and_relations():
    nodes = ("<http://dbpedia.org/resource/Big_(film)>", "<http://dbpedia.org/resource/X_Y>", "8")
    graph = build_graph(triples(nodes=nodes), catalogue(), threshold=2)
    assert graph.relations == (SELF_LOOP,)  # three self loops, two edges of the other relation
    assert [graph.node_name(node) for node in range(3)] == ["A (1999)", "X Y", "B"]
    assert readable(nodes[0]) == "Big (film)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: triples(rows=np.array([(0, 0, 3)])), "the tail of triple 1 is 3, outside 0 to 2"),
        (lambda: triples(rows=np.array([(0, 0, 1), (-1, 0, 0)])), "the head of triple 2 is -1"),
        (lambda: triples(rows=np.array([(0, 2, 1)])), "the relation of triple 1 is 2"),
        (lambda: triples(rows=np.zeros((2, 2), dtype=int)), "shape"),
        (lambda: triples(nodes=()), "no node"),
        (lambda: triples(self_loop=2), "the self loop is relation 2"),
        (lambda: catalogue(nodes=np.array([0, 0])), "the node 0"),
        (lambda: catalogue(ids=("7", "7")), "the identifier '7'"),
        (lambda: catalogue(names=("A",)), "different lengths"),
        (
            lambda: build_graph(triples(), catalogue(nodes=np.array([0, 3])), threshold=0),
            "the node of item 2 is 3",
        ),
        (lambda: build_graph(triples(), catalogue(), threshold=3), "no relation has more than 3"),
    ],
)
def test_a_wrong_graph_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


ITEMS = "item\tnode\tname\tmentions\n7\t0\tA, B (1999)\t3\n8\t2\tC\t0\n"


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """A directory with a graph as an array."""
    np.savez(tmp_path / "triples.npz", triples=np.array([(0, 0, 1), (0, 1, 0)], dtype=np.int32))
    (tmp_path / "nodes.txt").write_text("<u:a>\n<u:b>\n8\n")
    (tmp_path / "items.tsv").write_text(ITEMS)
    return tmp_path


def test_a_graph_as_an_array(npz):
    found, items, files = read_npz(npz, None)
    assert found.self_loop == 1  # the only triple of a node with itself
    assert found.nodes == ("<u:a>", "<u:b>", "8")
    assert items.names == ("A, B (1999)", "C")
    assert items.mentions.tolist() == [3, 0]
    assert {path.name for path in files} == {"triples.npz", "nodes.txt", "items.tsv"}
    assert read_npz(npz, 0)[0].self_loop == 0
    (npz / "relations.txt").write_text("self_loop\nother\n")
    assert read_npz(npz, 1)[0].self_loop == 0  # the name counts more than the number


def test_the_tables_of_kbrds_data_are_read(npz):
    (npz / "items.tsv").unlink()
    (npz / "movies.tsv").write_text("movieId\tentity_id\turi\n8\t2\t-\n7\t0\t<u:a>\n")
    table = 'movieId,movieName,nbMentions\n7,"A, ""B""  (1999)",3\n8,C,0\n'
    (npz / "movies_with_mentions.csv").write_text(table)
    _, items, _ = read_npz(npz, None)
    assert items.ids == ("8", "7")  # the order of movies.tsv is the official one
    assert items.names == ("C", 'A, "B" (1999)')


def damage_npz(folder: Path, **arrays: np.ndarray) -> None:
    np.savez(folder / "triples.npz", **arrays)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "triples.npz").write_bytes(b""), ["triples.npz", "not a readable npz"]),
        (lambda f: damage_npz(f, other=np.zeros(3)), ["triples.npz", "no array named triples"]),
        (lambda f: damage_npz(f, triples=np.zeros((2, 3))), ["triples.npz", "float64"]),
        (lambda f: damage_npz(f, triples=np.zeros(6, dtype=int)), ["triples.npz", "shape"]),
        (
            lambda f: damage_npz(f, triples=np.array([(0, 0, 9)])),
            ["triples.npz", "the tail of triple 1 is 9"],
        ),
        (
            lambda f: damage_npz(f, triples=np.array([(0, 1 << 40, 1)])),
            ["triples.npz", "no number of a relation"],
        ),
        (
            lambda f: damage_npz(f, triples=np.array([("x", "y", "z")])),
            ["triples.npz", "not integers"],
        ),
        (lambda f: (f / "nodes.txt").unlink(), ["holds no nodes.txt nor entities.txt"]),
        (lambda f: (f / "items.tsv").unlink(), ["holds no movies.tsv nor items.tsv"]),
        (lambda f: (f / "triples.npz").unlink(), ["holds no triples.npz nor subkg_triples.npz"]),
        (lambda f: (f / "items.tsv").write_text("a\tb\n"), ["items.tsv", "does not begin with"]),
        (lambda f: (f / "items.tsv").write_text(ITEMS + "9\t5\tD\t1\n"), ["items.tsv", "node 5"]),
        (lambda f: (f / "items.tsv").write_text(ITEMS + "9\tx\tD\t1\n"), ["items.tsv", "'x'"]),
        (lambda f: (f / "items.tsv").write_text(ITEMS + "9\t0\tD\t1\n"), ["items.tsv", "node 0"]),
        (lambda f: (f / "items.tsv").write_text(ITEMS + "9\t0\tD\n"), ["items.tsv", "row 4"]),
    ],
)
def test_a_damaged_file_is_named(npz, damage, words):
    damage(npz)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        read_npz(npz, None)
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_an_npz_cut_off_anywhere_is_named(npz):
    whole = (npz / "triples.npz").read_bytes()
    for length in range(0, len(whole), 7):
        (npz / "triples.npz").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"triples\.npz: not a readable npz"):
            read_triples(npz / "triples.npz")


def test_objects_in_an_npz_are_not_unpickled(npz):
    damage_npz(npz, triples=np.array([[{}, 0, 0]], dtype=object))
    with pytest.raises(ValueError, match="not a readable npz"):
        read_triples(npz / "triples.npz")


def test_a_graph_as_a_table(tmp_path):
    (tmp_path / "graph.tsv").write_text("Heat\tstars\tPacino\nPacino\tborn\tNew York\n")
    (tmp_path / "items.tsv").write_text("item\tnode\tname\n1\tHeat\tHeat (1995)\n2\t-\tOther\n")
    found, items, _ = read_tsv(tmp_path)
    assert found.nodes == ("Heat", "Pacino", "New York", "2")
    assert found.relations == ("stars", "born", SELF_LOOP)
    assert found.rows.tolist() == [[0, 0, 1], [1, 1, 2]]
    assert items.nodes.tolist() == [0, 3]
    assert build_graph(found, items, threshold=0).num_relations == 3
    (tmp_path / "graph.tsv").write_text("Heat\tstars\n")
    with pytest.raises(ValueError, match=r"graph\.tsv: line 1 is not head, relation and tail"):
        read_tsv(tmp_path)


def test_a_node_that_the_table_lacks_is_named_with_its_row(tmp_path):
    (tmp_path / "graph.tsv").write_text("Heat\tstars\tPacino\n")
    items = "item\tnode\tname\n1\tHeat\tHeat (1995)\n2\t-\tOther\n"
    (tmp_path / "items.tsv").write_text(items + "777\tnonode\tNo node\n")
    with pytest.raises(ValueError, match=r"items\.tsv: row 4: the node 'nonode' .* write - for an"):
        read_tsv(tmp_path)
