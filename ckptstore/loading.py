"""A ``.pt`` file of a store, as objects: each byte of a tensor is read once, to where it stays, and checked there.

torch reads the pickle and the directory from a file that has nothing else, so that it makes the tensors, and leaves them empty. Then they
are filled in parallel, and the whole file is checked on the way. That is done only where nobody can have looked into an empty tensor
meanwhile: the file is laid out as `torch.save` does, and holds nothing but plain tensors and containers. Other files are read
whole, and checked, before torch sees them.
"""

from __future__ import annotations

import ctypes
import io
import sys
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

import torch

from . import archive, torchfile
from .archive import Outline, Record
from .errors import NotFound, UsageError
from .picklescan import plain_names
from .reading import Piece, StoredFile

__all__ = ["NotPlain", "is_cpu", "load", "load_tensors", "plain_outline", "prefer_huge_pages", "tensor_names", "tensors_of"]

_PLAIN = frozenset(
    {"collections.OrderedDict", "collections.Counter", "builtins.set", "torch.Size", "torch.device"}
    | {f"torch._utils._rebuild_{what}" for what in ("tensor_v2", "tensor_v3", "parameter")}
    | {"torch.storage.UntypedStorage"}
    | {f"torch.{kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")}
    | {"torch.ComplexDoubleStorage", "torch.ComplexFloatStorage"}
    | {str(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
)
"""Names that make plain tensors and containers, none of which looks into a tensor."""
_CONTAINERS = (dict, OrderedDict, list, tuple, set)
_OTHERS = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, Counter)
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # <asm-generic/mman-common.h>


class NotPlain(Exception):
    """The file has to be read whole before torch sees it."""


def load(file: StoredFile, *, map_location: Any, weights_only: bool, name: str) -> Any:
    """Return what `torch.load` makes of a stored file, every byte checked.

    Takes little more memory than the result, if the file is plain and stays on the CPU; else that of the file besides.

    Args:
        map_location, weights_only: as for `torch.load`.
        name: what to call the file in a message.

    Raises:
        DamagedFile
        UnsafeContent, RuntimeError: see `torchfile.load`.
    """
    try:
        if is_cpu(map_location):
            hollow = _Hollow(file, archive.outline(file.read, file.entry.size, name))
            result = hollow.load(map_location, weights_only, name)
            hollow.fill(result)
            return result
    except NotPlain:
        pass
    return torchfile.load(file.whole(), map_location=map_location, weights_only=weights_only, name=name)


def is_cpu(map_location: Any) -> bool:
    return map_location is None or (isinstance(map_location, (str, torch.device)) and str(map_location) == "cpu")


def load_tensors(file: StoredFile, names: Sequence[str], *, weights_only: bool, name: str) -> dict[str, torch.Tensor]:
    """Return some tensors of a stored file by their dotted paths, on the CPU, and read no more of it than that takes, if it is plain.

    Raises:
        NotFound: there is no such tensor.
        DamagedFile, UnsafeContent, RuntimeError: as `load`.
    """
    try:
        hollow = _Hollow(file, archive.outline(file.read, file.entry.size, name))
        wanted = _named(hollow.load("cpu", weights_only, name), names, name)
        hollow.read(wanted.values())
        return wanted
    except NotPlain:
        return _named(load(file, map_location="cpu", weights_only=weights_only, name=name), names, name)


def tensor_names(file: StoredFile, *, weights_only: bool, name: str) -> list[str]:
    """Return the dotted paths of the tensors in a stored file, in its order. Raises as `load_tensors`."""
    try:
        hollow = _Hollow(file, archive.outline(file.read, file.entry.size, name))
        return list(dict(_paths(hollow.load("cpu", weights_only, name))))
    except NotPlain:
        return list(dict(_paths(load(file, map_location="cpu", weights_only=weights_only, name=name))))


def _named(result: Any, names: Sequence[str], name: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path, tensor in _paths(result):
        if path in found and found[path] is not tensor and path in names:
            raise UsageError(f"two tensors of {name} have the path {path!r:.200}, because of a dot in a key; load it whole")
        found[path] = tensor
    for wanted in names:
        if wanted not in found:
            near = get_close_matches(wanted, found, 3) or list(islice(found, 3))
            raise NotFound(f"{name} has no tensor {wanted!r:.200}; it has {', '.join(near) or 'none'} …; see tensor_names()")
    return {wanted: found[wanted] for wanted in names}


def _paths(value: Any, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in nested dicts, lists and tuples by the keys and indices that lead to them."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in above:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _paths(item, f"{path}.{key}" if path else str(key), (*above, id(value)))


def plain_outline(file: StoredFile, outline: Outline | None) -> Outline:
    """Return the outline of a file of plain tensors and containers. Raises `NotPlain` if it is not, or may not be."""
    if outline is None:
        raise NotPlain
    order = outline.records.get("byteorder")
    names = plain_names(outline.pickle)
    if names is None or not names <= _PLAIN or order is None:
        raise NotPlain
    if bytes(file.read(order.start, order.size)) != sys.byteorder.encode():
        raise NotPlain
    return outline


class _Hollow:
    """A file without the bytes of its tensors, and the tensors that torch made of it."""

    def __init__(self, file: StoredFile, outline: Outline | None) -> None:
        self._file = file
        self._outline = plain_outline(file, outline)
        self._empty: dict[int, tuple[Record, memoryview]] = {}  # by address

    def load(self, map_location: Any, weights_only: bool, name: str) -> Any:
        """Return the object with empty tensors."""
        with _HollowFile(self._file, self._outline) as reader:
            try:
                result = torchfile.load_open(reader, map_location, weights_only, name)
            except Exception:
                if reader.error is not None:  # torch may have hidden it behind one of its own
                    raise reader.error from None
                raise
            self._empty = {_address(view): (record, view) for record, view in reader.asked}
        return result

    def fill(self, result: Any) -> None:
        """Read the tensors of `result`, and check the whole file."""
        self._read(tensors_of(result), all_chunks=True)

    def read(self, tensors: Iterable[torch.Tensor]) -> None:
        """Read some of the tensors, and check what is read."""
        self._read(tensors, all_chunks=False)

    def _read(self, tensors: Iterable[torch.Tensor], *, all_chunks: bool) -> None:
        # Only memory that a tensor at hand owns is written to, and no such tensor may have its bytes from anywhere else.
        pieces: dict[int, Piece] = {}
        used: list[Record] = [] if not all_chunks else list(self._outline.records.values())
        for tensor in tensors:
            address = tensor.untyped_storage().data_ptr()
            if not address or address in pieces:
                continue
            record, view = self._empty.get(address, (None, memoryview(b"")))
            if record is None or len(view) != tensor.untyped_storage().nbytes():
                raise NotPlain
            pieces[address] = (record.start, view)
            if not all_chunks:
                used.append(record)
        heads = [memoryview(bytearray(record.header_size)) for record in used]
        for _, view in pieces.values():
            prefer_huge_pages(view)
        self._file.fill(
            [*pieces.values(), *((r.header, head) for r, head in zip(used, heads, strict=True))], all_chunks=all_chunks
        )
        if not all(record.fits(head) for record, head in zip(used, heads, strict=True)):
            raise NotPlain


class _HollowFile(io.RawIOBase):
    """The archive as torch's reader asks for it: what is no tensor is read, headers are made up, and the tensors left as they are."""

    def __init__(self, file: StoredFile, outline: Outline) -> None:
        self._file = file
        self._outline = outline
        self._position = 0
        self._records = sorted(outline.records.items(), key=lambda item: item[1].header)
        self._storages = {r.start: r for key, r in outline.records.items() if key.startswith("data/") and r.size}
        self._headers = [record.header for _, record in self._records]
        self.asked: list[tuple[Record, memoryview]] = []
        """Each tensor's storage, and the memory that torch wants it in."""
        self.error: BaseException | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.entry.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, out: Any, /) -> int:
        if (record := self._storages.get(self._position)) is not None and record.size == len(out):
            self.asked.append((record, memoryview(out).cast("B")))
            self._position += record.size
            return record.size
        with memoryview(out) as given:
            view = given.cast("B")[: max(0, self._file.entry.size - self._position)]
        try:
            self._read(view)
        except BaseException as exc:
            self.error = exc
            raise
        self._position += len(view)
        return len(view)

    def _read(self, view: memoryview) -> None:
        start, stop = self._position, self._position + len(view)
        if stop > self._outline.directory or not view:
            # Where torch looks for the end of the directory, there is no need for what precedes it.
            before = min(len(view), max(0, self._outline.directory - start))
            view[:before] = bytes(before)
            view[before:] = self._file.read(start + before, len(view) - before)
            return
        index = bisect_right(self._headers, start) - 1
        key, record = self._records[index] if index >= 0 else ("", None)
        if record is None:
            raise NotPlain
        if stop <= record.start:
            view[:] = record.made_header()[start - record.header : stop - record.header]
        elif start >= record.start and stop <= record.start + record.size and not key.startswith("data/"):
            view[:] = self._file.read(start, len(view))
        else:
            raise NotPlain


def tensors_of(result: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in plain containers. Raises `NotPlain` for anything that may hide another one."""
    queue, seen = [result], set[int]()
    while queue:
        node = queue.pop()
        kind = type(node)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if node.layout != torch.strided or node.is_quantized or node.device.type != "cpu" or node.__dict__:
                raise NotPlain
            yield node
        elif kind in _CONTAINERS:
            if id(node) not in seen:
                seen.add(id(node))
                queue.extend(node.values() if isinstance(node, dict) else node)
                if isinstance(node, dict):
                    queue.extend(key for key in node if type(key) not in (str, int))
        elif kind not in _OTHERS:
            raise NotPlain


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0


def prefer_huge_pages(view: memoryview) -> None:
    """Have the kernel provide the memory, which nobody has touched, in large pages: making them costs as much as reading the data."""
    start = _address(view)
    first, end = -(-start // _HUGE_PAGE) * _HUGE_PAGE, (start + len(view)) // _HUGE_PAGE * _HUGE_PAGE
    if end > first and _madvise is not None:
        _madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)  # a hint: what comes of it does not matter


_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
