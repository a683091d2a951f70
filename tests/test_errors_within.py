"""An error that no storage raises, at every place of a save where one may: in a writer thread, in the sink, at each call of the storage.

It reaches the caller as it is, nothing that was acknowledged is lost or mixed, and the same store goes on with the next save.
"""

from __future__ import annotations

import io
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import evidence
import pytest
import rivals
import torch
import torch.distributed.checkpoint as dcp
from procs import litter
from stores import contents, store_on, write
from torch.distributed.checkpoint import filesystem

from ckptstore import Store
from ckptstore.backends.local import LocalBackend
from ckptstore.protocol import Backend
from ckptstore.testing import FaultyBackend
from ckptstore.transfer import FileSink

_T = TypeVar("_T")
_PATIENCE = 120.0
"""Seconds after which a save that says nothing is taken to hang."""
_SIZE = 300_000
"""Bytes of the large things in a save: several parts of `Counting.PART`."""


class Moment:
    """Counts the places that are come by, and raises at one of them, in whichever thread."""

    def __init__(self) -> None:
        self.left = 0
        """How many are still to come, the one to raise at included; 0 for none."""
        self.error: BaseException = MemoryError()
        self.raised_in = 0
        self._lock = threading.Lock()

    def come_by(self) -> None:
        with self._lock:
            self.left -= self.left > 0
            here = self.left == 0 and not self.raised_in and self.armed
            if here:
                self.raised_in, self.armed = threading.get_ident(), False
        if here:
            raise self.error

    def arm(self, nth: int, error: BaseException) -> None:
        self.left, self.error, self.raised_in, self.armed = nth, error, 0, True

    def disarm(self) -> None:
        self.armed = False

    armed = False


class Counting(FaultyBackend):
    """Storage on which some calls are places for an error."""

    PART = 1 << 16

    def __init__(self, inner: Backend, moment: Moment, what: str) -> None:
        super().__init__(inner)
        self.capabilities = replace(inner.capabilities, part_size=self.PART, parallel=2)
        self._moment = moment
        self._what = what

    def run(self, method: str, call: Callable[[], _T]) -> _T:
        if method == "writer.write" and self._what == "in a thread":
            self._moment.come_by()
        if method != "close" and self._what == "before a call":
            self._moment.come_by()
        done = call()
        if method != "close" and self._what == "after a call":
            self._moment.come_by()
        return done


_STEPS = ("_take", "_copy", "_cut", "_append", "_seal", "_send", "_store", "_hash", "close")


@contextmanager
def sink_watched(moment: Moment) -> Iterator[None]:
    """Each step that the sink makes with what is written to a file, in whichever thread, is a place for an error."""

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **more: Any) -> Any:
            moment.come_by()
            return real(*args, **more)

        return step

    with ExitStack() as stack:
        for name in _STEPS:
            stack.enter_context(mock.patch.object(FileSink, name, watched(getattr(FileSink, name))))
        yield


def _state(step: int) -> dict[str, Any]:
    return {"w": torch.full((_SIZE,), step % 251, dtype=torch.uint8), "small": torch.tensor(step), "m": torch.full((9,), step)}


SAVES: dict[str, Callable[[Store, int], object]] = {
    "save": lambda store, step: store.save(_state(step), step=step),
    "save_async": lambda store, step: store.save_async(_state(step), step=step).result(),
    "transaction": lambda store, step: write(store, step=step, files={"a": bytes([step % 251]) * _SIZE, "b": b"%d" % step}),
}
PLACES = {
    "in a thread": "an error in a writer thread, at every part",
    "in the sink": "MemoryError in the sink, at every step",
    "before a call": "MemoryError at every call of the storage",
    "after a call": "MemoryError at every call of the storage",
}


def is_whole(store: Store, name: str) -> bool:
    """Whether all that a name points to is of one step."""
    checkpoint = store.checkpoint(name)
    step = checkpoint.step or 0
    if "state.pt" not in checkpoint.files:
        return contents(store, checkpoint.id) == {"a": bytes([step % 251]) * _SIZE, "b": b"%d" % step}
    found = store.load(checkpoint.id)
    return all(torch.equal(found[key], value) for key, value in _state(step).items())


def attempt(work: Callable[[], object]) -> BaseException | None:
    """Do it, in a thread of its own, so that one that waits for ever is found; return what it raised."""
    told: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
            told.append(None)
        except BaseException as exc:
            told.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    assert told, "it waits for ever"
    return told[0]


def errors(where: str) -> Callable[[int], BaseException]:
    """Return what is raised at each place, by turns: a thread that writes may meet what the sink does not."""
    if where != "in a thread":
        return lambda nth: MemoryError(f"at {nth}")
    return lambda nth: MemoryError(f"at {nth}") if nth % 2 else OSError(5, f"at {nth}")


def strike(
    store: Store, moment: Moment, save: Callable[[Store, int], object], step: int, nth: int, where: str
) -> list[str] | None:
    """Have an error raised at the `nth` place of a save; return what is wrong then, None if there was no such place."""
    before, wrong = store.names(), []
    error = errors(where)(nth)
    moment.arm(nth, error)
    told = attempt(lambda: save(store, step))
    store._engine.settle()
    moment.disarm()
    if not moment.raised_in:
        assert told is None, told
        return None
    with Store(store.url, acquire=False) as other:
        names = other.names()
        if names != before and not (set(names) == {*before, "latest"} and other.checkpoint("latest").step == step):
            wrong.append(f"{before} became {names}")
        if told is None and names == before:
            wrong.append("acknowledged, and not there")
        if told is not None and told is not error:
            wrong.append(f"{error!r} was told as {told!r}")
        if names != before and told is not None and where in ("in a thread", "in the sink"):
            wrong.append("published in spite of an error")
        wrong += [f"{name} is mixed" for name in names if not is_whole(other, name)]
        wrong += map(str, other.verify())
    again = attempt(lambda: save(store, step + 1))
    if again is not None or store.checkpoint("latest").step != step + 1 or not is_whole(store, "latest"):
        wrong.append(f"the next save: {again!r}")
    return wrong


def all_places(folder: Path, what: str, where: str, stride: int) -> None:
    """Strike at each `stride`-th place of a save."""
    moment, found = Moment(), []
    with (
        evidence.experiment(PLACES[where]) as tally,
        sink_watched(moment if where == "in the sink" else Moment()),
        store_on(Counting(LocalBackend.open(str(folder / "store"), {}), moment, where), keep_last=2, owner="job") as store,
    ):
        SAVES[what](store, 1)
        SAVES[what](store, 2)
        for n in range(10_000):
            wrong = strike(store, moment, SAVES[what], 3 + 2 * n, 1 + n * stride, where)
            if wrong is None:
                break
            tally.strike()
            if wrong:
                found.append((1 + n * stride, wrong))
                tally.violations += 1
        store.close()
        with Store(folder / "store", owner="last") as last:
            last.acquire()
            last.gc()
            assert not litter(last)
    assert found == []
    assert tally.fired > 4 / stride


@pytest.mark.parametrize("stride", [pytest.param(7, id="sampled"), pytest.param(1, id="full", marks=pytest.mark.soak)])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("what", SAVES)
def test_an_error_at_every_place(ram: Path, what: str, where: str, stride: int) -> None:
    all_places(ram, what, where, stride)


# -- the others


class Failing(io.FileIO):
    """A file of which each write is a place for an error."""

    moment: Moment

    def write(self, data: Any) -> int:
        self.moment.come_by()
        return super().write(data)


@contextmanager
def _create_stream(_: Any, path: Path, mode: str) -> Iterator[io.FileIO]:
    with Failing(path, mode) as file:
        yield file


def _torch_save(folder: Path, step: int) -> None:
    with Failing(folder / "latest.pt", "wb") as file:
        torch.save(rivals.state_of_step(step), file)


def _tmp_replace(folder: Path, step: int) -> None:
    with Failing(folder / "latest.tmp", "wb") as file:
        torch.save(rivals.state_of_step(step), file)
    (folder / "latest.tmp").replace(folder / "latest.pt")


def _dcp(threads: int) -> Callable[[Path, int], None]:
    def save(folder: Path, step: int) -> None:
        place = folder / f"step-{step}"
        writer = dcp.FileSystemWriter(place, thread_count=threads, single_file_per_rank=False)
        with mock.patch.object(filesystem.FileSystem, "create_stream", _create_stream), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(rivals.state_of_step(step), storage_writer=writer, no_dist=True)

    return save


OTHERS: list[tuple[str, str, Callable[[Path, int], None]]] = [
    ("torch.save", "in the sink", _torch_save),
    ("tmp + os.replace", "in the sink", _tmp_replace),
    ("DCP", "in the sink", _dcp(1)),
    ("DCP", "in a thread", _dcp(3)),
]


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the error that nobody else is told
@pytest.mark.parametrize(("name", "where", "save"), OTHERS, ids=lambda p: p if isinstance(p, str) else "")
def test_the_same_happens_to_others(ram: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str, save: Any) -> None:
    """Only counted."""
    moment = Moment()
    monkeypatch.setattr(Failing, "moment", moment, raising=False)
    points = violations = 0
    for nth in range(1, 1000):
        folder = ram / str(nth)
        folder.mkdir()
        save(folder, 1)
        moment.arm(nth, errors(where)(nth))
        try:
            save(folder, 2)
            said = True
        except rivals.REFUSALS:
            said = False
        moment.disarm()
        if not moment.raised_in:
            break
        points += 1
        violations += rivals.is_violation(rivals.RIVALS[name], folder, 2 if said else 1, None if said else 2)
        shutil.rmtree(folder)
    evidence.record(PLACES[where], points=points, fired=points, violations=violations, subject=name)
    assert points > 5
