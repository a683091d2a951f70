"""The ``.metadata`` of a distributed checkpoint: the pickle that torch's own `FileSystemReader` reads, read without running any code."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from ..errors import UnsafeContent, WrongVersion
from ..picklescan import scan

try:
    from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo  # so that plain torch reads our files
except ImportError as exc:
    raise WrongVersion(
        f"torch {torch.__version__} lays out distributed checkpoints in another way than ckptstore knows (that of 2.10 to 2.15); "
        f"use one of these, or a newer ckptstore: {exc}"
    ) from exc

__all__ = ["BY", "METADATA_FILE", "StorageInfo", "dump", "parse"]

BY = "torch.distributed.checkpoint"
"""What a checkpoint is marked with."""
METADATA_FILE = ".metadata"
"""The file that says which tensor is where."""
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},  # as older ones wrote it
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
"""All that torch's planners put there, by module; and dtypes."""


def dump(metadata: Metadata) -> bytes:
    """Return the bytes of `metadata`. Protocol 2, which `scan` follows."""
    return pickle.dumps(metadata, 2)


def parse(data: memoryview, name: str) -> Metadata:
    """Return the metadata in `data`, whose checksums were compared, without running code and in bounded memory.

    Raises:
        UnsafeContent: it names other things than torch's planners do and `torch.serialization.add_safe_globals` allows.
    """
    raw = bytes(data)
    try:
        scan(raw, {}, len(raw))
        found = _Restricted(io.BytesIO(raw)).load()
    except UnsafeContent as exc:
        raise UnsafeContent(f"refused to read {name}: {exc}") from exc
    except Exception as exc:
        raise UnsafeContent(f"cannot read {name}: it makes no sense to this torch ({type(exc).__name__}: {exc!s:.200})") from exc
    if (
        not isinstance(found, Metadata)
        or not isinstance(found.storage_data, dict)
        or not all(map(_is_plain, found.storage_data.values()))
    ):
        raise UnsafeContent(f"cannot read {name}: it holds no metadata of a distributed checkpoint")
    return found


def _is_plain(where: Any) -> bool:
    """Whether this is where an item is, as we write it, or torch without extensions does."""
    if not isinstance(where, StorageInfo) or getattr(where, "transform_descriptors", None):
        return False
    fields = vars(where)
    return all(type(fields.get(name)) is kind for name, kind in (("relative_path", str), ("offset", int), ("length", int)))


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        for entry in torch.serialization.get_safe_globals():
            known, given = entry if isinstance(entry, tuple) else (entry, "")
            if (given or f"{known.__module__}.{known.__qualname__}") == f"{module}.{name}":
                return known
        raise UnsafeContent(
            f"it names {ascii(module)[1:-1]}.{ascii(name)[1:-1]}; if a planner of yours put that there, allow it with "
            "torch.serialization.add_safe_globals([…])"
        )
