"""What a storage backend must do: the whole contract, in one place.

A backend only moves bytes. Chunking, checksums, threads, retries, names and retention live above it. Keys are relative,
``/``-separated, made of ``[A-Za-z0-9._=-]`` segments, none of which is ``.`` or ``..`` or ends in ``.partial`` (reserved for backends);
the library never passes any other. Every method is synchronous and MUST be safe to call from several threads at once.

Errors: a backend maps whatever its storage raises to `ckptstore.errors`, keeping the original as ``__cause__``. `NotFound` is
an answer, never a guess: a backend that could not look raises `BackendError`. A backend repeats nothing by itself, nor lets an SDK do
so: it raises `Transient`, and what may be repeated is repeated above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

__all__ = ["Backend", "Capabilities", "GatheringWriter", "LocalFiles", "ObjectInfo", "PartWriter"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can promise; fixed for the life of the backend object."""

    atomic_create: bool
    """`put_if_absent` has exactly one winner, also between processes and hosts."""
    durable: bool
    """What was acknowledged survives a crash of this process (False: the memory backend)."""
    part_size: int
    """Bytes per `PartWriter.write` that suit the storage best."""
    parallel: int
    """How many parts of one file may usefully be moved at a time."""
    min_part: int = 0
    """Bytes that every part but the last has at least (S3: 5 MiB)."""
    max_parts: int = 0
    """How many parts a file may have, so that they must grow with it (S3: 10 000); 0: any number."""
    gathers: bool = False
    """Writers have `GatheringWriter.write_pieces`. Asked for only where parts are limited, by `min_part` or `max_parts`."""
    remote: bool = False
    """Each call is a request over a network: few requests matter, and what failed in between is worth repeating."""
    probe: bool = False
    """`atomic_create` is a claim of somebody else's service: try it out before it is relied upon."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object."""

    key: str
    size: int
    """Bytes."""
    checksum: str | None = None
    """What the service itself recorded: ``crc64nvme:``, ``crc32c:`` or ``md5:`` and lower-case hexadecimal digits, or None. Only from
    `Backend.stat`."""


class PartWriter(Protocol):
    """Writes one large object in parts. Nothing is visible under its key before `finish` returns."""

    def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
        """Write `data`, part `number` (from 0, in the order of the offsets), at byte `offset`. MUST write all of it or raise.

        Called from several threads; parts never overlap and leave no gap, but come in any order. `data` is only valid until the
        call returns. A part that failed with `Transient` may be written again, the same bytes under the same number.

        Args:
            crc: the CRC-64/NVME of `data`, if it is known already: for a service that compares it with what comes.

        Raises:
            BackendError, StorageFull: the whole file is lost; only `abort` may follow.
            DamagedFile: likewise: the service, or the writer, has found that `data` has another `crc`, having changed since.
        """

    def start_finish(self) -> None:
        """Begin what `finish` will wait for, without waiting. Called when all parts are written; `finish` does not need it.

        Sends no request over a network. The object may become visible, but need not be durable.

        Raises:
            AlreadyExists, BackendError: as `finish`.
        """

    def finish(self) -> str | None:
        """Publish the object under its key, durably: after return it MUST survive a power cut.

        MUST NOT replace an object that is already there, where the storage can tell; no key of a data file is ever used twice.

        Returns:
            The service's own checksum of the object, as in `ObjectInfo.checksum`, None if it has none.

        Raises:
            AlreadyExists: the key is taken.
            Transient: nobody knows, or it did not happen; `finish` may be called again, and then tells.
            BackendError: not durable, and MUST NOT be left visible; only `abort` may follow. A failed flush is final: never flush
                the same file again and believe the answer.
            Ambiguous: not known to be durable, and it could not be taken away again either.
        """

    def abort(self) -> None:
        """Drop what was written. Idempotent; MUST NOT raise for anything the storage does; does nothing after a successful `finish`."""


class GatheringWriter(PartWriter, Protocol):
    """A writer to which a part may be given from several places in memory, which else would have to be copied together."""

    def write_pieces(self, offset: int, pieces: Sequence[memoryview], number: int, crc: int | None = None) -> None:
        """Do as `PartWriter.write` with `pieces`, of bytes, none of them empty, one behind the other."""


@runtime_checkable
class Backend(Protocol):
    """Storage for one store. See the module docstring for keys, threads and errors."""

    options: ClassVar[Mapping[str, str]]
    """URL options of this backend: name -> one line of help."""
    capabilities: Capabilities
    url: str
    """Where this is, for messages; never with a secret in it."""

    @classmethod
    def open(cls, location: str, options: Mapping[str, str]) -> Backend:
        """Make a backend for `location` (the URL behind ``scheme://``, or a path). MUST NOT touch the storage.

        Raises:
            InvalidOption, InvalidURL: say what is wrong with which.
        """

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        """Create a small object: atomic and durable, with exactly one winner. Carries the whole commit protocol.

        `ready` makes durable what the object refers to. It MUST have returned before anything that could make the object visible is
        tried; what it raises is passed on as it is, and then nothing is created. The backend may prepare the object first.

        After return the object MUST survive a power cut and MUST be visible to every reader. No reader ever sees part of it. MUST
        NOT be retried inside the backend or by an SDK.

        Raises:
            AlreadyExists: the key is taken, perhaps by this very call sent twice.
            Ambiguous: it may or may not have taken effect: any lost answer, unlike with the other methods.
            BackendError, Transient: it did not take effect, and never will.
        """

    def replace(self, key: str, data: bytes) -> None:
        """Create or overwrite a small object. A reader sees the old or the new content, never a mixture or nothing.

        Need not be durable. Used for hints and for shrinking old log slots, never for anything that must not be lost.
        """

    def open_writer(self, key: str) -> PartWriter:
        """Begin to write a large object. Missing parent directories are made (and made durable by `PartWriter.finish`)."""

    def get(self, key: str, limit: int) -> bytes:
        """Return the whole content of a small object.

        Raises:
            NotFound: there is no such object.
            BackendError: it could not be read, or is larger than `limit` bytes.
        """

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill all of `buffer` from byte `offset` of the object.

        Raises:
            NotFound: there is no such object.
            Unreadable: the storage has lost these bytes for good (EIO of a local disk, something else in the file's place).
            BackendError: it could not be read, or ends before the buffer is full: short data is an error, never fewer bytes.
        """

    def stat(self, key: str) -> ObjectInfo:
        """Return the size of an object. Raises `NotFound` if it is proven absent."""

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield objects whose key starts with `prefix` and sorts after `start_after`, in ascending order of key.

        `prefix` is empty or ends in ``/``. Includes the leftovers of unfinished writes, under keys of the backend's choice below the
        prefix, so that `delete` can remove them. Not a snapshot. MUST raise rather than end early.
        """

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects (and directories that this leaves empty). A key that is not there is no error.

        Need not be durable. MUST NOT follow links out of the store.
        """

    def close(self) -> None:
        """Release connections and descriptors. Idempotent."""


@runtime_checkable
class LocalFiles(Protocol):
    """What a backend has besides, if its objects are files of this machine: small reads cost little, and they may be mapped into memory."""

    def reader(self, key: str) -> AbstractContextManager[Callable[[int, memoryview], None]]:
        """Lend what does as `Backend.read_into` for one object, without opening it each time. Raises the same."""

    def open_file(self, key: str) -> int | None:
        """Return a descriptor of the object, open for reading, which the caller closes; None if files here should not be mapped.

        Raises:
            NotFound, Unreadable, BackendError: as `Backend.read_into`.
        """
