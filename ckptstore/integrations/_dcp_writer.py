"""Saving with `torch.distributed.checkpoint`: each rank a file of its own, the coordinator one commit for all; see `.dcp`."""

from __future__ import annotations

import gc
import io
import os
import secrets
import warnings
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from .. import torchfile, torchload
from ..errors import CkptStoreError, InvalidName, UsageError, WeightsOnlyWarning
from ..files import Files, TransactionFile
from ..manifest import FileEntry
from ..naming import check_name
from ..ranks import told
from ..transaction import Draft, Transaction
from ._dcp_metadata import BY, METADATA_FILE, StorageInfo, dump

if TYPE_CHECKING:
    from ..distributed import Distributed

__all__ = ["StoreWriter"]

_LAYOUT = "1.0.0"
"""torch's number for the layout of `Metadata.storage_data` that we write, too."""


@dataclass(frozen=True)
class _Place:
    """Where a rank writes; travels with its plan."""

    id: str
    file: str
    token: Any
    """What the rank has sent with its plan, unless the planner lost it."""


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
        self._token = ""

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": self._store, "_draft": self._draft}  # to a process that saves: nothing has begun

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_anew()

    @property
    def checkpoint_id(self) -> str:
        """The id of the checkpoint once this rank has begun to write it; before, the name that it is saved under."""
        return self._id or self._draft.name

    @told
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

    @told
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageWriter.set_up_storage_writer`."""
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "use_collectives=False leaves nobody to publish what the ranks have written as one checkpoint; leave it out"
            )
        self._abandon()

    @told
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See `StorageWriter.prepare_local_plan`."""
        self._token = secrets.token_hex(8)
        return replace(plan, storage_data=self._token)

    @told
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
            replace(
                plan, storage_data=_Place(transaction.id, f"__{rank}_0.distcp", plan.storage_data)
            )  # the names that torch uses
            for rank, plan in enumerate(plans)
        ]

    @told
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items into a file of its own, and make that durable."""
        place = plan.storage_data
        if not isinstance(place, _Place):
            raise UsageError(f"{type(planner).__name__}.finish_plan lost the plan's storage_data, which says where to write")
        if place.token not in (None, self._token):  # somebody's checkpoint may be there
            raise UsageError(f"{type(planner).__name__} gave this rank the place of an earlier save")
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

    @told
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
