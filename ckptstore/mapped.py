"""A ``.pt`` file of a local disk, mapped into memory: nothing is copied before somebody looks at it, or it is put where it belongs.

A mapped file must not be read first through the map: a disk that fails then ends the process (SIGBUS), where a read raises an error. So
it is checked by reading, which brings it into the page cache, where the map finds it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import archive, torchfile
from .errors import UsageError
from .loading import plain_outline, prefer_huge_pages, tensors_of
from .protocol import LocalFiles
from .reading import StoredFile

__all__ = ["NotMapped", "load", "own", "takes_copies"]


class NotMapped(UsageError):
    """The file cannot, or should not, be mapped."""


@contextmanager
def _descriptor(file: StoredFile) -> Iterator[int | None]:
    """Lend a descriptor of the file, None if it cannot, or should not, be mapped."""
    fd = file.backend.open_file(file.key) if isinstance(file.backend, LocalFiles) else None
    if fd is None:
        yield None
        return
    with open(fd, "rb", buffering=0):  # closes it
        yield fd


def load(file: StoredFile, *, lazy: bool, plain: bool = False, map_location: Any, weights_only: bool, name: str) -> Any:
    """Return what ``torch.load(mmap=True)`` makes of a stored file, whose tensors are private views of it, copied where they are changed.

    Args:
        lazy: check the directory and the pickle only, if the file is laid out as `torch.save` does it; else every byte.
        plain: take only files of plain tensors and containers.

    Raises:
        DamagedFile, UnsafeContent, RuntimeError: as `loading.load`.
        NotPlain: it is not that.
        NotMapped: the file is in no folder of a local disk, or torch was told to share what it maps.
    """
    if torch.serialization.get_default_mmap_options() != mmap.MAP_PRIVATE:
        how = "set torch.serialization.set_default_mmap_options(mmap.MAP_PRIVATE)"
        raise NotMapped(f"torch was told to map files as shared, so that a change of a tensor would change the checkpoint; {how}")
    with _descriptor(file) as fd:
        if fd is None:
            raise NotMapped(
                f"{file.backend.url}: only files in a folder of a local disk can be mapped (mmap=True), and not on file systems that other "
                "hosts can change; load without it, or part of it with load_tensors"
            )
        outline = archive.outline(file.read, file.entry.size, name)
        if plain:
            plain_outline(file, outline)
        records = list(outline.records.values()) if outline else []
        if not lazy or outline is None:
            heads = [memoryview(bytearray(record.header_size)) for record in records]
            file.fill([(record.header, head) for record, head in zip(records, heads, strict=True)])
            if outline is None or not all(record.fits(head) for record, head in zip(records, heads, strict=True)):
                with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as whole, memoryview(whole) as view:
                    archive.check(view, name)
        result = torchfile.load_open(f"/proc/self/fd/{fd}", map_location, weights_only, name, mmap=True)
        if plain:
            for _ in tensors_of(result):  # or NotPlain
                pass
        return result


def own(value: Any, owned: dict[int, torch.UntypedStorage]) -> None:
    """Give the tensors in `value`, a part of what `load` returned, memory of their own, in place.

    Args:
        owned: what was copied already, by its address before and after.
    """
    for tensor in tensors_of(value):
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            continue
        if storage.data_ptr() not in owned:
            copy = torch.empty(storage.nbytes(), dtype=torch.uint8)
            prefer_huge_pages(memoryview(copy.numpy()))  # type: ignore[arg-type]
            copy.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
            owned[storage.data_ptr()] = owned[copy.data_ptr()] = copy.untyped_storage()
        with torch.no_grad():
            tensor.set_(owned[storage.data_ptr()], tensor.storage_offset(), tensor.size(), tensor.stride())


def takes_copies(target: Any) -> bool:
    """Say whether ``target.load_state_dict`` copies what it is given, and keeps nothing of it: so do modules of nothing unusual."""
    if not isinstance(target, torch.nn.Module):
        return False
    plain = torch.nn.Module
    for module in target.modules():
        kind = type(module)
        if kind.load_state_dict is not plain.load_state_dict or kind.set_extra_state is not plain.set_extra_state:
            return False
        if kind._load_from_state_dict is not plain._load_from_state_dict and not kind.__module__.startswith("torch.nn."):
            return False
        if module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks:
            return False
    return True
