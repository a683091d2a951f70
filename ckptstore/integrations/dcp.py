"""`torch.distributed.checkpoint` on a store: every rank writes and reads its own files, one commit record publishes them all.

The coordinator (rank 0 of the process group) begins a transaction and tells the others its id with their plans; what each rank has written
and made durable comes back with its results; the coordinator takes these files into the transaction and commits. Where any rank fails,
DCP raises on all of them, and there is no commit. A checkpoint's folder is laid out as torch's own `FileSystemReader` reads it.
"""

from __future__ import annotations

import gc
import io
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from .. import torchfile, torchload
from ..checkpoint import LOADERS, Checkpoint
from ..errors import (
    CkptStoreError,
    Damaged,
    InvalidName,
    RankFailed,
    StateMismatch,
    UnsafeContent,
    UsageError,
    WeightsOnlyWarning,
    WrongKind,
)
from ..files import Files, TransactionFile
from ..lookup import first_whole, newest_first
from ..manifest import FileEntry
from ..naming import check_name, is_id
from ..ranks import Ranks, portable
from ..restore import newest_whole_for_all
from ..transaction import Draft, Transaction
from ._dcp_metadata import METADATA_FILE, StorageInfo, dump, parse

if TYPE_CHECKING:
    from ..distributed import Distributed

__all__ = ["BY", "StoreReader", "StoreWriter"]

BY = "torch.distributed.checkpoint"
_LAYOUT = "1.0.0"
"""torch's number for the layout of `Metadata.storage_data` that we write, too."""
_M = TypeVar("_M", bound=Callable[..., Any])


def _tells(method: _M) -> _M:
    """Let only what can be pickled out of `method`: DCP tells the other ranks, and would leave them waiting if it could not."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except BaseException as exc:
            told = portable(exc)
            if told is exc:
                raise
            raise told from exc

    return cast(_M, call)


@dataclass(frozen=True)
class _Place:
    """Where a rank writes; travels with its plan."""

    id: str
    file: str


@dataclass(frozen=True)
class _Written(WriteResult):
    """Where an item was written; the first of a rank also brings that rank's file."""

    place: _Place
    file: FileEntry | None = None
    unsafe: tuple[str, ...] = ()


class StoreWriter(StorageWriter):
    """Saves one checkpoint for `dcp.save` or `dcp.async_save`. Get one from `Store.dcp_writer`, on every rank, for each save.

    `dcp.save(…, checkpoint_id=name)` gives it another name.
    """

    def __init__(self, store: Distributed, draft: Draft) -> None:
        super().__init__()
        self._store = store
        self._draft = draft
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._open = ExitStack()  # the transaction, on the coordinator
        self._transaction: Transaction | None = None
        self._given_up: weakref.finalize[..., Any] | None = None
        self._id = ""

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": self._store, "_draft": self._draft}  # to a process that saves: nothing has begun

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_anew()

    @property
    def checkpoint_id(self) -> str:
        """The id of the checkpoint once this rank has begun to write it; before, the name that it is saved under."""
        return self._id or self._draft.name

    @_tells
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See `StorageWriter.reset`. `checkpoint_id` is the name to save under."""
        if checkpoint_id is not None:
            self._draft = replace(self._draft, name=check_name(os.fspath(checkpoint_id)))
        self._abandon()

    def _abandon(self) -> None:
        if self._given_up is not None:
            self._given_up()
        self._begin_anew()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """See `StorageWriter.validate_checkpoint_id`."""
        try:
            check_name(os.fspath(checkpoint_id))
        except (InvalidName, TypeError):
            return False
        return True

    def storage_meta(self) -> StorageMeta:
        """See `StorageWriter.storage_meta`."""
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self._id or None)

    @_tells
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageWriter.set_up_storage_writer`."""
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "use_collectives=False leaves nobody to publish what the ranks have written as one checkpoint; leave it out"
            )
        self._abandon()

    @_tells
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See `StorageWriter.prepare_local_plan`."""
        return plan

    @_tells
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the checkpoint, on the coordinator."""
        if not all(getattr(plan, "usable", True) for plan in plans):
            raise UsageError(
                "with enable_plan_caching=True, DCP's planner gives the ranks the plan of an earlier save, and with it the place of "
                "that; leave it out"
            )
        engine = self._store._engine
        if engine.unfinished:
            gc.collect()  # what a failed save raised refers to the frames that have its writer, and they to what it raised
        engine.delete_abandoned()
        transaction = self._store._begin(self._draft)
        transaction.by = BY
        self._transaction = self._open.enter_context(transaction)
        engine.unfinished.add(transaction.id)
        self._given_up = weakref.finalize(self, engine.abandon, transaction.id)
        self._given_up.atexit = False
        return [
            replace(plan, storage_data=_Place(transaction.id, f"__{rank}_0.distcp"))  # the names that torch uses
            for rank, plan in enumerate(plans)
        ]

    @_tells
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items into a file of its own, and make that durable."""
        place = plan.storage_data
        if not isinstance(place, _Place):
            raise UsageError(f"{type(planner).__name__}.finish_plan lost the plan's storage_data, which says where to write")
        self._id = place.id
        done: Future[list[WriteResult]] = Future()
        done.set_result(list(self._write(place, plan.items, planner)) if plan.items else [])
        return done

    def _write(self, place: _Place, items: list[WriteItem], planner: SavePlanner) -> list[_Written]:
        files = Files(self._store._engine, place.id)
        try:
            with files.open(place.file) as out:
                written = [_write_item(out, place, item, planner) for item in sorted(items, key=_tensors_last)]
            files.finish()
        except BaseException:
            files.drop()
            self._abandon()
            raise
        return [replace(written[0], file=files.entries[0]), *written[1:]]

    @_tells
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit what all ranks have written, on the coordinator."""
        if self._transaction is None or self._given_up is None:
            raise UsageError("finish was called on a rank that did not plan the save; is this DCP's coordinator?")
        transaction, given_up = self._transaction, self._given_up
        with self._open.pop_all():
            given_up.detach()
            self._store._engine.unfinished.discard(transaction.id)  # from here on the transaction cleans up by itself, if it may
            written = [_ours(result, transaction.id) for of_rank in results for result in of_rank]
            unsafe: dict[str, set[str]] = {}
            for result in written:
                if result.unsafe:
                    unsafe.setdefault(result.place.file, set()).update(result.unsafe)
            transaction.adopt([r.file for r in written if r.file], {path: sorted(names) for path, names in unsafe.items()})
            metadata.storage_data = {result.index: result.storage_data for result in written}
            metadata.storage_meta = StorageMeta(checkpoint_id=transaction.id, save_id=transaction.id)
            metadata.version = _LAYOUT
            with transaction.open(METADATA_FILE) as out:
                out.write(dump(metadata))
        self._transaction = self._given_up = None


def _ours(result: WriteResult, checkpoint_id: str) -> _Written:
    if not isinstance(result, _Written) or result.place.id != checkpoint_id:
        raise CkptStoreError(f"{result.index.fqn} was written elsewhere than into {checkpoint_id}: a rank used an earlier plan")
    return result


def _tensors_last(item: WriteItem) -> bool:
    return item.type != WriteItemType.BYTE_IO


def _write_item(out: TransactionFile, place: _Place, item: WriteItem, planner: SavePlanner) -> _Written:
    data = planner.resolve_data(item)
    start = out.tell()
    unsafe: tuple[str, ...] = ()
    if item.type == WriteItemType.BYTE_IO:
        if not isinstance(data, io.BytesIO):
            raise UsageError(f"the planner resolved {item.index.fqn} to a {type(data).__name__} instead of a BytesIO")
        unsafe = torchload.refused(data.getbuffer())
        if unsafe:
            message = f"{item.index.fqn} holds {', '.join(unsafe)}, which only dcp_reader(…, weights_only=False) will load"
            warnings.warn(message, WeightsOnlyWarning, stacklevel=2)
        out.write(data.getbuffer())
    else:
        if not isinstance(data, torch.Tensor):
            raise UsageError(f"the planner resolved {item.index.fqn} to a {type(data).__name__} instead of a tensor")
        tensor = data.detach().cpu()
        if tensor.untyped_storage().size() != tensor.nbytes:
            tensor = tensor.clone()  # of a view only what is seen
        torchfile.save(tensor, out)
    length = out.tell() - start
    return _Written(item.index, length, StorageInfo(place.file, start, length), place, unsafe=unsafe)


class _Unread(Metadata):
    """Stands for metadata that could not be read.

    `dcp.load` hides what `read_metadata` raises behind an AssertionError. So it raises nothing, and the error is raised by whoever is
    the first to look.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error


class StoreReader(StorageReader):
    """Loads one checkpoint for `dcp.load`. Get one from `Store.dcp_reader`, on every rank. Every byte that it gives away was checked.

    `dcp.load(…, checkpoint_id=name_or_id)` makes it read another one.
    """

    def __init__(self, store: Distributed, target: str | None, step: int | None, weights_only: bool) -> None:
        super().__init__()
        self._store = store
        self._target = target
        self._step = step
        self._weights_only = weights_only
        self._checkpoint: Checkpoint | None = None
        self._where: dict[Any, StorageInfo] = {}

    @property
    def checkpoint_id(self) -> str:
        """The id of the checkpoint once it has been found; before, what was asked for."""
        return self._checkpoint.id if self._checkpoint else self._target or "latest"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See `StorageReader.reset`. `checkpoint_id` is a name or an id."""
        if checkpoint_id is not None:
            self._target, self._step = os.fspath(checkpoint_id), None
        self._checkpoint, self._where = None, {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """See `StorageReader.validate_checkpoint_id`."""
        return is_id(os.fspath(checkpoint_id)) or StoreWriter.validate_checkpoint_id(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Find the checkpoint and return its metadata. What goes wrong is raised when that is first looked at."""
        try:
            self._checkpoint, metadata = first_whole(self._store._engine, self._target, self._step, _metadata)
        except Exception as exc:
            return _Unread(cast(Exception, portable(exc)))
        return metadata

    @_tells
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageReader.set_up_storage_reader`."""
        if isinstance(metadata, _Unread):
            raise metadata.error
        self._where = cast("dict[Any, StorageInfo]", metadata.storage_data)

    @_tells
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """See `StorageReader.prepare_local_plan`."""
        return replace(plan, storage_data=self.checkpoint_id)

    @_tells
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Make sure, on the coordinator, that all ranks have found the same checkpoint."""
        found = {plan.storage_data for plan in plans}
        if len(found) > 1:
            raise RankFailed(
                f"the ranks found different checkpoints ({', '.join(sorted(map(str, found)))}): one was being saved, or not all could "
                "read the newest; load again, or by id, or with dcp_resume"
            )
        return plans

    @_tells
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank wants, each stored item once, and only the chunks it is in."""
        assert self._checkpoint is not None  # set_up_storage_reader came before
        files: dict[str, dict[tuple[int, int], list[ReadItem]]] = {}
        for item in plan.items:
            where = self._where.get(item.storage_index)
            if where is None:
                raise StateMismatch(f"{self._checkpoint.id} does not say where {item.storage_index.fqn} is")
            files.setdefault(where.relative_path, {}).setdefault((where.offset, where.length), []).append(item)
        with self._verdict(self._checkpoint):
            for path, wanted in files.items():
                ranges = sorted(wanted)
                for part, data in zip(ranges, self._checkpoint.read_ranges(path, ranges), strict=True):
                    self._give(planner, wanted[part], data)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @contextmanager
    def _verdict(self, checkpoint: Checkpoint) -> Iterator[None]:
        try:
            yield
        except Damaged:
            self._store._engine.verdicts[checkpoint.id] = False  # the next commit here writes it down
            raise

    def _give(self, planner: LoadPlanner, items: list[ReadItem], data: memoryview) -> None:
        name = f"{self.checkpoint_id}: {items[0].storage_index.fqn}"
        tensor: Any = None
        for item in items:
            if item.type == LoadItemType.BYTE_IO:
                if self._weights_only:  # torch's planner does not ask for it
                    torchload.load(data, map_location="meta", name=name)
                planner.load_bytes(item, io.BytesIO(data))
                continue
            if tensor is None:
                tensor = torchload.load(data, map_location="cpu", name=name)
            if not isinstance(tensor, torch.Tensor):
                raise UnsafeContent(f"{name} should be a tensor, and is a {type(tensor).__name__}")
            part = tensor
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            if target.size() != part.size():
                raise StateMismatch(f"{name} has shape {list(part.size())}, and {list(target.size())} is wanted")
            target.copy_(part)
            planner.commit_tensor(item, target)


def _metadata(checkpoint: Checkpoint) -> Metadata:
    size = checkpoint.files.get(METADATA_FILE)
    if not size:
        raise WrongKind(
            f"checkpoint {checkpoint.id} was not written by {BY}, but by {checkpoint.by or 'Store.save or a transaction'}; "
            f"{LOADERS.get(checkpoint.by, 'that')} loads it"
        )
    (data,) = checkpoint.read_ranges(METADATA_FILE, [(0, size)])
    return parse(data, f"{checkpoint.id}/{METADATA_FILE}")


def load_newest(
    store: Distributed,
    state_dict: dict[str, Any],
    name: str,
    weights_only: bool,
    planner: LoadPlanner | None,
    process_group: Any,
    ranks: Ranks | None,
) -> Checkpoint | None:
    """Load the newest checkpoint saved under `name` that is whole for all ranks, and return it; see `Store.dcp_resume`."""

    def read(checkpoint: Checkpoint) -> None:
        reader = StoreReader(store, checkpoint.id, None, weights_only)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is no news to whoever runs one process
                load_distributed(state_dict, storage_reader=reader, planner=planner, process_group=process_group)
        except CheckpointException as exc:
            raise _cause(exc) from exc

    if ranks is not None:
        found = newest_whole_for_all(store._engine, name, ranks, read)
        return found and found[0]
    if not newest_first(store._engine, name):
        return None
    return first_whole(store._engine, name, None, read)[0]


def _cause(error: CheckpointException) -> BaseException:
    """Return what a failed load of all ranks came from: an error that is no damage, if there is one, else the first damage."""
    causes = [cause for _, (cause, _) in sorted(error.failures.items())]
    return next((c for c in causes if not isinstance(c, Damaged)), causes[0])
