"""Loading the data that a configuration names."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from separata_shared.data.prepared import open_prepared

from .config import DataConfig
from .corpus import Corpus, load_corpus, make_corpus
from .made import tiny

__all__ = ["Corpus", "load", "settings"]

_TINY = ("tiny_dialogs", "tiny_items")
_PLACES = ("raw", "prepared", "spotlight_url")


def load(data: DataConfig) -> Corpus:
    """The data set as numbers: made, or as ``prepare`` left it.

    Raises:
        ValueError: It was not prepared, or with other settings, or is damaged; the message says
            what to do.
    """
    if data.dataset == "tiny":
        made = tiny(items=data.tiny_items, dialogs=data.tiny_dialogs, seed=data.split_seed)
        return make_corpus(made, data)
    directory = Path(data.prepared)
    open_prepared(directory, settings(data))
    return load_corpus(directory)


def settings(data: DataConfig) -> dict[str, Any]:
    """What the prepared data depends on."""
    return {name: value for name, value in asdict(data).items() if name not in (*_TINY, *_PLACES)}
