"""Reasons: the paths are in the graph, the picture is a picture, the words are the bias's."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from separata_kbrd.explain import Explainer, Reason, draw, layout, node_names, top_words
from separata_kbrd.graph import Catalogue, KnowledgeGraph
from separata_kbrd.system import System


def made_graph(pairs: list[tuple[int, int]], nodes: int) -> KnowledgeGraph:
    """A graph of undirected edges of one relation, and self loops."""
    rows = {(a, b, 0) for a, b in pairs} | {(b, a, 0) for a, b in pairs}
    loops = {(node, node, 1) for node in range(nodes)}
    return KnowledgeGraph(
        num_nodes=nodes,
        num_relations=2,
        edges=np.array(sorted(rows | loops), dtype=np.int64),
        nodes=tuple(f"<http://example.org/resource/Node_{node}>" for node in range(nodes)),
        relations=("<http://example.org/ontology/starring>", "self_loop"),
        catalogue=Catalogue(
            ids=("1",), nodes=np.array([0]), names=("Zero (1999)",), mentions=np.array([1])
        ),
    )


def test_a_reason_holds_the_shortest_paths_and_their_relations() -> None:
    graph = made_graph([(0, 1), (1, 2), (0, 3), (3, 2), (2, 4), (4, 5), (5, 6)], 8)
    reason = Explainer(graph).reason([(2, 0.75), (6, 0.25), (7, 0.0)], [0])
    assert {edge[:2] for edge in reason.edges} == {(0, 1), (1, 2), (0, 3), (2, 3)}
    assert {edge[2] for edge in reason.edges} == {"starring"}
    assert reason.mentioned == {2: 0.75, 6: 0.25, 7: 0.0}  # from 6 it is too far, from 7 no way
    assert set(reason.nodes) == {0, 1, 2, 3, 6, 7}


def test_weights_of_a_node_that_was_mentioned_twice_are_added() -> None:
    reason = Explainer(made_graph([(0, 1)], 2)).reason([(1, 0.5), (1, 0.25), (0, 0.25)], [0])
    assert reason.mentioned == {1: 0.75, 0: 0.25}


@given(
    mentioned=st.sets(st.integers(0, 5), max_size=4),
    recommended=st.lists(st.integers(0, 9), max_size=3, unique=True),
    edges=st.lists(st.tuples(st.integers(0, 4), st.integers(5, 9)), max_size=8, unique=True),
)
def test_every_node_has_a_place_of_its_own_inside_the_picture(
    mentioned: set[int], recommended: list[int], edges: list[tuple[int, int]]
) -> None:
    reason = Reason(
        mentioned=dict.fromkeys(mentioned, 0.1),
        recommended=tuple(recommended),
        edges=tuple((*edge, "genre") for edge in edges),
    )
    places = layout(reason)
    assert places.keys() == set(reason.nodes)
    assert len(set(places.values())) == len(places)
    assert all(0 <= x <= 1 and 0 <= y <= 1 for x, y in places.values())
    assert all(places[item][0] == 1 for item in recommended)
    assert all(places[node][0] == 0 for node in mentioned - set(recommended))


@pytest.mark.parametrize("name", ["$100 & $2", "名字", "x" * 200, "<b>", ""])
def test_any_name_can_be_drawn(name: str) -> None:
    from PIL import Image

    reason = Reason(mentioned={1: 1.0}, recommended=(0,), edges=((0, 1, "genre"),))
    with Image.open(io.BytesIO(draw(reason, {0: name, 1: name}))) as picture:
        assert picture.format == "PNG"
        assert picture.size[0] == 1100


def test_words_of_a_node_are_those_its_bias_lifts_most(system: System) -> None:
    nodes = system.recommender.corpus.graph.items[:2].tolist()
    (first, _) = found = top_words(system, nodes, 3)
    assert [len(words) for words in found] == [3, 3]
    frozen, bias = system.recommender.model, system.network.bias
    items = torch.from_numpy(system.recommender.corpus.graph.items)
    with torch.no_grad():
        user, _ = frozen.users(torch.tensor([nodes[:1]]), torch.tensor([[True]]))
        shift = bias(user)[0] - bias(frozen.H[items]).mean(dim=0)
    assert first[0][0] == system.vocabulary.pieces[int(shift.argmax())]
    assert first[0][1] == pytest.approx(shift.max().item(), abs=1e-5)


def test_names_of_nodes_are_readable(system: System) -> None:
    names = node_names(system)
    assert len(names) == system.recommender.corpus.graph.num_nodes
    assert not any(name.startswith("<http") for name in names.values())


def test_the_command_writes_a_picture_and_prints_a_table(
    command: Callable[..., Any], talking_run: Path
) -> None:
    done = command("explain", "--run", talking_run, "--output", "why.png", "--items", 2)
    assert done.status == 0, done
    assert Path("why.png").read_bytes().startswith(b"\x89PNG")
    assert done.output.splitlines()[-1] == "why.png"
    command("explain", "--run", talking_run, "--text", "zzz qqq").refused("text")
    command("explain", "--run", talking_run, "--items", 0).refused("items")
    command("explain", "--run", "nowhere").refused("nowhere", "train-dialog")
