"""The parallel corpora, and a corpus whose training targets are the teacher's translations.

Reading, preparing and batching sentence pairs is the same for every paper that translates.
"""

import sys
from dataclasses import replace
from pathlib import Path

from separata_shared.translation import Corpus, DataConfig, ParallelBatch, Split, load, prepare
from separata_shared.translation.data import Sequences

from .distill import read_distilled

__all__ = ["Corpus", "DataConfig", "ParallelBatch", "Split", "load", "prepare", "with_distilled"]


def with_distilled(corpus: Corpus, directory: Path, *, max_length: int) -> Corpus:
    """The corpus with distilled training targets; validation and test keep the references.

    A pair whose translation is empty or longer than ``max_length`` is left out, and counted.

    Args:
        corpus: The corpus that was distilled.
        directory: What ``distill`` wrote.
        max_length: Longest target in tokens, end mark included.

    Raises:
        ValueError: ``directory`` is incomplete, damaged or of another corpus, or no pair is left.
    """
    lines = read_distilled(directory, corpus.train.source)
    targets = [corpus.target_vocabulary.encode(line) for line in lines]
    kept = [n for n, target in enumerate(targets) if 1 < len(target) <= max_length]
    if not kept:
        raise ValueError(f"{directory}: has no translation of 1 to {max_length - 1} tokens")
    source = corpus.train.source
    if len(kept) < len(lines):
        print(f"{directory}: {len(lines) - len(kept):,} pairs left out", file=sys.stderr)
        source = Sequences.of(source[n] for n in kept)
    return replace(corpus, train=Split(source, Sequences.of(targets[n] for n in kept)))
