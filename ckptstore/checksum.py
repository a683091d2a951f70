"""CRC-64/NVME of chunks, and of whole files from their chunks.

S3 checks and keeps the same number (``x-amz-checksum-crc64nvme``), so one checksum serves the manifest and the wire. It detects
accidents, not forgery. awscrt computes it at memory speed with the GIL released; it takes 70 ms to import, hence the late import.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["ALGORITHM", "combine", "crc32", "crc64nvme", "sha256"]

ALGORITHM = "crc64nvme"


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
