"""The threads of a store: each job ends, whatever interrupts those who wait for it, and no thread outlives its use."""

from __future__ import annotations

import _thread
import gc
import threading
import weakref
from queue import SimpleQueue
from typing import Any

import pytest

from ckptstore import workers
from ckptstore.workers import Bell, Job, Workers, _Crew, _start, drain

_PATIENCE = 30.0
"""Seconds after which a thread that has not ended never will."""


def fail(error: BaseException) -> None:
    raise error


def no_thread(*_: Any) -> Any:
    raise RuntimeError("can't start new thread")


@pytest.fixture
def crew() -> Any:
    """Threads of this test's own, which have ended after it."""
    made = _Crew()
    yield made
    made.dismiss()


def test_a_job_has_let_go_of_its_memory_when_it_is_over() -> None:
    class Owner:
        """Of the memory that a job moves."""

    owner = Owner()
    kept = weakref.ref(owner)
    job = Job(lambda _: "done", owner)
    del owner
    there: list[bool] = []

    class Over:
        def release(self) -> None:
            there.append(kept() is not None)

    job._over = Over()  # type: ignore[assignment]
    job.run()
    assert there == [False], "who waits for the job may find that the memory is still in use"
    assert job.result() == "done"


def test_a_job_that_has_failed_does_not_keep_what_it_was_given() -> None:
    """Not through the frames of its error, nor through those of what came before that."""

    class Owner:
        """Of the memory that a job moves."""

    def move(owner: Owner, inner: bool) -> None:
        try:
            if inner:
                move(Owner(), False)
            raise ValueError
        finally:
            owners.append(weakref.ref(owner))

    def told(owner: Owner) -> None:
        try:
            move(owner, True)
        except ValueError as exc:
            raise OSError("it went wrong") from exc

    owners: list[weakref.ref[Owner]] = []
    job = Job(told, Owner())
    job.run()
    assert isinstance(job._outcome and job._outcome[1], OSError)
    assert len(owners) == 2
    assert not any(owner() for owner in owners)


def test_waiting_for_a_job_lasts_until_its_call_is_over() -> None:
    may_end, begun = threading.Event(), threading.Event()

    def call() -> str:
        begun.set()
        may_end.wait(_PATIENCE)
        return "done"

    job = Job(call)
    thread = threading.Thread(target=job.run)
    thread.start()
    begun.wait(_PATIENCE)
    assert not job.done()
    assert not job._over.acquire(blocking=False), "who waits would not wait"
    job.cancel()  # too late
    may_end.set()
    assert job.result() == "done"
    thread.join()


def test_a_job_that_was_given_up_has_no_result_and_is_never_begun() -> None:
    called: list[int] = []
    job = Job(called.append, 1)
    job.cancel()
    assert job.done()
    job.wait()
    with pytest.raises(RuntimeError, match="given up"):
        job.result()
    job.run()
    assert not called


def test_only_what_is_no_error_of_a_call_interrupts_whose_thread_it_came_to() -> None:
    jobs = [Job(fail, error) for error in (ValueError(), KeyboardInterrupt(), SystemExit(3))]
    assert [job.interrupt for job in jobs] == [None] * 3
    for job in jobs:
        job.run()
    assert [type(job.interrupt) for job in jobs] == [type(None), KeyboardInterrupt, SystemExit]
    with pytest.raises(SystemExit):
        jobs[2].result()


class Waited(Job[None]):
    """A job for which nobody can wait in vain: says instead whether it would have been."""

    def __init__(self, *interrupts: BaseException) -> None:
        super().__init__(lambda: None)
        self.waits: list[bool] = []
        self._interrupts = [*interrupts]

    def wait(self) -> None:
        self.waits.append(self.done())
        if self._interrupts:
            raise self._interrupts.pop(0)


def test_draining_gives_up_what_has_not_begun() -> None:
    jobs = [Waited(), Waited()]
    drain(jobs)
    assert [job.waits for job in jobs] == [[True], [True]]
    for job in jobs:
        job.run()
        assert job._outcome is None
    waited = Waited()
    drain([waited], cancel=False)
    assert waited.waits == [False]


def test_an_interrupted_drain_waits_for_all_and_then_raises() -> None:
    jobs = [Waited(KeyboardInterrupt("first"), KeyboardInterrupt("second")), Waited(SystemExit(3)), Waited()]
    with pytest.raises(SystemExit):
        drain(jobs)
    assert [len(job.waits) for job in jobs] == [4, 2, 1]


def test_without_threads_an_interrupt_is_raised_where_it_came_and_an_error_by_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_thread, "start_new_thread", no_thread)
    some = Workers(2)
    with pytest.raises(KeyboardInterrupt):
        some.submit(fail, KeyboardInterrupt())
    job = some.submit(fail, ValueError("no number"))
    with pytest.raises(ValueError, match="no number"):
        job.result()
    assert some.submit(len, "four").result() == 4


@pytest.mark.parametrize("there", [False, True], ids=["first", "any"])
def test_a_job_that_an_interrupt_kept_from_the_threads_is_over(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    some = Workers(1)
    if there:
        some.submit(len, "").result()
    monkeypatch.setattr(_Crew, "hire", lambda *_: fail(KeyboardInterrupt()))
    jobs: list[Job[int]] = []
    with pytest.raises(KeyboardInterrupt):
        some.begin(jobs, len, "four")
    assert [job.done() for job in jobs] == [True], "who waits for it would wait for ever"
    monkeypatch.undo()
    assert some.submit(len, "four").result() == 4
    some.close()


@pytest.mark.parametrize("first", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize("closing", [False, True])
def test_a_handler_of_a_signal_that_comes_while_a_job_is_begun(
    monkeypatch: pytest.MonkeyPatch, closing: bool, first: bool
) -> None:
    """It does not wait for a lock that it has kept from being given back; and nobody waits for threads that it has ended."""
    some = Workers(1)
    hire = _Crew.hire
    results: list[int] = []

    def interrupted(crew: _Crew, most: int) -> bool:
        monkeypatch.setattr(_Crew, "hire", hire)
        hired = first or hire(crew, most)
        results.append(some.submit(len, "two").result())
        if closing:
            some.close()
        return hire(crew, most) if first else hired

    monkeypatch.setattr(_Crew, "hire", interrupted)
    thread = threading.Thread(target=lambda: results.append(some.submit(len, "four").result()), daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    assert results == [3, 4], "it waits for ever"
    assert some.submit(len, "again").result() == 5
    some.close()


def test_what_comes_while_the_threads_are_being_dismissed_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, which had hired before."""
    crew, job = _Crew(), Job(len, "four")
    dismiss = workers._dismiss

    def meanwhile(*args: Any, **options: Any) -> None:
        dismiss(*args, **options)
        crew.jobs.put(job)
        crew.do_what_is_left()

    monkeypatch.setattr(workers, "_dismiss", meanwhile)
    crew.dismiss()
    assert job.done()


def test_threads_that_have_been_dismissed_and_are_still_at_work_end(monkeypatch: pytest.MonkeyPatch) -> None:
    there, may_end = threading.Event(), threading.Event()

    class Told(SimpleQueue[Any]):
        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            super().put(item)
            if item is None:
                there.set()

    monkeypatch.setattr(workers, "SimpleQueue", Told)
    crew = _Crew()
    crew.jobs.put(Job(may_end.wait, _PATIENCE))
    assert crew.hire(1)
    there.clear()
    closing = threading.Thread(target=crew.dismiss, daemon=True)
    closing.start()
    assert there.wait(_PATIENCE)
    crew.do_what_is_left()
    may_end.set()
    closing.join(_PATIENCE)
    assert not closing.is_alive()


def test_what_interrupts_the_job_that_is_done_here_goes_on(crew: _Crew) -> None:
    crew.dismiss()
    crew.jobs.put(Job(fail, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        crew.do_what_is_left()


def test_no_more_threads_than_were_asked_for_and_none_after_closing() -> None:
    some = Workers(2)
    together = threading.Barrier(2)

    def meet() -> threading.Thread:
        together.wait(_PATIENCE)
        return threading.current_thread()

    for _ in range(2):
        jobs: list[Job[threading.Thread]] = []
        for _ in range(4):
            some.begin(jobs, meet)
        assert len(jobs) == 4
        threads = {job.result() for job in jobs}
        assert len(threads) == 2 and threading.current_thread() not in threads
        some.close()
        assert not any(thread.is_alive() for thread in threads)
    some.close()


def test_the_threads_end_when_what_they_were_for_is_dropped() -> None:
    some = Workers(2)
    threads = [some.submit(threading.current_thread).result() for _ in range(2)]
    del some
    gc.collect()
    for thread in threads:
        thread.join(_PATIENCE)
        assert not thread.is_alive()


def test_what_is_to_have_a_new_lock_in_a_fork_is_forgotten_when_it_is_dropped() -> None:
    gc.collect()
    before = set(workers._owners)
    some = [Workers(1) for _ in range(3)]
    assert set(workers._owners) - before == {id(one) for one in some}
    del some
    gc.collect()
    assert set(workers._owners) <= before


def test_a_map_runs_ahead_keeps_the_order_and_ends_what_it_began() -> None:
    some = Workers(2)
    begun: list[int] = []

    def work(i: int) -> int:
        begun.append(i)
        return -i

    results = some.map(work, range(100))
    assert [next(results) for _ in range(3)] == [0, -1, -2]
    results.close()  # type: ignore[attr-defined]
    at_most = len(begun)
    assert at_most <= 7
    assert list(some.map(work, range(10))) == [-i for i in range(10)]
    some.close()
    assert sorted(begun[at_most:]) == [*range(10)]


def test_a_thread_is_counted_and_told_of_when_it_runs(crew: _Crew) -> None:
    answer: SimpleQueue[None] = SimpleQueue()
    _start(answer, crew.jobs, crew._threads)
    answer.get_nowait()
    assert [thread.is_alive() for thread in crew._threads] == [True]
    job = Job(threading.current_thread)
    crew.jobs.put(job)
    assert [job.result()] == crew._threads


def test_a_thread_that_cannot_be_had_is_not_counted(monkeypatch: pytest.MonkeyPatch, crew: _Crew) -> None:
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    answer: SimpleQueue[None] = SimpleQueue()
    _start(answer, crew.jobs, crew._threads)
    answer.get_nowait()
    assert not crew._threads
    assert not crew.hire(2)
    monkeypatch.undo()
    assert crew.hire(2)
    assert len(crew._threads) == 1


class Ear(SimpleQueue[None]):
    """A waiter's queue that does not wait: it says whether it would have."""

    heard: list[bool]

    def get(self, block: bool = True, timeout: float | None = None) -> None:
        self.heard.append(not self.empty())
        return super().get(block=False)


def test_a_bell_is_heard_by_who_waits_and_forgets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SimpleQueue", Ear)
    Ear.heard = []
    bell, attempts = Bell(), 0

    def attempt() -> bool:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            bell.ring()  # somebody else does, between this look and the wait
        return attempts > 4

    bell.until(attempt)
    assert Ear.heard == [True, False], "the first wait is over at once, the second when it is time to look again"
    assert attempts == 5
    assert not bell._waiting
    with pytest.raises(ZeroDivisionError):
        bell.until(lambda: bool(bell._waiting and 1 // 0))
    assert not bell._waiting


def test_a_bell_wakes_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_RING_AGAIN", _PATIENCE)
    bell, looked, over = Bell(), threading.Semaphore(0), threading.Event()

    def attempt() -> bool:
        looked.release()
        return over.is_set()

    waiters = [threading.Thread(target=bell.until, args=(attempt,)) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    for _ in range(2 * len(waiters)):  # the second look of each: it has put itself down by then
        assert looked.acquire(timeout=_PATIENCE)
    over.set()
    bell.ring()
    for waiter in waiters:
        waiter.join(_PATIENCE)
        assert not waiter.is_alive()
    assert not bell._waiting
