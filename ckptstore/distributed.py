"""What a store does in a job of several ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint
from .envelope import JSON
from .log import new_op
from .naming import check_name
from .owned import Owned
from .ranks import Ranks, ranks_of, whole_state
from .restore import restore_sampler
from .transaction import Draft

if TYPE_CHECKING:
    from .integrations.dcp import StoreReader, StoreWriter

__all__ = ["Distributed"]


class Distributed(Owned):
    """The methods of `Store` that know of ranks."""

    def dcp_writer(
        self,
        name: str = "latest",
        *,
        step: int | None = None,
        sampler: Any = None,
        metrics: Mapping[str, Any] | None = None,
        metadata: JSON = None,
    ) -> StoreWriter:
        """Return the ``storage_writer`` for one `torch.distributed.checkpoint.save` or ``async_save``, to be called on every rank.

        Each rank writes a file of its own; rank 0 of the process group commits them as one checkpoint, with its arguments, which are those
        of `save`. If any rank fails, there is no checkpoint, and DCP raises a ``CheckpointException`` on every rank, with what each met
        in its ``failures``. Only rank 0 acquires the store. ``use_collectives=False`` and ``enable_plan_caching=True`` are refused.

        Raises:
            InvalidName, UsageError: nothing was touched.
            WrongVersion: not with this version of torch.
        """
        from .integrations.dcp import StoreWriter

        return StoreWriter(self, Draft.check(name, step, metrics, metadata, sampler))

    def dcp_reader(self, target: str | None = None, *, step: int | None = None, weights_only: bool = True) -> StoreReader:
        """Return the ``storage_reader`` for `torch.distributed.checkpoint.load`, to be called on every rank.

        Each rank reads the chunks that its part of the state is in, and checks them before anything is made of them. By name, a
        checkpoint whose manifest or metadata is damaged is passed over for an older one, as by `load`; damage in the data makes
        every rank raise: `dcp_resume` then goes on to an older one. All ranks load the same checkpoint, or all raise.

        Args:
            target, step: as for `load`.
            weights_only: refuse what is no tensor unless ``torch.load(weights_only=True)`` loads it. (DCP itself never asks for that.)

        Raises:
            WrongVersion: not with this version of torch. What else is wrong is raised, on every rank, when it is used.
        """
        from .integrations.dcp import StoreReader

        return StoreReader(self, target, step, weights_only)

    def dcp_resume(
        self,
        state_dict: dict[str, Any],
        name: str = "latest",
        *,
        sampler: Any = None,
        weights_only: bool = True,
        planner: Any = None,
        process_group: Any = None,
    ) -> Checkpoint | None:
        """Do what `resume` does, with `torch.distributed.checkpoint.load`, which fills `state_dict`. For what `dcp_writer` saved.

        To be called on all ranks of `process_group`, the whole job if not given. Rank 0 acquires the store for all and looks up what there
        is; where any rank finds it damaged, all fall back to the same older one.

        Returns the checkpoint it resumed from, or None when the store is empty, on all ranks alike.

        Raises:
            Damaged, CheckpointNotFound, RankFailed, …: as `resume`, on all ranks.
            WrongVersion: not with this version of torch.
        """
        from .integrations.dcp import load_newest

        ranks = self._take_over(process_group, everybody=True)
        checkpoint = load_newest(self, state_dict, check_name(name), weights_only, planner, process_group, ranks)
        if checkpoint is not None:
            restore_sampler(checkpoint, sampler, ranks)
        self._note_resumed(checkpoint, ranks)
        return checkpoint

    def _save_together(self, process_group: Any, obj: Any, save: Callable[[Any], Checkpoint]) -> Checkpoint:
        """Save on rank 0 of a group, all of whose ranks make this call; see `Store.save`."""
        ranks = Ranks(process_group)
        state = whole_state(obj, ranks)
        return Checkpoint(self._engine, ranks.on_first(lambda: save(state).entry))

    def _take_over(self, process_group: Any, everybody: bool = False) -> Ranks | None:
        """Acquire the store, for all ranks of a group if there is one; see whether a newer job has come since."""

        def acquire() -> tuple[str, int | None]:
            self._acquire_for_change()
            self.acquire()  # also sees whether a newer job has come since
            return self._writer.owner, self._writer.epoch

        ranks = ranks_of(process_group, everybody)
        if ranks is None:
            acquire()
        else:
            owner, epoch = ranks.on_first(acquire)
            if epoch is not None and ranks.rank:
                self._writer.join(owner, epoch)
                self._acquired = True
        return ranks

    def _note_resumed(self, checkpoint: Checkpoint | None, ranks: Ranks | None) -> None:
        """Write down what the job resumed from, so that retention, anybody's, keeps what it stands on."""
        if checkpoint is None:
            return

        def note() -> None:
            record = self._writer.commit(lambda now: replace(self._engine.write_down(now), resumed=checkpoint.id), new_op())
            self._engine.committed(record)

        note() if ranks is None else ranks.on_first(note)
