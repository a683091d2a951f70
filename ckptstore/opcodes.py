"""Pickles by their opcodes alone, without a stack: where each ends, what a pickle names, and whether it is of the plainest kind.

Opcodes and their arguments: CPython's ``pickletools``. What a pickle means, and may allocate: `picklescan`.
"""

from __future__ import annotations

import pickletools
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

__all__ = ["COUNTED", "FIXED", "OPCODES", "SLACK", "global_names", "modern", "plain_ops"]

SLACK = 1 << 20
"""Bytes a pickle may always allocate."""
_LENGTH_BYTES = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4}
_LENGTH_BYTES |= {pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
OPCODES = {ord(op.code): op for op in pickletools.opcodes}
FIXED = [0] * 256
"""Bytes of an opcode with its argument, 0 where the argument says it."""
COUNTED = [0] * 256
"""Bytes of the count in front of the argument, 0 where there is none."""
for _code, _op in OPCODES.items():
    if _op.arg is None or _op.arg.n >= 0:
        FIXED[_code] = 1 + (_op.arg.n if _op.arg is not None else 0)
    else:
        COUNTED[_code] = _LENGTH_BYTES.get(_op.arg.n, 0)


def modern(module: str, name: str) -> str:
    """Return the dotted Python 3 name of what protocol 2 writes under its Python 2 name."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    else:
        module = IMPORT_MAPPING.get(module, module)
    return f"{module}.{name}"


def global_names(data: bytes) -> frozenset[str] | None:
    """Return the dotted names of all classes and functions in a pickle that this process just made.

    None if the pickle holds anything that torch's restricted unpickler may not read, whatever it names. Fast (about 0.1 µs per
    opcode), and only for trusted pickles: a broken one raises IndexError or ValueError.
    """
    names: set[str] = set()
    fixed, pos = _PLAIN, 0
    while True:
        op = data[pos]
        if size := fixed[op]:
            pos += size
        elif op == 0x58:  # BINUNICODE
            pos += 5 + int.from_bytes(data[pos + 1 : pos + 5], "little")
        elif op == 0x63:  # GLOBAL
            middle = data.index(b"\n", pos)
            end = data.index(b"\n", middle + 1)
            names.add(modern(data[pos + 1 : middle].decode(), data[middle + 1 : end].decode()))
            pos = end + 1
        elif op == 0x8A:  # LONG1
            pos += 2 + data[pos + 1]
        elif op == 0x2E:  # STOP
            return frozenset(names)
        else:
            return None


_PLAIN = [0] * 256
"""`FIXED` for the opcodes that ``torch/_weights_only_unpickler.py`` reads (as of 2.13); the others send the caller to torch."""
for _code in b"\x80\x81\x85\x86\x87\x88\x89\x8f()GJKMNQR]abehjqrstu}":
    _PLAIN[_code] = FIXED[_code]


def plain_ops(data: bytes, size: int) -> bool:
    """Say whether a pickle from anywhere takes memory in proportion to `size`, the bytes of its file, whatever it calls takes none.

    Only for pickles of the simplest opcodes, those that plain tensors and containers are made of; of others it says no. The C unpickler
    keeps its memo in an array, however few entries that has; BUILD copies what may be large, and may be asked for again and again.
    """
    fixed, number, pos, builds = _SIMPLE, _NUMBER.unpack_from, 0, 0
    try:
        while True:
            op = data[pos]
            if step := fixed[op]:
                pos += step
            elif op == 0x72:  # LONG_BINPUT
                if number(data, pos + 1)[0] > pos:
                    return False
                pos += 5
            elif op == 0x58:  # BINUNICODE
                pos += 5 + number(data, pos + 1)[0]
            elif op == 0x63:  # GLOBAL
                pos = data.index(b"\n", data.index(b"\n", pos) + 1) + 1
            elif op == 0x8A:  # LONG1
                pos += 2 + data[pos + 1]
            elif op == 0x62:  # BUILD
                builds += 1
                pos += 1
            else:  # 0x2E: STOP
                return op == 0x2E and builds * len(data) * _ITEM <= size + SLACK
    except (IndexError, ValueError, struct.error):
        return False


_NUMBER = struct.Struct("<L")
_ITEM = 64
"""Bytes of memory that a byte of a pickle may take at most, in a dict that is copied."""
_SIMPLE = [0] * 256
"""`FIXED` for the opcodes that `plain_ops` lets pass as they are."""
for _code in b"\x80\x85\x86\x87\x88\x89()GJKMNQR]aehjqstu}":
    _SIMPLE[_code] = FIXED[_code]
