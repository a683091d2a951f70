"""The log by itself: finding the newest slot, shrinking old ones, and losing races."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import new_memory, objects

from ckptstore.backends.memory import MemoryBackend
from ckptstore.checksum import sha256
from ckptstore.envelope import FORMAT
from ckptstore.errors import (
    AlreadyExists,
    Ambiguous,
    BackendError,
    CommitUnknown,
    DamagedRecord,
    NewerFormat,
    NotFound,
    Unreadable,
)
from ckptstore.log import Head, Log, new_op, slot_key, slot_of
from ckptstore.record import EMPTY, Entry, Record, Tombstone, decode, encode, encode_tombstone
from ckptstore.testing import Fault, FaultyBackend

HINT = "log/hint"
BIG = tuple(f"owner-{i}-{'x' * 100}" for i in range(50))
"""Makes a record longer than the 4096 bytes up to which shrinking frees nothing."""


def record(n: int, op: str | None = None, prev: str | None = None, big: bool = False) -> Record:
    return Record(n=n, epoch=1, owner="me", op=op or f"op{n}", prev=prev, past_owners=BIG if big else ())


def filled(n: int) -> MemoryBackend:
    """Return storage with `n` slots taken, without a hint: the newest a record, the others tombstones, as after a long life."""
    backend = new_memory()
    raw = objects(backend)
    prev = None
    for i in range(1, n + 1):
        raw[slot_key(i)] = encode_tombstone(i, f"op{i}") if i < n - 7 else encode(record(i, prev=prev))
        prev = sha256(raw[slot_key(i)])
    return backend


def slots(backend: MemoryBackend) -> list[int]:
    return sorted(n for key in objects(backend) if (n := slot_of(key)) is not None)


def held(backend: MemoryBackend, n: int) -> Record | Tombstone:
    return decode(objects(backend)[slot_key(n)], n)


def grow(head: Head) -> Record:
    """Make a commit that changes nothing."""
    return head.record if head.slot else replace(EMPTY, epoch=1, owner="me")


def grow_big(head: Head) -> Record:
    return replace(grow(head), past_owners=BIG)


# --- finding the newest slot

COUNTS = (0, 1, 2, 3, 7, 8, 9, 100, 1000)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize(
    "hint", [None, b"", b"0", b"1", b"-3", b"nonsense", b"\xff\xfe", b"9" * 60, b"9" * 65, b"99999999999999", b"500"]
)
def test_newest_slot_is_found_whatever_the_hint_says(n: int, hint: bytes | None) -> None:
    backend = filled(n)
    if hint is not None:
        objects(backend)[HINT] = hint
    head = Log(backend).head()
    assert (head.slot, head.record.n, head.damaged) == (n, n, ())
    assert head.digest == (sha256(objects(backend)[slot_key(n)]) if n else None)


@pytest.mark.parametrize("n", COUNTS[1:])
def test_newest_slot_is_found_from_every_hint_that_was_once_true(n: int) -> None:
    backend = filled(n)
    for hint in {1, 2, n // 3, n // 2, n - 8, n - 1, n, n + 1, 2 * n}:
        objects(backend)[HINT] = b"%d" % hint
        assert Log(backend).head().slot == n, hint


@pytest.mark.parametrize("n", COUNTS[1:])
def test_newest_slot_is_found_from_every_slot_that_a_log_knew_before(n: int) -> None:
    backend = filled(n)
    raw = objects(backend)
    for known in {1, 2, 3, n // 2, n - 1} - {0} if n > 3 else {1}:
        whole = {slot_key(i): raw[slot_key(i)] for i in range(1, n + 1)}
        for i in range(known + 1, n + 1):
            del raw[slot_key(i)]
        raw[slot_key(known)] = encode(record(known))
        log = Log(backend)
        assert log.head().slot == known
        raw.update(whole)
        assert log.head().record.n == n


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 3000), hint=st.integers(-5, 4000))
def test_newest_slot_is_found_for_any_count_and_hint(n: int, hint: int) -> None:
    backend = filled(n)
    objects(backend)[HINT] = b"%d" % hint
    assert Log(backend).head().slot == n


@pytest.mark.parametrize("method", ["get", "stat"])
def test_a_hint_that_cannot_be_read_or_checked_is_done_without(method: str) -> None:
    inner = filled(20)
    objects(inner)[HINT] = b"16"
    faulty = FaultyBackend(inner, [Fault(method, 1 if method == "get" else 2, before=BackendError("the hint is on a bad disk"))])
    assert Log(faulty).head().slot == 20


def test_what_cannot_be_looked_up_is_never_taken_for_absent() -> None:
    for nth in range(1, 40):
        faulty = FaultyBackend(filled(100), [Fault("stat", nth, before=BackendError("no answer"))])
        try:
            assert Log(faulty).head().slot == 100
        except BackendError as exc:
            assert "no answer" in str(exc)
        if faulty.calls["stat"] < nth:
            break
    else:
        pytest.fail("it never got through without an error")


@pytest.fixture(scope="module")
def long_log() -> MemoryBackend:
    return filled(100_000)


@pytest.mark.parametrize(("hint", "most"), [(None, 45), (100_000, 7), (99_985, 15), (50_000, 45), (1, 45), (200_000, 45)])
def test_finding_the_newest_of_100_000_slots_takes_few_calls(long_log: MemoryBackend, hint: int | None, most: int) -> None:
    objects(long_log).pop(HINT, None)
    if hint is not None:
        objects(long_log)[HINT] = b"%d" % hint
    faulty = FaultyBackend(long_log)
    assert Log(faulty).head().record.n == 100_000
    assert sum(faulty.calls.values()) <= most, faulty.calls


def test_looking_again_costs_one_call() -> None:
    faulty = FaultyBackend(filled(1000))
    log = Log(faulty)
    log.head()
    before = sum(faulty.calls.values())
    log.head()
    assert sum(faulty.calls.values()) == before + 1


def test_the_slot_of_a_key_has_twelve_digits_that_every_file_system_has() -> None:
    assert slot_of("log/000000000012") == slot_of("log/000000000012.0123456789abcdef.partial") == 12
    for name in ("", "7", "00000000012", "hint", "x00000000012", "\u0663" * 12, "\u00b2" * 12):
        assert slot_of(f"log/{name}") is None, name


def test_what_a_killed_writer_left_of_the_next_record_is_no_record() -> None:
    inner = filled(3)
    inner.capabilities = replace(inner.capabilities, remote=True)  # type: ignore[misc]
    objects(inner)[f"{slot_key(4)}.0123456789abcdef.partial"] = b"half a rec"
    head = Log(inner).head()
    assert (head.slot, head.record.n, head.damaged) == (3, 3, ())


# --- committing


def test_commits_are_numbered_chained_and_carry_their_operation() -> None:
    backend = new_memory()
    log = Log(backend)
    ops = [new_op() for _ in range(30)]
    made = [log.commit(grow, op) for op in ops]
    assert slots(backend) == list(range(1, 31))
    assert [r.n for r in made] == slots(backend)
    prev = None
    for n, op in enumerate(ops, 1):
        found = held(backend, n)
        assert isinstance(found, Record)
        assert (found.op, found.prev) == (op, prev)
        prev = sha256(objects(backend)[slot_key(n)])


def test_a_change_that_has_nothing_to_do_takes_no_slot() -> None:
    backend = filled(3)
    assert Log(backend).commit(lambda head: None, new_op()).n == 3
    assert slots(backend) == [1, 2, 3]


def test_a_change_that_raises_takes_no_slot() -> None:
    backend = filled(3)
    with pytest.raises(ZeroDivisionError):
        Log(backend).commit(lambda head: replace(head.record, epoch=1 // 0), new_op())
    assert slots(backend) == [1, 2, 3]


@pytest.mark.parametrize("change", [grow, grow_big])
def test_only_long_old_records_are_shrunk_and_none_is_ever_deleted(change: Callable[[Head], Record]) -> None:
    backend = new_memory()
    log = Log(backend)
    ops = [new_op() for _ in range(40)]
    for n, op in enumerate(ops, 1):
        log.commit(change, op)
        assert slots(backend) == list(range(1, n + 1))
        kinds = {i: isinstance(held(backend, i), Tombstone) for i in range(1, n + 1)}
        assert kinds == {i: change is grow_big and i <= n - 8 for i in kinds}
        assert [held(backend, i).op for i in kinds] == ops[:n]


def test_slots_that_others_committed_are_shrunk_too() -> None:
    backend = new_memory()
    for _ in range(30):
        Log(backend).commit(grow_big, new_op())
    assert [n for n in slots(backend) if isinstance(held(backend, n), Record)] == list(range(23, 31))


def test_the_hint_is_never_far_behind() -> None:
    backend = new_memory()
    log = Log(backend)
    for n in range(1, 100):
        log.commit(grow, new_op())
        assert n - int(objects(backend).get(HINT, b"0").split()[0]) < 16


@pytest.mark.parametrize("method", ["replace", "get"])
def test_tidying_up_may_fail_without_harm(method: str) -> None:
    inner = new_memory()
    faulty = FaultyBackend(inner, [Fault(method, 0, before=BackendError("not now"))])
    log = Log(faulty)
    for n in range(1, 41):
        assert log.commit(grow_big, new_op()).n == n
    faulty.plan.clear()
    assert Log(faulty).head().record.n == 40


def test_a_reader_far_behind_sees_slots_shrunk_under_it() -> None:
    inner = new_memory()
    writer = Log(inner)
    writer.commit(grow_big, new_op())

    def go_on() -> None:
        for _ in range(20):
            writer.commit(grow_big, new_op())

    # Each time the reader has found the newest slot, 20 newer ones come before it reads; the fourth time it is left in peace.
    faulty = FaultyBackend(inner)
    reader = Log(faulty)
    assert reader.head().slot == 1
    go_on()
    reads = 0

    real_get = faulty.get

    def get(key: str, limit: int) -> bytes:
        nonlocal reads
        if key != HINT:
            reads += 1
            if reads <= 3:
                go_on()
        return real_get(key, limit)

    faulty.get = get  # type: ignore[method-assign]
    head = reader.head()
    assert reads == 4
    assert head.slot == head.record.n == len(slots(inner)) == 81
    assert head.damaged == ()


def test_16_threads_lose_races_but_no_commit() -> None:
    backend = new_memory()
    ops = [[f"{t:02d}-{i:02d}" for i in range(20)] for t in range(16)]
    start = threading.Barrier(16)
    errors: list[BaseException] = []
    seen: dict[int, str] = {}

    def change(head: Head) -> Record:
        if head.slot:
            seen[head.slot] = encode(head.record).decode()
        names = (*head.record.past_owners, "x")
        return replace(grow(head), past_owners=names)

    def work(mine: list[str]) -> None:
        try:
            log = Log(backend)
            start.wait()
            for op in mine:
                assert log.commit(change, op).op == op
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in ops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert slots(backend) == list(range(1, 321))
    everything = {n: held(backend, n) for n in slots(backend)}
    assert sorted(r.op for r in everything.values()) == sorted(op for mine in ops for op in mine)
    last = Log(backend).head().record
    assert len(last.past_owners) == 320, "somebody's change was built on an old state"
    prev = None
    for n, found in everything.items():
        # Records are short at first, so they are still there; a longer one that was shrunk was seen by whoever built on it.
        data = objects(backend)[slot_key(n)] if isinstance(found, Record) else seen[n].encode()
        chained = decode(data, n)
        assert isinstance(chained, Record)
        assert chained.prev == prev
        prev = sha256(data)


@pytest.mark.parametrize("seen", [1, 2, 4])
def test_a_shrunk_record_is_proof_of_newer_ones_that_are_not_to_be_seen(seen: int) -> None:
    """However old what is seen: a job must not believe that it is at the beginning."""
    backend = new_memory()
    writer = Log(backend)
    for _ in range(12):
        writer.commit(grow_big, new_op())
    for n in range(seen + 1, 13):
        del objects(backend)[slot_key(n)]
    with pytest.raises(
        DamagedRecord, match=f"commit record {seen} was shrunk when {seen + 8} was there, and that is not to be seen"
    ):
        Log(backend).commit(grow, new_op())
    assert slots(backend) == list(range(1, seen + 1))


# --- no answer, or a wrong one

LOST = Ambiguous("the answer was lost")


def test_a_lost_answer_is_looked_up() -> None:
    inner = filled(3)
    log = Log(FaultyBackend(inner, [Fault("put_if_absent", 1, after=LOST)]))
    assert log.commit(grow, "mine").n == 4
    assert slots(inner) == [1, 2, 3, 4]
    assert log.commit(grow, "next").n == 5


def test_a_lost_request_is_sent_again_byte_for_byte() -> None:
    inner = filled(3)
    faulty = FaultyBackend(inner, [Fault("put_if_absent", n, before=LOST) for n in (1, 2, 3)])
    assert Log(faulty).commit(grow, "mine").n == 4
    assert faulty.calls["put_if_absent"] == 4
    assert slots(inner) == [1, 2, 3, 4]


def test_what_is_not_there_is_sent_again_even_if_it_would_not_have_been_durable() -> None:
    inner = new_memory()
    lost = Ambiguous(5, "the folder could not be flushed", durable=False)
    faulty = FaultyBackend(inner, [Fault("put_if_absent", 1, before=lost)])
    assert Log(faulty).commit(grow, new_op()).n == 1
    assert faulty.calls["put_if_absent"] == 2


def test_its_own_write_reported_as_somebody_elses_is_recognised() -> None:
    inner = filled(3)
    log = Log(FaultyBackend(inner, [Fault("put_if_absent", 1, after=AlreadyExists("sent twice"))]))
    made = log.commit(grow, "mine")
    assert (made.n, made.op) == (4, "mine")
    assert slots(inner) == [1, 2, 3, 4]


@pytest.mark.parametrize("lost", [Fault("put_if_absent", 0, before=LOST), Fault("put_if_absent", 1, after=LOST)])
def test_when_nobody_answers_the_outcome_is_unknown(lost: Fault) -> None:
    inner = filled(3)
    log = Log(faulty := FaultyBackend(inner, [lost]))
    log.head()
    faulty.plan.append(Fault("get", 0, before=BackendError("cannot be read either")))
    with pytest.raises(CommitUnknown) as caught:
        log.commit(grow, "mine")
    assert caught.value.op_id == "4-mine"
    assert faulty.calls["put_if_absent"] <= 4
    faulty.plan.clear()
    assert log.took_effect("mine", 4) is (True if lost.after else None)


def test_visible_but_not_durable_is_unknown_too() -> None:
    faulty = FaultyBackend(filled(3), [Fault("put_if_absent", 1, after=Ambiguous("fsync failed", durable=False))])
    with pytest.raises(CommitUnknown, match="durable"):
        Log(faulty).commit(grow, "mine")


def test_a_proven_error_after_a_lost_answer_proves_nothing() -> None:
    inner = filled(3)
    log = Log(faulty := FaultyBackend(inner))
    log.head()
    faulty.plan += [
        Fault("put_if_absent", 1, before=LOST),
        *(Fault("put_if_absent", n, before=BackendError("no")) for n in (2, 3, 4)),
    ]
    with pytest.raises(CommitUnknown):
        log.commit(grow, "mine")
    assert slots(inner) == [1, 2, 3]


def test_a_proven_error_is_passed_on() -> None:
    inner = filled(3)
    with pytest.raises(BackendError, match="disk full") as caught:
        Log(FaultyBackend(inner, [Fault("put_if_absent", 1, before=BackendError("disk full"))])).commit(grow, "mine")
    assert not isinstance(caught.value, Ambiguous)
    assert slots(inner) == [1, 2, 3]


def test_a_slot_lost_while_the_answer_was_lost_is_tried_again_further_on() -> None:
    inner = filled(3)

    def other_then_lost() -> None:
        Log(inner).commit(grow, "theirs")
        raise LOST

    assert Log(FaultyBackend(inner, [Fault("put_if_absent", 1, before=other_then_lost)])).commit(grow, "mine").n == 5
    assert [held(inner, n).op for n in (4, 5)] == ["theirs", "mine"]


def test_a_slot_that_is_taken_and_not_there_ends_in_unknown() -> None:
    faulty = FaultyBackend(filled(3), [Fault("put_if_absent", 0, before=AlreadyExists("so it says"))])
    with pytest.raises(CommitUnknown):
        Log(faulty).commit(grow, "mine")
    assert faulty.calls["put_if_absent"] <= 4


def test_an_operation_that_was_shrunk_meanwhile_is_still_known_to_have_taken_effect() -> None:
    backend = new_memory()
    log = Log(backend)
    log.commit(grow_big, "mine")
    for _ in range(20):
        log.commit(grow_big, new_op())
    assert isinstance(held(backend, 1), Tombstone)
    assert log.took_effect("mine", 1) is True
    assert log.took_effect("theirs", 1) is False
    assert log.took_effect("mine", 22) is None


# --- damage


@pytest.mark.parametrize("bad", range(1, 8))
def test_damaged_newest_records_are_passed_over(bad: int) -> None:
    backend = filled(20)
    for n in range(21 - bad, 21):
        objects(backend)[slot_key(n)] = objects(backend)[slot_key(n)][:-5]
    head = Log(backend).head()
    assert (head.slot, head.record.n, len(head.damaged)) == (20, 20 - bad, bad)


@pytest.mark.parametrize("known", [0, 1, 5])
@pytest.mark.parametrize("n", [2, 7])
def test_a_foreign_record_is_passed_over_by_who_knows_the_log_and_by_who_does_not(n: int, known: int) -> None:
    backend = filled(n)
    later = {i: objects(backend).pop(slot_key(i)) for i in range(min(known, n - 1) + 1, n + 1)}
    log = Log(backend)
    if known:
        assert log.head().slot == min(known, n - 1)
    objects(backend).update({slot_key(i): data for i, data in later.items()})
    objects(backend)[slot_key(n)] = encode(record(n, prev="0" * 64))
    head = log.head()
    assert (head.slot, head.record.n) == (n, n - 1)
    assert f"commit record {n} does not continue commit record {n - 1}" in head.damaged[0]


@pytest.mark.parametrize("gone", [False, True])
def test_a_foreign_record_is_passed_over_also_where_an_older_one_cannot_tell(gone: bool) -> None:
    backend = filled(7)
    objects(backend)[slot_key(7)] = encode(record(7, prev="0" * 64))
    objects(backend)[slot_key(5)] = b"rubbish"
    if gone:
        del objects(backend)[slot_key(5)]
    head = Log(backend).head()
    assert (head.slot, head.record.n) == (7, 6)
    assert "commit record 7 does not continue commit record 6" in head.damaged[0]


def test_a_record_that_passed_over_two_is_believed_when_one_of_them_is_back() -> None:
    backend = filled(7)
    objects(backend)[slot_key(7)] = encode(record(7, prev=sha256(objects(backend)[slot_key(4)])))
    objects(backend)[slot_key(5)] = b"rubbish"
    head = Log(backend).head()
    assert (head.slot, head.record.n, head.damaged) == (7, 7, ())


def test_a_foreign_record_is_told_by_one_that_was_read_before_it_was_damaged() -> None:
    backend = filled(3)
    log = Log(backend)
    assert log.head().slot == 3
    objects(backend)[slot_key(3)] = b"rubbish"
    objects(backend)[slot_key(4)] = encode(record(4, prev="0" * 64))
    head = log.head()
    assert (head.slot, head.record.n) == (4, 2)
    assert "commit record 4 does not continue commit record 3" in head.damaged[0]


def test_a_record_that_can_be_read_again_is_compared_in_the_place_of_the_one_that_served_for_it() -> None:
    backend = filled(4)
    whole = dict(objects(backend))
    del objects(backend)[slot_key(4)]
    for n in (2, 3):
        objects(backend)[slot_key(n)] = b"rubbish"
    log = Log(backend)
    assert (log.head().slot, log.head().record.n) == (3, 1)
    for n in (3, 4):
        objects(backend)[slot_key(n)] = whole[slot_key(n)]
    assert (log.head().slot, log.head().record.n) == (4, 4)


def test_a_first_record_that_continues_another_is_foreign() -> None:
    backend = new_memory()
    objects(backend)[slot_key(1)] = encode(record(1, prev="0" * 64))
    head = Log(backend).head()
    assert (head.slot, head.record) == (1, EMPTY)
    assert "commit record 1 does not continue commit record 0" in head.damaged[0]


def test_damaged_older_records_are_told_when_asked_for() -> None:
    backend = filled(6)
    objects(backend)[slot_key(5)] = b"rubbish"
    del objects(backend)[slot_key(4)]
    log = Log(backend)
    assert log.head().damaged == ()
    rubbish, gone = log.damaged()
    assert "commit record 5" in rubbish
    assert slot_key(4) in gone


def test_one_bad_moment_of_a_disk_is_no_damage() -> None:
    """A job that acquires would pass the record over for good."""
    bad = Unreadable(5, "the disk can no longer read this", slot_key(20))
    backend = FaultyBackend(filled(20), [Fault("get", 2, before=bad)])  # the first is that of the hint
    assert Log(backend).head() == Log(backend.inner).head()
    backend = FaultyBackend(filled(20), [Fault("get", n, before=bad) for n in (2, 3)])
    assert Log(backend).head().damaged == (str(bad),)


def test_when_no_record_kept_whole_can_be_read_it_says_so() -> None:
    backend = filled(20)
    for n in range(13, 21):
        objects(backend)[slot_key(n)] = b"rust"
    with pytest.raises(DamagedRecord, match="commit record 20"):
        Log(backend).head()


def test_before_the_first_record_comes_the_empty_state() -> None:
    backend = filled(2)
    for n in (1, 2):
        objects(backend)[slot_key(n)] = b"rust"
    head = Log(backend).head()
    assert (head.slot, head.record, len(head.damaged)) == (2, EMPTY, 2)


def test_a_record_in_another_slot_is_damaged() -> None:
    backend = filled(3)
    objects(backend)[slot_key(4)] = objects(backend)[slot_key(3)]
    head = Log(backend).head()
    assert (head.slot, head.record.n) == (4, 3)
    assert "another slot" in head.damaged[0]


def test_a_newer_format_stops_everything() -> None:
    backend = filled(3)
    text = encode(record(4))[84:-2].replace(b'"format":1', b'"format":%d' % (FORMAT + 1))
    objects(backend)[slot_key(4)] = b'{"sha256":"%s","body":%s}\n' % (sha256(text).encode(), text)
    before = dict(objects(backend))
    for call in (lambda: Log(backend).head(), lambda: Log(backend).commit(grow, new_op())):
        with pytest.raises(NewerFormat, match="upgrade"):
            call()
    assert objects(backend) == before


def test_a_log_that_knew_slot_3_meets_a_newer_format_in_slot_4() -> None:
    backend = filled(3)
    log = Log(backend)
    log.head()
    text = encode(record(4))[84:-2].replace(b'"format":1', b'"format":%d' % (FORMAT + 1))
    objects(backend)[slot_key(4)] = b'{"sha256":"%s","body":%s}\n' % (sha256(text).encode(), text)
    with pytest.raises(NewerFormat):
        log.commit(grow, new_op())
    assert slots(backend) == [1, 2, 3, 4]


def test_a_record_too_long_is_refused_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptstore.log.RECORD_LIMIT", 10_000)
    backend = filled(3)
    entry = Entry(id="e1-0123456789ab", step=None, name="latest", created=0.0, nbytes=0, manifest="0" * 64)
    many = tuple(replace(entry, id=f"e1-{i:012x}") for i in range(200))
    with pytest.raises(BackendError, match="prune or delete"):
        Log(backend).commit(lambda head: replace(head.record, checkpoints=many), new_op())
    assert slots(backend) == [1, 2, 3]


def test_a_change_is_shown_damage_that_appeared_in_the_slot_it_wanted() -> None:
    backend = filled(3)
    log = Log(backend)
    log.head()
    objects(backend)[slot_key(4)] = b"rust"
    shown: list[Head] = []

    def change(head: Head) -> Record | None:
        shown.append(head)
        return None if head.damaged else grow(head)

    assert log.commit(change, new_op()).n == 3
    assert [(head.slot, len(head.damaged)) for head in shown] == [(3, 0), (4, 1)]
    # Once somebody has committed past it, it is history.
    Log(backend).commit(grow, new_op())
    assert log.commit(change, new_op()).n == 6


def test_storage_that_contradicts_itself_does_not_keep_it_busy_for_ever() -> None:
    inner = filled(3)
    log = Log(FaultyBackend(inner, [Fault("stat", n, before=NotFound("listed, not there")) for n in range(11, 99)]))
    while log._backend.calls["stat"] < 9:  # type: ignore[attr-defined]
        log.head()  # the tenth is whether slot 3 is still there
    Log(inner).commit(grow, "theirs")
    with pytest.raises(CommitUnknown, match="contradicts itself"):
        log.commit(grow, "mine")
