"""What the translation configurations read; the reading itself is tested in shared."""

from pathlib import Path

import pytest
from separata_adanorm.config import DataConfig, ModelConfig
from separata_adanorm.data import load, prepare
from separata_shared.cli import from_yaml

CONFIGS = Path(__file__).parents[1] / "src/separata_adanorm/configs"
PARALLEL = ("tiny", "sample", "demo", "multi30k", "iwslt14_de_en", "iwslt15_en_vi", "wmt14_en_de")


def data_of(name: str) -> DataConfig:
    data: DataConfig = from_yaml(CONFIGS / f"{name}.yaml", {"data": DataConfig})["data"]
    return data


def test_tiny_is_made_and_reversed(capsys: pytest.CaptureFixture[str]) -> None:
    prepare(data=data_of("tiny"))
    assert "nothing to prepare" in capsys.readouterr().out
    corpus = load(data_of("tiny"))
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (6000, 600, 600)
    for source, target in zip(corpus.test.source_lines, corpus.test.target_lines, strict=True):
        assert source.split() == target.split()[::-1]


@pytest.mark.parametrize("name", PARALLEL)
def test_the_longest_sentence_fits_the_model(name: str) -> None:
    model = from_yaml(CONFIGS / f"{name}.yaml", {"model": ModelConfig})["model"]
    assert data_of(name).max_length <= model.max_length


def test_sample_and_demo_share_their_prepared_text() -> None:
    sample, demo = data_of("sample"), data_of("demo")
    assert sample.prepared == demo.prepared
    assert sample.vocabulary_size == demo.vocabulary_size
