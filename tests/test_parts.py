"""How files are cut into parts: none too small for the service, none copied without need, few enough for 5 TiB."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.checksum import crc64nvme
from ckptstore.manifest import CHUNK_LIMIT, FileEntry
from ckptstore.protocol import Capabilities
from ckptstore.transfer import FileSink
from ckptstore.workers import Job, Workers

MIB = 1 << 20
SERVICE = Capabilities(atomic_create=True, durable=True, part_size=64, parallel=4, min_part=40, max_parts=10_000)


class Unused(Workers):
    """Does nothing with what it gets."""

    def begin(self, jobs: list[Job[Any]], call: Any, *args: Any) -> Job[Any]:
        job = Job(lambda: (0, ""))
        job.run()
        return job


class Parts:
    """A `PartWriter` that keeps what it gets."""

    def __init__(self) -> None:
        self.parts: dict[int, tuple[int, bytes]] = {}

    def write(self, offset: int, data: memoryview, number: int) -> None:
        assert number not in self.parts
        self.parts[number] = (offset, bytes(data))

    def finish(self) -> str | None:
        return None

    def abort(self) -> None: ...


def sent(writes: list[bytes], storage: Capabilities) -> tuple[list[bytes], FileEntry]:
    """Return the parts that a file of these writes is sent in, and its entry."""
    workers = Workers(4)
    writer = Parts()
    sink = FileSink("f", writer, workers, storage)
    for data in writes:
        assert sink.write(data) == len(data)
    entry = sink.close()
    workers.close()
    assert sorted(writer.parts) == list(range(len(writer.parts)))
    offset = 0
    parts = []
    for number in range(len(writer.parts)):
        assert writer.parts[number][0] == offset
        parts.append(writer.parts[number][1])
        offset += len(parts[-1])
    return parts, entry


@given(sizes=st.lists(st.integers(0, 300), max_size=12), least=st.sampled_from([0, 1, 40, 64]))
def test_parts_make_up_the_file_and_only_the_last_is_short(sizes: list[int], least: int) -> None:
    writes = [bytes([i]) * n for i, n in enumerate(sizes)]
    storage = replace(SERVICE, min_part=least)
    parts, entry = sent(writes, storage)
    whole = b"".join(writes)
    assert b"".join(parts) == whole
    assert all(len(p) >= least for p in parts[:-1])
    assert all(0 < len(p) < storage.part_size + max(least, storage.part_size // 2) for p in parts)
    assert (entry.size, entry.crc) == (len(whole), crc64nvme(whole))
    assert entry.chunks == tuple((len(p), crc64nvme(p)) for p in parts)


def test_large_tensors_are_sent_from_where_they_are() -> None:
    workers = Workers(2)
    tensor = memoryview(bytes(1000))
    seen: list[Any] = []

    class Looking(Parts):
        def write(self, offset: int, data: memoryview, number: int) -> None:
            seen.append(data.obj is tensor.obj)

    sink = FileSink("f", Looking(), workers, SERVICE)
    sink.write(b"header")
    sink.write(tensor)
    sink.close()
    workers.close()
    assert seen.count(False) <= 2  # the one with the header, and what was left at the end
    assert seen.count(True) >= 13


@pytest.mark.parametrize("part_size", [5 * MIB, 8 * MIB, 64 * MIB, 1024 * MIB])
def test_five_tebibytes_fit_into_ten_thousand_parts(part_size: int) -> None:
    sink = FileSink("f", Parts(), Workers(1), replace(SERVICE, part_size=part_size, min_part=5 * MIB))
    total = 0
    sizes = []
    for _ in range(10_000):
        sizes.append(sink._part())
        total += sizes[-1]
        sink._chunks.append((sizes[-1], 0))
    assert total >= 5 << 40
    assert sizes == sorted(sizes)
    assert max(sizes) <= min(CHUNK_LIMIT, 5 << 30)
    assert sizes[1000] == part_size  # only files of many gigabytes have larger ones


@pytest.mark.parametrize("shape", [(0.5,), (1.02,), (0.02, 0.5), (0.02, 1.02)])
def test_however_large_the_tensors_are_they_fit_into_ten_thousand_parts(shape: tuple[float, ...]) -> None:
    """Tensors that are just a little larger than a part, or small ones between large ones, must not leave short parts."""
    storage = replace(SERVICE, part_size=5 * MIB >> 14, min_part=5 * MIB >> 14)  # all is 16384 times smaller
    sink = FileSink("f", Parts(), Unused(1), storage)
    tensor, total = memoryview(bytes(MIB)), 0
    while len(sink._chunks) < 9_990:
        for factor in shape:
            size = int(sink._part() * factor) + 1
            total += sink.write(tensor[:size])
    assert total >= 5 << 26


def test_parts_do_not_grow_where_any_number_will_do() -> None:
    sink = FileSink("f", Parts(), Workers(1), replace(SERVICE, max_parts=0))
    sink._chunks += [(64, 0)] * 100_000
    assert sink._part() == 64
