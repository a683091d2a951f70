"""Manifests: what one checkpoint consists of. Field by field in docs/format.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from .checksum import ALGORITHM, DIGESTS
from .envelope import JSON, from_number, seal, to_number, to_time, unseal
from .errors import Damaged, DamagedManifest
from .key import Key
from .naming import check_name, check_path, check_step, file_key

__all__ = ["CHUNK_LIMIT", "MANIFEST_LIMIT", "FileEntry", "Manifest", "decode", "encode"]

MANIFEST_LIMIT = 1 << 30
"""Manifests larger than this many bytes are refused."""

CHUNK_LIMIT = 1 << 32
"""Longest chunk, in bytes; a reader needs one chunk in memory to check it. Only files of terabytes have chunks of more than 8 MiB."""


_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    path: str
    """Relative to the checkpoint, as the user named it."""
    size: int
    """Bytes."""
    crc: int
    """CRC-64/NVME of the whole file."""
    chunks: tuple[tuple[int, int], ...]
    """(length in bytes, CRC-64/NVME) of consecutive pieces that make up the file."""
    remote: str | None = None
    """The checksum that the service recorded, as in `ObjectInfo.checksum`."""
    digests: tuple[str, ...] = ()
    """The cryptographic checksum of each chunk, in a store with a key (whoever can change the data could make a CRC fit), or where it was
    asked for. Else empty."""
    digest: str = ""
    """Of which kind they are, one of `DIGESTS`; empty if there are none."""

    @property
    def key(self) -> str:
        """Key of the file below the checkpoint's folder."""
        return file_key(self.path)

    @property
    def checksum(self) -> str:
        """The CRC of the whole file, as in `ObjectInfo.checksum`."""
        return f"{ALGORITHM}:{self.crc:016x}"


@dataclass(frozen=True)
class Manifest:
    """Everything about one checkpoint but its bytes."""

    id: str
    name: str
    step: int | None
    created: float
    files: tuple[FileEntry, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    metadata: JSON = None
    sampler: JSON = None
    """The sampler's `state_dict`, None if none was saved."""
    unsafe: Mapping[str, list[str]] = field(default_factory=dict)
    """Per file: classes that ``torch.load(weights_only=True)`` refuses."""
    writer: Mapping[str, str] = field(default_factory=dict)
    """What wrote it: versions and host, for people."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)

    def file(self, path: str) -> FileEntry | None:
        """Return the entry of the file `path`, if there is one."""
        return self._by_path.get(path) if isinstance(path, str) else None

    @cached_property
    def _by_path(self) -> dict[str, FileEntry]:
        return {f.path: f for f in self.files}


def encode(manifest: Manifest, key: Key | None = None) -> bytes:
    """Return the bytes of `manifest`."""
    return seal(
        {
            "kind": "manifest",
            "id": manifest.id,
            "name": manifest.name,
            "step": manifest.step,
            "created": manifest.created,
            "checksum": ALGORITHM,
            "files": [
                {
                    "path": f.path,
                    "size": f.size,
                    "crc": _hex(f.crc),
                    "chunks": [[n, _hex(c)] for n, c in f.chunks],
                    **({"remote": f.remote} if f.remote else {}),
                    **({f.digest: list(f.digests)} if f.digest else {}),
                }
                for f in manifest.files
            ],
            "metrics": {k: from_number(v) for k, v in manifest.metrics.items()},
            "metadata": manifest.metadata,
            "sampler": manifest.sampler,
            "unsafe": dict(manifest.unsafe),
            "writer": dict(manifest.writer),
        },
        key,
    )


def decode(data: bytes, checkpoint_id: str, key: Key | None = None) -> Manifest:
    """Read the manifest of `checkpoint_id`, trusting nothing.

    Raises:
        DamagedManifest: also `Forged`, if it is not authentic.
        KeyMismatch, NewerFormat
    """
    what = f"the manifest of {checkpoint_id}"
    try:
        body = unseal(data, what, key)
        if body["kind"] != "manifest" or body["id"] != checkpoint_id:
            raise ValueError("it belongs to something else")
        if body["checksum"] != ALGORITHM:
            raise ValueError(f"unknown checksum {body['checksum']!r:.40}")
        manifest = Manifest(
            id=checkpoint_id,
            name=check_name(body["name"]),
            step=check_step(body["step"]),
            created=to_time(body["created"]),
            files=tuple(_decode_file(f, bool(key)) for f in body["files"]),
            metrics={str(k): to_number(v) for k, v in body["metrics"].items()},
            metadata=body["metadata"],
            sampler=body["sampler"],
            unsafe={check_path(k): [str(c) for c in v] for k, v in body["unsafe"].items()},
            writer={str(k): str(v) for k, v in body["writer"].items()},
        )
        if len({f.key for f in manifest.files}) != len(manifest.files):
            raise ValueError("a file is listed twice")
        return manifest
    except DamagedManifest:
        raise
    except Damaged as exc:
        raise DamagedManifest(str(exc)) from None
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise DamagedManifest(f"{what} is not valid: {type(exc).__name__}: {exc!s:.200}") from None


def _decode_file(item: JSON, authentic: bool) -> FileEntry:
    chunks = tuple((_length(n), _unhex(c)) for n, c in item["chunks"])
    size = item["size"]
    if not isinstance(size, int) or isinstance(size, bool) or sum(n for n, _ in chunks) != size:
        raise ValueError("chunks do not add up to the file's size")
    remote = item.get("remote")
    if remote is not None and not isinstance(remote, str):
        raise ValueError("a service's checksum is malformed")
    digest = next((kind for kind in DIGESTS if kind in item), "")
    digests = tuple(_digest(d) for d in item[digest]) if digest else ()
    if (authentic or digest) and len(digests) != len(chunks):
        raise ValueError("a chunk has no digest")
    return FileEntry(check_path(item["path"]), size, _unhex(item["crc"]), chunks, remote, digests, digest)


def _length(value: JSON) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= CHUNK_LIMIT:
        raise ValueError("a chunk's length is out of range")
    return value


def _digest(value: JSON) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError("a digest is malformed")
    return value


def _hex(crc: int) -> str:
    return f"{crc:016x}"


def _unhex(value: JSON) -> int:
    if not isinstance(value, str) or len(value) != 16:
        raise ValueError("a checksum is malformed")
    return int(value, 16)
