"""Look at a ``.pt`` file before torch does, without torch, and refuse what torch.save never writes.

A ``.pt`` file is a zip archive of stored (never compressed) entries below one root folder: ``data.pkl`` holds the pickle,
``data/<key>`` the bytes of each storage (``torch/serialization.py``). torch's own reader trusts sizes and names more than a
file from a stranger deserves: the central directory is read here in full, so that everything it declares lies inside the
file, once. Zip layout: PKWARE's APPNOTE 6.3.10, sections 4.3.7 to 4.3.16.
"""

from __future__ import annotations

import struct

from . import picklescan
from .errors import UnsafeContent

__all__ = ["check"]

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


def check(buffer: memoryview, name: str) -> None:
    """Refuse the ``.pt`` file in `buffer` if reading it could take memory out of proportion to its size.

    Nothing of it is imported or run. What the classes it names would do is not judged here.

    Args:
        buffer: all bytes of the file, one dimension of format ``B``.
        name: what to call the file in a message.

    Raises:
        UnsafeContent: says what is wrong with the file.
    """
    try:
        entries = _entries(buffer)
        pickle = entries.get("data.pkl")
        if "constants.pkl" in entries:
            raise UnsafeContent("it is a TorchScript archive; download it and use torch.jit.load if you trust who wrote it")
        if pickle is None:
            raise UnsafeContent("it is a zip archive, but not one that torch.save wrote (no data.pkl)")
        if any(key in _SMALL and size > _SMALL_BYTES for key, (_, size) in entries.items()):
            raise UnsafeContent("an entry that torch.save fills with a few digits is large")
        storages = {key[5:]: size for key, (_, size) in entries.items() if key.startswith("data/")}
        start, size = pickle
        picklescan.scan(bytes(buffer[start : start + size]), storages, len(buffer))
    except UnsafeContent as exc:
        raise UnsafeContent(f"refused to load {name}: {exc}") from exc.__cause__


def _entries(buffer: memoryview) -> dict[str, tuple[int, int]]:
    """Return (first byte, size) of each entry below the archive's root folder, by its path there."""
    if bytes(buffer[:4]) != b"PK\x03\x04":
        raise UnsafeContent(
            "it is not a zip archive, so this torch.save did not write it; a file from before torch 1.6 can be read with "
            "torch.load after download, if you trust who wrote it"
        )
    offset, end, count = _directory(buffer)
    spans: list[tuple[int, int]] = []
    found: dict[str, tuple[int, int]] = {}
    folded: set[bytes] = set()
    root = b""
    for _ in range(count):
        if offset + _ENTRY.size > end:
            raise UnsafeContent("its zip directory is cut off")
        signature, _, _, flags, method, *_, packed, size, n, n_extra, n_comment, disk, _, _, header = _ENTRY.unpack_from(
            buffer, offset
        )
        path = bytes(buffer[offset + 46 : offset + 46 + n])
        extra = buffer[offset + 46 + n : min(offset + 46 + n + n_extra, end)]
        offset += _ENTRY.size + n + n_extra + n_comment
        if signature != b"PK\x01\x02" or disk or offset > end:
            raise UnsafeContent("its zip directory is malformed")
        if method != 0 or flags & ~_FLAGS:
            raise UnsafeContent(f"entry {_text(path)} is compressed or encrypted, and torch.save does neither")
        size, packed, header = _wide(extra, size, packed, header)
        if size != packed:
            raise UnsafeContent(f"entry {_text(path)} declares two different sizes")
        start = _data_start(buffer, header, path)
        spans.append((header, start + size))
        if path.lower() in folded or b"\0" in path:  # torch's reader looks names up without regard to case, as C strings
            raise UnsafeContent(f"it holds two entries named {_text(path)}, or one whose name cannot be told apart")
        folded.add(path.lower())
        root = root or path[: path.find(b"/") + 1]
        if root and path.startswith(root):
            found[path[len(root) :].decode("utf-8", "replace")] = (start, size)
    if offset != end:
        raise UnsafeContent("its zip directory does not hold as many entries as it says")
    _check_disjoint(spans, end)
    return found


def _directory(buffer: memoryview) -> tuple[int, int, int]:
    """Return first byte, end and number of entries of the central directory."""
    where = len(buffer) - _END.size
    if where < 0 or bytes(buffer[where : where + 4]) != b"PK\x05\x06":
        raise UnsafeContent("its zip directory is missing: it was cut off, or something was appended")
    _, disk, first_disk, here, count, size, offset, comment = _END.unpack_from(buffer, where)
    end = where
    locator = where - _END64_LOCATOR.size
    if locator >= 0 and bytes(buffer[locator : locator + 4]) == b"PK\x06\x07":
        _, _, end, disks = _END64_LOCATOR.unpack_from(buffer, locator)
        if disks != 1 or end + _END64.size != locator or bytes(buffer[end : end + 4]) != b"PK\x06\x06":
            raise UnsafeContent("its zip64 directory is malformed")
        _, _, _, _, disk, first_disk, here, count, size, offset = _END64.unpack_from(buffer, end)
    if disk or first_disk or here != count or comment or offset + size != end:
        raise UnsafeContent("its zip directory is malformed")
    return offset, end, count


def _wide(extra: memoryview, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """Return size, packed size and header offset, read from the zip64 extra field where the narrow ones are full."""
    narrow = [size, packed, header]
    if 0xFFFFFFFF not in narrow:
        return size, packed, header
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


def _data_start(buffer: memoryview, header: int, path: bytes) -> int:
    if header + _LOCAL.size > len(buffer):
        raise UnsafeContent(f"entry {_text(path)} lies outside the file")
    signature, _, flags, method, *_, n, n_extra = _LOCAL.unpack_from(buffer, header)
    same = bytes(buffer[header + 30 : header + 30 + n]) == path
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
