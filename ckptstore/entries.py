"""The checkpoints of a store, as its records know them: those that a record lists itself, and a base that many records share.

A store that keeps thousands would write them all down with every commit. So now and then they are written into an object of their own, the
base, and records then list what has changed since. A base is parsed when somebody asks for more than a record lists: saving, and loading
by name, do not.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import overload

from .checksum import sha256
from .entry import Entry, decode_all, decode_entry
from .envelope import JSON, body_of, in_pieces, parse, seal
from .errors import Damaged, DamagedRecord, InvalidName
from .naming import are_ids

__all__ = ["BASE_FORMAT", "Base", "Entries", "check_base", "new_base_name"]

BASE_FORMAT = 2
"""Format of bases, and of records that have one: who knows only format 1 would take such a record for the whole state."""

_BASE = re.compile(r"[0-9]{12}-[0-9a-f]{12}")


def new_base_name(n: int) -> str:
    """Return a name for a base that is made with commit `n`, never used before."""
    return f"{n:012d}-{secrets.token_hex(6)}"


class Base:
    """The checkpoints that were kept after one commit. Immutable, but for being parsed when needed."""

    def __init__(self, name: str, digest: str, before: str | None) -> None:
        self.name = name
        """The number of the commit, and random digits: see `new_base_name`."""
        self.digest = digest
        """SHA-256 of the object's bytes."""
        self.before = before
        """Name of the base that came before this one, None if none did: older records may need it yet."""
        self.obsolete: str | None = None
        """Name of the one before that, as far as is known here: nobody needs it once this one is in use."""
        self.read: Callable[[], bytes] | None = None
        """Reads its object, and compares its SHA-256."""
        self._found: dict[str, Entry | JSON] | None = None
        self._parsed: dict[str, Entry] | None = None

    @classmethod
    def make(cls, name: str, entries: Entries) -> tuple[Base, bytes]:
        """Return a base with `entries`, and the bytes of its object."""
        listed = f"[{','.join(e.json for e in entries)}]"
        data = seal({"kind": "base", "name": name}, encoded={"checkpoints": listed}, version=BASE_FORMAT)
        last = entries.base
        base = cls(name, sha256(data), last.name if last else None)
        base.obsolete = last.before if last else None
        base._found = base._parsed = {e.id: e for e in entries}
        return base, data

    @property
    def slot(self) -> int:
        """The commit that it was made with: the first to name it."""
        return int(self.name[:12])

    def ids(self) -> Collection[str]:
        """The ids of its checkpoints, oldest commit first."""
        return self._index().keys()

    def get(self, checkpoint_id: str) -> Entry | None:
        """Return one of its checkpoints."""
        index = self._index()
        found = index.get(checkpoint_id)
        if found is None or isinstance(found, Entry):
            return found
        with _damage(self.name):
            entry = index[checkpoint_id] = decode_entry(found)
        return entry

    def entries(self) -> Mapping[str, Entry]:
        """Return all its checkpoints by their ids, oldest commit first."""
        if self._parsed is None:
            index = [*self._index().items()]  # as it is now: another thread may be reading one of them, in `get`
            known = {i: e for i, e in index if isinstance(e, Entry)}
            with _damage(self.name):
                decoded = {e.id: e for e in decode_all([e for i, e in index if i not in known])}
                self._parsed = {i: known[i] if i in known else decoded[i] for i, _ in index} if known else decoded
            self._found = {**self._parsed}
        return self._parsed

    def _index(self) -> dict[str, Entry | JSON]:
        if self._found is None:
            assert self.read is not None
            data = self.read()
            with _damage(self.name):
                body = parse(body_of(data), "it")
                if body["kind"] != "base" or body["name"] != self.name:
                    raise ValueError("it belongs to something else")
                found = {item["id"]: item for item in body["checkpoints"]}
                if not are_ids(found):
                    raise InvalidName("a checkpoint id is malformed")
                if len(found) != len(body["checkpoints"]):
                    raise ValueError("a checkpoint is listed twice")
            self._found = found
        return self._found

    def passing(self) -> Iterator[Sequence[Entry]]:
        """Yield all its checkpoints, oldest commit first, some hundreds at a time; none are kept, unless they were before.

        Memory that is used again and again is faster by far than new memory, of which tens of thousands of checkpoints take much.
        """
        done = set[str]()
        if self._found is None:
            assert self.read is not None
            with suppress(KeyError, TypeError, ValueError, AttributeError, RecursionError, Damaged):
                number = 0
                for items in in_pieces(self.read(), {"kind": "base", "name": self.name}, "checkpoints", BASE_FORMAT):
                    some = decode_all(items)
                    number += len(some)
                    done.update([e.id for e in some])
                    if len(done) != number:
                        break  # one is listed twice
                    yield some
                else:
                    return
        yield [e for i, e in self.entries().items() if i not in done]  # which also says what is wrong


class _damage:
    """Turns what is wrong with the content of a base into `DamagedRecord`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, (KeyError, TypeError, ValueError, AttributeError, Damaged)):
            raise DamagedRecord(
                f"the base {self._name} of commit records is not valid: {type(exc).__name__}: {exc!s:.200}"
            ) from None


def _kind(entry: Entry) -> tuple[str, bool]:
    return entry.name, entry.verified is False


class Entries(Sequence[Entry]):
    """The checkpoints of one state, oldest commit first. Immutable."""

    def __init__(self, own: Iterable[Entry] = (), base: Base | None = None, gone: frozenset[str] = frozenset()) -> None:
        self.own = {e.id: e for e in own}
        """Those that are not in the base, or not as here."""
        self.base = base
        self.gone = gone
        """Ids in the base that are no longer kept."""

    def get(self, checkpoint_id: str) -> Entry | None:
        """Return the entry with this id, None if there is none."""
        found = self.own.get(checkpoint_id)
        if found is not None or self.base is None or checkpoint_id in self.gone:
            return found
        return self.base.get(checkpoint_id)

    def ids(self) -> set[str]:
        """The ids of all."""
        return {*self.own, *(self.base.ids() if self.base else ())} - self.gone

    def put(self, *entries: Entry) -> Entries:
        """Return these with `entries` in the place of those with the same ids, or else at the end."""
        if not entries:
            return self
        more = Entries((*self.own.values(), *entries), self.base, self.gone)
        if "_all" in vars(self) and not any(map(self.get, (e.id for e in entries))):
            vars(more)["_all"] = self._all + entries  # need not be put together again
            vars(more)["counts"] = self.counts + Counter(map(_kind, entries))
        return more

    def without(self, ids: Collection[str]) -> tuple[Entries, tuple[str, ...]]:
        """Return these but for `ids`, and which of `ids` were there, oldest commit first."""
        if not ids:
            return self, ()
        left, kept, gone = set(ids), list[Entry](), list[Entry]()
        everything = iter(self._all)
        while left and (entry := next(everything, None)):
            if entry.id in left:
                left.remove(entry.id)
                gone.append(entry)
            else:
                kept.append(entry)
        if not gone:
            return self, ()
        old = {e.id for e in gone if e.id in self.base.ids()} if self.base else set()
        fewer = Entries((e for e in self.own.values() if e.id not in ids), self.base, self.gone | old)
        vars(fewer)["_all"] = (*kept, *everything)
        vars(fewer)["counts"] = self.counts - Counter(map(_kind, gone))
        return fewer, tuple(e.id for e in gone)

    def based(self, base: Base) -> Entries:
        """Return the same, all of which are in `base`."""
        same = Entries((), base)
        vars(same)["_all"] = self._all
        vars(same)["counts"] = self.counts
        return same

    def on(self, base: Base) -> Entries:
        """Return the same, where `base` is another object with the content of the base."""
        return Entries(self.own.values(), base, self.gone)

    def listed(self, ids: Iterable[str]) -> list[Entry]:
        """Return what a record must list: those that its base does not have as they are, and `ids`."""
        found = dict(self.own)
        for checkpoint_id in ids:
            if checkpoint_id not in found and (entry := self.get(checkpoint_id)):
                found[checkpoint_id] = entry
        return [*found.values()]

    @cached_property
    def counts(self) -> Counter[tuple[str, bool]]:
        """How many there are, by the name that they were saved under, and whether they were found damaged."""
        return Counter(map(_kind, self._all))

    @cached_property
    def _all(self) -> tuple[Entry, ...]:
        if self.base is None:
            return (*self.own.values(),)
        old = self.base.entries()
        new = [e for i, e in self.own.items() if i not in old]
        if not self.gone and len(new) == len(self.own):
            return (*old.values(), *new)
        return (*(self.own.get(i, e) for i, e in old.items() if i not in self.gone), *new)

    def passing(self) -> Iterator[Sequence[Entry]]:
        """Yield all, oldest commit first, some at a time, for who looks at each once: see `Base.passing`."""
        if self.base is None or "_all" in vars(self):
            yield self._all
            return
        new = dict(self.own)
        changed = self.gone | new.keys()
        for some in self.base.passing():
            same = changed.isdisjoint([e.id for e in some])
            yield some if same else [new.pop(e.id, e) for e in some if e.id not in self.gone]
        yield [*new.values()]

    def __len__(self) -> int:
        return len(self._all)

    def __bool__(self) -> bool:
        return bool(self.own) or bool(self._all)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._all)

    @overload
    def __getitem__(self, index: int) -> Entry: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Entry, ...]: ...

    def __getitem__(self, index: int | slice) -> Entry | tuple[Entry, ...]:
        return self._all[index]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Entries) and (other.base, other.gone, other.own) == (self.base, self.gone, self.own):
            return True
        return isinstance(other, Sequence) and self._all == tuple(other)

    __hash__ = None  # type: ignore[assignment]  # as those of a dict

    def __repr__(self) -> str:
        return f"Entries({len(self)})"


def check_base(value: JSON) -> str:
    """Return the name of a base. Raises ValueError for anything else."""
    if not isinstance(value, str) or not _BASE.fullmatch(value):
        raise ValueError("the name of a base is malformed")
    return value
