"""A ``.pt`` file of a local disk, mapped into memory: nothing is copied before somebody looks at it, or it is put where it belongs.

A mapped file must not be read first through the map: a disk that fails then ends the process (SIGBUS), where a read raises an error. So
it is checked by reading, which brings it into the page cache, where the map finds it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from . import archive, rebuild, torchload
from .archive import Record
from .checkedfile import checked_outline
from .errors import UsageError
from .loading import PlainFile, new_storage, on_cpu, writable
from .protocol import LocalFiles
from .reading import Piece, StoredFile
from .rebuild import NotPlain

__all__ = ["NotMapped", "load", "load_to_copy", "takes_copies"]


class NotMapped(UsageError):
    """The file cannot, or should not, be mapped."""


@contextmanager
def _descriptor(file: StoredFile) -> Iterator[int]:
    """Lend a descriptor of the file. Raises `NotMapped`."""
    fd = file.backend.open_file(file.key) if isinstance(file.backend, LocalFiles) else None
    if fd is None:
        raise NotMapped(
            f"{file.backend.url}: only files in a folder of a local disk can be mapped (mmap=True), and not on file systems that other "
            "hosts can change; load without it, or part of it with load_tensors"
        )
    with open(fd, "rb", buffering=0):  # closes it
        yield fd


def load(file: StoredFile, *, lazy: bool, map_location: Any, weights_only: bool, name: str) -> Any:
    """Return what ``torch.load(mmap=True)`` makes of a stored file, whose tensors are private views of it, copied where they are changed.

    Args:
        lazy: check the directory and the pickle only, if the file is laid out as `torch.save` does it; else every byte.

    Raises:
        DamagedFile, UnsafeContent, RuntimeError: as `loading.load`.
        NotMapped: the file is in no folder of a local disk, or torch was told to share what it maps.
    """
    if torch.serialization.get_default_mmap_options() != mmap.MAP_PRIVATE:
        how = "set torch.serialization.set_default_mmap_options(mmap.MAP_PRIVATE)"
        raise NotMapped(f"torch was told to map files as shared, so that a change of a tensor would change the checkpoint; {how}")
    with _descriptor(file) as fd:
        try:
            plain = PlainFile(file, on_cpu(map_location), name)
            if not lazy:
                plain.check([], plain.records)
            elif not _all_fit(fd, plain.records):
                raise NotPlain
            return rebuild.fill(plain.value, _mapped(fd, plain))
        except NotPlain:
            return _load_any(file, fd, lazy, map_location, weights_only, name)


def _load_any(file: StoredFile, fd: int, lazy: bool, map_location: Any, weights_only: bool, name: str) -> Any:
    outline = archive.outline(file.read, file.entry.size, name) if lazy else None
    if outline is None or not _all_fit(fd, outline.records.values()):  # it is laid out in another way, or damaged
        outline = checked_outline(file, name)
    if outline is not None:
        archive.judge(outline, file.entry.size, name)
    else:
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as whole, memoryview(whole) as view:
            archive.check(view, name)
    return torchload.load_open(f"/proc/self/fd/{fd}", map_location, weights_only, name, mmap=True)


def _all_fit(fd: int, records: Iterable[Record]) -> bool:
    """Say whether each record begins where the directory says, as far as it can be read."""
    with suppress(OSError):  # whoever reads the whole file finds the words for it
        for record in records:
            head = os.pread(fd, record.header_size, record.header)
            if len(head) < record.header_size or not record.fits(memoryview(head)):
                return False
        return True
    return False


def load_to_copy(file: StoredFile, map_location: Any, name: str, held: Callable[[Any], Iterable[Any]]) -> Any:
    """Return a stored file of plain tensors, every byte checked, for who copies them elsewhere at once: they are views of the file.

    Args:
        held: says of the object which parts will be held on to. Their tensors get memory of their own, and are read to there.

    Raises:
        NotPlain: it is not that.
        NotMapped: the file is in no folder of a local disk.
        DamagedFile, UnsafeContent
    """
    with _descriptor(file) as fd:
        plain = PlainFile(file, on_cpu(map_location), name)
        views = _mapped(fd, plain)
    result = rebuild.fill(plain.value, views)
    starts = {view.data_ptr(): start for start, view in views.items()}
    owned: dict[int, torch.UntypedStorage] = {}  # by the address in the file, and by the new one
    pieces: list[Piece] = []
    with torch.no_grad():
        for tensor in (tensor for part in held(result) for tensor in rebuild.tensors_of(part)):
            view = tensor.untyped_storage()
            address = view.data_ptr()
            if not view.nbytes():  # but it holds on to the file
                tensor.set_(new_storage(0), tensor.storage_offset(), tensor.size(), tensor.stride())
                continue
            if address not in owned:
                owned[address] = storage = new_storage(view.nbytes())
                owned[storage.data_ptr()] = storage
                pieces.append((starts[address], writable(storage)))
            tensor.set_(owned[address], tensor.storage_offset(), tensor.size(), tensor.stride())
    plain.check(pieces, plain.records)
    return result


def _mapped(fd: int, plain: PlainFile) -> dict[int, torch.UntypedStorage]:
    """Return the records with the tensors, by their first byte, as private views of the file."""
    whole = torch.UntypedStorage.from_file(f"/proc/self/fd/{fd}", False, os.fstat(fd).st_size)
    records = {hollow.record.start: hollow.record for hollow in plain.tensors()}
    return {start: whole[start : start + record.size] for start, record in records.items()}


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
