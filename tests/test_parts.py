"""How files are cut into parts: none too small for the service, none copied without need, few enough for 5 TiB."""

from __future__ import annotations

import gc
import io
import itertools
import threading
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptstore import torchfile, transfer
from ckptstore.checksum import crc64nvme
from ckptstore.errors import StorageFull
from ckptstore.manifest import CHUNK_LIMIT, FileEntry
from ckptstore.protocol import Capabilities
from ckptstore.transfer import FileSink
from ckptstore.workers import Job, Workers, drain

MIB = 1 << 20
SERVICE = Capabilities(atomic_create=True, durable=True, part_size=64, parallel=4, min_part=40, max_parts=10_000)


class Unused(Workers):
    """Does nothing with what it gets."""

    def begin(self, jobs: list[Job[Any]], call: Any, *args: Any) -> Job[Any]:
        job = Job(lambda: [(1, 0, "")])
        job.run()
        return job


class Parts:
    """A `PartWriter` that keeps what it gets."""

    def __init__(self) -> None:
        self.parts: dict[int, tuple[int, bytes]] = {}

    def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
        assert number not in self.parts
        self.parts[number] = (offset, bytes(data))

    def finish(self) -> str | None:
        return None

    def abort(self) -> None: ...


class Gathering(Parts):
    """See `GatheringWriter`."""

    def write_pieces(self, offset: int, pieces: Sequence[memoryview], number: int, crc: int | None = None) -> None:
        assert all(pieces)
        assert crc == crc64nvme(b"".join(pieces))
        self.write(offset, memoryview(b"".join(pieces)), number, crc)


class Late(Parts):
    """Has somebody write to the live tensors just before what is in them is taken."""

    def __init__(self, live: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = live

    def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
        for tensor in self.live:
            tensor.add_(1)
        super().write(offset, data, number, crc)


@pytest.mark.parametrize("threads", [1, 4])
def test_what_other_processes_write_to_is_hashed_as_it_is_written(threads: int) -> None:
    """As in Hogwild training. Or the checkpoint would be published, and be damaged."""
    live = [torch.arange(n, dtype=torch.float32).share_memory_() for n in (3 * MIB, 20_000, 1000, 7)]
    writer, workers = Late(live), Workers(threads)
    sink = FileSink("f", writer, workers, replace(SERVICE, part_size=MIB, min_part=0, max_parts=0))
    torchfile.save({"w": live}, sink)
    entry = sink.close()
    workers.close()
    data = b"".join(part for _, part in sorted(writer.parts.values()))
    starts = itertools.accumulate((length for length, _ in entry.chunks), initial=0)
    assert [crc for _, crc in entry.chunks] == [
        crc64nvme(data[start : start + length]) for start, (length, _) in zip(starts, entry.chunks, strict=False)
    ]
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    assert [tuple(tensor.shape) for tensor in torch.load(io.BytesIO(data))["w"]] == [tuple(tensor.shape) for tensor in live]


def sent(writes: list[bytes], storage: Capabilities) -> tuple[list[bytes], FileEntry]:
    """Return the parts that a file of these writes is sent in, and its entry."""
    workers = Workers(4)
    writer = Gathering() if storage.gathers else Parts()
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


@given(sizes=st.lists(st.integers(0, 300), max_size=12), least=st.sampled_from([0, 1, 40, 64, 100]), gathers=st.booleans())
def test_parts_make_up_the_file_and_only_the_last_is_short(sizes: list[int], least: int, gathers: bool) -> None:
    writes = [bytes([i]) * n for i, n in enumerate(sizes)]
    storage = replace(SERVICE, min_part=least, gathers=gathers)
    parts, entry = sent(writes, storage)
    whole = b"".join(writes)
    assert b"".join(parts) == whole
    assert all(max(64, least) <= len(p) < max(64, least) + 64 // 8 for p in parts[:-1])
    assert all(0 < len(p) < max(64, least) + 64 // 8 for p in parts)
    assert (entry.size, entry.crc) == (len(whole), crc64nvme(whole))
    assert entry.chunks == tuple((len(p), crc64nvme(p)) for p in parts)


DISK = Capabilities(atomic_create=True, durable=True, part_size=1024, parallel=2)


@given(
    writes=st.lists(st.tuples(st.integers(0, 3000), st.booleans(), st.booleans()), max_size=12),
    service=st.booleans(),
    fine=st.booleans(),
)
def test_sums_and_chunks_are_right_however_a_file_is_written(
    writes: list[tuple[int, bool, bool]], service: bool, fine: bool
) -> None:
    """Each write with or without a CRC-32, of memory that stays or does not."""
    workers, writer = Workers(2), Gathering()
    storage = replace(DISK, min_part=600, max_parts=10_000, gathers=True) if service else DISK
    sink = FileSink("f", writer, workers, storage, fine=fine)
    whole, crc, starts = b"", 0, set()
    for i, (size, summed, stays) in enumerate(writes):
        data = bytearray(bytes([i + 1]) * size)
        if size >= DISK.part_size // 8:
            starts.add(len(whole))
        whole += data
        crc = sink.write_summed(memoryview(data), crc, data if stays else None) if summed else zlib.crc32(data, crc)
        if not summed:
            sink.write(data)
        if not stays:
            data[:] = bytes(size)  # whoever reads it from now on reads something else
        assert crc == zlib.crc32(whole)
    entry = sink.close()
    workers.close()
    parts = [writer.parts[n] for n in sorted(writer.parts)]
    assert b"".join(data for _, data in parts) == whole
    assert [offset for offset, _ in parts] == [sum(len(d) for _, d in parts[:i]) for i in range(len(parts))]
    assert sorted(writer.parts) == list(range(len(parts)))
    assert entry.size == len(whole) and entry.crc == crc64nvme(whole)
    offset, cuts = 0, set()
    for length, found in entry.chunks:
        cuts.add(offset)
        assert found == crc64nvme(whole[offset : offset + length])
        offset += length
    assert offset == len(whole)
    if service:
        assert all(1024 <= len(data) < 1024 + DISK.part_size // 8 for _, data in parts[:-1])
    if fine:
        assert starts <= cuts | {0}, "one that is not tiny can be read without the ones before"
        assert len(entry.chunks) <= len(writes) + len(parts)
    elif not service:
        assert starts <= cuts | {0}, "a tensor can be read, and checked, without the ones before"
        assert len(entry.chunks) <= 2 * len(starts) + 1 + sum(size // 1024 for size, _, _ in writes) + len(whole) // 512


def test_memory_that_stays_is_written_while_the_next_is_prepared_and_kept_as_long() -> None:
    """`write_summed` returns before a byte of it is written; then its owner goes."""
    may_write, seen = threading.Event(), []

    class Held(Parts):
        def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
            may_write.wait(60)
            seen.append(bytes(data))

    class Owner:
        def __init__(self, fill: int) -> None:
            self.memory = bytearray([fill]) * 1000

    workers = Workers(2)
    sink = FileSink("f", Held(), workers, DISK)
    owners = [Owner(1), Owner(2), Owner(3)]
    kept = [weakref.ref(owner) for owner in owners]
    for owner in owners:
        sink.write_summed(memoryview(owner.memory), 0, owner)
    del owner, owners
    assert all(ref() is not None for ref in kept)
    assert not seen
    may_write.set()
    sink.close()
    assert sorted(seen) == [bytes([n]) * 1000 for n in (1, 2, 3)]
    workers.close()
    del sink
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_beside_a_single_writer_the_caller_hashes_the_next_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file on this machine takes one write at a time: a second thread that wants to write would wait, and hash nothing meanwhile."""
    hashed, ahead = threading.Semaphore(0), []

    def hash_here(data: Any, before: int = 0) -> int:
        assert threading.current_thread() is threading.main_thread()
        hashed.release()
        return crc64nvme(data, before)

    class Slow(Parts):
        def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
            assert threading.current_thread() is not threading.main_thread()
            ahead.append(hashed.acquire(timeout=60) and (number == 3 or hashed.acquire(timeout=60)))
            hashed.release()
            super().write(offset, data, number)

    monkeypatch.setattr("ckptstore.transfer.crc64nvme", hash_here)
    workers, writer = Workers(1), Slow()
    sink = FileSink("f", writer, workers, DISK)
    owners = [bytes([n]) * 1000 for n in range(4)]
    for owner in owners:
        sink.write_summed(memoryview(owner), 0, owner)
    entry = sink.close()
    workers.close()
    assert ahead == [True] * 4, "each part but the last waited until the next one was hashed"
    assert entry.crc == crc64nvme(b"".join(owners))
    assert [writer.parts[n] for n in range(4)] == [(n * 1000, owners[n]) for n in range(4)]


def test_a_part_that_fails_is_told_by_a_later_write_or_by_close() -> None:
    class Full(Parts):
        def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
            raise StorageFull("full")

    workers = Workers(2)
    sink = FileSink("f", Full(), workers, DISK)
    data = bytes(1000)
    with pytest.raises(StorageFull):
        for _ in range(10):
            sink.write_summed(memoryview(data), 0, data)
        sink.close()
    sink.abort()
    workers.close()


@pytest.mark.parametrize("least", [0, 10, 40, 64])
def test_each_part_comes_to_a_service_with_its_checksum(least: int) -> None:
    """So the service can compare it with what arrived, which it does a part at a time."""
    came: list[int | None] = []

    class Told(Parts):
        def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
            assert crc == crc64nvme(data)
            came.append(crc)

    workers = Workers(1)
    for sizes in itertools.product(range(0, 150, 11), repeat=2):
        sink = FileSink("f", Told(), workers, replace(SERVICE, min_part=least))
        for size in sizes:
            sink.write(bytes([size]) * size)
        entry = sink.close()
        assert [crc for _, crc in entry.chunks] == came
        came.clear()
    workers.close()


class Held(Parts):
    """Writes its first part only when somebody waits for that, in `awaited`; `seen` has what was done, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.begun, self._awaited = threading.Event(), threading.Event()
        self.seen: list[str] = []
        self.held = 0
        """Number of the part."""

        def awaited(jobs: list[Job[Any]]) -> None:
            self.seen.append("awaited")
            self._awaited.set()
            drain(jobs)

        monkeypatch.setattr(transfer, "drain", awaited)

    def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
        if number == self.held:
            self.begun.set()
            self._awaited.wait(60)
            self.seen.append("written")
        else:
            self.begun.wait(60)
            raise StorageFull("full")

    def abort(self) -> None:
        self.seen.append("aborted")

    def let_go(self) -> None:
        self._awaited.set()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    writer = Held(monkeypatch)
    yield writer
    writer.let_go()


def test_an_interrupted_write_returns_when_nothing_moves_its_memory_or_ever_will(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []

    def interrupt(data: memoryview, before: int = 0) -> int:
        if len(left) == 1:  # one part is on its way, one waits
            held.begun.wait(60)
            assert sink._pieces
            raise KeyboardInterrupt
        left.append(len(data))
        return 0

    def awaited(jobs: list[Job[Any]]) -> None:
        left.append(len(sink._pieces))
        there(jobs)

    there = transfer.drain  # type: ignore[attr-defined]
    monkeypatch.setattr(transfer, "drain", awaited)
    monkeypatch.setattr(transfer, "crc32", interrupt)
    workers = Workers(2)
    sink = FileSink("f", held, workers, DISK)
    with pytest.raises(KeyboardInterrupt):
        sink.write_summed(memoryview(bytes(4000)), 0)
    assert held.seen == ["awaited", "written"]
    assert left == [1024, 0], "what waits is given up before anything else can go wrong"
    workers.close()


def test_a_file_is_dropped_when_nothing_is_written_to_it_any_more(held: Held) -> None:
    workers, data = Workers(2), bytes(1000)
    sink = FileSink("f", held, workers, DISK)
    for _ in range(2):
        sink.write_summed(memoryview(data), 0, data)
    held.begun.wait(60)
    sink.abort()
    assert held.seen == ["awaited", "written", "aborted"]
    workers.close()


def test_closing_fails_when_nothing_moves_the_owners_memory_any_more(held: Held) -> None:
    workers, data = Workers(2), bytes(1000)
    held.held = 1
    sink = FileSink("f", held, workers, DISK)
    for _ in range(2):
        sink.write_summed(memoryview(data), 0, data)
    with pytest.raises(StorageFull):
        sink.close()
    assert held.seen == ["awaited", "written"]
    workers.close()


@pytest.mark.parametrize("size", [0, 10, 1000, 3000])
@pytest.mark.parametrize("storage", [DISK, replace(DISK, min_part=600)], ids=["disk", "service"])
def test_it_is_said_how_much_was_taken_before_and_after_closing(size: int, storage: Capabilities) -> None:
    workers = Workers(2)
    sink = FileSink("f", Parts(), workers, storage)
    sink.write(bytes(size))
    assert sink.size == size
    assert sink.close().size == size
    assert sink.size == size
    workers.close()


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("storage", [DISK, replace(DISK, min_part=600)], ids=["disk", "service"])
def test_small_writes_are_gathered_but_not_without_end(storage: Capabilities, fine: bool) -> None:
    workers, writer = Workers(2), Parts()
    sink = FileSink("f", writer, workers, storage, fine=fine)
    whole = b"".join(bytes([i]) * 50 for i in range(100))
    for i in range(100):
        sink.write(whole[50 * i : 50 * i + 50])
        assert sink._gathered < 1024 + 50
    entry = sink.close()
    workers.close()
    assert b"".join(data for _, data in (writer.parts[n] for n in sorted(writer.parts))) == whole
    assert all(900 < len(data) < 1024 + 50 for _, data in list(writer.parts.values())[:-1])
    assert all(length < 1024 + 50 for length, _ in entry.chunks)
    assert len(entry.chunks) == (100 if fine else 5)


@pytest.mark.parametrize("stays", [True, False])
def test_large_tensors_are_sent_from_where_they_are(stays: bool) -> None:
    """All of those whose memory stays; else all but what would have to wait for the next one."""
    workers = Workers(2)
    tensors = [bytes([n]) * size for n, size in enumerate((100, 640, 800))]
    copied = 0

    class Looking(Gathering):
        def write_pieces(self, offset: int, pieces: Sequence[memoryview], number: int, crc: int | None = None) -> None:
            nonlocal copied
            copied += sum(len(piece) for piece in pieces if not any(piece.obj is tensor for tensor in tensors))
            super().write_pieces(offset, pieces, number, crc)

    writer = Looking()
    sink = FileSink("f", writer, workers, replace(SERVICE, gathers=True))
    for tensor in tensors:
        sink.write(b"header")
        sink.write_summed(memoryview(tensor), 0, tensor if stays else None)
    sink.close()
    workers.close()
    headers = len(tensors) * len(b"header")
    assert b"".join(data for _, (_, data) in sorted(writer.parts.items())) == b"".join(b"header" + t for t in tensors)
    assert copied == headers if stays else copied < headers + len(tensors) * SERVICE.part_size


@pytest.mark.parametrize("part_size", [5 * MIB, 8 * MIB, 64 * MIB, 1024 * MIB])
def test_five_tebibytes_fit_into_ten_thousand_parts(part_size: int) -> None:
    sink = FileSink("f", Parts(), Workers(1), replace(SERVICE, part_size=part_size, min_part=5 * MIB))
    total = 0
    sizes = []
    for _ in range(10_000):
        sizes.append(sink._part())
        total += sizes[-1]
        sink._sums.append([])
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
    while len(sink._sums) < 9_990:
        for factor in shape:
            size = int(sink._part() * factor) + 1
            total += sink.write(tensor[:size])
    assert total >= 5 << 26


def test_parts_do_not_grow_where_any_number_will_do() -> None:
    sink = FileSink("f", Parts(), Workers(1), replace(SERVICE, max_parts=0))
    sink._sums += [[]] * 100_000
    assert sink._part() == 64
