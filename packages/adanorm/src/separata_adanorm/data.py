"""The parallel corpora; images, sentences and treebanks have modules of their own.

Reading, preparing and batching sentence pairs is the same for every paper that translates.
"""

from separata_shared.translation import Corpus, DataConfig, ParallelBatch, Split, load, prepare

__all__ = ["Corpus", "DataConfig", "ParallelBatch", "Split", "load", "prepare"]
