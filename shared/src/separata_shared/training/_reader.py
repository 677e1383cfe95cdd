"""Reading a checkpoint of torch.distributed.checkpoint without trusting it.

Its index, ``.metadata``, is a pickle, and a pickle can run any code. This reader admits the few
plain classes an index of tensors needs and nothing else. The tensors themselves are read by torch
with ``weights_only=True``.
"""

import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
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
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ADMITTED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not admitted")


def read_index(file: IO[bytes]) -> Metadata:
    """Read the index of a checkpoint that holds tensors only.

    Raises:
        pickle.UnpicklingError: The file is something else.
    """
    index = _IndexUnpickler(file).load()
    if not isinstance(index, Metadata) or not all(
        isinstance(entry, TensorStorageMetadata) for entry in index.state_dict_metadata.values()
    ):
        raise pickle.UnpicklingError("not an index of tensors")
    return index


class TensorReader(FileSystemReader):
    """``FileSystemReader`` whose index is read by ``read_index``."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index; the arguments are those of the parent."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            index = read_index(file)
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index
