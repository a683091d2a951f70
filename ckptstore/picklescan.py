"""Read a pickle without running it: what it names, which storages it wants, what it would allocate.

Nothing is imported and nothing is called. The opcodes are followed on a stack of inert values, with just enough meaning to
bound what a load may allocate beyond the objects the pickle spells out: those cost memory in proportion to its length, but a
few bytes may also ask for ``bytearray(10**12)``, or copy one long list a thousand times. Whether a name may be used at all is
left to torch's own restricted unpickler. Opcodes and their arguments: CPython's ``pickletools``; how tensors are pickled:
``torch/_utils.py`` and ``torch/serialization.py``.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UnsafeContent
from .opcodes import COUNTED, FIXED, OPCODES, SLACK, modern

__all__ = ["scan"]

_MAX_DIMS = 64  # more than any operation of torch takes, and sizes of a million dimensions would be slow to multiply
_LINES = {ord(op.code): 2 if op.name in ("GLOBAL", "INST") else 1 for op in pickletools.opcodes if op.arg and op.arg.n == -1}

_STORAGE_ITEM = {"Double": 8, "Float": 4, "Half": 2, "Long": 8, "Int": 4, "Short": 2, "BFloat16": 2, "ComplexDouble": 16}
_STORAGE_ITEM |= {"ComplexFloat": 8, "QInt32": 4}
_PACKED = {"torch.QUInt4x2Storage": 2, "torch.QUInt2x4Storage": 4}
"""Elements in a byte; each row begins with a byte of its own."""
_DTYPE_ITEM = {"torch.double": 8, "torch.float": 4, "torch.half": 2, "torch.long": 8, "torch.int": 4, "torch.short": 2}
_COPIES = {"builtins.set", "collections.OrderedDict", "collections.Counter"}
_ASKS = {*_COPIES, "torch.Size", "builtins.bytearray", "_codecs.encode"}
"""What asks its arguments for their items, or their value."""
_TENSORS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor"}
_CONSTRUCTORS = {"torch", "torch.storage", "torch.sparse", "torch.cuda", "torch.cuda.sparse"}
"""Modules of the tensor and storage classes that the restricted unpickler knows."""


@dataclass(slots=True)
class _Global:
    name: str


@dataclass(slots=True)
class _Sized:
    """Something that costs about `n` items or bytes to copy."""

    n: int = 0
    tensors: bool = False
    """Whether it is a list with something in it that may be a tensor."""


@dataclass(slots=True)
class _Storage:
    nbytes: int
    item: int
    packed: int = 1
    """Elements in an item."""


@dataclass(slots=True)
class _Tensor:
    """A tensor. It may be far longer than its storage, at no cost: until something asks for its items, each of which is an object then."""

    nbytes: int | None = None
    """None if that is not followed here."""
    dtype: str = ""


class _Made:
    """What a function returns that is not known here: it may be a tensor, too."""


def _storage_item(name: str) -> int:
    """Return the bytes per element of the storage class `name` (``FloatStorage``); untyped ones count bytes."""
    return _STORAGE_ITEM.get(name.rpartition(".")[2].removesuffix("Storage"), 1)


def _dtype_item(name: str) -> int:
    # torch's canonical dtype names carry their bits; those without are listed, and anything else is one byte wide.
    bits = re.search(r"[a-z](\d+)", name)
    return _DTYPE_ITEM.get(name, max(1, int(bits[1]) // 8) if bits else 1)


def scan(data: bytes, records: Mapping[str, int], budget: int) -> None:
    """Follow the pickle `data` and refuse what would allocate more than a file of its size has a right to.

    Args:
        records: bytes of each storage in the archive, by key.
        budget: bytes that all storages together, and whatever else the pickle asks for by number, may take.

    Raises:
        UnsafeContent: says what the pickle asks for; nothing of it was run.
    """
    _Machine(data, records, budget).run()


class _Machine:
    """The abstract unpickler. Values are int, str, tuple, the small classes above, or None for anything else."""

    def __init__(self, data: bytes, records: Mapping[str, int], budget: int) -> None:
        self.data = data
        self.records = records
        self.budget = self.bytes_left = budget + SLACK
        self.items_left = len(data)  # each item of a legitimate copy was pushed once, by an opcode of its own
        self.copied_left = len(data) + SLACK  # each byte of a legitimate bytearray was spelled out once
        self.seen: set[str] = set()
        self.stack: list[object] = []
        self.marked: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def run(self) -> None:
        try:
            self._run()
        except (IndexError, KeyError) as exc:  # an empty stack, a memo entry that was never put, the end of the data
            raise UnsafeContent("its pickle is malformed") from exc

    def _run(self) -> None:
        data, total, memo, pos = self.data, len(self.data), self.memo, 0
        while True:
            op = data[pos]
            arg = end = pos + 1
            if op == 0x71:  # BINPUT; this and the next three are most of a pickle, and more than twice as fast here
                memo[data[arg]] = self.stack[-1]
                end = pos + 2
            elif op == 0x68:  # BINGET
                self.stack.append(memo[data[arg]])
                end = pos + 2
            elif op == 0x4B:  # BININT1
                self.stack.append(data[arg])
                end = pos + 2
            elif op == 0x28:  # MARK
                self.marked.append(self.stack)
                self.stack = []
            elif op == 0x2E:  # STOP
                return
            else:
                if size := FIXED[op]:
                    end = pos + size
                elif count := COUNTED[op]:
                    arg += count
                    end = arg + int.from_bytes(data[pos + 1 : arg], "little")
                elif op in _LINES:
                    for _ in range(_LINES[op]):
                        end = data.find(b"\n", end) + 1 or total + 1
                else:
                    raise UnsafeContent(f"its pickle has an unknown opcode 0x{op:02x} at byte {pos}")
                if end > total:
                    raise UnsafeContent(f"its pickle declares {end - total} bytes more than it has, at byte {pos}")
                self._step(op, arg, end)
            pos = end

    def _step(self, op: int, arg: int, end: int) -> None:
        stack, data = self.stack, self.data
        if op in _PUTS:
            index = len(self.memo) if op == 0x94 else self._number(op, arg, end)
            if index >= len(data):  # the C unpickler keeps its memo in an array of that length
                raise UnsafeContent(f"its pickle uses memo entry {index}, more than it can have")
            self.memo[index] = stack[-1]
        elif op in _GETS:
            stack.append(self.memo[self._number(op, arg, end)])
        elif op in _INTS:
            stack.append(int.from_bytes(data[arg:end], "little", signed=op in (0x4A, 0x8A)))
        elif op in _TEXTS:
            stack.append(str(data[arg:end], "utf-8", "replace") if end - arg <= 256 else _Sized(end - arg))
        elif op in _TUPLES:
            n = _TUPLES[op]
            items = tuple(self._pop_mark() if n < 0 else [stack.pop() for _ in range(n)][::-1])
            self.stack.append(items)
        elif op == 0x63:  # GLOBAL
            module, name = data[arg : end - 1].decode("utf-8", "replace").split("\n")
            stack.append(_Global(modern(module, name)))
        elif op == 0x93:  # STACK_GLOBAL
            parts = [stack.pop(), stack.pop()][::-1]
            stack.append(_Global(".".join(map(str, parts))) if all(isinstance(p, str) for p in parts) else None)
        elif op in (0x52, 0x81):  # REDUCE, NEWOBJ
            args, func = stack.pop(), stack.pop()
            stack.append(self._call(func, args))
        elif op == 0x62:  # BUILD
            self._build(stack.pop())
        elif op == 0x51:  # BINPERSID
            stack.append(self._storage(stack.pop()))
        elif op in _EMPTIES:
            stack.append(_Sized())
        elif op in _ADDS:
            added = [stack.pop()] if op in b"as" else self._pop_mark()  # APPEND, SETITEM
            if op == 0x73:  # SETITEM
                stack.pop()
            if isinstance(target := self.stack[-1], _Sized):
                target.n += len(added)
                target.tensors = target.tensors or (op in b"ae" and any(isinstance(i, (_Tensor, _Made)) for i in added))
        else:
            self._generic(op)

    def _generic(self, op: int) -> None:
        """Do to the stack what ``pickletools`` says, with values that mean nothing."""
        info = OPCODES[op]
        if op == 0x30 and not self.stack:  # POP of a mark
            self._pop_mark()
            return
        if op == 0x32:  # DUP
            self.stack.append(self.stack[-1])
            return
        before = info.stack_before
        if pickletools.markobject in before:
            self._pop_mark()
            before = before[: before.index(pickletools.markobject)]
        for _ in before:
            self.stack.pop()
        self.stack.extend([None] * len(info.stack_after))

    def _number(self, op: int, arg: int, end: int) -> int:
        if op in (0x67, 0x70):  # GET, PUT: a decimal line
            text = self.data[arg : end - 1]
            return int(text) if text.isdigit() and len(text) < 20 else len(self.data)
        return int.from_bytes(self.data[arg:end], "little")

    def _pop_mark(self) -> list[object]:
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def _take_bytes(self, n: int, what: str) -> None:
        self.bytes_left -= n
        if self.bytes_left < 0:
            raise UnsafeContent(f"{what} would take memory out of proportion to the file")

    def _take_items(self, *values: object) -> None:
        self.items_left -= sum(map(_length, values))
        if self.items_left < 0:
            raise UnsafeContent("its pickle copies the same containers over and over")

    def _storage(self, pid: object) -> object:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Global)):
            return None
        kind, key, numel = pid[1].name, pid[2], pid[4]
        if not isinstance(key, str) or not isinstance(numel, int) or key not in self.records:
            raise UnsafeContent(f"its pickle wants a storage that is not in the file: {key if isinstance(key, str) else '?'!r}")
        item = _storage_item(kind)
        if not 0 <= numel * item <= self.records[key]:
            raise UnsafeContent(f"storage {key} declares {numel} elements of {item} bytes, but has {self.records[key]} bytes")
        if key not in self.seen:
            self.seen.add(key)
            self._take_bytes(self.records[key], f"storage {key}")
        return _Storage(self.records[key], item, _PACKED.get(kind, 1))

    def _call(self, func: object, args: object) -> object:
        """Account for ``func(*args)``; returns what is known of the result."""
        if not isinstance(args, tuple):  # torch would ask for its items
            raise UnsafeContent("its pickle calls something, and not with a tuple of arguments")
        if not isinstance(func, _Global):
            return _Made()
        module, _, name = func.name.rpartition(".")
        builds = module in _CONSTRUCTORS and name.endswith(("Tensor", "Storage"))
        if builds or func.name in _ASKS:
            _refuse_items(func.name, *args, whole=func.name != "builtins.set")  # which asks for no items of its own ones
        if func.name == "torch.Size" and args and isinstance(args[0], tuple):
            self._take_items(args[0])
            return args[0]
        if func.name in _COPIES:
            self._take_items(*args)
            return _Sized(max(map(_length, args), default=0))
        if func.name in ("builtins.bytearray", "_codecs.encode"):
            first = args[0] if args else 0
            n = max(first, 0) if isinstance(first, int) else _length(first)
            if module == "builtins" and isinstance(first, _Sized):  # of bytes, which have been accounted for
                self.copied_left -= n
                if self.copied_left < 0:
                    raise UnsafeContent("its pickle copies the same bytes over and over")
                return _Sized(n)
            # bytes are pickled as text that is encoded again as latin1, one byte a character
            self._take_bytes(n if module == "builtins" or args[1:2] == ("latin1",) else n * 4, func.name)
            return _Sized(n)
        if module == "torch._utils":
            return self._rebuild(name, args)
        if func.name == "torch._tensor._rebuild_from_type_v2" and len(args) == 4:
            self._take_items(args[3])
            return self._call(args[0], args[2])
        if module.split(".")[0] == "torch" and name.endswith(("Tensor", "Storage")):
            # Constructors that torch.save never writes, but torch lets a file call with a size.
            sizes = [a for arg in args for a in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(a, int)]
            self._take_bytes((_product(sizes) if sizes else 0) * 16 + sum(map(_length, args)) * 16, func.name)
            if builds:
                return _Tensor() if name.endswith("Tensor") else _Storage(0, 1)
        if func.name == "torch.nn.parameter.Parameter":
            return args[0] if args and isinstance(args[0], _Tensor) else _Tensor()
        return _Made()

    def _rebuild(self, name: str, args: tuple[object, ...]) -> object:
        if name in _TENSORS:
            dtype = args[6] if name == "_rebuild_tensor_v3" and len(args) > 6 else None
            return self._tensor(args[:4], dtype.name if isinstance(dtype, _Global) else "", name == "_rebuild_qtensor")
        if name == "_rebuild_parameter_with_state":
            self._take_items(*args[3:])
        if name.startswith("_rebuild_parameter") and args and isinstance(args[0], _Tensor):
            return args[0]
        if name == "_rebuild_sparse_tensor" and len(args) > 1 and isinstance(args[1], (_Tensor, _Made)):
            raise UnsafeContent("a sparse tensor is not made of a tuple")
        if name == "_rebuild_device_tensor_from_cpu_tensor" and len(args) > 1 and isinstance(data := args[0], (_Tensor, _Made)):
            dtype = args[1].name if isinstance(args[1], _Global) else ""
            if isinstance(data, _Made) or data.nbytes is None:
                raise UnsafeContent("a tensor of unknown size is converted to another dtype")
            if dtype != data.dtype:
                self._take_bytes(data.nbytes * 16, "a tensor converted to another dtype")
        return _Tensor()

    def _tensor(self, args: tuple[object, ...], dtype: str, whole: bool) -> object:
        """Check a view (storage, offset, sizes, strides) against its storage; `whole`: torch first allocates all of it."""
        storage, offset, size, stride = args if len(args) == 4 else (None,) * 4
        if not (isinstance(storage, _Storage) and isinstance(size, tuple) and isinstance(stride, tuple)):
            raise UnsafeContent("a tensor is not made of a storage, an offset, sizes and strides")
        dims = (offset, *size, *stride)
        if len(size) != len(stride) or len(size) > _MAX_DIMS or not all(isinstance(d, int) and 0 <= d < 1 << 63 for d in dims):
            raise UnsafeContent("a tensor has sizes and strides that no tensor can have")
        item = _dtype_item(dtype) if dtype else storage.item
        last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        numel = _product(list(size))
        reach, taken = offset + last + 1, numel
        if storage.packed > 1 and numel and not dtype:
            row = size[-1] if size else 1
            taken = numel // row * -(-row // storage.packed)
            reach = max(-(-reach // storage.packed), taken)
        if numel and reach * item > storage.nbytes:
            raise UnsafeContent(f"a tensor of shape {list(size)} reaches beyond its storage of {storage.nbytes} bytes")
        if whole and taken * item > self.budget:
            raise UnsafeContent(f"a quantized tensor of shape {list(size)} is larger than the whole file")
        return _Tensor(numel * item, dtype)

    def _build(self, state: object) -> None:
        if isinstance(self.stack[-1], (_Tensor, _Storage, _Sized)):  # the others are classes that somebody trusts
            _refuse_items("what is built", state)
        if isinstance(state, tuple) and state and isinstance(state[0], _Storage):
            self._tensor(state[:4], "", False)
        elif isinstance(state, _Sized):
            self._take_items(state)


def _refuse_items(who: str, *values: object, whole: bool = True) -> None:
    """Refuse values whose items `who` would get, if a tensor is among them; if `whole`, those of their items, too."""
    for value in values:
        among = whole and isinstance(value, _Sized) and value.tensors
        items = value if whole and isinstance(value, tuple) else ()
        if among or any(isinstance(v, (_Tensor, _Made)) for v in (value, *items)):
            raise UnsafeContent(f"{who} would be given a tensor to take apart")


def _length(value: object) -> int:
    return value.n if isinstance(value, _Sized) else len(value) if isinstance(value, (tuple, str)) else 0


def _product(sizes: list[int]) -> int:
    return math.prod(min(max(n, 0), 1 << 63) for n in sizes[:_MAX_DIMS])


_PUTS = frozenset(b"pr\x94")
_GETS = frozenset(b"gj")
_INTS = frozenset(b"JM\x8a")
_TEXTS = frozenset(b"XU\x8c")
_TUPLES = {0x29: 0, 0x74: -1, 0x85: 1, 0x86: 2, 0x87: 3}
_EMPTIES = frozenset(b"]}\x8f")
_ADDS = frozenset(b"aesu\x90")
