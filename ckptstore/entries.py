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
from dataclasses import dataclass, field, fields
from functools import cached_property
from operator import itemgetter
from typing import overload

from .checksum import sha256
from .envelope import JSON, body_of, dumps, from_number, parse, seal, to_number, to_time
from .errors import Damaged, DamagedRecord, InvalidName
from .naming import check_name, check_step, is_id

__all__ = [
    "BASE_FORMAT",
    "Base",
    "Entries",
    "Entry",
    "check_base",
    "check_count",
    "check_digest",
    "check_id",
    "check_text",
    "decode_entry",
    "new_base_name",
]

BASE_FORMAT = 2
"""Format of bases, and of records that have one: who knows only format 1 would take such a record for the whole state."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HEXADECIMAL = re.compile(r"[0-9a-f]*")
_BASE = re.compile(r"[0-9]{12}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Entry:
    """One committed checkpoint, as records know it."""

    id: str
    step: int | None
    name: str
    """The name it was saved under; names may have moved on since."""
    created: float
    """Seconds since 1970 by the writer's clock; for people, nothing depends on it."""
    nbytes: int
    """Bytes of all its files, without the manifest."""
    manifest: str
    """SHA-256 of its manifest's bytes."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    verified: bool | None = None
    """True: read back whole since it was saved. False: last found damaged. None: not read back yet."""

    @cached_property
    def json(self) -> str:
        """The JSON of this entry, made once: most entries of a record were in the one before."""
        item = {
            "id": self.id,
            "step": self.step,
            "name": self.name,
            "created": self.created,
            "nbytes": self.nbytes,
            "manifest": self.manifest,
            "metrics": {k: from_number(v) for k, v in self.metrics.items()},
            "verified": self.verified,
        }
        return dumps(item)


def decode_entry(item: JSON) -> Entry:
    """Undo `Entry.json`, trusting nothing. Raises KeyError, TypeError, ValueError or AttributeError."""
    verified = item["verified"]
    if verified is not None and not isinstance(verified, bool):
        raise ValueError("verified is neither true, false nor null")
    return Entry(
        id=check_id(item["id"]),
        step=check_step(item["step"]),
        name=check_name(item["name"]),
        created=to_time(item["created"]),
        nbytes=check_count(item["nbytes"]),
        manifest=check_digest(item["manifest"]),
        metrics={check_text(k): to_number(v) for k, v in item["metrics"].items()},
        verified=verified,
    )


def _decode_all(items: Mapping[str, JSON]) -> dict[str, Entry]:
    """Do as `decode_entry` for each of `items`, whose ids have been checked. A store may keep tens of thousands."""
    values = list(items.values())
    if not _all_common(values):
        return {i: decode_entry(item) for i, item in items.items()}
    found, new = {}, object.__new__
    for checkpoint_id, item in items.items():
        entry = found[checkpoint_id] = new(Entry)
        vars(entry).update(item)  # what its __init__ does, at a tenth of the time: these fields, and no others
    return found


def _all_common(items: list[JSON]) -> bool:
    """Say whether `decode_entry` takes all of `items` as they are; field by field, which takes a third of the time. If not, it may yet."""
    if not items:
        return True
    try:
        step, name, created, nbytes, manifest, metrics, verified = zip(*map(_FIELDS, items), strict=True)
        steps = [one for one in step if one is not None] or [0]
        for one in set(name):
            check_name(one)
        for one in {key for some in metrics for key in some}:
            check_text(one)
        return (
            {*map(len, items)} == {len(fields(Entry))}
            and {*map(type, steps), *map(type, nbytes)} <= {int}
            and {*map(type, created)} <= {float}
            and {*map(type, metrics)} <= {dict}
            and {type(value) for some in metrics for value in some.values()} <= {float}
            and {*map(type, verified)} <= {bool, type(None)}
            and min(steps) >= 0
            and check_step(max(steps)) is not None
            and to_time(min(created)) <= to_time(max(created))
            and min(nbytes) >= 0
            and check_count(max(nbytes)) >= 0
            and {*map(len, manifest)} <= {64}
            and _HEXADECIMAL.fullmatch("".join(manifest)) is not None
        )
    except (KeyError, TypeError, ValueError, AttributeError, InvalidName):
        return False


_FIELDS = itemgetter("step", "name", "created", "nbytes", "manifest", "metrics", "verified")


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
            index = self._index()
            known = {i: e for i, e in index.items() if isinstance(e, Entry)}
            with _damage(self.name):
                decoded = _decode_all({i: e for i, e in index.items() if i not in known} if known else index)
                self._parsed = {i: known[i] if i in known else decoded[i] for i in index} if known else decoded
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
                if not all(map(is_id, found)):
                    raise InvalidName("a checkpoint id is malformed")
                if len(found) != len(body["checkpoints"]):
                    raise ValueError("a checkpoint is listed twice")
            self._found = found
        return self._found


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


def check_count(value: JSON) -> int:
    """Return a whole number of at most 63 bits. Raises ValueError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError("a number is out of range")
    return value


def check_text(value: JSON) -> str:
    """Return a text of at most 1024 characters. Raises ValueError for anything else."""
    if not isinstance(value, str) or len(value) > 1024:
        raise ValueError("a text is missing or too long")
    return value


def check_digest(value: JSON) -> str:
    """Return a SHA-256 in hexadecimal. Raises ValueError for anything else."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError("a SHA-256 is malformed")
    return value


def check_id(value: JSON) -> str:
    """Return the id of a checkpoint. Raises `InvalidName` for anything else."""
    if not isinstance(value, str) or not is_id(value):
        raise InvalidName("a checkpoint id is malformed")
    return value


def check_base(value: JSON) -> str:
    """Return the name of a base. Raises ValueError for anything else."""
    if not isinstance(value, str) or not _BASE.fullmatch(value):
        raise ValueError("the name of a base is malformed")
    return value
