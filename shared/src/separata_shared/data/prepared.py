"""Directories of prepared data: whole or absent, with a manifest that says what they hold."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from separata_shared.files import read_json, sha256, write_json

MANIFEST = "manifest.json"
_FORMAT = 1


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Give an empty directory that takes the place of ``path`` when the block succeeds.

    Raises:
        ValueError: ``path`` holds something that is not prepared data; it is left alone.
    """
    path = path.absolute()
    if path.exists() and not (path / MANIFEST).is_file() and any(path.iterdir()):
        raise ValueError(f"{path}: holds other files; give data.prepared a directory of its own")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rename(replaced)
        try:
            temporary.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seal(
    directory: Path, settings: Mapping[str, Any], details: Mapping[str, Any]
) -> dict[str, Any]:
    """Write and return the manifest: settings, details, size and checksum of every file."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(directory.iterdir())
    }
    manifest = {"format": _FORMAT, "settings": dict(settings), **details, "files": files}
    write_json(directory / MANIFEST, manifest)
    return manifest


def open_prepared(directory: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Manifest of a prepared directory that fits ``settings`` and is complete.

    Raises:
        ValueError: There is none, it was prepared with other settings, or a file is missing or has
            another size; the message names the directory or file and says what to do.
    """
    if not (directory / MANIFEST).is_file():
        raise ValueError(
            f"{directory}: no prepared data; run the verb prepare with the same configuration first"
        )
    manifest: dict[str, Any] = read_json(directory / MANIFEST)
    whole = isinstance(manifest, dict) and manifest.keys() >= {"settings", "files"}
    if not whole or manifest.get("format") != _FORMAT:
        raise ValueError(f"{directory / MANIFEST}: not a manifest of format {_FORMAT}")
    for name, value in settings.items():
        found = manifest["settings"].get(name)
        if found != value:
            raise ValueError(
                f"{directory}: was prepared with {name} {found!r}, but data.{name} is {value!r}; "
                "prepare again or change the configuration"
            )
    for name, entry in manifest["files"].items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else 0
        if size != entry["bytes"]:
            raise ValueError(
                f"{path}: has {size} bytes instead of {entry['bytes']}; prepare the data again"
            )
    return manifest


def read_array(path: Path) -> NDArray[Any]:
    """Map an ``.npy`` file into memory.

    Raises:
        ValueError: The file is missing or damaged; the message names it.
    """
    try:
        # A plain view of the map: slices of np.memmap itself are several times slower.
        array: NDArray[Any] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable array ({error})") from None
    return array
