"""Look at a ``.pt`` file before torch does, without torch, and refuse what torch.save never writes.

A ``.pt`` file is a zip archive of stored (never compressed) entries below one root folder: ``data.pkl`` holds the pickle,
``data/<key>`` the bytes of each storage (``torch/serialization.py``). torch's own reader trusts sizes and names more than a
file from a stranger deserves: the central directory is read here in full, so that everything it declares lies inside the
file, once. Zip layout: PKWARE's APPNOTE 6.3.10, sections 4.3.7 to 4.3.16.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from . import picklescan
from .errors import UnsafeContent

__all__ = ["Outline", "Record", "check", "judge", "outline"]

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FLAGS = 0x0808
"""Flag bits that change nothing here: sizes follow the data; names are UTF-8."""
_SMALL = frozenset({"version", ".format_version", ".storage_alignment", "byteorder", ".data/serialization_id"})
_SMALL_BYTES = 1024
"""Limit of the entries that torch reads whole, besides the pickle: all are a few digits."""


Read = Callable[[int, int], memoryview]
"""Returns so many bytes from an offset on, all of which were checked, and which lie inside the file."""


class Record(NamedTuple):
    """One entry of an archive."""

    path: bytes
    """With the root folder."""
    header: int
    """First byte of its local header."""
    start: int
    """First byte of its data."""
    size: int
    """Bytes of its data."""

    @property
    def header_size(self) -> int:
        """Bytes of the local header with the path, but without what comes between it and the data."""
        return _LOCAL.size + len(self.path)

    def made_header(self) -> bytes:
        """Return a local header that leads where the record is, with its path and empty padding."""
        extra = self.start - self.header - _LOCAL.size - len(self.path)
        head = _LOCAL.pack(b"PK\x03\x04", 0, _FLAGS & 0x0800, 0, 0, 0, 0, 0, 0, len(self.path), extra)
        return head + self.path + bytes(extra)

    def fits(self, head: memoryview) -> bool:
        """Say whether `head`, the first `header_size` bytes at `header`, is a header that leads here."""
        signature, _, flags, method, *_, n, n_extra = _LOCAL.unpack_from(head)
        leads = self.header + _LOCAL.size + int(n) + int(n_extra) == self.start and bytes(head[_LOCAL.size :]) == self.path
        return leads and signature == b"PK\x03\x04" and method == 0 and not flags & ~_FLAGS


@dataclass(frozen=True, slots=True)
class Outline:
    """What the directory of an archive and its pickle say."""

    records: dict[str, Record]
    """By path below the root folder."""
    directory: int
    """First byte of what comes after the last record."""
    pickle: bytes


def check(buffer: memoryview, name: str) -> None:
    """Refuse the ``.pt`` file in `buffer` if reading it could take memory out of proportion to its size.

    Nothing of it is imported or run. What the classes it names would do is not judged here.

    Args:
        buffer: all bytes of the file, one dimension of format ``B``.
        name: what to call the file in a message.

    Raises:
        UnsafeContent: says what is wrong with the file.
    """

    def read(offset: int, length: int) -> memoryview:
        return buffer[offset : offset + length]

    with _refusing(name):
        listed, end = _listed(read, len(buffer))
        starts = [_data_start(read, len(buffer), header, path) for path, header, _, _ in listed]
        found = _judged(listed, starts, end, read)
    judge(found, len(buffer), name)


def judge(found: Outline, size: int, name: str) -> None:
    """Refuse a pickle that would take memory out of proportion to the `size` of its file. Raises `UnsafeContent`."""
    storages = {key[5:]: record.size for key, record in found.records.items() if key.startswith("data/")}
    with _refusing(name):
        picklescan.scan(found.pickle, storages, size)


def outline(read: Read, size: int, name: str) -> Outline | None:
    """Do as `check` for a file of `size` bytes of which no more than the directory and the pickle has been read; the latter is for `judge`.

    Where the data of each record begins is taken from where the next one does, as `torch.save` lays them out. Whoever reads a record has
    to compare its header (`Record.fits`). None if the layout is another, or can be told from the headers only: use `check` then.

    Raises:
        UnsafeContent: says what is wrong with the file.
    """
    with _refusing(name):
        listed, end = _listed(read, size)
        order = sorted(range(len(listed)), key=lambda i: listed[i][1])
        starts = [0] * len(listed)
        for i, following in zip(order, [*order[1:], -1], strict=True):
            path, header, length, flags = listed[i]
            after = listed[following][1] if following >= 0 else end
            wide = max(header, length) >= 0xFFFFFFFF
            starts[i] = after - length - ((24 if wide else 16) if flags & 0x0008 and length else 0)
            if not 0 <= starts[i] - header - _LOCAL.size - len(path) <= 0xFFFF:
                return None
            if path.endswith(b"/data.pkl"):
                record = Record(path, header, starts[i], length)
                if not record.fits(read(header, record.header_size)):
                    return None
        return _judged(listed, starts, end, read)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    try:
        yield
    except UnsafeContent as exc:
        raise UnsafeContent(f"refused to load {name}: {exc}") from exc.__cause__


_Listed = tuple[bytes, int, int, int]  # path, first byte of the local header, bytes of data, flags


def _judged(listed: list[_Listed], starts: list[int], end: int, read: Read) -> Outline:
    _check_disjoint([(header, start + size) for (_, header, size, _), start in zip(listed, starts, strict=True)], end)
    records: dict[str, Record] = {}
    root = b""
    for (path, header, size, _), start in zip(listed, starts, strict=True):
        root = root or path[: path.find(b"/") + 1]
        if root and path.startswith(root):
            records[path[len(root) :].decode("utf-8", "replace")] = Record(path, header, start, size)
    pickle = records.get("data.pkl")
    if pickle is None:
        raise UnsafeContent("it is a zip archive, but not one that torch.save wrote (no data.pkl)")
    if any(key in _SMALL and record.size > _SMALL_BYTES for key, record in records.items()):
        raise UnsafeContent("an entry that torch.save fills with a few digits is large")
    return Outline(records, end, bytes(read(pickle.start, pickle.size)))


def _listed(read: Read, total: int) -> tuple[list[_Listed], int]:
    """Return what the directory lists, and its first byte."""
    if bytes(read(0, min(4, total))) != b"PK\x03\x04":
        raise UnsafeContent(
            "it is not a zip archive, so this torch.save did not write it; a file from before torch 1.6 can be read with "
            "torch.load after download, if you trust who wrote it"
        )
    first, end, count = _directory(read, total)
    buffer = read(first, end - first)
    offset = 0
    listed: list[_Listed] = []
    folded: set[bytes] = set()
    odd = b""
    script = False
    for _ in range(count):
        if offset + _ENTRY.size > len(buffer):
            raise UnsafeContent("its zip directory is cut off")
        signature, _, _, flags, method, *_, packed, size, n, n_extra, n_comment, disk, _, _, header = _ENTRY.unpack_from(
            buffer, offset
        )
        path = bytes(buffer[offset + 46 : offset + 46 + n])
        extra = buffer[offset + 46 + n : offset + 46 + n + n_extra]
        offset += _ENTRY.size + n + n_extra + n_comment
        if signature != b"PK\x01\x02" or disk or offset > len(buffer):
            raise UnsafeContent("its zip directory is malformed")
        script = script or path.endswith(b"/constants.pkl")
        if method != 0 or flags & ~_FLAGS:
            odd = odd or path
            continue
        if 0xFFFFFFFF in (size, packed, header):
            size, packed, header = _wide(extra, size, packed, header)
        if size != packed:
            raise UnsafeContent(f"entry {_text(path)} declares two different sizes")
        if header + _LOCAL.size > total:
            raise UnsafeContent(f"entry {_text(path)} lies outside the file")
        lower = path.lower()
        if lower in folded or b"\0" in path:  # torch's reader looks names up without regard to case, as C strings
            raise UnsafeContent(f"it holds two entries named {_text(path)}, or one whose name cannot be told apart")
        folded.add(lower)
        listed.append((path, header, size, flags))
    if offset != len(buffer):
        raise UnsafeContent("its zip directory does not hold as many entries as it says")
    if script:  # whose code is compressed
        raise UnsafeContent("it is a TorchScript archive; download it and use torch.jit.load if you trust who wrote it")
    if odd:
        raise UnsafeContent(f"entry {_text(odd)} is compressed or encrypted, and torch.save does neither")
    return listed, first


def _directory(read: Read, total: int) -> tuple[int, int, int]:
    """Return first byte, end and number of entries of the central directory."""
    where = total - _END.size
    if where < 0 or bytes((last := read(where, _END.size))[:4]) != b"PK\x05\x06":
        raise UnsafeContent("its zip directory is missing: it was cut off, or something was appended")
    _, disk, first_disk, here, count, size, offset, comment = _END.unpack(last)
    end = where
    locator = where - _END64_LOCATOR.size
    if locator >= 0 and bytes((found := read(locator, _END64_LOCATOR.size))[:4]) == b"PK\x06\x07":
        _, _, end, disks = _END64_LOCATOR.unpack(found)
        if disks != 1 or end + _END64.size != locator or bytes((wide := read(end, _END64.size))[:4]) != b"PK\x06\x06":
            raise UnsafeContent("its zip64 directory is malformed")
        _, _, _, _, disk, first_disk, here, count, size, offset = _END64.unpack(wide)
    if disk or first_disk or here != count or comment or offset + size != end:
        raise UnsafeContent("its zip directory is malformed")
    return offset, end, count


def _wide(extra: memoryview, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """Return size, packed size and header offset, read from the zip64 extra field where the narrow ones are full."""
    narrow = [size, packed, header]
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = bytes(extra[at + 4 : at + 4 + length])
            values = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            wide = [next(values, -1) if value == 0xFFFFFFFF else value for value in narrow]
            if -1 not in wide:
                return wide[0], wide[1], wide[2]
        at += 4 + length
    raise UnsafeContent("its zip64 directory is malformed")


def _data_start(read: Read, total: int, header: int, path: bytes) -> int:
    head = read(header, min(_LOCAL.size + len(path), total - header))
    signature, _, flags, method, *_, n, n_extra = _LOCAL.unpack_from(head)
    same = n == len(path) and bytes(head[_LOCAL.size :]) == path
    if signature != b"PK\x03\x04" or method != 0 or flags & ~_FLAGS or not same:
        raise UnsafeContent(f"entry {_text(path)} is described in two different ways")
    return header + _LOCAL.size + int(n) + int(n_extra)


def _check_disjoint(spans: list[tuple[int, int]], end: int) -> None:
    spans.sort()
    for (_, stop), (start, _) in zip(spans, [*spans[1:], (end, end)], strict=True):
        if stop > start:
            raise UnsafeContent("its zip entries overlap or reach beyond the file")


def _text(path: bytes) -> str:
    return ascii(path[:80].decode("utf-8", "replace"))
