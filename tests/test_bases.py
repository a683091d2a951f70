"""Stores that keep many checkpoints: records stay short, because they share a base, and nothing is lost because of it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from stores import Killed, Mortal, new_memory, objects, state_of, store_on, write
from test_model import COMMON, NO_LONG_SEARCH, StoreMachine

from ckptstore import Store, bases, envelope
from ckptstore.backends.memory import MemoryBackend
from ckptstore.bases import BASE_ENDS, Bases
from ckptstore.checksum import sha256
from ckptstore.entries import Base, Entries
from ckptstore.entry import Entry, decode_all, decode_entry
from ckptstore.envelope import seal
from ckptstore.errors import (
    BackendError,
    CheckpointNotFound,
    CkptStoreError,
    DamagedRecord,
    FallbackWarning,
    KeyMismatch,
    StorageFull,
)
from ckptstore.log import Log, slot_key
from ckptstore.record import EMPTY, RECORD_LIMIT, Record, decode, encode
from ckptstore.testing import Fault, FaultyBackend

EVERY = 16


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base with every sixteenth commit, however short the record is."""
    monkeypatch.setattr(bases, "_ABOVE", 0)
    monkeypatch.setattr(bases, "_SHARE", 1 << 40)


def base_objects(backend: MemoryBackend) -> list[str]:
    return sorted(key for key in objects(backend) if key.endswith(BASE_ENDS))


def keep_all(backend: object, owner: str = "me", **options: object) -> Store:
    return store_on(backend, keep_last="all", owner=owner, **options)  # type: ignore[arg-type]


def filled(commits: int) -> tuple[MemoryBackend, list[str]]:
    """Return storage with so many commits, the first of which acquired it, and the ids that the others saved."""
    backend = new_memory()
    with keep_all(backend) as store:
        return backend, [write(store, step=step) for step in range(1, commits)]


# --- in ordinary life


def test_records_stay_short_however_many_checkpoints_are_kept() -> None:
    backend, sizes = new_memory(), []
    with keep_all(backend) as store:
        made = []
        for step in range(700):
            made.append(write(store, step=step, metrics={"loss": step / 7}))
            sizes.append(max(len(data) for key, data in objects(backend).items() if slot_key(step + 2) == key))
            assert len(base_objects(backend)) <= 4
    whole = len(encode(Record(n=1, epoch=1, owner="me", checkpoints=Entries(state_of(backend).checkpoints))))
    assert whole > 150_000
    assert max(sizes) < 24_000
    with keep_all(backend, owner="another job") as reader:
        assert [c.id for c in reader] == made
        assert [c.metrics["loss"] for c in reader] == [step / 7 for step in range(700)]
        assert reader.checkpoint(made[3]).step == 3
        assert reader.checkpoint(step=350).id == made[350]
        reader.acquire()
        assert reader.verify(made[0]) == []
        assert reader.gc().ids == ()
        assert [c.id for c in reader] == made


def test_without_many_checkpoints_there_is_no_base_and_no_newer_format() -> None:
    backend, _ = filled(2 * EVERY + 2)
    assert base_objects(backend) == []
    assert b'"format":1' in objects(backend)[slot_key(2 * EVERY)]


def test_records_with_a_base_are_of_the_newer_format(early: None) -> None:
    backend, _ = filled(EVERY + 1)
    assert [b'"format":2' in objects(backend)[slot_key(n)] for n in (EVERY - 1, EVERY, EVERY + 1)] == [False, True, True]
    assert b'"format":2' in objects(backend)[base_objects(backend)[0]]


def test_loading_by_name_and_saving_read_no_base(early: None) -> None:
    backend, made = filled(EVERY + 5)
    for use in (lambda s: s.checkpoint(), lambda s: write(s), lambda s: s.checkpoint(made[-1]), lambda s: "latest" in s):
        blind = FaultyBackend(backend)
        inner = blind.get

        def get(key: str, limit: int, inner: Callable[[str, int], bytes] = inner) -> bytes:
            assert not key.endswith(BASE_ENDS), "a base was read"
            return inner(key, limit)

        blind.get = get  # type: ignore[method-assign]
        with store_on(blind, keep_last="all", acquire=False) as store:
            use(store)


def test_what_a_name_points_to_is_in_the_record_however_old_it_is(early: None) -> None:
    backend, made = filled(EVERY + 2)
    with keep_all(backend) as store:
        store.tag("first", made[0])
        for _ in range(3 * EVERY):
            write(store)
    record = decode(objects(backend)[slot_key(state_of(backend).n)], state_of(backend).n)
    assert isinstance(record, Record)
    assert made[0] in record.checkpoints.own
    assert state_of(backend).checkpoints[0].id == made[0], "where it was"


def test_what_was_deleted_judged_or_pruned_since_the_base_is(early: None) -> None:
    backend, made = filled(EVERY + 4)
    with keep_all(backend) as store:
        store.delete(made[1])
        assert store.verify(made[2]) == []
        store.tag("seen", "latest")
    with keep_all(backend) as reader:
        assert [c.id for c in reader] == [made[0], *made[2:]]
        assert state_of(backend).entry(made[1]) is None
        assert {e.id for e in state_of(backend).checkpoints if e.verified} == {made[2]}
        with pytest.raises(CheckpointNotFound):
            reader.checkpoint(made[1])
    with store_on(backend, keep_last=1, owner="me") as strict:
        assert set(strict.prune()) == {made[0], *made[3:-1]}, "the newest that was read back whole stays"
    assert [e.id for e in state_of(backend).checkpoints] == [made[2], made[-1]]


Step = tuple[str, int]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["save", "judge", "delete", "base", "read"]), st.integers(0, 30)), max_size=40))
def test_entries_are_as_a_plain_list(steps: list[Step]) -> None:
    entries, plain = Entries(), list[Entry]()
    for number, (what, chosen) in enumerate(steps):
        picked = plain[chosen % len(plain)] if plain else None
        if what == "save":
            new = Entry(f"e1-{number:012x}", number, "latest", 1.0, 1, "0" * 64, {"m": float("nan") if chosen % 2 else 0.5})
            entries, plain = entries.put(new), [*plain, new]
        elif what == "judge" and picked:
            judged = Entry(picked.id, picked.step, picked.name, 1.0, 1, "0" * 64, {}, chosen % 2 == 0)
            entries, plain = entries.put(judged), [judged if e.id == judged.id else e for e in plain]
        elif what == "delete" and picked:
            entries, gone = entries.without({picked.id, "e1-ffffffffffff"})
            assert gone == (picked.id,)
            plain = [e for e in plain if e.id != picked.id]
        elif what == "base":
            base, data = Base.make(f"{number + 1:012d}-0123456789ab", entries)
            assert sha256(data) == base.digest
            again = Base(base.name, base.digest, base.before)
            again.read = lambda data=data: data  # type: ignore[misc]
            entries = Entries((), again) if chosen % 2 else entries.based(base)
        elif what == "read":
            names = {f"name{i}": plain[i].id for i in range(min(chosen, len(plain)))}
            record = Record(n=number + 50, epoch=1, owner="me", op="x", names=names, checkpoints=entries)
            found = decode(encode(record), number + 50)
            assert isinstance(found, Record)
            assert (found.checkpoints.base is None) == (entries.base is None)
            entries = found.checkpoints.on(entries.base) if entries.base else found.checkpoints
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(envelope, "_PIECE", 300)
            assert [e.json for some in entries.passing() for e in some] == [e.json for e in plain]
        assert [e.json for e in entries] == [e.json for e in plain]
        assert entries.ids() == {e.id for e in plain}
        assert +entries.counts == Counter((e.name, e.verified is False) for e in plain)
        assert (len(entries), bool(entries)) == (len(plain), bool(plain))
        for entry in plain:
            found_entry = entries.get(entry.id)
            assert found_entry is not None
            assert found_entry.json == entry.json
        assert entries.get("e1-ffffffffffff") is None


def test_a_store_with_bases_does_what_the_model_does(early: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "_EVERY", 9)
    run_state_machine_as_test(
        StoreMachine, settings=settings(COMMON, max_examples=25, stateful_step_count=50, derandomize=True, phases=NO_LONG_SEARCH)
    )


# --- when a base cannot be made


def test_what_the_storage_refuses_is_done_without(early: None) -> None:
    for nth in (1, 2):
        backend, made = filled(EVERY - 1)
        full = FaultyBackend(backend, [Fault("put_if_absent", nth, before=StorageFull("no space for so much"))])
        with keep_all(full) as store:
            made.append(write(store))
        assert full.calls["put_if_absent"] == nth + 1, "it was tried"
        assert base_objects(backend) == []
        assert [e.id for e in state_of(backend).checkpoints] == made


def test_who_loses_the_race_takes_its_base_away(early: None) -> None:
    backend, made = filled(EVERY - 1)
    other = keep_all(backend)
    late = FaultyBackend(backend, [Fault("put_if_absent", 3, before=lambda: made.append(write(other, "other")))])
    with keep_all(late) as store:
        made.append(write(store))
    assert [e.id for e in state_of(backend).checkpoints] == made
    record = state_of(backend)
    assert record.checkpoints.base is not None
    assert base_objects(backend) == [f"log/{record.checkpoints.base.name}{end}" for end in BASE_ENDS], "that of the other"


def test_who_loses_the_race_takes_its_base_away_even_if_it_cannot_see_what_came_of_it(early: None) -> None:
    backend, made = filled(EVERY - 1)
    other = keep_all(backend)

    def lose() -> None:
        made.append(write(other, "other"))
        late.plan.append(Fault("stat", late.calls["stat"] + 1, before=BackendError("not now")))

    late = FaultyBackend(backend, [Fault("put_if_absent", 3, before=lose)])
    with keep_all(late) as store, pytest.raises(BackendError, match="not now"):
        write(store)
    record = state_of(backend)
    assert [e.id for e in record.checkpoints] == made
    assert record.checkpoints.base is not None
    assert base_objects(backend) == [f"log/{record.checkpoints.base.name}{end}" for end in BASE_ENDS], "that of the other"


def test_an_error_that_proves_that_nothing_was_committed_leaves_no_base(early: None) -> None:
    backend, made = filled(EVERY - 1)
    broken = FaultyBackend(backend, [Fault("put_if_absent", 3, before=BackendError("no"))])
    with keep_all(broken) as store, pytest.raises(BackendError, match="no"):
        write(store)
    assert base_objects(backend) == []
    assert [e.id for e in state_of(backend).checkpoints] == made


@pytest.mark.parametrize("last_takes_effect", [False, True])
def test_killed_at_any_call_of_a_save_that_makes_a_base(early: None, last_takes_effect: bool) -> None:
    outcomes: Counter[bool] = Counter()
    calls = 0
    while True:
        backend, made = filled(3 * EVERY - 1)  # so that one base is there, one is obsolete soon, and one comes
        mortal = Mortal(backend)
        mortal.last_takes_effect = last_takes_effect
        store = keep_all(mortal)
        store.acquire()
        mortal.calls_left = calls
        try:
            made.append(write(store, step=1000))
        except Killed:
            survived = False
        else:
            survived = True
        mortal.calls_left = 0
        state = state_of(backend)
        assert [e.id for e in state.checkpoints][: len(made)] == made
        outcomes[len(state.checkpoints) > 3 * EVERY - 2] += 1
        with keep_all(backend, owner="next") as following:
            following.acquire()
            following.gc()
            assert len(base_objects(backend)) in (2, 4)
            needed = {key for name in bases.bases_of(state_of(backend)) for key in bases.base_keys(name)}
            assert set(base_objects(backend)) <= needed, "no litter"
            assert following.verify() == []
            made = [*(e.id for e in state.checkpoints), *(write(following) for _ in range(2 * EVERY))]
        assert [e.id for e in state_of(backend).checkpoints] == made
        if survived:
            break
        calls += 1
    assert calls > 8
    assert outcomes[True] > 1
    assert outcomes[False] > 5


# --- when a base is damaged


def harm(backend: MemoryBackend, *keys: str) -> None:
    for key in keys:
        data = objects(backend)[key]
        objects(backend)[key] = data[:100] + bytes([data[100] ^ 1]) + data[101:]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("how", ["flip", "remove"])
def test_one_copy_is_enough_and_verify_tells_of_the_other(early: None, which: int, how: str) -> None:
    backend, made = filled(EVERY + 3)
    key = base_objects(backend)[which]
    if how == "flip":
        harm(backend, key)
    else:
        del objects(backend)[key]
    with keep_all(backend) as store:
        assert [c.id for c in store] == made
        (damage,) = store.verify()
        assert key in damage.reason
        for _ in range(EVERY):
            made.append(write(store))
        assert store.verify() == [], "the next base is whole"
        assert [c.id for c in store] == made


def test_without_a_whole_copy_names_are_loaded_and_saves_go_on_and_nothing_is_deleted(early: None) -> None:
    backend, made = filled(EVERY + 3)
    harm(backend, *base_objects(backend))
    before = dict(objects(backend))
    with store_on(backend, acquire=False, keep_last="all") as store:
        with store_on(backend, acquire=False, keep_last=1) as strict:
            asks = [
                lambda: list(store),
                lambda: store.checkpoint(made[0]),
                lambda: store.checkpoint(step=1),
                store.gc,
                strict.prune,
            ]
            for ask in asks:
                with pytest.raises(DamagedRecord, match=r"needs its base.*\.base2 is damaged"):
                    ask()
        assert dict(objects(backend)) == before
        assert store.checkpoint().id == made[-1]
        assert len(store.verify(made[-1])) == 0
        write(store)
        assert store.checkpoint(made[-1]).id == made[-1]
    with keep_all(backend, owner="next") as following:
        write(following)
    assert {key for key in before if key.startswith("data/")} <= objects(backend).keys()


def test_damaged_records_are_passed_over_also_when_those_before_have_another_base(early: None) -> None:
    backend, made = filled(2 * EVERY + 3)
    for n in range(2 * EVERY - 2, 2 * EVERY + 4):
        harm(backend, slot_key(n))
    with pytest.warns(FallbackWarning), keep_all(backend) as store:
        assert [c.id for c in store] == made[: 2 * EVERY - 4]
    with pytest.warns(FallbackWarning), keep_all(backend, owner="next") as following:
        following.acquire()
        made = [*made[: 2 * EVERY - 4], *(write(following) for _ in range(3 * EVERY))]
        following.gc()
        assert [c.id for c in following] == made
        assert following.verify() == []
        assert len(base_objects(backend)) == 4


def test_a_reader_that_looks_when_its_base_is_gone_is_told_so_and_finds_the_new_one(early: None) -> None:
    backend, made = filled(EVERY + 2)
    log = Log(backend)
    state = log.head().record
    with keep_all(backend) as store:
        made += [write(store) for _ in range(4 * EVERY)]
    with pytest.raises(DamagedRecord, match="unless newer ones have come"):
        list(state.checkpoints)
    assert [e.id for e in log.head().record.checkpoints] == made


def test_a_save_that_began_from_a_state_whose_base_is_gone_goes_on_from_the_newest(early: None) -> None:
    backend, made = filled(EVERY + 2)
    with store_on(backend, owner="me", keep_last=1000) as rare, keep_all(backend) as busy:
        rare.acquire()
        made += [write(busy) for _ in range(2 * EVERY)]
        assert rare.checkpoint().id == made[-1], "the state that it knows from now on, of which it has not read the base"
        made += [write(busy) for _ in range(4 * EVERY)]
        made.append(write(rare))
        assert [c.id for c in busy] == made


def test_a_base_may_be_looked_up_while_another_thread_reads_all_of_it() -> None:
    base, data = Base.make("000000000016-0123456789ab", Entries(decode_all([item(n) for n in range(10)])))
    again = Base(base.name, base.digest, None)
    again.read = lambda: data

    class Busy(dict[str, object]):
        """In which the other thread finds something just when this one has looked."""

        def items(self) -> object:  # type: ignore[override]
            found = [*super().items()]
            again.get("e1-s3-000000000004")
            return found

        def values(self) -> object:  # type: ignore[override]
            again.get("e1-s3-000000000005")
            return super().values()

    again.ids()
    again._found = Busy(again._index())
    assert [*again.entries().values()] == [*base.entries().values()]


def nonsense() -> Iterator[tuple[str, dict[str, object]]]:
    entry = json.loads(Entry("e1-0123456789ab", 1, "latest", 1.0, 1, "0" * 64).json)
    name = "000000000001-0123456789ab"
    yield "belongs to something else", {"kind": "base", "name": "000000000001-ffffffffffff", "checkpoints": []}
    yield "belongs to something else", {"kind": "record", "name": name, "checkpoints": []}
    yield "KeyError", {"kind": "base", "name": name}
    yield "listed twice", {"kind": "base", "name": name, "checkpoints": [entry, entry]}
    yield "malformed", {"kind": "base", "name": name, "checkpoints": [{**entry, "id": "../x"}]}
    yield "SHA-256", {"kind": "base", "name": name, "checkpoints": [{**entry, "manifest": 1}]}
    yield "TypeError", {"kind": "base", "name": name, "checkpoints": 5}


@pytest.mark.parametrize(("why", "body"), [*nonsense()])
def test_a_base_that_says_nonsense(why: str, body: dict[str, object]) -> None:
    backend = new_memory()
    data = seal(body)
    base = Base("000000000001-0123456789ab", sha256(data), None)
    for end in BASE_ENDS:
        objects(backend)[f"log/{base.name}{end}"] = data
    record = Record(n=5, epoch=1, owner="me", checkpoints=Entries((), base))
    with pytest.raises(DamagedRecord, match=why):
        list(Bases(backend).attach(record, EMPTY).checkpoints)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "x"},
        {"name": "000000000009-0123456789ab"},
        {"name": "000000000001-0123456789ab/../../x"},
        {"sha256": "0"},
        {"before": "../x"},
        {"without": ["x"]},
        {"without": ["e1-0123456789ab"]},
    ],
)
def test_a_record_that_names_an_impossible_base_is_damaged(change: dict[str, object]) -> None:
    entry = Entry("e1-0123456789ab", 1, "latest", 1.0, 1, "0" * 64)
    base = Base("000000000001-0123456789ab", "0" * 64, None)
    data = encode(Record(n=5, epoch=1, owner="me", op="x", checkpoints=Entries((entry,), base)))
    assert isinstance(decode(data, 5), Record)
    body = json.loads(data)["body"]
    with pytest.raises(DamagedRecord):
        decode(seal({**body, "base": {**body["base"], **change}}, version=2), 5)


def test_with_a_key_a_base_is_authentic_because_the_record_that_names_it_is(early: None, tmp_path: Path) -> None:
    key = b"correct horse battery staple"
    with Store(tmp_path, hmac_key=key, keep_last="all", owner="me") as store:
        made = [write(store) for _ in range(EVERY + 3)]
    with Store(tmp_path, hmac_key=key) as reader:
        assert [c.id for c in reader] == made
        assert reader.verify() == []
    forged = [path for path in (tmp_path / "log").iterdir() if path.name.endswith(BASE_ENDS)]
    assert len(forged) == 2
    for path in forged:
        text = path.read_bytes()[84:-2].replace(made[0].encode(), b"e1-" + os.urandom(6).hex().encode())
        path.write_bytes(b'{"sha256":"%s","body":%s}\n' % (sha256(text).encode(), text))
    with Store(tmp_path, hmac_key=key) as reader, pytest.raises(DamagedRecord):
        list(reader)
    with Store(tmp_path) as without, pytest.raises(KeyMismatch):
        list(without)


def test_a_base_larger_than_a_record_may_be_is_refused_by_its_reader(early: None, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, _ = filled(EVERY + 3)
    assert RECORD_LIMIT > 1 << 20
    monkeypatch.setattr(bases, "RECORD_LIMIT", 1000)
    with keep_all(backend) as reader, pytest.raises(BackendError):
        list(reader)


def test_a_base_that_nobody_would_read_is_not_made(early: None, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, made = filled(EVERY + 3)
    monkeypatch.setattr(bases, "RECORD_LIMIT", max(len(objects(backend)[key]) for key in base_objects(backend)))
    with keep_all(backend) as store:
        made += [write(store) for _ in range(3 * EVERY)]
    with keep_all(backend) as reader:
        assert [c.id for c in reader] == made


# --- what those leave in the log that died


def test_gc_takes_from_the_log_what_can_be_of_no_use_any_more_and_nothing_else(early: None) -> None:
    backend, _ = filled(EVERY + 2)
    n = state_of(backend).n
    dead = [
        f"{slot_key(n)}.0123456789abcdef.partial",
        "log/hint.0123456789abcdef.partial",
        *bases.base_keys(f"{n:012d}-{'0' * 12}"),
    ]
    alive = [f"{slot_key(n + 1)}.0123456789abcdef.partial", *bases.base_keys(f"{n + 1:012d}-{'0' * 12}")]
    alive += ["log/3.partial", "log/hints.partial", "log/mine/x.partial", "log/model.base"]  # of somebody else
    before = set(objects(backend))
    assert len(base_objects(backend)) == 2
    objects(backend).update(dict.fromkeys([*dead, *alive], b"begun"))
    with store_on(backend, acquire=False) as tool:
        tool.gc()
    assert set(objects(backend)) == before | {*alive}


VALUES: dict[str, list[object]] = {
    "step": [None, 0, 10**18 - 1, 10**18, -1, 7.0, True, "7"],
    "name": ["best", "..", "a/b", "e1-s1-0123456789ab", "", None, ["x"], "x" * 129],
    "created": [1.5e9, 1_500_000_000, -7e10, 3e11, "nan", "1", None, True, 1e999],
    "nbytes": [0, 2**63 - 1, 2**63, -1, 1.0, False, None],
    "manifest": ["f" * 64, "F" * 64, "f" * 63, "f" * 63 + "\n", "g" * 64, None, ["f"] * 64, "f" * 128],
    "metrics": [{}, {"a": 1.5}, {"a": 1}, {"a": "inf"}, {"a": "x"}, {"a": True}, {"a": None}, {"k" * 1025: 1.0}, [], ["a"], None],
    "verified": [None, True, False, 0, 1, "yes", []],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in VALUES.items() for value in values])
def test_thousands_of_entries_are_read_as_strictly_as_one(field: str, value: object) -> None:
    plain = {"step": 3, "name": "latest", "created": 1.7e9, "nbytes": 5, "manifest": "0" * 64, "metrics": {"loss": 0.5}}
    items = {i: {"id": i, **plain, "verified": None} for i in (f"e1-s3-{n:012x}" for n in range(5))}
    last = list(items)[-1]
    items[last][field] = value

    def outcome(read: Callable[[], object]) -> object:
        try:
            return read()
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            return type(exc)

    def copied() -> list[dict[str, object]]:
        return [dict(one) for one in items.values()]

    one = outcome(lambda: repr(decode_entry(items[last])))
    assert outcome(lambda: repr(decode_all(copied())[-1])) == one
    items[last]["of a later version"] = 1
    assert outcome(lambda: repr(decode_all(copied())[-1])) == one
    del items[last][field]
    assert outcome(lambda: decode_all(copied())) is KeyError


def item(number: int, **more: object) -> dict[str, object]:
    plain = {"created": 1.7e9, "id": f"e1-s3-{number:012x}", "manifest": "0" * 64, "metrics": {'},{"created":': 0.5}}
    return plain | {"name": "latest", "nbytes": 5, "step": 3, "verified": None} | more


def text(items: object, more: str = "", name: str = "000000000016-0123456789ab", version: int = 2) -> str:
    listed = json.dumps(items, separators=(",", ":"))
    return f'{{"checkpoints":{listed},"format":{version},"kind":"base","name":"{name}"{more}}}'


TEN = [item(n) for n in range(10)]
BODIES = {
    "as it is written here": text(TEN),
    "with spaces": json.dumps(json.loads(text(TEN))),
    "of other order": json.dumps(json.loads(text([dict(reversed(i.items())) for i in TEN])), sort_keys=False),
    "with a field more": text(TEN, ',"of a later version":[{"created":1}]'),
    "with items of a later version": text([*TEN, item(10, more=[{"created": 1}, {"created": 2}])]),
    "with items within items": text([*TEN, {**item(10), "metrics": [{"created": 1}, {"created": 2}]}]),
    "one is listed twice": text([*TEN, TEN[0]]),
    "one is nothing": text([*TEN, None]),
    "one is a number": text([*TEN, 7]),
    "one has another id": text([*TEN, item(10, id="x")]),
    "one has no digest": text([*TEN, item(10, manifest="x" * 64)]),
    "one has no time": text([*TEN, item(10, created=float("nan"))]),
    "one lacks a field": text([*TEN, {"created": 1.0}]),
    "one is not closed": text(TEN).replace("}],", "],"),
    "one is of other characters": text([*TEN, item(10)]).replace("latest", "l\u00e9"),
    "none": text([]),
    "no list": text(7),
    "another's": text(TEN, name="000000000017-0123456789ab"),
    "of a newer format": text(TEN, version=3),
    "two lists": text(TEN).replace('}],"format', '}],[{"created":1}],"format'),
    "deep": text([*TEN, item(10, metrics=0)]).replace(':0,"name"', ":" + "[" * 10**5 + "]" * 10**5 + ',"name"'),
}


@pytest.mark.parametrize("which", BODIES)
def test_looking_through_a_base_finds_what_reading_all_of_it_finds(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b'{"sha256":"%b","body":%b}\n' % (b"0" * 64, BODIES[which].encode())

    def outcome(read: Callable[[Base], object]) -> object:
        base = Base("000000000016-0123456789ab", "0" * 64, None)
        base.read = lambda: data
        try:
            return read(base)
        except CkptStoreError as exc:
            return type(exc), str(exc)

    monkeypatch.setattr(envelope, "_PIECE", 400)
    known = outcome(lambda base: [e.json for e in base.entries().values()])
    assert isinstance(known, list) == (which in [*BODIES][:5] or which == "none"), known
    assert outcome(lambda base: [e.json for some in base.passing() for e in some]) == known


def test_a_base_is_looked_through_without_being_kept() -> None:
    entries = Entries(decode_all([item(n) for n in range(1000)]))
    base, data = Base.make("000000000016-0123456789ab", entries)
    again = Base(base.name, base.digest, None)
    again.read = lambda: data
    pieces = [len(some) for some in again.passing()]
    assert sum(pieces) == 1000
    assert max(pieces) < 200
    assert again._found is None
