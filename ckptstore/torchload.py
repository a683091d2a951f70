"""A ``.pt`` file from memory: `torch.load` of bytes that were verified, and what it refuses. How one is made: `torchfile`.

What torch refuses becomes an error that says what to do.
"""

from __future__ import annotations

import io
import pickle
from typing import IO, Any, cast

import torch

from . import archive
from .errors import UnsafeContent

__all__ = ["load", "load_open", "refused"]


def refused(buffer: bytes | bytearray | memoryview) -> tuple[str, ...]:
    """Return the names in a ``.pt`` file that ``weights_only=True`` refuses, sorted; of another kind of file, that it is one."""
    for location in ("meta", "cpu"):
        try:
            load(buffer, map_location=location)
        except UnsafeContent:
            try:
                found = torch.serialization.get_unsafe_globals_in_checkpoint(
                    io.BytesIO(buffer)
                )  # a copy, of what is not loadable
            except Exception:
                found = []
            return tuple(sorted(found)) or ("something torch does not name",)
        except RuntimeError:
            continue  # there are tensors that cannot be made without their numbers, or not here: that is no refusal
        break
    return ()


def load(
    buffer: bytes | bytearray | memoryview,
    *,
    map_location: Any = None,
    weights_only: bool = True,
    name: str = "state.pt",
) -> Any:
    """Return what `torch.load` makes of the ``.pt`` file in `buffer`, whose checksums the caller has compared.

    Takes no more memory than `buffer`, the result, and what the Python objects in it cost. The result does not refer to `buffer`.

    Args:
        buffer: all bytes of the file, C-contiguous.
        map_location, weights_only: as for `torch.load`; there is never a silent fall-back to ``weights_only=False``.
        name: what to call the file in a message.

    Raises:
        UnsafeContent: the file declares more than it has, or asks for something that ``weights_only=True`` refuses.
        RuntimeError: from torch, for instance for tensors of a device that is not here; `map_location` helps.
    """
    with memoryview(buffer) as view, view.cast("B") as data:
        archive.check(data, name)
        with _Reader(data) as file:
            return load_open(file, map_location, weights_only, name)


def load_open(file: io.RawIOBase | str, map_location: Any, weights_only: bool | None, name: str, *, mmap: bool = False) -> Any:
    """Do as `load` for an open file, or the path of one to be mapped, that was looked at already."""
    source = cast(IO[bytes], file)
    weights_only = weights_only is None or weights_only  # None means True, as for torch.load, here whatever the environment says
    try:
        return torch.load(source, map_location=map_location, weights_only=weights_only, mmap=mmap)
    except pickle.UnpicklingError as exc:
        if not weights_only:
            raise
        raise UnsafeContent(f"refused to load {name}: {_reason(source, exc)}") from exc
    except _MALFORMED as exc:
        if not weights_only:
            raise  # perhaps from code in the pickle, which the caller trusts
        raise UnsafeContent(f"cannot load {name}: torch cannot make sense of its pickle ({exc})") from exc


_MALFORMED = (TypeError, ValueError, LookupError, AttributeError, AssertionError, EOFError, OverflowError)
"""What torch's unpickler and tensor constructors raise for a pickle that is well-formed, but means nothing."""


def _reason(file: IO[bytes], exc: pickle.UnpicklingError) -> str:
    advice = "if you trust who wrote it, pass weights_only=False"
    if not isinstance(file, str):
        file.seek(0)
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except (pickle.UnpicklingError, *_MALFORMED):
        names = []
    if not names:
        return f"{exc}\n{advice}"
    listed = ", ".join(ascii(name)[1:-1][:200] for name in names[:20])
    return (
        f"it names {listed}, and weights_only=True allows only tensors and plain containers; {advice}, or name what it may use: "
        f"torch.serialization.add_safe_globals([{listed}])"
    )


class _Reader(io.RawIOBase):
    """A file over memory that is not copied, unlike `io.BytesIO`."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._pos = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, out: Any, /) -> int:
        with memoryview(out) as view, view.cast("B") as target:
            n = max(0, min(len(target), len(self._data) - self._pos))
            target[:n] = self._data[self._pos : self._pos + n]
        self._pos += n
        return n

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._pos, io.SEEK_END: len(self._data)}[whence]
        self._pos = max(0, start + offset)
        return self._pos

    def tell(self) -> int:
        return self._pos
