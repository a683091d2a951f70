"""Loading with `torch.distributed.checkpoint`: each rank what it wants, every byte checked; see `.dcp`."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from .. import torchload
from ..checkpoint import LOADERS, Checkpoint
from ..errors import Damaged, InvalidName, RankFailed, StateMismatch, UnsafeContent, WrongKind
from ..lookup import first_whole, newest_first
from ..naming import check_name, is_id
from ..ranks import Ranks, portable, told
from ..restore import newest_whole_for_all
from ._dcp_metadata import BY, METADATA_FILE, StorageInfo, parse

if TYPE_CHECKING:
    from ..distributed import Distributed

__all__ = ["StoreReader", "load_newest"]


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

    def __init__(self, store: Distributed, target: str | None, step: int | None, weights_only: bool | None) -> None:
        super().__init__()
        self._store = store
        self._target = target
        self._step = step
        self._weights_only = weights_only is None or weights_only  # as `torchload.load_open`
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
        try:
            target = os.fspath(checkpoint_id)
            return is_id(target) or check_name(target) == target
        except (InvalidName, TypeError):
            return False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Find the checkpoint and return its metadata. What goes wrong is raised when that is first looked at."""
        try:
            self._checkpoint, metadata = first_whole(self._store._engine, self._target, self._step, _metadata)
        except Exception as exc:
            return _Unread(cast(Exception, portable(exc)))
        return metadata

    @told
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `StorageReader.set_up_storage_reader`."""
        if isinstance(metadata, _Unread):
            raise metadata.error
        self._where = cast("dict[Any, StorageInfo]", metadata.storage_data)

    @told
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """See `StorageReader.prepare_local_plan`."""
        return replace(plan, storage_data=self.checkpoint_id)

    @told
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Make sure, on the coordinator, that all ranks have found the same checkpoint."""
        found = {plan.storage_data for plan in plans}
        if len(found) > 1:
            raise RankFailed(
                f"the ranks found different checkpoints ({', '.join(sorted(map(str, found)))}): one was being saved, or not all could "
                "read the newest; load again, or by id, or with dcp_resume"
            )
        return plans

    @told
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
        states: dict[str, Any] = {}

        def take() -> None:
            states.update((k, v.state_dict() if isinstance(v, Stateful) else v) for k, v in state_dict.items())

        # As torch would, but for what fails there on one rank: that would leave the others waiting in the middle of a load.
        take() if ranks is None else ranks.together(take)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is no news to whoever runs one process
                load_distributed(states, storage_reader=reader, planner=planner, process_group=process_group)
        except CheckpointException as exc:
            raise _cause(exc) from exc
        for key in sorted(states):
            target = state_dict[key]
            if isinstance(target, Stateful):
                target.load_state_dict(states[key])
            else:
                state_dict[key] = states[key]

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
