"""Text as characters, for language models: a made text and enwik8.

N is the number of characters of a part.
"""

import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from separata_shared.files import find_file, read_bytes

ENWIK8_PARTS = (90_000_000, 5_000_000, 5_000_000)


@dataclass(frozen=True, kw_only=True)
class Characters:
    """A text in three parts as symbol numbers, each (N,)."""

    train: NDArray[np.uint8]
    valid: NDArray[np.uint8]
    test: NDArray[np.uint8]
    alphabet: bytes
    """Byte of each symbol number. The number after the last stands for any other byte."""

    @property
    def vocabulary_size(self) -> int:
        """Number of symbols, the one for unseen bytes included."""
        return len(self.alphabet) + 1

    def decode(self, symbols: Iterable[int]) -> bytes:
        """Bytes of symbol numbers; the unseen symbol becomes ``?``."""
        table = self.alphabet + b"?"
        return bytes(table[symbol] for symbol in symbols)


def number_characters(train: bytes, valid: bytes, test: bytes) -> Characters:
    """Number the bytes of the training part in ascending order; one more number is for others."""
    parts = {"train": train, "valid": valid, "test": test}
    symbols = {name: np.frombuffer(part, dtype=np.uint8) for name, part in parts.items()}
    alphabet = np.unique(symbols["train"])
    table = np.full(256, len(alphabet), dtype=np.uint8)
    table[alphabet] = np.arange(len(alphabet), dtype=np.uint8)
    numbered = {name: table[part] for name, part in symbols.items()}
    return Characters(**numbered, alphabet=alphabet.tobytes())


def tiny_characters(size: int, *, seed: int = 1) -> tuple[bytes, bytes, bytes]:
    """A made text of sentences whose last word repeats the first.

    Args:
        size: Characters of the training part; the other parts have a tenth each.
        seed: Seed of the generator.
    """
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefgh"))
    words = ["".join(random.choice(letters, size=random.integers(2, 6))) for _ in range(16)]

    def text(characters: int) -> bytes:
        sentences, made = [], 0
        while made < characters:
            chosen = [words[n] for n in random.integers(len(words), size=random.integers(2, 5))]
            sentences.append(" ".join([*chosen, chosen[0]]) + ".\n")
            made += len(sentences[-1])
        return "".join(sentences)[:characters].encode()

    held_out = max(size // 10, 1)
    return text(size), text(held_out), text(held_out)


def enwik8(raw: Path) -> tuple[tuple[bytes, bytes, bytes], tuple[Path, ...]]:
    """The three parts of enwik8 and the files they come from.

    ``raw`` holds the standard file (``enwik8``, also ``.zip``, ``.gz`` or ``.xz``), cut at 90 and
    95 million bytes, or one file for each part, whose name begins with ``train.``, ``valid.`` and
    ``test.``; those are taken as they are.

    Raises:
        ValueError: No such files, or the standard file has another size.
    """
    given = [sorted(path for path in raw.glob(f"{part}.*")) for part in ("train", "valid", "test")]
    if all(len(paths) == 1 for paths in given):
        paths = tuple(found[0] for found in given)
        train, valid, test = (read_bytes(path) for path in paths)
        for path, content in zip(paths, (train, valid, test), strict=True):
            if not content:
                raise ValueError(f"{path}: is empty")
        return (train, valid, test), paths
    path = find_file(raw, "enwik8") or raw / "enwik8.zip"
    whole = _unzip(path, "enwik8") if path.suffix == ".zip" else read_bytes(path)
    if len(whole) != sum(ENWIK8_PARTS):
        raise ValueError(f"{path}: holds {len(whole)} bytes, enwik8 has {sum(ENWIK8_PARTS)}")
    first, second = ENWIK8_PARTS[0], ENWIK8_PARTS[0] + ENWIK8_PARTS[1]
    return (whole[:first], whole[first:second], whole[second:]), (path,)


def _unzip(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (zipfile.BadZipFile, KeyError, zlib.error) as error:
        raise ValueError(f"{path}: not the archive of {name} ({error})") from None
