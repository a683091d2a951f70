"""One committed checkpoint, as records and bases know it, and how it is read from their JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain, repeat

from .envelope import JSON, dumps, from_number, to_number, to_time
from .errors import InvalidName
from .naming import are_ids, check_name, check_step, is_id

__all__ = ["Entry", "check_count", "check_digest", "check_id", "check_text", "decode_all", "decode_entry"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


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


def decode_all(items: list[JSON]) -> list[Entry]:
    """Do as `decode_entry` for each of `items`, which become part of what is returned. A store may keep tens of thousands."""
    if not _all_common(items):
        return [decode_entry(item) for item in items]
    found = [*map(object.__new__, repeat(Entry, len(items)))]
    for _ in map(object.__setattr__, found, repeat("__dict__"), items):
        pass  # each has now what its __init__ would have put there, and no more; at a thirtieth of the time
    return found


def _all_common(items: list[JSON]) -> bool:
    """Say whether `decode_entry` takes all of `items` as they are; field by field, which takes a third of the time. If not, it may yet."""
    if not items:
        return True
    try:
        ids, step, name, created, nbytes, manifest, metrics, verified = ([item[f] for item in items] for f in _FIELDS)
        steps = [one for one in step if one is not None] or [0]
        for one in set(name):
            check_name(one)
        for one in set().union(*metrics):
            check_text(one)
        return (
            {*map(len, items)} == {len(_FIELDS)}
            and are_ids(ids)
            and {*map(type, steps), *map(type, nbytes)} <= {int}
            and {*map(type, created)} <= {float}
            and {*map(type, metrics)} <= {dict}
            and {*map(type, chain.from_iterable([some.values() for some in metrics]))} <= {float}
            and {*map(type, verified)} <= {bool, type(None)}
            and min(steps) >= 0
            and check_step(max(steps)) is not None
            and to_time(min(created)) <= to_time(max(created))
            and min(nbytes) >= 0
            and check_count(max(nbytes)) >= 0
            and {*map(len, manifest)} <= {64}
            and all(bytes.fromhex(some).hex() == some for some in _in_blocks(manifest))
        )
    except (KeyError, TypeError, ValueError, AttributeError, InvalidName):
        return False


_FIELDS = [f.name for f in fields(Entry)]


def _in_blocks(digests: list[str]) -> Iterator[str]:
    """Yield all digits, a thousand digests at a time: what is much longer is new memory each time it is made."""
    for at in range(0, len(digests), 1000):
        yield "".join(digests[at : at + 1000])


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
