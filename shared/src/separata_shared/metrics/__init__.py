"""Evaluation metrics; each returns a ``Score`` that says how it was computed."""

from separata_shared.metrics.bleu import bleu
from separata_shared.metrics.diversity import distinct_n
from separata_shared.metrics.perplexity import bits_per_character, perplexity
from separata_shared.metrics.ranking import mean_reciprocal_rank, ranks, recall_at_k
from separata_shared.metrics.retrieval import retrieval_recall
from separata_shared.metrics.score import Score

__all__ = [
    "Score",
    "bits_per_character",
    "bleu",
    "distinct_n",
    "mean_reciprocal_rank",
    "perplexity",
    "ranks",
    "recall_at_k",
    "retrieval_recall",
]
