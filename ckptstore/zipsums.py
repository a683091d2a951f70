"""The CRC-32s of a ``.pt`` file, filled in while torch writes it.

``python -m zipfile -t`` and every other reader of zip archives checks them. torch computes them slowly, on the thread that writes, but can
be told to leave them zero. They come behind the bytes that they are about (in a data descriptor), and again in the directory at the end, so
that none must be known too early. Zip layout: PKWARE's APPNOTE 6.3.10, sections 4.3.7 to 4.3.12.
"""

from __future__ import annotations

import struct

from .errors import BackendError

__all__ = ["ZipSums"]

_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_DESCRIPTOR, _DESCRIPTOR64 = struct.Struct("<4s3L"), struct.Struct("<4sL2Q")
_HAS_DESCRIPTOR = 1 << 3  # a bit of the flags
_FINGERPRINT = "/.data/serialization_id"
_WORD = (1 << 64) - 1


class ZipSums:
    """Follows an archive piece by piece, as torch writes it: header, name, padding, bytes, descriptor; and the directory at the end.

    While `record` is not None, the next piece is (more of) its bytes: pass it to `content`, and then tell its CRC by `add`. Any other piece
    goes through `frame`.
    """

    def __init__(self) -> None:
        self.record: str | None = None
        """The path of the record whose bytes come next, None if none do."""
        self._header = b""
        self._ahead = 0  # bytes of name and padding that are still to come
        self._described = False
        self._size = 0
        self._crc = 0
        self._crcs: list[int] = []
        self._fingerprint = 0

    def frame(self, piece: bytes | memoryview) -> bytes | memoryview:
        """Return what is to be written instead of `piece`.

        Raises:
            BackendError: torch writes otherwise than we know.
        """
        if self._ahead:
            self._header += piece
            self._ahead -= len(piece)
            if self._ahead <= 0:
                self._begin()
            return piece
        kind = bytes(piece[:4])
        if kind == b"PK\x03\x04" and len(piece) == _LOCAL.size:
            *_, flags, _, _, _, _, _, _, n, n_extra = _LOCAL.unpack(piece)
            self._header, self._ahead, self._described = bytes(piece), n + n_extra, bool(flags & _HAS_DESCRIPTOR)
            return piece
        if kind == b"PK\x01\x02":
            return self._directory(bytearray(piece))
        if kind in (b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06"):
            return piece
        raise BackendError("torch writes its archives in a way that is not known here; report this, with torch.__version__")

    def content(self, piece: memoryview) -> tuple[bytes | memoryview, bool]:
        """Return what is to be written instead of `piece`, and whether that is bytes of the record (else it is its descriptor)."""
        if self._size:
            form = {_DESCRIPTOR.size: _DESCRIPTOR, _DESCRIPTOR64.size: _DESCRIPTOR64}.get(len(piece))
            if form and bytes(piece[:4]) == b"PK\x07\x08" and form.unpack(piece)[3] == self._size:
                self.record = None
                self._crcs.append(self._crc)
                self._mix(self._crc)
                return b"".join((piece[:4], self._crc.to_bytes(4, "little"), piece[8:])), False
        elif self.record and self.record.endswith(_FINGERPRINT) and len(piece) == 40:
            # The later half of torch's fingerprint is made of the CRCs so far.
            piece = memoryview(bytes(piece[:20]) + b"%020d" % self._fingerprint)
        if len(piece) >= 8 and bytes(piece[:4]) == b"PK\x07\x08":
            self._mix(int.from_bytes(piece[4:8], "little"))  # torch takes it for a descriptor
        return piece, True

    def add(self, size: int, crc: int) -> None:
        """Note that `size` bytes of the record were written, and that all its bytes so far have this CRC-32."""
        self._size += size
        self._crc = crc

    @property
    def crc(self) -> int:
        """That of the record's bytes so far."""
        return self._crc

    def _begin(self) -> None:
        *_, n, _ = _LOCAL.unpack_from(self._header)
        self._size = self._crc = 0
        if self._described:
            self.record = self._header[_LOCAL.size : _LOCAL.size + n].decode("utf-8", "replace")
        else:
            self._crcs.append(0)  # it is empty

    def _directory(self, entries: bytearray) -> bytes:
        at = 0
        for crc in self._crcs:
            kind, *_, n, n_extra, n_comment, _, _, _, _ = _ENTRY.unpack_from(entries, at)
            if kind != b"PK\x01\x02":
                break
            struct.pack_into("<L", entries, at + 16, crc)
            at += _ENTRY.size + n + n_extra + n_comment
        if at != len(entries):
            raise BackendError("torch writes its archives in a way that is not known here; report this, with torch.__version__")
        return bytes(entries)

    def _mix(self, crc: int) -> None:
        seed = self._fingerprint
        self._fingerprint = seed ^ ((crc + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & _WORD)
