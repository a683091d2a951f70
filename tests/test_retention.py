"""What retention keeps: each rule by example, then the promises that hold for any state and any rules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptstore
from ckptstore.entries import Entries
from ckptstore.errors import InvalidOption, UsageError
from ckptstore.options import STORE_OPTIONS, split_options
from ckptstore.record import EMPTY, Entry, Record
from ckptstore.retention import Retention, expired
from ckptstore.url import parse_url

ALL_GO = Retention(keep_last=1)


def entry(
    i: int,
    name: str = "latest",
    *,
    step: int | None = None,
    verified: bool | None = None,
    metrics: dict[str, float] | None = None,
) -> Entry:
    return Entry(
        id=f"e1-{i:012x}",
        step=step,
        name=name,
        created=0.0,
        nbytes=1,
        manifest="0" * 64,
        metrics=metrics or {},
        verified=verified,
    )


def kept(entries: list[Entry], rules: Retention, **state: Any) -> list[int]:
    """Return which of `entries` stay, by their place in the list."""
    record = replace(EMPTY, checkpoints=tuple(entries), **state)
    gone = expired(record, rules)
    return [i for i, e in enumerate(entries) if e.id not in gone]


def losses(*values: float) -> list[Entry]:
    return [entry(i, metrics={"loss": v}) for i, v in enumerate(values)]


# --- each rule


@pytest.mark.parametrize(("n", "stay"), [(1, [5]), (2, [4, 5]), (5, [1, 2, 3, 4, 5]), (6, list(range(6))), (99, list(range(6)))])
def test_keep_last(n: int, stay: list[int]) -> None:
    assert kept([entry(i) for i in range(6)], Retention(keep_last=n)) == stay


def test_keep_last_counts_each_saved_under_name_for_itself() -> None:
    entries = [entry(0, "eval"), entry(1), entry(2, "eval"), *(entry(i) for i in range(3, 8))]
    assert kept(entries, Retention(keep_last=2)) == [0, 2, 6, 7]


def test_a_name_that_moved_does_not_change_what_it_was_saved_under() -> None:
    entries = [entry(i) for i in range(4)]
    assert kept(entries, Retention(keep_last=1), names={"eval": entries[0].id}) == [0, 3]


def test_all_are_kept_if_so_asked() -> None:
    entries = [entry(i, verified=False) for i in range(50)]
    assert kept(entries, Retention(keep_last=None)) == list(range(50))


def test_keep_every() -> None:
    steps = [0, 50, None, 100, 150, 199, 200, 201]
    entries = [entry(i, step=s) for i, s in enumerate(steps)]
    assert kept(entries, Retention(keep_last=1, keep_every=100)) == [0, 3, 6, 7]


@pytest.mark.parametrize(("mode", "stay"), [("min", [1, 3, 5]), ("max", [0, 2, 5])])
def test_keep_best(mode: str, stay: list[int]) -> None:
    rules = Retention(keep_last=1, keep_best=2, best_metric="loss", best_mode=mode)
    assert kept(losses(0.9, 0.1, 0.8, 0.2, 0.5, 0.5), rules) == stay


def test_among_equals_the_newer_is_better() -> None:
    assert kept(losses(0.1, 0.1, 0.1, 0.5), Retention(keep_last=1, keep_best=2, best_metric="loss")) == [1, 2, 3]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_is_no_score_and_infinity_is_one(mode: str) -> None:
    values = [math.nan, 0.2, math.inf, -math.inf, math.nan]
    rules = Retention(keep_last=1, keep_best=3, best_metric="loss", best_mode=mode)
    assert kept(losses(*values), rules) == [1, 2, 3, 4]
    assert kept(losses(*values), replace(rules, keep_best=1)) == ([3, 4] if mode == "min" else [2, 4])


def test_without_the_metric_there_is_no_score() -> None:
    entries = [entry(0, metrics={"acc": 1.0}), entry(1, metrics={"loss": 9.0}), entry(2), entry(3)]
    assert kept(entries, Retention(keep_last=1, keep_best=2, best_metric="loss")) == [1, 3]


def test_rules_add_up() -> None:
    entries = [entry(i, step=i, metrics={"loss": abs(i - 4)}) for i in range(9)]
    rules = Retention(keep_last=1, keep_every=3, keep_best=1, best_metric="loss")
    assert kept(entries, rules) == [0, 3, 4, 6, 8]


# --- what is kept whatever the rules say


class Counted(Entries):
    """Counts how many are looked at."""

    seen = 0

    def __iter__(self) -> Iterator[Entry]:
        for entry in super().__iter__():
            self.seen += 1
            yield entry


def test_of_thousands_that_are_kept_few_are_looked_at() -> None:
    for names, keep in (("a", 997), ("ab", 497)):
        entries = Counted([entry(i, name=names[i % len(names)]) for i in range(1000)])
        assert len(expired(replace(EMPTY, checkpoints=entries), Retention(keep_last=keep))) == 1000 - keep * len(names)
        assert entries.seen < 10


def test_named_resumed_and_asked_for_are_kept() -> None:
    entries = [entry(i) for i in range(6)]
    assert kept(entries, ALL_GO, names={"best": entries[1].id}, resumed=entries[3].id) == [1, 3, 5]
    record = replace(EMPTY, checkpoints=tuple(entries))
    assert entries[2].id not in expired(record, ALL_GO, keep=[entries[2].id])


def test_the_newest_read_back_whole_is_kept() -> None:
    entries = [entry(0, verified=True), entry(1, verified=True), entry(2), entry(3)]
    assert kept(entries, ALL_GO) == [1, 3]


def test_damaged_ones_count_for_nothing() -> None:
    entries = [entry(0), entry(1), entry(2), entry(3, verified=False), entry(4, verified=False)]
    assert kept(entries, Retention(keep_last=2)) == [1, 2, 3, 4]
    scored = [replace(e, verified=False if i < 2 else None) for i, e in enumerate(losses(0.1, 0.2, 0.3, 0.4, 0.5))]
    assert kept(scored, Retention(keep_last=1, keep_best=2, best_metric="loss")) == [0, 1, 2, 3, 4]


# --- for any state and any rules

ENTRIES = st.lists(
    st.tuples(
        st.sampled_from(["latest", "best", "eval"]),
        st.none() | st.integers(0, 30),
        st.sampled_from([None, True, False]),
        st.dictionaries(st.sampled_from(["loss", "acc"]), st.sampled_from([0.0, 1.0, 2.0, -1.0, math.inf, -math.inf, math.nan])),
    ),
    max_size=12,
)


@st.composite
def states(draw: st.DrawFn) -> Record:
    rows = draw(ENTRIES)
    entries = tuple(entry(i, n, step=s, verified=v, metrics=m) for i, (n, s, v, m) in enumerate(rows))
    ids = st.sampled_from([e.id for e in entries]) if entries else st.nothing()
    names = draw(st.dictionaries(st.sampled_from(["latest", "best", "prod"]), ids)) if entries else {}
    resumed = draw(st.none() | ids) if entries else None
    return replace(EMPTY, n=1, checkpoints=entries, names=names, resumed=resumed)


@st.composite
def rulings(draw: st.DrawFn) -> Retention:
    best = draw(st.none() | st.integers(1, 4))
    return Retention(
        keep_last=draw(st.integers(1, 4)),
        keep_every=draw(st.none() | st.integers(1, 10)),
        keep_best=best,
        best_metric=None if best is None else draw(st.sampled_from(["loss", "acc"])),
        best_mode=draw(st.sampled_from(["min", "max"])),
    )


def naive(state: Record, rules: Retention) -> set[str]:
    """Say which ids stay: every checkpoint for itself, word by word as documented."""
    assert rules.keep_last is not None
    sign = 1 if rules.best_mode == "min" else -1

    def score(e: Entry) -> float | None:
        value = e.metrics.get(rules.best_metric or "")
        return None if value is None or math.isnan(value) else sign * value

    def stays(e: Entry) -> bool:
        i = state.checkpoints.index(e)
        newer = state.checkpoints[i + 1 :]
        if e.id in state.names.values() or e.id == state.resumed:
            return True
        if e.verified and not any(o.verified for o in newer):
            return True
        if rules.keep_every and e.step is not None and e.step % rules.keep_every == 0:
            return True
        # A damaged one may only be displaced by others, a whole one only by whole ones.
        rivals = state.checkpoints if e.verified is False else [o for o in state.checkpoints if o.verified is not False]
        if sum(o in newer and o.name == e.name for o in rivals) < rules.keep_last:
            return True
        mine = score(e)
        if rules.keep_best is None or mine is None:
            return False
        better = [o for o in rivals if (s := score(o)) is not None and (s < mine or (s == mine and o in newer))]
        return len(better) < rules.keep_best

    return {e.id for e in state.checkpoints if stays(e)}


@settings(max_examples=500, deadline=None, derandomize=True)
@given(states(), rulings())
def test_any_state_keeps_what_was_promised(state: Record, rules: Retention) -> None:
    gone = expired(state, rules)
    ids = [e.id for e in state.checkpoints]
    assert gone <= set(ids)
    assert set(ids) - gone == naive(state, rules)
    assert gone.isdisjoint(state.names.values())
    assert state.resumed not in gone
    if ids:
        assert set(ids) - gone, "something is always left"
        assert ids[-1] not in gone, "the newest is never pruned"
    whole = [e for e in state.checkpoints if e.verified is not False]
    assert not whole or whole[-1].id not in gone, "the newest not known to be damaged stays"
    verified = [e.id for e in state.checkpoints if e.verified]
    assert not verified or verified[-1] not in gone

    after = state.without(gone)
    assert set(after.names) == set(state.names)
    assert expired(after, rules) == set(), "pruning twice prunes nothing more"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(states(), rulings(), st.integers(1, 3))
def test_a_more_generous_rule_never_keeps_less(state: Record, rules: Retention, more: int) -> None:
    assert rules.keep_last is not None
    gone = expired(state, rules)
    assert expired(state, replace(rules, keep_last=rules.keep_last + more)) <= gone
    assert expired(state, replace(rules, keep_last=None)) == set()
    if rules.keep_every is None:
        assert expired(state, replace(rules, keep_every=more)) <= gone
    if rules.keep_best is None:
        assert expired(state, replace(rules, keep_best=more, best_metric="loss")) <= gone
    else:
        assert expired(state, replace(rules, keep_best=rules.keep_best + more)) <= gone


@settings(max_examples=300, deadline=None, derandomize=True)
@given(states(), rulings(), st.data())
def test_finding_damage_never_removes_a_whole_one(state: Record, rules: Retention, data: st.DataObject) -> None:
    if not state.checkpoints:
        return
    i = data.draw(st.integers(0, len(state.checkpoints) - 1))
    worse = replace(
        state, checkpoints=tuple(replace(e, verified=False) if j == i else e for j, e in enumerate(state.checkpoints))
    )
    assert expired(worse, rules) - {state.checkpoints[i].id} <= expired(state, rules)


# --- options


@pytest.mark.parametrize(
    ("text", "keywords"),
    [
        ("", {}),
        ("keep_last=3", {"keep_last": 3}),
        ("keep_last=all", {"keep_last": "all"}),
        ("keep_last=1&keep_every=1000", {"keep_last": 1, "keep_every": 1000}),
        ("keep_best=3&best_metric=loss", {"keep_best": 3, "best_metric": "loss"}),
        ("keep_best=3&best_metric=val%20acc&best_mode=max", {"keep_best": 3, "best_metric": "val acc", "best_mode": "max"}),
        ("single_writer=1", {"single_writer": True}),
        ("single_writer=0", {"single_writer": False}),
        ("single_writer=true", {"single_writer": 1}),
    ],
)
def test_url_and_keywords_mean_the_same(text: str, keywords: dict[str, Any]) -> None:
    by_url = split_options(parse_url(f"memory://x?{text}").options, {})
    assert by_url == split_options(keywords, {})
    assert by_url == split_options({k: str(v) for k, v in keywords.items()}, {})


def test_two_are_kept_by_default() -> None:
    chosen = split_options({}, {})
    rules, single_writer, rest = chosen.retention, chosen.single_writer, chosen.backend
    assert (rules, single_writer, rest) == (Retention(keep_last=2), False, {})


def test_keywords_win_over_the_url() -> None:
    with ckptstore.Store("memory://keywords-win?keep_last=7", keep_last=1) as store:
        for _ in range(3):
            with store.transaction():
                pass
        assert len(store.checkpoints()) == 1


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("keep_lst", "keep_last"),
        ("keeplast", "keep_last"),
        ("keep_bets", "keep_best"),
        ("Best_mode", "best_mode"),
        ("single-writer", "single_writer"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(wrong: str, meant: str) -> None:
    for make in (lambda: ckptstore.Store(f"memory://x?{wrong}=1"), lambda: ckptstore.Store("memory://x", **{wrong: 1})):
        with pytest.raises(InvalidOption, match=f"{wrong}.*did you mean '{meant}'"):
            make()


def test_an_option_like_no_other_is_refused_with_all_there_are() -> None:
    with pytest.raises(InvalidOption) as caught:
        ckptstore.Store("memory://x?zzz=1")
    assert all(name in str(caught.value) for name in STORE_OPTIONS)


BAD = [
    ("keep_last", 0), ("keep_last", -1), ("keep_last", "0"), ("keep_last", "two"), ("keep_last", 2.5), ("keep_last", True),
    ("keep_last", None), ("keep_last", "ALL"), ("keep_last", ""), ("keep_every", 0), ("keep_every", "all"), ("keep_every", None),
    ("keep_best", 0), ("keep_best", "all"), ("best_mode", "median"), ("single_writer", "yes"), ("single_writer", 2),
    ("keep_last", "1" * 5000), ("best_metric", None), ("best_metric", b"loss"), ("best_metric", ""), ("best_mode", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{n}={v!s:.10}" for n, v in BAD])
def test_a_bad_value_is_refused(name: str, value: object) -> None:
    extra: dict[str, Any] = {"best_metric": "loss"} if name == "keep_best" else {"keep_best": 1} if name == "best_metric" else {}
    with pytest.raises(InvalidOption, match=name) as caught:
        ckptstore.Store("memory://x", **{name: value}, **extra)
    assert isinstance(caught.value, (UsageError, ValueError))
    assert len(str(caught.value)) < 400


def test_none_is_no_value() -> None:
    with pytest.raises(InvalidOption, match="'write_size' has no value"):
        ckptstore.Store("shared:///nowhere", write_size=None)


@pytest.mark.parametrize("options", [{"keep_best": 2}, {"best_metric": "loss"}])
def test_keep_best_and_its_metric_belong_together(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="belong together"):
        ckptstore.Store("memory://x", **options)


@pytest.mark.parametrize("text", ["keep_last", "keep_last=", "keep_last=1&keep_last=2", "=3", "&", "keep_last=1&"])
def test_badly_written_options_are_refused(text: str) -> None:
    with pytest.raises(InvalidOption):
        ckptstore.Store(f"memory://x?{text}")
