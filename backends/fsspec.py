"""Whatever fsspec has a protocol for: ``abfs://container/run-42``, ``sftp://host/path``, ``s3fs://bucket/run-42`` (S3 through s3fs) …

``fsspec+NAME://`` means fsspec's protocol NAME also where ckptstore has a backend of its own. Credentials, and every other setting of a
file system, come from where its library finds them or from fsspec's configuration: ``FSSPEC_SFTP_PASSWORD=…`` in the environment, or
``~/.config/fsspec/*.json``. Only of a few protocols is it known that they create an object atomically; the others need ``single_writer=1``.

The libraries repeat failed requests on their own. Of the one that must not be repeated, the creation of a commit record, this does no
harm: a repeated one meets the first, so that the log looks whose record is there.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, ClassVar

from ckptstore.errors import (
    AlreadyExists,
    BackendError,
    CkptStoreError,
    InvalidOption,
    InvalidURL,
    NoAtomicCreate,
    NotFound,
    Transient,
)
from ckptstore.inorder import InOrder
from ckptstore.protocol import Capabilities, ObjectInfo, PartWriter

from ._fsspec_errors import typed_error

__all__ = ["FsspecBackend", "backend_for", "protocols"]

_ATOMIC = frozenset(
    {
        # s3fs 2026.9, `_pipe_file`: with mode="create", data below 100 MB is one PutObject with "If-None-Match: *". The probe finds
        # services that ignore that.
        *("s3", "s3a"),
        # gcsfs 2026.10, `_pipe_file`: below 50 MiB `simple_upload`, one request with ifGenerationMatch=0.
        *("gs", "gcs"),
        # adlfs 2026.8, `_pipe_file`: `upload_blob(overwrite=False)`, in azure-storage-blob 12 (`upload_block_blob`) one Put Blob with
        # "If-None-Match: *" below 64 MiB.
        *("abfs", "abfss", "az"),
        # Not local and memory: AbstractFileSystem looks whether the file exists and then writes it. Nor sftp, smb, ftp, hdfs, webdav, hf.
    }
)
_AT_CLOSE = _ATOMIC | {"hf"}
"""What is written appears when the file object is closed, whole or not at all; and there are no folders to make. `HfFileSystemFile` of
huggingface_hub 1: `_upload_chunk` collects in a temporary file, and commits that at the end."""
_HERE = frozenset({"file", "local", "memory"})
_RMDIR = frozenset({"file", "local", "sftp", "ssh", "ftp", "smb"})
"""`rmdir` refuses a folder that is not empty. That of hdfs would take everything in it."""
_BLOCK = 50 << 20
"""Bytes per request of an upload: 10 000 of them, the most that S3 takes, make 488 GiB."""
_NAMES = {"s3fs": "s3"}
_OPTIONS = {
    "endpoint_url": ({"s3", "s3a", "gs", "gcs"}, "another address of the service"),
    "anon": ({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}, "'1': send no credentials"),
    "account_name": ({"abfs", "abfss", "az"}, "the storage account"),
    "username": ({"sftp", "ssh", "ftp", "smb"}, "who logs in"),
}


def protocols() -> list[str]:
    """Return what fsspec has a protocol for, without looking whether the packages are there."""
    import fsspec

    return [*fsspec.available_protocols(), *_NAMES]


def backend_for(scheme: str) -> type[FsspecBackend] | None:
    """Return the backend for a URL scheme, None if fsspec has no such protocol.

    Raises:
        ImportError: a package is missing, or its import fails; says in one line which.
        InvalidURL: the protocol only wraps others (caches).
    """
    import fsspec
    from fsspec.implementations.chained import ChainedFileSystem

    name = _NAMES.get(scheme, scheme.removeprefix("fsspec+"))
    if name not in fsspec.available_protocols():
        return None
    try:
        implementation = fsspec.get_filesystem_class(name)
    except (ImportError, AttributeError) as exc:  # the latter: a package of another version
        raise ImportError(_missing(name, exc)) from exc
    if issubclass(implementation, ChainedFileSystem):
        raise InvalidURL(f"{scheme}:// only wraps other protocols of fsspec; name the storage itself")
    options = {option: text for option, (protocols, text) in _OPTIONS.items() if name in protocols}
    return type("FsspecBackend", (FsspecBackend,), {"scheme": scheme, "protocol": name, "options": options})


def _missing(name: str, exc: Exception) -> str:
    """Say what to install for a protocol, by fsspec's own hint where it has one, and why its import failed."""
    from fsspec.registry import known_implementations

    known = known_implementations.get(name, {})
    hint = known.get("err", "")
    if not hint or "EntryPoint(" in hint:  # what fsspec says of all that other packages have registered
        package = known.get("class", name).partition(".")[0].partition(":")[0]
        hint = f"install {package}, or mend it if it is there"
    return " ".join(f"{hint} ({exc.__cause__ or exc})".split())


class FsspecBackend:
    """A folder of some fsspec file system; `backend_for` makes the class for one protocol. Usable on both sides of a fork."""

    options: ClassVar[Mapping[str, str]] = {}
    scheme: ClassVar[str]
    protocol: ClassVar[str]

    def __init__(self, location: str, arguments: Mapping[str, Any]) -> None:
        import fsspec

        self.url = f"{self.scheme}://{location}"
        self.at_close = self.protocol in _AT_CLOSE
        async_impl = fsspec.get_filesystem_class(self.protocol).async_impl
        self.capabilities = Capabilities(
            atomic_create=self.protocol in _ATOMIC,
            durable=self.protocol != "memory",
            part_size=16 << 20,
            parallel=4 if async_impl else 1,
            remote=self.protocol not in _HERE,
            probe=self.protocol in _ATOMIC,
        )
        self._full_url = f"{self.protocol}://{location}"
        self._arguments = arguments
        # fsspec's own rule: an instance that is not asynchronous inside belongs to one thread.
        self._turn: Any = nullcontext() if async_impl else threading.RLock()
        self._lock = threading.Lock()
        self._made: dict[int, tuple[Any, str]] = {}  # by process: connections do not survive a fork

    @classmethod
    def open(cls, location: str, options: Mapping[str, str]) -> FsspecBackend:
        """Make a backend for `location`, in the notation of the protocol. Sends nothing.

        Raises:
            InvalidOption: unknown, or with a bad value.
            InvalidURL: empty, with ``.`` or ``..`` parts, or a chain of several URLs.
        """
        for name in options:
            if name not in cls.options:
                raise InvalidOption(
                    f"{cls.scheme}:// has no option {name!r:.50} (it has {', '.join(cls.options) or 'none'}); give what is secret, and "
                    f"anything else, by fsspec's configuration, such as FSSPEC_{cls.protocol.upper()}_NAME=VALUE in the environment"
                )
        if options.get("anon", "0") not in ("0", "1"):
            raise InvalidOption("anon must be 0 or 1")
        if "@" in options.get("endpoint_url", ""):
            raise InvalidOption("endpoint_url must have no user or password in it")
        parts = location.strip("/").split("/")
        if any(p in ("", ".", "..") or re.search(r"[\0-\x1f\x7f]", p) for p in parts) or "::" in location:
            raise InvalidURL(f"{location!r:.200} is no place: no empty, '.' or '..' parts, no control characters, no '::'")
        arguments: dict[str, Any] = {k: v for k, v in options.items() if k != "anon"}
        if options.get("anon") == "1":
            arguments.update({"token": "anon"} if cls.protocol in ("gs", "gcs") else {"anon": True})
        return cls(location.rstrip("/"), arguments)

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        """See `Backend.put_if_absent`.

        Raises:
            NoAtomicCreate: the protocol has none; with ``single_writer=1`` this is never called.
        """
        if not self.capabilities.atomic_create:
            raise NoAtomicCreate(
                f"{self.url}: {self.protocol} has no create-if-absent; add single_writer=1 if only one job ever writes"
            )
        if ready:
            ready()
        with self.errors("create", key, creating=True) as (fs, path):
            fs.pipe_file(path, data, mode="create")

    def replace(self, key: str, data: bytes) -> None:
        """See `Backend.replace`."""
        if self.protocol in _ATOMIC:
            with self.errors("write", key) as (fs, path):
                fs.pipe_file(path, data)
            return
        writer = _FsspecWriter(self, key, replacing=True)
        try:
            writer.write(0, memoryview(data), 0)
            writer.finish()
        except BaseException:
            writer.abort()
            raise

    def open_writer(self, key: str) -> PartWriter:
        """See `Backend.open_writer`."""
        return _FsspecWriter(self, key)

    def get(self, key: str, limit: int) -> bytes:
        """See `Backend.get`."""
        try:
            with self.errors("read", key) as (fs, path):
                data = bytes(fs.cat_file(path, start=0, end=limit + 1))
        except NotFound:
            raise
        except BackendError:
            if self.stat(key).size:
                raise
            return b""  # no range of an empty object can be satisfied
        if len(data) > limit:
            raise BackendError(f"{self.url}: {key} is longer than the {limit} bytes that belong here")
        return data

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Backend.read_into`."""
        if not buffer.nbytes:
            self.stat(key)
            return
        end = offset + buffer.nbytes
        with self.errors("read", key) as (fs, path):
            data = fs.cat_file(path, start=offset, end=end)
        if len(data) != buffer.nbytes:
            raise BackendError(f"{self.url}: got {len(data)} bytes of {key} instead of {buffer.nbytes} from byte {offset} on")
        buffer.cast("B")[:] = data

    def stat(self, key: str) -> ObjectInfo:
        """See `Backend.stat`. What libraries tell of checksums is too different to be used."""
        with self.errors("look at", key) as (fs, path):
            info = fs.info(path)
        if info["type"] != "file":
            raise NotFound(f"{self.url}: {key} is no file but a {info['type']}")
        return ObjectInfo(key, _size(info))

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """See `Backend.list`. Uploads to an object store that were never finished are not shown: let the bucket's rules remove them."""
        stack = [iter(self._folder(prefix, start_after))]
        while stack:
            for key, info in stack[-1]:
                if info is not None:
                    yield info
                elif key > start_after or start_after.startswith(key):
                    stack.append(iter(self._folder(key, start_after)))
                    break
            else:
                stack.pop()

    def _folder(self, prefix: str, start_after: str) -> Sequence[tuple[str, ObjectInfo | None]]:
        """Return what is in one folder in the order of the keys: files, and folders (their keys end in ``/``) with None."""
        found: list[tuple[str, ObjectInfo | None]] = []
        try:
            # Not `find`: it passes over folders that it cannot read.
            with self.errors("read", prefix) as (fs, path):
                entries = fs.ls(path, detail=True)
        except NotFound:
            return found
        for entry in entries:
            name = str(entry["name"]).rstrip("/")
            if name == path:
                continue  # a marker of the folder itself, or a file where a folder was expected
            if not name.startswith(f"{path}/"):
                raise BackendError(f"{self.url}: the listing of {path} shows {name!r:.200}, which is not in it")
            key = prefix + name[len(path) + 1 :]
            if entry["type"] == "directory":
                found.append((f"{key}/", None))
            elif key > start_after:
                found.append((key, ObjectInfo(key, _size(entry))))
        return sorted(found, key=lambda item: item[0])

    def delete(self, keys: Sequence[str]) -> None:
        """See `Backend.delete`."""
        for key in keys:
            with self.errors("delete", key) as (fs, path):
                with suppress(FileNotFoundError):
                    fs.rm_file(path)
                while "/" in key and self.protocol in _RMDIR:
                    key, path = key.rpartition("/")[0], path.rpartition("/")[0]
                    try:
                        fs.rmdir(path)
                    except OSError:  # not empty
                        break

    def close(self) -> None:
        """See `Backend.close`. Its connections end with the file system object; another is made if need be."""
        with self._lock:
            self._made.pop(os.getpid(), None)

    @contextmanager
    def errors(self, doing: str, key: str, *, creating: bool = False) -> Iterator[tuple[Any, str]]:
        """Yield the file system and the path of `key`, and turn whatever goes wrong in the block into our errors, with it as cause.

        `creating`: what may have happened all the same is `Ambiguous`.
        """
        try:
            with self._turn:
                fs, root = self._fs()
                yield fs, f"{root}/{key}".rstrip("/")
        except CkptStoreError:
            raise
        except ImportError as exc:
            raise BackendError(f"{self.url}: {self.protocol} needs a package that is not there: {exc}") from exc
        except Exception as exc:
            raise typed_error(exc, f"could not {doing} {self.url}/{key}", doing, creating) from exc

    def _fs(self) -> tuple[Any, str]:
        with self._lock:
            if os.getpid() not in self._made:
                from fsspec.core import url_to_fs
                from fsspec.dircache import DirCache

                fs, root = url_to_fs(self._full_url, skip_instance_cache=True, **self._arguments)
                fs.dircache = DirCache(use_listings_cache=False)  # not every file system takes it as an argument
                self._made[os.getpid()] = fs, root.rstrip("/")
            fs, root = self._made[os.getpid()]
        fs.invalidate_cache()  # some have caches of their own
        return fs, root


class _FsspecWriter:
    """See `PartWriter`. Where a file shows while it is being written, it has a temporary name.

    A file object of fsspec publishes what it has got when it is closed, by ``with``, or when Python collects it: so `abort` marks it
    as closed.
    """

    def __init__(self, backend: FsspecBackend, key: str, *, replacing: bool = False) -> None:
        self._backend = backend
        self._key = key
        self._replacing = replacing
        above, slash, name = key.rpartition("/")
        # The final name is there for people who look; it is cut so that the whole stays below 255 bytes.
        self._name = key if backend.at_close else f"{above}{slash}{name[:200]}.{secrets.token_hex(8)}.partial"
        self._parts = InOrder(self._send)
        self._closed = self._over = self._done = False
        self._failure: CkptStoreError | None = None
        with backend.errors("write", self._name) as (fs, path):
            self._file = self._open(fs, path)

    def _open(self, fs: Any, path: str) -> Any:
        if self._backend.at_close:
            return fs.open(path, "wb", block_size=_BLOCK)
        try:
            return fs.open(path, "wb")
        except FileNotFoundError:
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            return fs.open(path, "wb")

    def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
        """See `PartWriter.write`. A part that failed cannot be written again: nobody knows how much of it the file object has passed on."""
        self._check_open()
        try:
            with self._backend.errors("write", self._key):
                self._parts.write(offset, data)
        except Transient as exc:
            raise BackendError(str(exc)) from exc

    def _send(self, data: memoryview) -> None:
        while data:
            written = self._file.write(data)
            data = data[len(data) if written is None else written :]

    def start_finish(self) -> None:
        """See `PartWriter.start_finish`. It would cost a request."""

    def finish(self) -> None:
        """See `PartWriter.finish`. Whatever the library said, it counts what is there, once, under a name that nobody else uses."""
        self._check_open()
        size = self._parts.position
        if not self._closed:
            self._parts.close()
            size = self._parts.position
            self._publish()
            self._closed = True
        try:
            found = self._backend.stat(self._key)
        except NotFound as exc:
            self._over = True
            raise self._failure or BackendError(f"{self._backend.url}: {self._key} is not there after it was written") from exc
        self._over = self._done = True
        if found.size != size:
            self._done = False
            with suppress(CkptStoreError):
                self._backend.delete([self._key])
            raise BackendError(
                f"{self._backend.url}: {found.size} bytes of {self._key} arrived instead of {size}"
            ) from self._failure

    def _publish(self) -> None:
        try:
            with self._backend.errors("write", self._key) as (fs, path):
                self._file.close()
                if self._name != self._key:
                    if not self._replacing and fs.exists(path):
                        raise AlreadyExists(f"{self._backend.url}: {self._key} exists already, and was left as it is")
                    fs.mv(f"{path.removesuffix(self._key)}{self._name}", path)
        except AlreadyExists:
            raise
        except Transient as exc:
            self._failure = BackendError(str(exc))
        except BackendError as exc:
            self._failure = exc

    def abort(self) -> None:
        """See `PartWriter.abort`."""
        if self._done:
            return
        self._over = True
        with suppress(CkptStoreError), self._backend.errors("cancel", self._key):
            self._drop()
        if self._name != self._key:
            with suppress(CkptStoreError):
                self._backend.delete([self._name])

    def _drop(self) -> None:
        from fsspec.spec import AbstractBufferedFile

        if not isinstance(self._file, AbstractBufferedFile):
            self._file.close()
            return
        try:
            self._file.discard()
        finally:
            self._file.closed = True

    def _check_open(self) -> None:
        if self._over:
            raise BackendError(f"{self._key}: this writer is finished or aborted; open a new one")


def _size(info: Mapping[str, Any]) -> int:
    if info["size"] is None:
        raise BackendError(f"{info['name']}: this storage does not tell the sizes of files, so it cannot hold a store")
    return int(info["size"])
