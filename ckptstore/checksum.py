"""CRC-64/NVME of chunks, and of whole files from their chunks.

S3 checks and keeps the same number (``x-amz-checksum-crc64nvme``), so one checksum serves the manifest and the wire. It detects
accidents, not forgery. awscrt computes it at memory speed with the GIL released; it takes 70 ms to import, hence the late import.

Besides, chunks may have a cryptographic checksum: a digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

from .errors import WrongVersion

__all__ = ["ALGORITHM", "DIGESTS", "Digest", "combine", "crc32", "crc64nvme", "digest_of", "new_digest", "sha256"]

ALGORITHM = "crc64nvme"
DIGESTS = ("sha256", "blake3")
"""The kinds of digests, all of 32 bytes, by the names that manifests give them."""


class Digest(Protocol):
    """A digest of what is not all at hand at once."""

    def update(self, data: memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


def new_digest(kind: str) -> Digest:
    """Return a digest of nothing yet, of one of the kinds of `DIGESTS`.

    Raises:
        WrongVersion: it needs a package that is not installed.
    """
    if kind == "sha256":
        return hashlib.sha256()
    try:
        from blake3 import blake3
    except ImportError:
        raise WrongVersion(
            "BLAKE3 checksums need the package blake3, which is not installed: pip install 'ckptstore[blake3]'"
        ) from None
    found: Digest = blake3()
    return found


def digest_of(kind: str, *data: memoryview) -> str:
    """Return the digest of `data`, one behind the other, in lower-case hexadecimal; nothing if `kind` is empty. Raises `WrongVersion`."""
    if not kind:
        return ""
    whole = new_digest(kind)
    for piece in data:
        whole.update(piece)
    return whole.hexdigest()


def crc64nvme(data: bytes | bytearray | memoryview, before: int = 0) -> int:
    """Return the CRC-64/NVME, an unsigned 64-bit number, of `data` behind bytes whose CRC is `before`."""
    from awscrt import checksums

    return int(checksums.crc64nvme(data, before))


def combine(chunks: Iterable[tuple[int, int]]) -> int:
    """Return the CRC of a whole from its consecutive chunks, each given as (length in bytes, CRC)."""
    from awscrt import checksums

    whole = 0  # the CRC of nothing
    for length, crc in chunks:
        whole = checksums.combine_crc64nvme(whole, crc, length)
    return int(whole)


def crc32(data: bytes | bytearray | memoryview, before: int = 0) -> int:
    """Return the CRC-32 that zip archives have, of `data` behind bytes whose CRC-32 is `before`. Three times as fast as zlib's own."""
    from zlib_ng import zlib_ng

    return int(zlib_ng.crc32(data, before))


def sha256(*data: bytes | bytearray | memoryview) -> str:
    """Return the SHA-256 of `data`, one behind the other, in lower-case hexadecimal."""
    whole = hashlib.sha256()
    for piece in data:
        whole.update(piece)
    return whole.hexdigest()
