"""Sizes that the paper states of its small experiments, in the shipped configurations."""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from separata_adanorm.images import ImageConfig
from separata_adanorm.parsing import ParserConfig
from separata_adanorm.sentences import SentenceConfig
from separata_shared.cli import from_yaml
from separata_shared.training import TrainConfig


def shipped(name: str, group: str, kind: type) -> tuple[Any, TrainConfig]:
    path = Path(str(resources.files("separata_adanorm"))) / "configs" / f"{name}.yaml"
    groups = from_yaml(path, {group: kind, "train": TrainConfig})
    return groups[group], groups["train"]


def test_mnist_is_20_epochs_of_55_000_images_in_batches_of_32() -> None:
    images, train = shipped("mnist", "images", ImageConfig)
    assert (images.channels, images.batch_size, images.valid_images) == ((20, 50), 32, 5000)
    epoch = -(-55_000 // 32)
    assert train.steps == 20 * epoch
    assert train.evaluate_every == epoch
    assert (train.optimizer, train.lr, train.schedule) == ("adam", 1e-3, "constant")


@pytest.mark.parametrize("name", ["rt", "sst5"])
def test_sentences_are_read_by_four_layers_of_width_128(name: str) -> None:
    sentences, train = shipped(name, "sentences", SentenceConfig)
    assert (sentences.num_layers, sentences.width, sentences.dropout) == (4, 128, 0.2)
    assert sentences.max_tokens == 4096
    assert (train.optimizer, train.betas) == ("adam", (0.9, 0.998))
    assert train.steps % train.evaluate_every == 0


@pytest.mark.parametrize("name", ["ptb", "ptb_sample", "ud_ewt"])
def test_the_parser_has_512_hidden_units_and_batches_of_1024(name: str) -> None:
    parser, train = shipped(name, "parser", ParserConfig)
    assert (parser.hidden_width, parser.dropout, parser.batch_size) == (512, 0.2, 1024)
    assert (train.optimizer, train.lr, train.monitor) == ("adam", 1e-3, "uas")
    if name == "ptb":
        # Two transitions for each of 950,028 words; a batch that is not full ends an epoch.
        assert train.evaluate_every == -(-1_900_056 // parser.batch_size)
        assert train.steps == 10 * train.evaluate_every
