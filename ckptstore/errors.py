"""Every error ckptstore raises on purpose.

Each one says what to do, and also subclasses the builtin that code which never heard of ckptstore would catch::

    CkptStoreError (Exception)
    ├── UsageError (ValueError)               the call itself is wrong; nothing was touched
    │   ├── InvalidName
    │   └── InvalidURL
    │       ├── UnknownScheme
    │       └── InvalidOption                 unknown (names the nearest match) or with a bad value
    ├── NotFound (FileNotFoundError)
    │   ├── StoreNotFound
    │   └── CheckpointNotFound
    ├── AlreadyExists (FileExistsError)       create-if-absent lost: somebody else's object is there
    ├── BackendError (OSError)                storage answered with an error; the step did NOT take effect
    │   ├── PermissionDenied (PermissionError)
    │   ├── StorageFull                       no space, no quota, file too large for the file system
    │   ├── NoAtomicCreate                    the storage cannot tell two writers apart; see single_writer=1
    │   ├── Unreadable                        the storage has lost these bytes; asking again will not help
    │   ├── Transient                         it could not answer now; asking again may help
    │   │   └── Throttled                     it asks for fewer requests
    │   └── Ambiguous                         the step may or may not have taken effect
    ├── Damaged (ValueError)                  bytes differ from what was committed
    │   ├── DamagedRecord
    │   ├── DamagedManifest
    │   │   └── Forged                        (a DamagedRecord, too) whole, but its HMAC is not that of our key
    │   └── DamagedFile                       carries the file and the bad byte ranges
    ├── KeyMismatch                           the store asks for another hmac_key, or for one, or for none
    ├── NewerFormat                           written by a newer ckptstore
    ├── UnsafeContent (ValueError)            refused before a parser could be harmed
    ├── NotSerializable (TypeError)           torch.save cannot write the object
    ├── ChangedWhileSaving                    a tensor was changed before save_async, told that it would not be, had copied it
    ├── RankFailed                            another rank of this job failed, or found something else
    ├── WrongVersion (ImportError)            a library is missing, or not of a version that its integration knows
    ├── WrongKind (TypeError)                 written by another integration than the one that loads it; says what to use
    ├── StateMismatch (ValueError)            the state does not fit the objects it is restored into
    ├── Fenced                                a newer job owns the store; this one must stop
    └── CommitUnknown                         the outcome could not be learnt; carries its op_id
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AlreadyExists",
    "Ambiguous",
    "BackendError",
    "ChangedWhileSaving",
    "CheckpointNotFound",
    "CkptStoreError",
    "CommitUnknown",
    "Damaged",
    "DamagedFile",
    "DamagedManifest",
    "DamagedRecord",
    "FallbackWarning",
    "Fenced",
    "Forged",
    "InvalidName",
    "InvalidOption",
    "InvalidURL",
    "KeyMismatch",
    "NewerFormat",
    "NoAtomicCreate",
    "NotFound",
    "NotSerializable",
    "PermissionDenied",
    "RankFailed",
    "StateMismatch",
    "StorageFull",
    "StoreNotFound",
    "StoreWarning",
    "Throttled",
    "Transient",
    "UnknownScheme",
    "Unreadable",
    "UnsafeContent",
    "UsageError",
    "WeightsOnlyWarning",
    "WrongKind",
    "WrongVersion",
]


class CkptStoreError(Exception):
    """Base of every error ckptstore raises on purpose."""


class UsageError(CkptStoreError, ValueError):
    """The call itself is wrong; nothing was touched."""


class InvalidName(UsageError):
    """A checkpoint or file name outside the allowed set."""


class InvalidURL(UsageError):
    """A store URL that cannot be understood."""


class UnknownScheme(InvalidURL):
    """No backend is registered for the URL's scheme."""


class InvalidOption(InvalidURL):
    """An option that does not exist, or one with a value it cannot have."""


class NotFound(CkptStoreError, FileNotFoundError):
    """What was asked for is not there (proven, not assumed after an error)."""


class StoreNotFound(NotFound):
    """There is no store at this place."""


class CheckpointNotFound(NotFound):
    """The store has no such name, id or step."""


class AlreadyExists(CkptStoreError, FileExistsError):
    """Create-if-absent found the key taken."""


class BackendError(CkptStoreError, OSError):
    """The storage answered with an error, and the step did not take effect.

    A backend that cannot prove the second half raises `Ambiguous` instead.
    """


class PermissionDenied(BackendError, PermissionError):
    """No right to read or write here, or the file system is read-only."""


class StorageFull(BackendError):
    """No space, inodes or quota left, or the file is larger than the file system allows."""


class NoAtomicCreate(BackendError):
    """The storage has no working create-if-absent, so two jobs could both believe they committed."""


class Unreadable(BackendError):
    """The storage cannot give these bytes any more, and asking again will not help: a media error, or a link or folder in their place."""


class Transient(BackendError):
    """The storage could not answer now (a timeout, a lost connection, an overloaded server): asking again may help.

    Only of steps that can be repeated without harm, so it does not matter whether this one took effect.
    """


class Throttled(Transient):
    """The storage asks for fewer requests."""


class Ambiguous(BackendError):
    """The step may have taken effect: the answer was lost, or came before durability was confirmed.

    `durable` is False when the object is known to be visible but the storage refused to confirm that it is on disk.
    """

    def __init__(self, *args: object, durable: bool = True) -> None:
        super().__init__(*args)
        self.durable = durable


class Damaged(CkptStoreError, ValueError):
    """Stored bytes differ from what was committed."""


class DamagedRecord(Damaged):
    """A commit record fails its own checksum."""


class DamagedManifest(Damaged):
    """A manifest is missing, or differs from the SHA-256 its record holds."""


class DamagedFile(Damaged):
    """A data file is missing, has another size, or fails its checksums.

    `path` is the file's path inside the checkpoint; `ranges` the bad byte ranges as (start, stop) pairs.
    """

    def __init__(self, message: str = "", path: str = "", ranges: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__(message, path, tuple(ranges))
        self.message = message
        self.path = path
        self.ranges = tuple(ranges)

    def __str__(self) -> str:
        return self.message


class Forged(DamagedRecord, DamagedManifest):
    """A record or manifest that is whole, but was not written with our `hmac_key`, or not for this store."""


class KeyMismatch(CkptStoreError):
    """The store was written with another `hmac_key`, or with one while none is given here, or without. Nothing was changed."""


class NewerFormat(CkptStoreError):
    """Written by a newer ckptstore; upgrade to read it. Nothing was changed."""


class UnsafeContent(CkptStoreError, ValueError):
    """The file asks for something a checkpoint has no business asking for; it was not parsed."""


class NotSerializable(CkptStoreError, TypeError):
    """`torch.save` cannot write this object; nothing was published."""


class ChangedWhileSaving(CkptStoreError):
    """Something else than a step changed a parameter or an optimizer's state before it was copied. Nothing was published."""


class RankFailed(CkptStoreError):
    """Another rank of this job failed, or found something else than this one, so that this one gave up, too. Says what it met."""


class WrongVersion(CkptStoreError, ImportError):
    """A library is not installed, or not of a version that the integration with it knows. Says which to use."""


class WrongKind(CkptStoreError, TypeError):
    """The checkpoint was written by another integration than the one that is to load it. Says which, and what loads it."""


class StateMismatch(CkptStoreError, ValueError):
    """The saved state does not fit the objects it should be restored into."""


class Fenced(CkptStoreError):
    """A newer job has acquired the store: nothing this job does takes effect any more, and it should stop."""


class CommitUnknown(CkptStoreError):
    """It could not be learnt whether the commit took effect. Its data is kept either way.

    `op_id` identifies the operation, also in another process: ``store.resolve(op_id)`` answers once the storage can be read again.
    `durable` is False if it is visible, but the storage refused to confirm that it is on disk: save once more, on a better disk.
    """

    def __init__(self, message: str = "", op: str = "", slot: int = 0, durable: bool = True) -> None:
        super().__init__(message, op, slot, durable)
        self.message = message
        self.op_id = f"{slot}-{op}{'' if durable else '-unconfirmed'}"
        self.durable = durable

    def __str__(self) -> str:
        return self.message


class StoreWarning(UserWarning):
    """Something is wrong with the store, and it was worked around."""


class FallbackWarning(StoreWarning):
    """A damaged checkpoint or record was passed over for an older one."""


class WeightsOnlyWarning(StoreWarning):
    """What was just saved cannot be loaded with ``weights_only=True``."""
