"""Reading a checkpoint of torch.distributed.checkpoint without trusting it.

Its index, ``.metadata``, is a pickle, and a pickle can run any code. This reader admits the few
plain classes an index of tensors needs and nothing else. The tensors themselves are read by torch
with ``weights_only=True``.
"""

import operator
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_METADATA = "torch.distributed.checkpoint.metadata"
_ADMITTED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(
        (_METADATA, name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return operator.getitem  # before 3.11.4 Python writes E.A so; E["A"] reaches no more
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ADMITTED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not admitted")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a checkpoint.

    Raises:
        pickle.UnpicklingError: The index is something else.
    """
    entries = _read_index(path).state_dict_metadata
    return {name: tuple(_tensor(entry).size) for name, entry in entries.items()}


def _read_index(path: Path) -> Metadata:
    with (path / ".metadata").open("rb") as file:
        index = _IndexUnpickler(file).load()
    if not isinstance(index, Metadata):
        raise pickle.UnpicklingError("not the index of a checkpoint")
    for entry in index.state_dict_metadata.values():
        _tensor(entry)
    return index


def _tensor(entry: object) -> TensorStorageMetadata:
    # Anything but a tensor is stored as a pickle.
    if not isinstance(entry, TensorStorageMetadata):
        raise pickle.UnpicklingError("the checkpoint does not hold tensors alone")
    return entry


class TensorReader(FileSystemReader):
    """``FileSystemReader`` that unpickles an index of tensors and nothing else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index; the arguments are those of the parent."""
        index = _read_index(Path(self.path))
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index
