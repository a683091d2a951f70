"""Random histories of a store, with crashes, rivals and damage, compared after each step with a small model that cannot fail."""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from stores import Killed, Mortal, contents, new_memory, state_of, store_on
from test_retention import naive

from ckptstore import Store
from ckptstore.backends.local import LocalBackend
from ckptstore.checksum import sha256
from ckptstore.errors import CheckpointNotFound, Damaged, FallbackWarning, Fenced
from ckptstore.log import slot_key
from ckptstore.naming import epoch_of
from ckptstore.protocol import Backend
from ckptstore.record import EMPTY, Entry, Record, Tombstone, decode
from ckptstore.retention import Retention
from ckptstore.transaction import Transaction

RULES: list[dict[str, Any]] = [
    {},
    {"keep_last": 1},
    {"keep_last": "all"},
    {"keep_last": 1, "keep_every": 2},
    {"keep_last": 1, "keep_best": 1, "best_metric": "loss"},
    {"keep_last": 2, "keep_best": 2, "best_metric": "loss", "best_mode": "max", "keep_every": 3},
]
NAMES = st.sampled_from(["latest", "eval"])
TAGS = st.sampled_from(["best", "latest", "keep"])
WHICH = st.integers(0, 3)
CRASHES = st.none() | st.none() | st.tuples(st.integers(0, 30), st.booleans())
LOSSES = st.sampled_from([None, 0.5, 1.0, 0.25, math.nan, math.inf])
FILES = st.dictionaries(st.sampled_from(["a", "b/c", "b/d", "ä"]), st.binary(max_size=20), max_size=3)
PLACEHOLDER = "e0-000000000000"


@dataclass
class Actor:
    """A job, or a tool beside one, and what it knows."""

    backend: Mortal
    store: Store
    cooperates: bool
    rules: Retention
    owner: str
    epoch: int | None = None
    verdicts: dict[str, bool] = field(default_factory=dict)


class StoreMachine(RuleBasedStateMachine):
    """The model is `state` (a record, of which only what users see counts), `bytes_of`, `object_of` and `broken`."""

    storage: Backend

    def make_storage(self) -> Backend:
        return new_memory()

    @initialize()
    def begin(self) -> None:
        self.storage = self.make_storage()
        self.state = EMPTY
        self.actors: list[Actor] = []
        self.bytes_of: dict[str, dict[str, bytes]] = {}
        self.object_of: dict[str, Any] = {}
        self.broken: set[str] = set()
        self.slots: dict[int, str] = {}
        self.count = 0
        self.add_actor(False, 0)

    # --- the model

    def add_actor(self, cooperates: bool, rules: int) -> Actor:
        self.count += 1
        owner = f"job{self.count}"
        backend = Mortal(self.storage)
        store = store_on(backend, acquire=not cooperates, owner=owner, **RULES[rules])
        actor = Actor(backend, store, cooperates, store._retention, owner)
        self.actors = [*self.actors[-3:], actor]
        return actor

    def actor(self, which: int) -> Actor:
        """Return one of those that are there, the newest for 0: the older ones are often fenced, and then little happens."""
        return self.actors[-1 - which % len(self.actors)]

    def fenced(self, actor: Actor) -> bool:
        return actor.epoch is not None and (actor.epoch, actor.owner) != (self.state.epoch, self.state.owner)

    def acquired(self, actor: Actor) -> Record:
        """Return the state once `actor` has acquired the store, if it has to."""
        if actor.cooperates or actor.epoch is not None:
            return self.state
        return replace(self.state, epoch=self.state.epoch + 1, owner=actor.owner)

    @staticmethod
    def judged(state: Record, actor: Actor) -> Record:
        entries = [replace(e, verified=actor.verdicts.get(e.id, e.verified)) for e in state.checkpoints]
        return replace(state, checkpoints=tuple(entries))

    @staticmethod
    def without(state: Record, gone: set[str]) -> Record:
        return replace(
            state,
            checkpoints=tuple(e for e in state.checkpoints if e.id not in gone),
            names={n: i for n, i in state.names.items() if i not in gone},
            resumed=None if state.resumed in gone else state.resumed,
        )

    def pruned(self, state: Record, rules: Retention) -> Record:
        if rules.keep_last is None:
            return state
        return self.without(state, {e.id for e in state.checkpoints} - naive(state, rules))

    @staticmethod
    def visible(state: Record) -> object:
        """Return what users see of a state."""
        entries = [
            (e.id, e.name, e.step, sorted((k, repr(v)) for k, v in e.metrics.items()), e.verified) for e in state.checkpoints
        ]
        return state.epoch, state.owner, sorted(state.names.items()), entries, state.resumed

    # --- doing something, and perhaps dying over it

    def change(
        self, actor: Actor, crash: tuple[int, bool] | None, act: Callable[[], Any], after: Callable[[Record, str], Record]
    ) -> Any:
        """Let `actor` do what makes `after` of the state, and check that the outcome is that or, if it died, perhaps nothing."""
        if self.fenced(actor):
            with pytest.raises(Fenced):
                act()
            return None
        ready = self.acquired(actor)
        known = {e.id for e in ready.checkpoints}
        result = None
        died = False
        if crash is not None:
            actor.backend.calls_left, actor.backend.last_takes_effect = crash
        try:
            result = act()
        except Killed:
            died = True
        actor.store._engine.settle()
        seen = state_of(self.storage)
        new = [e.id for e in seen.checkpoints if e.id not in known] or [PLACEHOLDER]
        done = after(self.judged(ready, actor), new[0])
        if died:
            possible = {repr(self.visible(s)): s for s in (self.state, ready, done)}
            assert repr(self.visible(seen)) in possible, "a crash leaves the state before or the one after"
            self.state = possible[repr(self.visible(seen))]
        else:
            assert self.visible(seen) == self.visible(done)
            self.state = done
            if not actor.cooperates:
                actor.epoch = done.epoch
            for entry in done.checkpoints:
                actor.verdicts.pop(entry.id, None)
        self.bury(actor)
        return result

    def bury(self, actor: Actor) -> None:
        """Put a new job in the place of one that died."""
        dead = actor.backend.calls_left is not None and actor.backend.calls_left < 0
        actor.backend.calls_left = None
        if dead:
            actor.store.close()
            self.actors.remove(actor)
            self.add_actor(actor.cooperates, 0)

    # --- rules

    @rule(kind=st.sampled_from(["tool", "job", "acquiring job"]), rules=st.integers(0, len(RULES) - 1))
    def somebody_else_comes(self, kind: str, rules: int) -> None:
        actor = self.add_actor(kind == "tool", rules)
        if kind == "acquiring job":
            self.change(actor, None, actor.store.acquire, lambda state, _: state)
            self.check_folders(self.state.epoch)

    @rule(which=WHICH, crash=CRASHES)
    def acquire(self, which: int, crash: tuple[int, bool] | None) -> None:
        actor = self.actor(which)
        if not actor.cooperates:
            verdicts = dict(actor.verdicts)
            actor.verdicts.clear()  # acquiring writes none down
            self.change(actor, crash, actor.store.acquire, lambda state, _: state)
            actor.verdicts.update(verdicts)

    def saved(self, actor: Actor, name: str, step: int | None, loss: float | None) -> Callable[[Record, str], Record]:
        def after(state: Record, new: str) -> Record:
            metrics = {} if loss is None else {"loss": loss}
            entry = Entry(id=new, step=step, name=name, created=0.0, nbytes=0, manifest="", metrics=metrics)
            state = replace(state, checkpoints=(*state.checkpoints, entry), names={**state.names, name: new})
            gone = {e.id for e in state.checkpoints} - {e.id for e in self.pruned(state, actor.rules).checkpoints}
            if actor.cooperates:  # its rules are for what it saves itself
                gone = {e.id for e in state.checkpoints if e.id in gone and e.name == name}
            return self.without(state, gone)

        return after

    @rule(which=WHICH, name=NAMES, step=st.none() | st.integers(0, 6), loss=LOSSES, crash=CRASHES)
    def save(self, which: int, name: str, step: int | None, loss: float | None, crash: tuple[int, bool] | None) -> None:
        actor = self.actor(which)
        self.count += 1
        value = {"x": self.count}
        metrics = None if loss is None else {"loss": loss}
        before = {e.id for e in self.state.checkpoints}
        made = self.change(
            actor,
            crash,
            lambda: actor.store.save(value, name, step=step, metrics=metrics),
            self.saved(actor, name, step, loss),
        )
        for entry in self.state.checkpoints:
            if entry.id not in before:
                self.object_of[entry.id] = value
                assert made is None or made.id == entry.id

    @rule(which=WHICH, files=FILES, step=st.none() | st.integers(0, 6), crash=CRASHES)
    def transaction(self, which: int, files: dict[str, bytes], step: int | None, crash: tuple[int, bool] | None) -> None:
        actor = self.actor(which)
        begun: list[str] = []

        def act() -> None:
            with actor.store.transaction("files", step=step) as tx:
                begun.append(tx.id)
                self.put(tx, files)

        self.change(actor, crash, act, self.saved(actor, "files", step, None))
        if begun and any(e.id == begun[0] for e in self.state.checkpoints):
            self.bytes_of[begun[0]] = files

    @staticmethod
    def put(tx: Transaction, files: dict[str, bytes]) -> None:
        for path, data in files.items():
            with tx.open(path) as file:
                file.write(data)

    @rule(which=WHICH, files=FILES, meanwhile=st.sampled_from(["acquire", "gc", "save", "prune"]))
    def transaction_while_others_work(self, which: int, files: dict[str, bytes], meanwhile: str) -> None:
        actor = self.actor(which)
        if self.fenced(actor):
            return
        tx = actor.store.transaction("files")
        tx.__enter__()
        self.state = self.acquired(actor)
        if not actor.cooperates:
            actor.epoch = self.state.epoch
        self.put(tx, files)
        if meanwhile == "acquire":
            self.somebody_else_comes("acquiring job", 0)
            with pytest.raises(Fenced):
                tx.__exit__(None, None, None)
            return
        other = self.add_actor(True, 1)
        if meanwhile == "gc":
            other.store.gc()
        elif meanwhile == "save":
            self.save(0, "latest", 1, None, None)
        else:
            self.prune(0, None)
        self.change(actor, None, lambda: tx.__exit__(None, None, None), self.saved(actor, "files", None, None))
        self.bytes_of[tx.id] = files

    @precondition(lambda self: self.state.checkpoints)
    @rule(which=WHICH, name=TAGS, chosen=st.integers(0, 20), crash=CRASHES)
    def tag(self, which: int, name: str, chosen: int, crash: tuple[int, bool] | None) -> None:
        actor = self.actor(which)
        wanted = self.state.checkpoints[chosen % len(self.state.checkpoints)].id
        by = next((n for n, i in self.state.names.items() if i == wanted), wanted)
        self.change(
            actor,
            crash,
            lambda: actor.store.tag(name, by),
            lambda state, _: replace(state, names={**state.names, name: wanted}),
        )

    @precondition(lambda self: self.state.checkpoints)
    @rule(which=WHICH, chosen=st.integers(0, 20), crash=CRASHES)
    def delete_by_id(self, which: int, chosen: int, crash: tuple[int, bool] | None) -> None:
        actor = self.actor(which)
        wanted = self.state.checkpoints[chosen % len(self.state.checkpoints)].id
        self.change(actor, crash, lambda: actor.store.delete(wanted), lambda state, _: self.without(state, {wanted}))

    @precondition(lambda self: self.state.names)
    @rule(which=WHICH, chosen=st.integers(0, 20), crash=CRASHES)
    def delete_by_name(self, which: int, chosen: int, crash: tuple[int, bool] | None) -> None:
        actor = self.actor(which)
        name = sorted(self.state.names)[chosen % len(self.state.names)]

        def after(state: Record, _: str) -> Record:
            others = {n: i for n, i in state.names.items() if n != name}
            if state.names[name] in others.values():
                return replace(state, names=others)
            return self.without(state, {state.names[name]})

        self.change(actor, crash, lambda: actor.store.delete(name), after)

    @rule(which=WHICH, crash=CRASHES)
    def prune(self, which: int, crash: tuple[int, bool] | None) -> None:
        actor = self.actor(which)
        before = {e.id for e in self.state.checkpoints}
        gone = self.change(actor, crash, actor.store.prune, lambda state, _: self.pruned(state, actor.rules))
        assert gone is None or set(gone) == before - {e.id for e in self.state.checkpoints}

    @rule(which=WHICH, crash=CRASHES)
    def gc(self, which: int, crash: tuple[int, bool] | None) -> None:
        actor = self.actor(which)
        if crash is not None:
            actor.backend.calls_left, actor.backend.last_takes_effect = crash
        try:
            actor.store.gc()
            self.check_folders(self.state.epoch)
        except Killed:
            pass
        self.bury(actor)

    def check_folders(self, epoch: int) -> None:
        """Check that nothing lies around but what is named, and what may be about to be committed."""
        named = {e.id for e in self.state.checkpoints}
        found = {info.key.split("/")[1] for info in self.storage.list("data/")}
        assert named - self.broken <= found
        assert all(epoch_of(i) == epoch for i in found - named)

    def readable(self, name: str) -> tuple[list[Entry], Entry | None]:
        """Return the damaged checkpoints that reading `name` meets, and the whole one it ends with."""
        wanted = next(e for e in self.state.checkpoints if e.id == self.state.names[name])
        before = self.state.checkpoints[: self.state.checkpoints.index(wanted)]
        met = [wanted, *(e for e in reversed(before) if e.name == name)]
        whole = next((i for i, e in enumerate(met) if e.id not in self.broken), len(met))
        return met[:whole], met[whole] if whole < len(met) else None

    @rule(which=WHICH, name=NAMES, spoil=st.booleans())
    def load_by_name(self, which: int, name: str, spoil: bool) -> None:
        actor = self.actor(which)
        if name not in self.state.names:
            with pytest.raises((CheckpointNotFound, FileNotFoundError)):
                actor.store.load(name)
            return
        if spoil:
            self.damage([e.id for e in self.state.checkpoints].index(self.state.names[name]), 0, "flip")
        damaged, whole = self.readable(name)
        if any(e.id not in self.object_of for e in [*damaged, *([whole] if whole else [])]):
            return  # tagged so: a checkpoint of plain files
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if whole is None:
                with pytest.raises(Damaged):
                    actor.store.load(name)
            else:
                assert actor.store.load(name) == self.object_of[whole.id]
        assert bool([w for w in told if w.category is FallbackWarning]) == (len(damaged) > (whole is None))
        actor.verdicts.update({e.id: False for e in damaged})
        if whole is not None:
            actor.verdicts[whole.id] = True

    @precondition(lambda self: self.state.checkpoints)
    @rule(which=WHICH, chosen=st.integers(0, 20), by_step=st.booleans())
    def load_one(self, which: int, chosen: int, by_step: bool) -> None:
        actor = self.actor(which)
        wanted = self.state.checkpoints[chosen % len(self.state.checkpoints)]
        how: dict[str, Any] = {"target": wanted.id}
        if by_step and wanted.step is not None:
            wanted = [e for e in self.state.checkpoints if e.step == wanted.step][-1]
            how = {"step": wanted.step}
        if wanted.id not in self.object_of:
            return
        if wanted.id in self.broken:
            with pytest.raises(Damaged):
                actor.store.load(**how)
        else:
            assert actor.store.load(**how) == self.object_of[wanted.id]
        actor.verdicts[wanted.id] = wanted.id not in self.broken

    @rule(which=WHICH)
    def verify(self, which: int) -> None:
        actor = self.actor(which)
        ids = {e.id for e in self.state.checkpoints}
        assert {d.id for d in actor.store.verify()} == self.broken & ids
        actor.verdicts.update({i: i not in self.broken for i in ids})

    @rule(which=WHICH, crash=CRASHES)
    def resume(self, which: int, crash: tuple[int, bool] | None) -> None:
        actor = self.actor(which)
        if actor.cooperates:
            return
        into = {"x": -1}
        if self.fenced(actor) or not self.state.checkpoints:
            self.change(actor, None, lambda: actor.store.resume(into), lambda state, _: replace(state))
            assert into == {"x": -1}
            return
        damaged, whole = self.readable("latest") if "latest" in self.state.names else ([], None)
        if any(e.id not in self.object_of for e in [*damaged, *([whole] if whole else [])]):
            return
        met = {e.id: False for e in damaged} | ({whole.id: True} if whole else {})

        def act() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                if whole is None:
                    with pytest.raises((Damaged, CheckpointNotFound)):
                        actor.store.resume(into)
                else:
                    assert actor.store.resume(into) == actor.store.checkpoint(whole.id)
                    assert into == self.object_of[whole.id]

        if whole is None:
            verdicts = actor.verdicts | met
            actor.verdicts = {}
            self.change(actor, None, act, lambda state, _: state)
            actor.verdicts = verdicts
        else:
            actor.verdicts.update(met)
            self.change(actor, crash, act, lambda state, _: replace(state, resumed=whole.id))

    @precondition(lambda self: self.state.checkpoints)
    @rule(chosen=st.integers(0, 20), where=st.integers(0, 10_000), how=st.sampled_from(["flip", "cut", "remove"]))
    def damage(self, chosen: int, where: int, how: str) -> None:
        wanted = self.state.checkpoints[chosen % len(self.state.checkpoints)].id
        objects = [info for info in self.storage.list(f"data/{wanted}/") if info.size]
        if wanted in self.broken or not objects:  # the same bit flipped twice would be no damage
            return
        key = objects[where % len(objects)].key
        data = bytearray(self.storage.get(key, 1 << 20))
        data[where % len(data)] ^= 1 << where % 8
        self.storage.delete([key])
        if how != "remove":
            self.storage.put_if_absent(key, bytes(data if how == "flip" else data[: where % len(data)]))
        self.broken.add(wanted)

    # --- what holds after each step

    @invariant()
    def the_store_is_as_the_model_says(self) -> None:
        seen = state_of(self.storage)
        assert self.visible(seen) == self.visible(self.state)
        assert {e.id for e in seen.checkpoints}.issuperset(seen.names.values())
        reader = store_on(self.storage, acquire=False)
        assert reader.names() == dict(sorted(self.state.names.items()))
        for entry in seen.checkpoints:
            if entry.id not in self.broken:
                found = contents(reader, entry.id)
                assert found == self.bytes_of[entry.id] if entry.id in self.bytes_of else list(found) == ["state.pt"]

    @invariant()
    def the_log_only_grows(self) -> None:
        epoch = 0
        n = state_of(self.storage).n
        assert len([info for info in self.storage.list("log/") if info.key.removeprefix("log/").isdigit()]) == n
        for slot in range(1, n + 1):
            data = self.storage.get(slot_key(slot), 1 << 20)
            found = decode(data, slot)
            if isinstance(found, Tombstone):
                assert slot <= n - 8
                continue
            assert self.slots.setdefault(slot, sha256(data)) == sha256(data), "a commit was changed"
            assert found.epoch >= epoch
            epoch = found.epoch
        assert set(self.slots) <= set(range(1, n + 1))

    def teardown(self) -> None:
        for actor in getattr(self, "actors", []):
            actor.store.close()


class LocalStoreMachine(StoreMachine):
    def make_storage(self) -> Backend:
        self.folder = Path(tempfile.mkdtemp())
        return LocalBackend.open(str(self.folder / "run"), {})

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


COMMON = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
NO_LONG_SEARCH = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)


def test_in_memory() -> None:
    run_state_machine_as_test(
        StoreMachine, settings=settings(COMMON, max_examples=60, stateful_step_count=50, derandomize=True, phases=NO_LONG_SEARCH)
    )


def test_on_a_disk() -> None:
    run_state_machine_as_test(
        LocalStoreMachine,
        settings=settings(COMMON, max_examples=6, stateful_step_count=50, derandomize=True, phases=NO_LONG_SEARCH),
    )


@pytest.mark.soak
@pytest.mark.parametrize("machine", [StoreMachine, LocalStoreMachine])
def test_for_long(machine: type[StoreMachine]) -> None:
    examples = 3000 if machine is StoreMachine else 300
    run_state_machine_as_test(machine, settings=settings(COMMON, max_examples=examples, stateful_step_count=80))
