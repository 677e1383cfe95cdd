"""Numbers that the paper and the authors' code state."""

import pytest
import torch
from separata_kbrd.config import RecommenderConfig
from separata_kbrd.diversity import distinct_per_response
from separata_kbrd.edges import EdgeIndex
from separata_kbrd.model import Recommender, RelationalGraphLayer

# Sizes of the authors' files after their filter; specification, section 2.
NODES, RELATIONS = 64362, 35


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    """A recommender of the paper's size without memory."""
    loops = torch.arange(NODES)
    edges = EdgeIndex(
        torch.stack([loops, loops, torch.full_like(loops, RELATIONS - 1)], dim=1),
        num_nodes=NODES,
        num_relations=RELATIONS,
    )
    config = RecommenderConfig()
    with torch.device("meta"):
        layer = RelationalGraphLayer(
            edges,
            width=config.width,
            num_bases=config.num_bases,
            initialise=lambda layer: None,
        )
        return Recommender(layer)


def test_the_graph_layer_has_66_million_parameters_for_its_bases(
    recommender: Recommender,
) -> None:
    # 65.9 M bases and 8.2 M root: specification, section 4.5.
    assert recommender.graph.basis.numel() == 8 * NODES * 128 == 65_906_688
    assert recommender.graph.root.numel() == NODES * 128 == 8_238_336


def test_the_rest_has_81_thousand_parameters(recommender: Recommender) -> None:
    large = {"graph.basis", "graph.root"}
    rest = sum(p.numel() for name, p in recommender.named_parameters() if name not in large)
    # att, bias, A, b, and a bias for each node.
    assert rest == RELATIONS * 8 + 128 + 128 * 128 + 128 + NODES
    assert round(rest / 1000) == 81


def test_no_tensor_of_relations_times_nodes_is_a_parameter(recommender: Recommender) -> None:
    assert max(p.numel() for p in recommender.parameters()) < RELATIONS * NODES * 128


def test_distinct_n_of_the_authors_can_exceed_one() -> None:
    responses = [["a", "b", "c", "d"], []]
    assert distinct_per_response(responses, 2).value == 1.5  # an empty response counts
    assert distinct_per_response(responses, 4).value == 0.5
    with pytest.raises(ValueError, match="something must be said"):
        distinct_per_response([], 2)
