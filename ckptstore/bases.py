"""Where the bases of records are kept, what they are read for, and when they are made and deleted.

A base is named by the record that it was made with, or never: it is written first, under a name of its own. So one that is not newer than
the newest record, which names neither it nor one that came after it, can go at any time; `gc` looks for those that a killed job left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

from .checksum import sha256
from .entries import Base, new_base_name
from .errors import CkptStoreError, DamagedRecord, NotFound, Unreadable
from .protocol import Backend
from .record import RECORD_LIMIT, Record

__all__ = ["BASE_ENDS", "Bases", "base_keys", "bases_of"]

BASE_ENDS = (".base", ".base2")
"""How their keys end: there are two copies of each, because many records depend on it."""
_EVERY = 16
"""A base may be made with every so many commits: more than records are kept whole, so that those never need more than two bases."""
_ABOVE = 16 << 10
"""Records that are longer get a base: those of about 70 checkpoints."""
_SHARE = 128
"""A record is also to be longer than this part of a new base, so that all bases together are not much more to write than the records."""


def base_keys(name: str) -> list[str]:
    """Return the keys of a base."""
    return [f"log/{name}{end}" for end in BASE_ENDS]


def bases_of(record: Record) -> set[str]:
    """Return the names of the bases that `record`, or one of the last before it that are kept whole, may need."""
    base = record.checkpoints.base
    return set() if base is None else {base.name, base.before or base.name}


class Bases:
    """The bases of one store."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def attach(self, record: Record, known: Record) -> Record:
        """Return `record`, whose base will be read when that is needed, unless it is that of the record `known`.

        Reading raises:
            DamagedRecord: neither copy is there and whole.
        """
        base, other = record.checkpoints.base, known.checkpoints.base
        if base is None:
            return record
        if other and (other.name, other.digest) == (base.name, base.digest):
            return replace(record, checkpoints=record.checkpoints.on(other))
        base.read = partial(self._read, base, record.n)
        return record

    def _read(self, base: Base, n: int) -> bytes:
        problems = []
        for data, problem in self._copies(base):
            if not problem:
                return data
            problems.append(problem)
        raise DamagedRecord(f"commit record {n} needs its base, unless newer ones have come meanwhile: {'; '.join(problems)}")

    def damage(self, record: Record) -> list[str]:
        """Return one message for each copy of the base of `record` that is not whole."""
        base = record.checkpoints.base
        return [] if base is None else [problem for _, problem in self._copies(base) if problem]

    def _copies(self, base: Base) -> Iterator[tuple[bytes, str]]:
        """Yield the bytes of each copy, and what is wrong with it."""
        for key in base_keys(base.name):
            try:
                data = self._backend.get(key, RECORD_LIMIT)
            except (NotFound, Unreadable) as exc:
                yield b"", f"{key} cannot be read: {exc}"
            else:
                yield data, "" if sha256(data) == base.digest else f"{key} is damaged: its bytes do not match their checksum"

    def make(self, record: Record, size: int) -> Record:
        """Return `record`, about to be committed in `size` bytes; with a new base, written durably, if that is due and can be done."""
        if size <= _ABOVE or record.n % _EVERY:
            return record
        base, data = Base.make(new_base_name(record.n), record.checkpoints)
        if size <= len(data) // _SHARE or len(data) > RECORD_LIMIT:  # which nobody would read
            return record
        based = replace(record, checkpoints=record.checkpoints.based(base))
        try:
            for key in base_keys(base.name):
                self._backend.put_if_absent(key, data)
        except CkptStoreError:  # then the record says it all
            self.drop(based)
            return record
        return based

    def drop(self, record: Record) -> None:
        """Delete the base that was made with `record`, if one was: it is proven that `record` was not committed."""
        base = record.checkpoints.base
        if base and base.slot == record.n:
            self._delete(base.name)

    def tidy(self, record: Record) -> None:
        """After the commit of `record`: delete the base that no record needs any more that is kept whole."""
        base = record.checkpoints.base
        if base and base.slot == record.n and base.obsolete:
            self._delete(base.obsolete)

    def _delete(self, name: str) -> None:
        with suppress(CkptStoreError):
            self._backend.delete(base_keys(name))
