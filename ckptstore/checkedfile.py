"""A stored ``.pt`` file for torch's own reader: what that reads is checked as it lands, and little of it is held in memory.

For files that hold something else than plain tensors, or whose tensors go to another device: torch makes their objects, and would do so
from a copy of the whole file otherwise. First the file is checked from its first to its last byte, as it is before torch sees any other.
"""

from __future__ import annotations

import io
from typing import Any

from . import archive
from .archive import Outline
from .reading import StoredFile
from .verifiedfile import VerifiedFile

__all__ = ["CheckedFile", "checked_outline"]

_DIRECT = 1 << 20
"""Bytes from which on what torch wants is read to where torch wants it; less is taken from a few chunks that are kept."""


def checked_outline(file: StoredFile, name: str) -> Outline | None:
    """Check every byte of a file, and return what is in it; None if it is not laid out as `torch.save` does, or may not be.

    Raises:
        DamagedFile
        UnsafeContent: as `archive.outline`. What the pickle asks for is still to be judged.
    """
    outline = archive.outline(file.read, file.entry.size, name)
    records = list(outline.records.values()) if outline else []
    heads = [memoryview(bytearray(record.header_size)) for record in records]
    file.fill([(record.header, head) for record, head in zip(records, heads, strict=True)])
    return outline if all(record.fits(head) for record, head in zip(records, heads, strict=True)) else None


class CheckedFile(VerifiedFile):
    """A file that always gives as many bytes as are asked for, and says "the end" instead of raising: torch's reader is in C++."""

    def __init__(self, file: StoredFile) -> None:
        super().__init__(file.backend, file.key, file.entry)
        self._file = file
        self.failure: BaseException | None = None
        """What came in the way. Then nothing that was made of the file is good."""

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        start = self.tell()
        view = view[: max(0, self._file.entry.size - start)]
        try:
            if len(view) >= _DIRECT:
                self._file.fill([(start, view)], all_chunks=False)
                self.seek(start + len(view))
                return len(view)
            done = 0
            while done < len(view):
                done += super().readinto(view[done:])
            return done
        except BaseException as exc:  # it is damaged since it was checked, or there was a signal
            self.failure = exc
            return 0

    def tell(self) -> int:
        return self.seek(0, io.SEEK_CUR)
