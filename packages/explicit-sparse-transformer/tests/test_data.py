"""What the configurations of this paper read; the reading itself is tested in shared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from separata_explicit_sparse_transformer.config import ModelConfig
from separata_explicit_sparse_transformer.data import (
    DataConfig,
    load,
    load_characters,
    prepare,
)
from separata_shared.cli import from_yaml

CONFIGS = Path(__file__).parents[1] / "src/separata_explicit_sparse_transformer/configs"


def data_of(name: str) -> DataConfig:
    data: DataConfig = from_yaml(CONFIGS / f"{name}.yaml", {"data": DataConfig})["data"]
    return data


def test_tiny_is_made_and_reversed() -> None:
    corpus = load(data_of("tiny"))
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (6000, 600, 600)
    for source, target in zip(corpus.test.source_lines, corpus.test.target_lines, strict=True):
        assert source.split() == target.split()[::-1]


@pytest.mark.parametrize(
    "name", ["tiny", "sample", "demo", "multi30k", "iwslt14_de_en", "iwslt15_en_vi", "wmt14_en_de"]
)
def test_the_longest_sentence_fits_the_model(name: str) -> None:
    model = from_yaml(CONFIGS / f"{name}.yaml", {"model": ModelConfig})["model"]
    assert data_of(name).max_length <= model.max_length


def test_own_text_becomes_batches(text_files: Callable[..., Path], tmp_path: Path) -> None:
    text_files()
    data = DataConfig(
        dataset="text", raw=str(tmp_path / "raw"), prepared=str(tmp_path / "prepared"),
        segmentation="words", vocabulary_size=40,
    )  # fmt: skip
    prepare(data=data)
    corpus = load(data)
    batches = corpus.train.batches(data.max_tokens, seed=1)(0)
    assert sum(len(batch.source) for batch in batches) == len(corpus.train) == 40


def test_characters_are_for_the_language_model() -> None:
    settings: dict[str, Any] = {"tiny_pairs": 100}
    text = load_characters(DataConfig(dataset="tiny_characters", **settings))
    assert text.decode(text.train).endswith(b"\n") or len(text.train) == 1000
    with pytest.raises(ValueError, match=r"data\.dataset: tiny "):
        load_characters(DataConfig(**settings))
