"""From configuration to recommender: the one place where a name in a YAML becomes a function."""

import torch

from .config import RecommenderConfig
from .edges import NORMALISERS, EdgeIndex
from .graph import KnowledgeGraph
from .model import (
    AutoRec,
    Recommender,
    RelationalGraphLayer,
    initialise_glorot,
    initialise_uniform,
)

INITIALISATIONS = {"uniform": initialise_uniform, "glorot": initialise_glorot}


def build_recommender(config: RecommenderConfig, graph: KnowledgeGraph) -> Recommender:
    """Compose the recommender that ``config`` describes, with fresh parameters.

    Args:
        config: Sizes and choices.
        graph: Edges and numbers of nodes and relations.

    Raises:
        ValueError: The graph's edges do not fit its sizes.
    """
    edges = EdgeIndex(
        torch.tensor(graph.edges),
        num_nodes=graph.num_nodes,
        num_relations=graph.num_relations,
        normaliser=NORMALISERS[config.aggregate],
    )
    return Recommender(
        RelationalGraphLayer(
            edges,
            width=config.width,
            num_bases=config.num_bases,
            initialise=INITIALISATIONS[config.initialisation],
        )
    )


def build_autorec(config: RecommenderConfig, graph: KnowledgeGraph) -> AutoRec:
    """The autoencoder baseline of the same width."""
    return AutoRec(graph.num_nodes, width=config.width)
