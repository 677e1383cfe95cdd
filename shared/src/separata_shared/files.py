"""Files that are either whole or absent, and reading errors that name the file."""

import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place when the block succeeds.

    The data is flushed to disk before the rename, so a crash leaves the old file or the new one.

    Args:
        path: Where the file shall appear; missing parent directories are made.

    Yields:
        The temporary path to write to.

    Raises:
        OSError: The file cannot be written (no space, no permission); nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # A full disk is met in the middle of a file, a directory in its place at the end.
        if error.errno is not None and error.filename in (None, temporary, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: The file is missing or is not JSON; the message names it.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def read_bytes(path: Path | str) -> bytes:
    """Read a file, decompressed where its name ends in ``.gz`` or ``.xz``.

    Raises:
        ValueError: The file is missing, a directory, or damaged; the message names it.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            return gzip.decompress(raw)
        return lzma.decompress(raw) if path.suffix == ".xz" else raw
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a directory, a file is needed") from None
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: cannot be decompressed ({error})") from None


def read_text(path: Path | str) -> str:
    """Read a UTF-8 text file, decompressed as ``read_bytes`` does, without a byte order mark.

    Raises:
        ValueError: The file cannot be read or is not valid UTF-8; the message names it.
    """
    raw = read_bytes(path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} is not valid UTF-8") from None


def read_lines(path: Path | str) -> list[str]:
    r"""Read a UTF-8 text file as lines separated by ``\n`` alone.

    Other line separators of Unicode stay inside a line: parallel files are aligned by ``\n``.

    Raises:
        ValueError: The file is missing, empty or not valid UTF-8; the message names it.
    """
    text = read_text(path)
    if not text:
        raise ValueError(f"{path}: is empty")
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


def find_file(directory: Path, name: str) -> Path | None:
    """The file of that name in a directory, plain or as ``read_bytes`` decompresses it."""
    candidates = (directory / f"{name}{ending}" for ending in ("", ".gz", ".xz"))
    return next((path for path in candidates if path.is_file()), None)


def need_file(directory: Path, name: str) -> Path:
    """The file of that name in a directory, plain or compressed.

    Raises:
        ValueError: It is not there.
    """
    path = find_file(directory, name)
    if path is None:
        raise ValueError(f"{directory / name}: no such file (nor {name}.gz or {name}.xz)")
    return path


def sha256(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
