"""One committed checkpoint, as users see it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from .engine import Engine
from .envelope import JSON
from .errors import AlreadyExists, Damaged, DamagedFile, DamagedManifest, NotFound, UsageError, WrongKind
from .manifest import FileEntry, Manifest
from .naming import data_key
from .posix import Folders, NewFile, fsync_dir, mapped_errors, nearest_existing, write_all
from .protocol import LocalFiles
from .ranges import read_ranges
from .reading import StoredFile, check_size, damaged_ranges, opened
from .record import Entry

if TYPE_CHECKING:
    import torch
from .verifiedfile import VerifiedFile

__all__ = ["LOADERS", "RNG_FILE", "STATE_FILE", "Checkpoint", "Damage"]

STATE_FILE = "state.pt"
"""The file that `Store.save` writes and `Store.load` reads."""
RNG_FILE = "rng.pt"
"""The file that holds the random generators, saved with ``rng=True``."""


LOADERS = {
    "": "store.load or store.resume",
    "accelerate": "ckptstore.integrations.accelerate.load_state",
    "lightning": "ckptstore.integrations.lightning.StoreCheckpointIO",
    "torch.distributed.checkpoint": "dcp.load(state, storage_reader=store.dcp_reader(…))",
    "transformers": "ckptstore.integrations.transformers.StoreCallback.newest",
}
"""What loads a checkpoint that was written by another library, by the name of that."""


@dataclass(frozen=True)
class Damage:
    """One damaged part of a checkpoint."""

    id: str
    path: str
    """The file inside the checkpoint; empty for the manifest."""
    ranges: tuple[tuple[int, int], ...]
    """Bad byte ranges as (start, stop) pairs."""
    reason: str


class Checkpoint:
    """One committed checkpoint. It does not change; only its files may be pruned. Get one from a `Store`."""

    def __init__(self, engine: Engine, entry: Entry, manifest: Manifest | None = None) -> None:
        self._engine = engine
        self._entry = entry
        self._manifest = manifest
        self.read_whole: set[str] = set()
        """The files of which every byte was read here, and checked."""

    @property
    def id(self) -> str:
        """Unique in the store, never used again; also the folder of its files, ``data/<id>/``."""
        return self._entry.id

    @property
    def entry(self) -> Entry:
        """What the commit record says of it."""
        return self._entry

    @property
    def name(self) -> str:
        """The name it was saved under. Names may have moved on since: see `Store.names`."""
        return self._entry.name

    @property
    def step(self) -> int | None:
        """The step it was saved with, None if none was given."""
        return self._entry.step

    @property
    def created(self) -> datetime:
        """When it was saved, by the clock of the machine that saved it (aware, UTC)."""
        return datetime.fromtimestamp(self._entry.created, timezone.utc)

    @property
    def nbytes(self) -> int:
        """Bytes of all files, without the manifest."""
        return self._entry.nbytes

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics it was saved with."""
        return dict(self._entry.metrics)

    @property
    def manifest(self) -> Manifest:
        """The manifest, read and checked when first asked for.

        Raises:
            DamagedManifest: missing, or not the one that was committed.
        """
        return self._manifest or self._reread_manifest()

    def _reread_manifest(self) -> Manifest:
        with self._damaged_or_pruned():
            self._manifest = self._engine.manifest(self._entry)
        return self._manifest

    @property
    def files(self) -> dict[str, int]:
        """Path -> size in bytes."""
        return {f.path: f.size for f in self.manifest.files}

    @property
    def metadata(self) -> JSON:
        """The metadata it was saved with, None if none was given."""
        return self.manifest.metadata

    @property
    def sampler_state(self) -> JSON:
        """The sampler's ``state_dict`` it was saved with, None if none was given."""
        return self.manifest.sampler

    @property
    def by(self) -> str:
        """The library in whose way it was written, such as "torch.distributed.checkpoint"; empty for `Store.save` and transactions."""
        return self.manifest.writer.get("by", "")

    def load(
        self,
        file: str = STATE_FILE,
        *,
        map_location: Any = None,
        weights_only: bool = True,
        mmap: bool = False,
        verify: Literal["full", "lazy"] = "full",
    ) -> Any:
        """Read `file`, check every byte, and return what `torch.load` makes of it. Never falls back to another checkpoint.

        Args:
            map_location, weights_only: as for `torch.load`.
            mmap: the tensors are views of the file, mapped privately: its data is read when first used, and stays on disk as long as
                they live. Only for stores in a folder of a local disk.
            verify: "lazy", only with `mmap`, returns when the names and places of the tensors have been checked, and checks the rest in
                the background: what it finds is raised by the store's next `load`, `resume` or save, or by `close`, which waits for it.

        Raises:
            Damaged: what is stored is not what was committed; nothing was parsed.
            UsageError: this store's files cannot be mapped.
            UnsafeContent: the file asks for more than ``weights_only=True`` allows, or for more memory than it has bytes.
            NotFound: there is no such file in it, or the checkpoint has been pruned.
            WrongKind: there is not, for it was written by another library.
        """
        from . import loading

        if verify not in ("full", "lazy") or (verify == "lazy" and not mmap):
            raise UsageError(f"verify must be 'full', or with mmap=True 'lazy', not {verify!r:.100}")
        entry = self._file(file)
        how: dict[str, Any] = {"map_location": map_location, "weights_only": weights_only, "name": f"{self.id}/{file}"}
        with self._damaged_or_pruned(), ExitStack() as held:
            if verify == "lazy":
                # What is checked is the file that is mapped, which may lose its name meanwhile, to retention.
                lent = held.enter_context(opened(self._engine.backend, data_key(self.id, entry.key)))
            if mmap:
                from . import mapped

                result = mapped.load(self._stored(entry), lazy=verify == "lazy", **how)
            else:
                result = loading.load(self._stored(entry), **how)
            if verify == "lazy":
                late = held.pop_all()
                self._engine.check_later(lambda: self._check_late(entry, late, lent))
            else:
                self.read_whole.add(file)
        return result

    def load_tensors(self, names: Iterable[str], file: str = STATE_FILE, *, weights_only: bool = True) -> dict[str, torch.Tensor]:
        """Return some tensors of `file`, on the CPU, by their dotted paths ("model.layer1.weight"), in the order asked for.

        Reads, and checks, their bytes, the list of names and little else, if the file holds nothing but plain tensors and containers;
        everything otherwise. A path is the keys and indices that lead to the tensor, with dots between them.

        Raises:
            NotFound: there is no such tensor, or no such file, or the checkpoint has been pruned.
            Damaged, UnsafeContent: as `load`.
        """
        from . import loading

        if isinstance(names, str):
            raise UsageError(f"names must be a list of paths, as in [{names!r:.200}]")
        names = list(names)
        for wanted in names:
            if not isinstance(wanted, str):
                raise UsageError(f"names must be paths, as tensor_names() lists them, not {wanted!r:.200}")
        entry = self._file(file)
        with self._damaged_or_pruned():
            stored = self._stored(entry)
            return loading.load_tensors(stored, names, weights_only=weights_only, name=f"{self.id}/{file}")

    def tensor_names(self, file: str = STATE_FILE, *, weights_only: bool = True) -> list[str]:
        """Return the paths of all tensors in `file`, for `load_tensors`. Raises as that does."""
        from . import loading

        entry = self._file(file)
        with self._damaged_or_pruned():
            return loading.tensor_names(self._stored(entry), weights_only=weights_only, name=f"{self.id}/{file}")

    def load_to_copy(self, map_location: Any, weights_only: bool, held: Callable[[Any], Iterable[Any]]) -> Any:
        """Do as `load`, for who copies the tensors elsewhere at once, except in the parts that `held` tells: see `mapped.load_to_copy`."""
        from . import loading, mapped

        entry = self._file(STATE_FILE)
        with self._damaged_or_pruned():
            if loading.is_cpu(map_location) and isinstance(self._engine.backend, LocalFiles):
                with suppress(loading.NotPlain, mapped.NotMapped):
                    result = mapped.load_to_copy(self._stored(entry), map_location, f"{self.id}/{STATE_FILE}", held)
                    self.read_whole.add(STATE_FILE)
                    return result
        return self.load(map_location=map_location, weights_only=weights_only)

    def _stored(self, entry: FileEntry) -> StoredFile:
        return StoredFile(self._engine.backend, data_key(self.id, entry.key), entry, self._engine.workers)

    def _check_late(self, entry: FileEntry, held: ExitStack, lent: Any) -> None:
        with held:
            ranges = damaged_ranges(self._engine.backend, data_key(self.id, entry.key), entry, None, lent=lent)
        if ranges:
            self._engine.verdicts[self.id] = False
            why = "it was loaded with verify='lazy', and is damaged: what was made of it must not be used"
            raise DamagedFile(f"{self.id}/{entry.path}: {why}", entry.path, ranges)

    def open(self, file: str) -> BinaryIO:
        """Open one file for reading (seekable, buffered). Bytes that fail their checksum raise `DamagedFile` instead of coming out."""
        entry = self._file(file)
        with self._damaged_or_pruned():
            raw = VerifiedFile(
                self._engine.backend, data_key(self.id, entry.key), entry, lambda: self._engine.check_kept(self.id)
            )
            return io.BufferedReader(raw, 1 << 20)

    def read_ranges(self, file: str, ranges: Iterable[tuple[int, int]]) -> Iterator[memoryview]:
        """Yield the bytes of each (offset, length) in ascending order, checked; reads only the chunks that these touch.

        Raises:
            DamagedFile: instead of the first bytes that are not what was committed.
        """
        entry = self._file(file)
        with self._damaged_or_pruned():
            yield from read_ranges(self._engine.backend, data_key(self.id, entry.key), entry, self._engine.workers, ranges)

    def verify(self, progress: Callable[[int], object] | None = None) -> list[Damage]:
        """Read every byte and compare it with what was committed; return what is damaged, an empty list if all is whole.

        Args:
            progress: called with the number of bytes just done.

        Raises:
            CheckpointNotFound: it has been pruned; what is missing then is no damage.
        """
        try:
            manifest = self._reread_manifest()
        except DamagedManifest as exc:
            self._engine.verdicts[self.id] = False
            return [Damage(self.id, "", (), str(exc))]
        found = []
        for entry in manifest.files:
            key = data_key(self.id, entry.key)
            ranges = damaged_ranges(self._engine.backend, key, entry, self._engine.workers, progress)
            if ranges:
                spans = ", ".join(f"{start}–{max(start, stop - 1)}" for start, stop in ranges)
                found.append(Damage(self.id, entry.path, tuple(ranges), f"bytes {spans} of {entry.path} are missing or wrong"))
        if found:
            self._engine.check_kept(self.id)
        self._engine.verdicts[self.id] = not found
        return found

    def verify_remote(self) -> tuple[list[Damage], list[str]]:
        """Compare the sizes and checksums that the service itself has recorded with what was committed, without reading the files.

        Returns:
            What is damaged, and the files of which only the size could be compared, because the service has no checksum that was noted
            or can be computed from those in the manifest. A local folder has none at all.

        Raises:
            CheckpointNotFound: it has been pruned.
        """
        try:
            manifest = self._reread_manifest()
        except DamagedManifest as exc:
            return [Damage(self.id, "", (), str(exc))], []
        found: list[Damage] = []
        sizes_only: list[str] = []
        for entry, (damage, compared) in zip(
            manifest.files, self._engine.workers.map(self._compare, manifest.files), strict=True
        ):
            if damage:
                found.append(Damage(self.id, entry.path, ((0, entry.size),), damage))
            elif not compared:
                sizes_only.append(entry.path)
        if found:
            self._engine.check_kept(self.id)
        return found, sizes_only

    def _compare(self, entry: FileEntry) -> tuple[str, bool]:
        """Return what is wrong with a file as far as the service knows, and whether its checksum could be compared."""
        key = data_key(self.id, entry.key)
        try:
            recorded = check_size(self._engine.backend, key, entry).checksum
        except DamagedFile as exc:
            return str(exc), False
        for ours in (entry.checksum, entry.remote):
            if recorded and ours and recorded.partition(":")[0] == ours.partition(":")[0]:
                return ("" if recorded == ours else f"the service recorded {recorded} for {entry.path} instead of {ours}"), True
        return "", False

    def download(self, folder: str | os.PathLike[str]) -> Path:
        """Copy all files, checked, to `folder`, which is made if need be, and return its path. Durable on return.

        A file appears under its name only when it is complete.

        Raises:
            AlreadyExists: one of the files is there already; nothing was written.
            Damaged: a file is not what was committed; it does not appear.
        """
        root = Path(folder)
        with self._damaged_or_pruned(), mapped_errors("write", str(root)):
            for entry in self.manifest.files:
                if os.path.lexists(root / entry.path):
                    raise AlreadyExists(f"{root / entry.path} exists already; give an empty folder")
            base = root.absolute()
            top = nearest_existing(str(base))  # what is made below it has to be flushed too
            base.mkdir(parents=True, exist_ok=True)
            folders = {base, *base.parents}
            for entry in self.manifest.files:
                target = base / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                folders.update(target.parents)
                self._copy(entry, target)
            for path in sorted(folders, reverse=True):
                if path.is_relative_to(top):
                    fsync_dir(str(path))
        return root

    def _copy(self, entry: FileEntry, target: Path) -> None:
        folder = Folders(str(target.parent), os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        with folder, NewFile(folder, target.name, str(target)) as new:
            with VerifiedFile(self._engine.backend, data_key(self.id, entry.key), entry) as source:
                while block := source.read(1 << 20):
                    write_all(new.fd, source.tell() - len(block), memoryview(block))
            os.fsync(new.fd)
            new.close_file()
            new.publish()  # never replaces a file that appeared meanwhile

    @contextmanager
    def _damaged_or_pruned(self) -> Iterator[None]:
        """Tell damage from files that went because the checkpoint was pruned while it was being read."""
        try:
            yield
        except Damaged:
            self._engine.check_kept(self.id)
            raise

    def _file(self, file: str) -> FileEntry:
        entry = self.manifest.file(file)
        if entry is None:
            if self.by and self.by in LOADERS:
                raise WrongKind(
                    f"checkpoint {self.id} has no file {file!r:.200}: it was written by {self.by}; {LOADERS[self.by]} loads it"
                )
            names = ", ".join(sorted(f.path for f in self.manifest.files)) or "none"
            raise NotFound(f"checkpoint {self.id} has no file {file!r:.200}; it has: {names:.500}")
        return entry

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Checkpoint):
            return NotImplemented
        return (self.id, self._engine.backend.url) == (other.id, other._engine.backend.url)

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.id} name={self.name!r} step={self.step} nbytes={self.nbytes}>"
