"""A ``.pt`` file of a store, as objects: each byte of a tensor is read once, to where it stays, and checked there.

The pickle says which tensors there are; their memory is provided, and filled in parallel, while the whole file is checked; then they are
made. That is done for files that are laid out as `torch.save` does, and hold nothing but plain tensors and containers (see `rebuild`).
Other files are read whole, and checked, before torch sees them.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from typing import Any

import torch

from . import archive, ondevice, rebuild, torchload
from .archive import Record
from .checkedfile import CheckedFile, checked_outline
from .errors import NotFound, UnsafeContent, UsageError
from .protocol import LocalFiles
from .reading import Piece, StoredFile
from .rebuild import Hollow, NotPlain, Place

__all__ = ["NotPlain", "PlainFile", "is_cpu", "load", "load_tensors", "new_storage", "on_cpu", "tensor_names", "writable"]

_SMALL = 32 << 20
"""Bytes of a file that may be held in memory besides what is made of it: it is read once then, not twice."""
_CPU = torch.device("cpu")
_WRITE = 0x200  # PyBUF_WRITE
_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.restype = ctypes.py_object
_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)


def load(file: StoredFile, *, map_location: Any, weights_only: bool, name: str) -> Any:
    """Return what `torch.load` makes of a stored file, every byte checked.

    Takes little more memory than the result, if the file is in a folder, or is plain and stays on the CPU; else that of the file besides.

    Args:
        map_location, weights_only: as for `torch.load`.
        name: what to call the file in a message.

    Raises:
        DamagedFile
        UnsafeContent, RuntimeError: see `torchload.load`.
    """
    try:
        place = _on_devices(map_location) if isinstance(file.backend, LocalFiles) else on_cpu(map_location)
        plain = PlainFile(file, place, name)
        return rebuild.fill(plain.value, plain.read(plain.tensors()))
    except NotPlain:
        pass
    if file.entry.size > _SMALL and isinstance(file.backend, LocalFiles):
        outline = checked_outline(file, name)
        if outline is not None:
            archive.judge(outline, file.entry.size, name)
            return _load_checked(file, map_location, weights_only, name)
    return torchload.load(file.whole(), map_location=map_location, weights_only=weights_only, name=name)


def _load_checked(file: StoredFile, map_location: Any, weights_only: bool, name: str) -> Any:
    with CheckedFile(file) as source:
        try:
            result = torchload.load_open(source, map_location, weights_only, name)
        except Exception as exc:
            if source.failure is None:
                raise
            raise source.failure from exc
        if source.failure is not None:
            raise source.failure
        return result


def load_tensors(file: StoredFile, names: Sequence[str], *, weights_only: bool, name: str) -> dict[str, torch.Tensor]:
    """Return some tensors of a stored file by their dotted paths, on the CPU, and read no more of it than that takes, if it is plain.

    Raises:
        NotFound: there is no such tensor.
        DamagedFile, UnsafeContent, RuntimeError: as `load`.
    """
    try:
        plain = PlainFile(file, on_cpu("cpu"), name)
        for _ in plain.tensors():  # or NotPlain
            pass
        wanted = _named(plain.value, names, file.entry.size, name)
        return dict(rebuild.fill(wanted, plain.read(wanted.values(), all_chunks=False)))
    except NotPlain:
        whole = load(file, map_location="cpu", weights_only=weights_only, name=name)
        return _named(whole, names, file.entry.size, name)


def tensor_names(file: StoredFile, *, weights_only: bool, name: str) -> list[str]:
    """Return the dotted paths of the tensors in a stored file, in its order. Raises as `load_tensors`."""
    try:
        plain = PlainFile(file, on_cpu("cpu"), name)
        for _ in plain.tensors():  # or NotPlain
            pass
        return list(dict(_paths(plain.value, file.entry.size, name)))
    except NotPlain:
        whole = load(file, map_location="cpu", weights_only=weights_only, name=name)
        return list(dict(_paths(whole, file.entry.size, name)))


def is_cpu(map_location: Any) -> bool:
    return map_location is None or (isinstance(map_location, (str, torch.device)) and str(map_location) == "cpu")


def on_cpu(map_location: Any) -> Place:
    """Return where tensors go, if all go to the CPU."""
    if map_location is None:
        return lambda location: _CPU if location == "cpu" else None
    return lambda location: _CPU if is_cpu(map_location) else None


def _on_devices(map_location: Any) -> Place:
    """Return where tensors go that may go to CUDA devices, too: what torch calls so, and has here."""
    if map_location is not None and not isinstance(map_location, (str, torch.device)):
        return lambda location: None
    return lambda location: _device(location if map_location is None else str(map_location))


@lru_cache(64)
def _device(location: Any) -> torch.device | None:
    if location == "cpu":
        return _CPU
    if not isinstance(location, str) or not re.fullmatch(r"cuda(:[0-9]+)?", location) or not torch.cuda.is_available():
        return None
    device = torch.device(location)
    return device if (device.index or 0) < torch.cuda.device_count() else None


def _named(result: Any, names: Sequence[str], size: int, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, tensor in _paths(result, size, name):
        if path in found and found[path] is not tensor and path in names:
            raise UsageError(f"two tensors of {name} have the path {path!r:.200}, because of a dot in a key; load it whole")
        found[path] = tensor
    for wanted in names:
        if wanted not in found:
            near = get_close_matches(wanted, found, 3) or list(islice(found, 3))
            raise NotFound(f"{name} has no tensor {wanted!r:.200}; it has {', '.join(near) or 'none'} …; see tensor_names()")
    return {wanted: found[wanted] for wanted in names}


def _paths(value: Any, size: int, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the tensors in nested dicts, lists and tuples by the keys and indices that lead to them.

    Args:
        size: bytes of the file, to which the memory that this takes is in proportion: a list that holds another twice, which holds
            another twice, and so on, has no end of paths.

    Raises:
        UnsafeContent
    """
    left = _PATHS + 2 * size
    above: set[int] = set()
    levels: list[tuple[int, Iterator[tuple[str, Any]]]] = [(0, iter([("", value)]))]
    while levels:
        node, parts = levels[-1]
        for path, part in parts:
            left -= _PATH + len(path)
            if left < 0:
                raise UnsafeContent(
                    f"{name} holds the same containers over and over, so its tensors have too many paths; load it whole"
                )
            if isinstance(part, (torch.Tensor, Hollow)):
                yield path, part
            elif isinstance(part, (dict, list, tuple)) and id(part) not in above:
                above.add(id(part))
                levels.append((id(part), _parts(part, path)))
                break
        else:
            levels.pop()
            above.discard(node)


_PATHS, _PATH = 32 << 20, 64
"""Bytes that all paths may always take, and one takes besides its text."""


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield f"{path}.{key}" if path else str(key), item


class PlainFile:
    """A file of plain tensors and containers, whose directory and pickle were read.

    Args:
        place: where its tensors are to be.

    Raises:
        NotPlain: it is not that, or may not be.
        DamagedFile, UnsafeContent
    """

    def __init__(self, file: StoredFile, place: Place, name: str) -> None:
        outline = archive.outline(file.read, file.entry.size, name) if place("cpu") else None
        order = outline.records.get("byteorder") if outline else None
        if outline is None or order is None or bytes(file.read(order.start, order.size)) != sys.byteorder.encode():
            raise NotPlain
        self._file = file
        self.records = list(outline.records.values())
        self.value = rebuild.hollow(outline.pickle, outline.records, file.entry.size, place)
        """With a `Hollow` where a tensor belongs."""

    def tensors(self) -> Iterator[Hollow]:
        """Yield where tensors belong. Raises `NotPlain` if there is something else in `value`."""
        return rebuild.hollows(self.value)

    def read(self, tensors: Iterable[Hollow], *, all_chunks: bool = True) -> dict[int, torch.UntypedStorage]:
        """Return the storages of `tensors`, by their first byte in the file.

        Args:
            all_chunks: check the whole file, not only what is read; as always if some of them are not on the CPU.
        """
        storages: dict[int, torch.UntypedStorage] = {}
        records, here, elsewhere = [], [], []
        for start, hollow in {hollow.record.start: hollow for hollow in tensors}.items():
            records.append(hollow.record)
            storages[start] = storage = new_storage(hollow.record.size, hollow.device)
            if not hollow.record.size:
                continue
            if hollow.device.type == "cpu":
                here.append((start, writable(storage)))
            else:
                elsewhere.append((start, storage))
        self.check(here, self.records if all_chunks else records, elsewhere, all_chunks=all_chunks)
        return storages

    def check(
        self,
        pieces: Sequence[Piece],
        records: Iterable[Record],
        elsewhere: Sequence[tuple[int, torch.UntypedStorage]] = (),
        *,
        all_chunks: bool = True,
    ) -> None:
        """Read into `pieces`, and into storages on devices, and see whether `records` begin where the directory says."""
        heads = [(record, memoryview(bytearray(record.header_size))) for record in records]
        pieces = [*pieces, *((record.header, head) for record, head in heads)]
        if elsewhere:
            ondevice.read_through(self._file, pieces, elsewhere)
        else:
            self._file.fill(pieces, all_chunks=all_chunks)
        if not all(record.fits(head) for record, head in heads):
            raise NotPlain


def new_storage(size: int, device: torch.device = _CPU) -> torch.UntypedStorage:
    """Return memory of `size` bytes that nobody has touched."""
    return torch.UntypedStorage(size, device=device)  # type: ignore[no-untyped-call]


def writable(storage: torch.UntypedStorage) -> memoryview:
    """Return the memory of a new storage, which is not empty."""
    view: memoryview = _memory(storage.data_ptr(), storage.nbytes(), _WRITE)
    return view
