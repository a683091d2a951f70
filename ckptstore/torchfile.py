"""A ``.pt`` file written: `torch.save` into any sink. The way back is `torchload`.

What torch refuses becomes an error that says what to do; what the sink raises surfaces as itself.
"""

from __future__ import annotations

import collections
import contextvars
import ctypes
import io
import pickle
import re
import sys
import threading
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import IO, Any, Protocol, cast

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from .checksum import crc32
from .errors import BackendError, NotSerializable
from .opcodes import global_names
from .plaintensor import reduction
from .unpicklable import check_storage, check_tensor, refusal
from .zipsums import ZipSums

__all__ = ["Sink", "save"]

_GATHERED, _COPIED = 1 << 14, 1 << 23
"""Bytes."""
_SMALL, _FEW = 1 << 16, 1000
"""Bytes, and values: what has no more of either is written to memory first."""
_TINY = frozenset({bool, float, torch.Size, torch.device, torch.dtype, type(None)})
_safe_by_default: set[str] = set()
"""Names that torch is known to load without being asked; learnt from torch as they are met."""


class Sink(Protocol):
    """What `save` writes to: `write` takes all of what it is given, which is valid only until it returns, or raises.

    A sink may have `write_summed` as well (see `FileSink`), and then gets large tensors by it.
    """

    def write(self, data: memoryview, /) -> int: ...


class _SummingSink(Sink, Protocol):
    def write_summed(self, data: memoryview, before: int, owner: object) -> int: ...


def save(obj: Any, sink: Sink, locations: Mapping[int, str] | None = None) -> tuple[str, ...]:
    """Write `obj` to `sink` with `torch.save`, as a plain ``.pt`` file.

    torch hands over the bytes of each CPU storage in one piece and without a copy (a 5 GiB tensor is one `write`), everything
    else in pieces of less than 100 bytes or so, and the pickle in one.

    Args:
        locations: for storages that are copies from elsewhere, by their `_cdata`: where ("cuda:0") torch.load is to put them.

    Returns:
        The qualified names of what ``torch.load(weights_only=True)`` would refuse, sorted; empty if it loads as it is. What was
        registered with `torch.serialization.add_safe_globals` in this process counts as loadable.

    Raises:
        NotSerializable: torch cannot write it, or could not read it back; says which part of `obj`.
        BackendError: the sink took fewer bytes than it was given.
        Exception: whatever the sink, or a ``__reduce__`` or ``__getstate__`` inside `obj`, raised.
    """
    if not _sums_may_be_ours():
        return _save(obj, sink, None, locations or {})
    if _is_small(obj):
        return _save(obj, sink, None, locations or {}, in_memory=True)
    return _save(obj, sink, ZipSums(), locations or {})


def _save(
    obj: Any, sink: Sink, sums: ZipSums | None, locations: Mapping[int, str], *, in_memory: bool = False
) -> tuple[str, ...]:
    storages: dict[str, Any] = {}
    guard = _Guard(sink, sums, storages)
    whole = io.BytesIO() if in_memory else None
    recorder = _Recorder(guard, storages, get_crc32_options(), locations)
    handled = sys.exc_info()[1]
    failure: BaseException | None = None
    unsafe: tuple[str, ...] = ()
    outer = getattr(_saving, "recorder", None)  # of a save whose __reduce__ or the like has called us
    _saving.recorder = recorder
    try:
        if sums or whole:
            set_crc32_options(sums is None)  # until torch has looked, before it begins to pickle
        torch.save(obj, cast(IO[bytes], whole or guard), pickle_module=_PICKLE_MODULE)
        if whole:
            guard.write(whole.getbuffer())
        guard.pass_on()
        unsafe = recorder.refused()  # which takes a while: now the sink's threads are still writing
    except BaseException as exc:
        # torch may hide the sink's error behind one of its own ("unexpected pos 64 vs 0"), even a Ctrl-C.
        failure = guard.error or _interrupt_behind(exc, handled) or exc
    recorder.reset_crcs()
    _saving.recorder = outer
    unpicklable = failure is recorder.error
    # Cycles of garbage (a class per save, an error that knows its own frame) must not keep tensors until the next collection;
    # so nothing is raised inside the except clause above either, which would chain torch's error to the one it holds.
    guard.close()
    recorder.error = None
    try:
        if failure is None:
            return unsafe
        if unpicklable and (problem := refusal(failure, obj)):
            raise NotSerializable(problem) from failure
        raise failure
    finally:
        del failure


@cache
def _sums_may_be_ours() -> bool:
    """Try out, in memory, whether the archive is the same to the last byte when torch leaves out the CRC-32s and we fill them in.

    And whether leaving them out is this thread's own affair, as since torch 2.12: another thread may be saving without us.
    """
    if torch.__version__ < "2.12":
        return False
    before = get_crc32_options()
    elsewhere = contextvars.copy_context()
    elsewhere.run(set_crc32_options, not before)
    if get_crc32_options() != before:
        set_crc32_options(before)
        return False
    sample = {"some": torch.ones(3, device="cpu"), "none": torch.ones(0, device="cpu")}
    theirs, ours = io.BytesIO(), io.BytesIO()
    elsewhere.run(set_crc32_options, True)
    elsewhere.run(torch.save, sample, theirs)
    try:
        _save(sample, ours, ZipSums(), {})
    except BackendError:
        return False
    return ours.getvalue() == theirs.getvalue()


def _is_small(obj: Any) -> bool:
    """Say whether `obj` is sure to take little memory, without looking long: then torch may write it there, in C, piece by tiny piece."""
    left, found = _SMALL, [obj]
    for value in found:  # which grows
        kind = type(value)
        if kind is dict or kind is collections.OrderedDict or kind is list or kind is tuple:
            if len(found) + 2 * len(value) > _FEW:
                return False
            found.extend(value)
            if kind is dict or kind is collections.OrderedDict:
                found.extend(value.values())
        elif kind is torch.Tensor or kind is torch.nn.Parameter:
            if value.layout is not torch.strided:
                return False
            try:
                left -= value.untyped_storage().nbytes()
            except RuntimeError:  # it has none, and torch will say so
                return False
            if left < 0:
                return False
        elif kind is str or kind is bytes:
            left -= len(value)
        elif kind is int:
            left -= value.bit_length() >> 3
        elif kind not in _TINY:
            return False
    return left >= 0


def _interrupt_behind(exc: BaseException | None, handled: BaseException | None) -> BaseException | None:
    """Return the KeyboardInterrupt or the like that `exc` was raised on top of, but not one the caller is handling already."""
    while isinstance(exc, Exception) and exc is not handled:
        exc = exc.__context__
    return exc if exc is not handled else None


class _Guard:
    """Stands between torch and the sink: after an error nothing more is passed on.

    torch (2.13) ignores how many bytes were taken, and after an error still writes the end of the archive. It writes some forty pieces of
    a few bytes for each small file: they are gathered, for the way down costs more than they do.
    """

    def __init__(self, sink: Sink, sums: ZipSums | None, storages: dict[str, Any]) -> None:
        self._sink: Sink | None = sink
        self._sums = sums
        self._storages = storages
        self._gathered = bytearray()
        self.error: BaseException | None = None
        self.shut = False

    def write(self, data: memoryview) -> int:
        sums = self._sums
        if self.shut or sums is None:
            self._gather(data)
        elif sums.record is None:
            self._gather(sums.frame(data))
        else:
            piece, content = sums.content(data)
            if not content:
                self._gather(piece)
            elif len(data) <= _GATHERED or not hasattr(self._sink, "write_summed"):
                if len(data) <= _GATHERED:
                    piece = bytes(piece)  # which no other process can write to
                self._gather(piece)
                sums.add(len(data), crc32(piece, sums.crc))
            else:
                self.pass_on()
                sums.add(len(data), self._write_summed(data, sums))
        return len(data)

    def _write_summed(self, data: memoryview, sums: ZipSums) -> int:
        """Write the bytes of a storage; if it is the CPU's, by ourselves, knowing that its memory stays, so that nobody has to wait."""
        assert sums.record is not None
        storage = self._storages.get(sums.record.rpartition("/data/")[2])
        if storage is not None and storage.device.type == "cpu" and storage.nbytes() == len(data):
            data = _memory(storage.data_ptr(), len(data), _READ)
        else:
            storage = None
        sink, crc = cast(_SummingSink, self._sink), sums.crc
        with self._shut_on_error():
            if storage is None or not storage.is_shared():
                return sink.write_summed(data, crc, storage)
            # Other processes may write to it at any moment, as in Hogwild training: what is hashed has to be what is written.
            for start in range(0, len(data), _COPIED):
                copy = bytes(data[start : start + _COPIED])
                crc = sink.write_summed(memoryview(copy), crc, copy)
            return crc

    def _gather(self, data: bytes | memoryview) -> None:
        if len(self._gathered) + len(data) <= _GATHERED:
            self._gathered += data
        else:
            self.pass_on()
            self._write(memoryview(data))

    def pass_on(self) -> None:
        """Write what was gathered."""
        if self._gathered:
            gathered, self._gathered = self._gathered, bytearray()
            self._write(memoryview(gathered))

    def _write(self, data: memoryview) -> None:
        if self.shut or self._sink is None:
            return
        with self._shut_on_error():
            taken = self._sink.write(data)
            if taken != len(data):
                raise BackendError(f"only {taken} of {len(data)} bytes were taken")

    @contextmanager
    def _shut_on_error(self) -> Iterator[None]:
        self.shut = True  # first, so that an error that comes at any moment leaves it so
        try:
            yield
        except BaseException as exc:
            self.error = exc
            raise
        self.shut = False

    def close(self) -> None:
        self._sink = self.error = None
        self._storages.clear()

    def flush(self) -> None:
        """torch asks for one at the end; durability is the sink's business."""


_READ = 0x100  # PyBUF_READ
_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.restype = ctypes.py_object
_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)


class _Recorder:
    """Looks at the pickle before torch writes it; what it saw is here afterwards."""

    def __init__(self, guard: _Guard, storages: dict[str, Any], crcs: bool, locations: Mapping[int, str]) -> None:
        self.guard = guard
        self.storages = storages
        self._crcs = crcs
        self.locations = locations
        self.error: BaseException | None = None
        self.pickle = b""

    def refused(self) -> tuple[str, ...]:
        """Return what torch's restricted unpickler would refuse."""
        try:
            return _refused(self.pickle, self.storages)
        except BaseException as exc:
            self.error = exc
            raise

    def reset_crcs(self) -> None:
        """Let torch compute CRC-32s again, or not, as before this save."""
        if get_crc32_options() != self._crcs:
            set_crc32_options(self._crcs)


_saving = threading.local()  # .recorder: of the save that this thread is in


class _Pickler(pickle.Pickler):
    """What torch derives its own pickler from. One class for all saves: making one takes as long as writing a small file."""

    def __init__(self, file: io.BytesIO, **options: Any) -> None:
        self._file = file
        self._recorder: _Recorder = _saving.recorder
        self._recorder.reset_crcs()  # torch has looked; what the objects that are pickled now may save is not ours
        super().__init__(file, **options)

    def __init_subclass__(cls) -> None:
        # torch's subclass decides what is a storage, and does not ask its base class.
        cls.persistent_id = _watched(cls.persistent_id)  # type: ignore[method-assign]

    _hooks: object = None

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.Tensor:
            found = reduction(obj)
            if found is NotImplemented:
                check_tensor(obj)
            else:
                self._hooks = found[1][-1]
            return found
        # The empty dictionary that came with the tensor: asked itself, it says the same, and takes longer than all else of a tensor.
        return _EMPTY if obj is self._hooks else NotImplemented

    def dump(self, obj: Any) -> None:
        try:
            super().dump(obj)
            self._recorder.pickle = self._file.getvalue()
        except BaseException as exc:
            self._recorder.error = exc
            self._recorder.guard.shut = True
            raise


_NO_STORAGES = frozenset(
    {bool, bytes, collections.OrderedDict, dict, float, int, list, str, tuple, torch.Size, type(None)}
    | {type, types.FunctionType, types.BuiltinFunctionType, torch.Tensor, torch.nn.Parameter, torch.dtype}
    | {type(torch.FloatStorage)}
)
"""Most of what a pickle is made of, and is asked about one by one."""
_EMPTY = (collections.OrderedDict, ())
_PICKLE_MODULE = types.SimpleNamespace(__name__="pickle", Pickler=_Pickler)


def _watched(persistent_id: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Note the keys of the storages that are written, and refuse those that could not be read back."""

    no_storages = _NO_STORAGES

    def watch(self: Any, obj: Any) -> Any:
        if type(obj) in no_storages:
            return None
        pid = persistent_id(self, obj)
        if pid is not None:
            self._recorder.storages[pid[2]] = untyped = check_storage(obj)
            location = self._recorder.locations.get(untyped._cdata)
            if location is not None:
                pid = (*pid[:3], location, *pid[4:])
        return pid

    return watch


def _refused(data: bytes, storages: Iterable[str]) -> tuple[str, ...]:
    """Return what torch's restricted unpickler would refuse in a pickle that was just made."""
    names = global_names(data)
    if names is not None and names <= _safe_by_default:
        return ()
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(_archive_of(data))
    except pickle.UnpicklingError:  # something without a name, such as an int of more than 255 bytes
        return _refused_in_trial(data, storages)
    if unsafe:
        return tuple(sorted(unsafe))
    names = names or frozenset()
    entries = torch.serialization.get_safe_globals()
    registered = {e[1] if isinstance(e, tuple) else f"{e.__module__}.{e.__qualname__}" for e in entries}
    _safe_by_default.update(names - registered)
    # A registered class may still be used in a way that torch refuses (a subclass of dict, given items), so try.
    if any(not name.startswith("torch.") for name in names & registered):
        return _refused_in_trial(data, storages)
    return ()


def _refused_in_trial(data: bytes, storages: Iterable[str]) -> tuple[str, ...]:
    """Load the pickle with its storages on the meta device, where they have sizes but no bytes; return the first refusal."""
    try:
        torch.load(_archive_of(data, storages), map_location="meta", weights_only=True)
    except pickle.UnpicklingError as exc:
        found = re.search(r"GLOBAL (\S+) |<class '([^']+)'>|Unsupported operand (\d+)", str(exc))
        if found is None:
            return ("something torch does not name",)
        return (found[1] or found[2] or _WITHOUT_NAME.get(found[3], f"something pickled with opcode {found[3]}"),)
    except Exception:
        return ()  # not a refusal: a constructor that needs the numbers
    return ()


_WITHOUT_NAME = {str(pickle.LONG4[0]): "an int of more than 2040 bits"}


def _archive_of(data: bytes, storages: Iterable[str] = ()) -> io.BytesIO:
    """Return an archive of the pickle `data` whose storages are empty."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("trial/data.pkl", data)
        out.writestr("trial/version", b"3\n")
        for key in storages:
            out.writestr(f"trial/data/{key}", b"")
    file.seek(0)
    return file
