"""Reading folders of shards (torch.distributed.checkpoint) without running what a stranger put into them.

PyTorch's own reader unpickles ``.metadata``, and every value that is no tensor, without any restriction.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_METADATA_CLASSES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles the description of a folder of shards: dataclasses, shapes and dtypes, and nothing else."""

    _allowed: ClassVar[set[tuple[str, str]]] = {
        *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA_CLASSES),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        # Where the folder was when it was written; Python 3.13 keeps the class in another module.
        *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
        ("collections", "OrderedDict"),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Names that such a description may use.

        Raises:
            pickle.UnpicklingError: for any other name, before it is imported.
        """
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class ShardReader(FileSystemReader):
    """Reads a folder of shards; its description may hold nothing but shapes, dtypes and places.

    Args:
        folder: that a run wrote.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description of the folder.

        Raises:
            ValueError: if it is damaged, asks for code to be run, or names files outside of the folder.
        """
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            with path.open("rb") as file:
                found = MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path} is not read: {error}. It is damaged, or was made to run code on whoever loads it. Use another "
                "checkpoint."
            ) from error
        if not isinstance(found, Metadata):
            raise ValueError(f"Expected {path} to describe a checkpoint, got {type(found).__name__}.")
        _check_places(path, found)
        if found.storage_meta is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


def _check_places(path: Path, metadata: Metadata) -> None:
    places = {part.relative_path for part in (metadata.storage_data or {}).values()}
    outside = sorted(place for place in places if Path(place).name != place)
    if outside:
        raise ValueError(f"{path} names files outside of its folder: {outside[:3]}. Use another checkpoint.")


class ShardPlanner(DefaultLoadPlanner):
    """Plans the reading of shards; values that are no tensors are read with ``weights_only=True``."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take over a value that is no tensor.

        Raises:
            ValueError: if it is anything but plain values and tensors.
        """
        name = read_item.dest_index.fqn
        try:
            plain = torch.load(value, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{name!r} of the checkpoint is not read: it is damaged, or is no plain value. Use another checkpoint."
            ) from error
        safe = io.BytesIO()
        torch.save(plain, safe)
        safe.seek(0)
        # What it hands on was written here, just now.
        super().load_bytes(read_item, safe)
