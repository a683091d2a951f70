"""The way back of single files: what is asked for comes to where it belongs, and nothing that was not checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import pytest
from stores import new_memory, objects, store_on, write

from ckptstore import reading
from ckptstore.backends.memory import MemoryBackend
from ckptstore.checksum import combine, crc64nvme
from ckptstore.errors import CheckpointNotFound, DamagedFile
from ckptstore.manifest import FileEntry
from ckptstore.pages import NewMemory
from ckptstore.reading import StoredFile, damaged_ranges, read_chunk
from ckptstore.verifiedfile import VerifiedFile
from ckptstore.workers import Workers

DATA = bytes(range(1, 101))
CHUNKS = [16, 16, 8, 24, 30, 6]


def stored(part_size: int = 16) -> tuple[MemoryBackend, FileEntry]:
    """Return storage that reads so many bytes at a time, with `DATA` in it as "key", and the file's entry."""
    backend = new_memory()
    backend.capabilities = replace(backend.capabilities, part_size=part_size)  # type: ignore[misc]
    objects(backend)["key"] = DATA
    ends = list(accumulate(CHUNKS))
    chunks = tuple((n, crc64nvme(DATA[end - n : end])) for n, end in zip(CHUNKS, ends, strict=True))
    return backend, FileEntry("f", len(DATA), combine(chunks), chunks)


@pytest.fixture(params=[10, 16, 40, 1000], ids="in {} bytes".format)
def part_size(request: pytest.FixtureRequest) -> int:
    """Smaller than a chunk, as some are, several, and all in one."""
    size: int = request.param
    return size


PLACES = {
    "all of it": [(0, 100)],
    "within one chunk": [(3, 5)],
    "chunks as they are": [(16, 16), (64, 30)],
    "across chunks": [(10, 60), (75, 4), (79, 21)],
    "nothing": [(7, 0)],
}


KEPT: dict[str, list[tuple[int, int]]] = {"none before": [], "some before": [(20, 2)], "all before": [(0, 100)]}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_pieces_are_filled_wherever_they_lie(
    places: Sequence[tuple[int, int]], kept: Sequence[tuple[int, int]], part_size: int
) -> None:
    backend, entry = stored(part_size)
    workers = Workers(2)
    for all_chunks in (True, False):
        file = StoredFile(backend, "key", entry, workers)
        for offset, length in kept:
            assert file.read(offset, length) == DATA[offset : offset + length]
        pieces = [(offset, memoryview(bytearray(length))) for offset, length in places]
        file.fill(pieces[::-1], all_chunks=all_chunks)
        for offset, view in pieces:
            assert view == DATA[offset : offset + len(view)]
    workers.close()


def test_new_memory_is_given_its_contents_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not read into: what was read elsewhere is put there, but for the ends, which are in chunks with something else."""
    put: list[tuple[int, bytes]] = []

    class Placed(NewMemory):
        def is_placed(self, view: memoryview) -> bool:
            return True

        def put(self, part: memoryview, data: memoryview) -> None:
            assert not any(part)
            put.append((len(part), bytes(data)))
            part[:] = data

    monkeypatch.setattr(reading, "NewMemory", Placed)
    backend, entry = stored(1000)
    file = StoredFile(backend, "key", entry, Workers(1))
    view = memoryview(bytearray(100))
    file.fill([(0, view)])
    assert view == DATA
    assert put == [(100, DATA)]
    backend, entry = stored(16)
    ends = memoryview(bytearray(80))
    file = StoredFile(backend, "key", entry, Workers(1))
    file.fill([(10, ends)])
    assert ends == DATA[10:90]
    assert b"".join(data for _, data in put[1:]) == DATA[16:80], "of the chunk at the end, what is read at a time"
    assert all(size == len(data) for size, data in put)


@pytest.mark.parametrize("at", [0, 20, 39, 60, 99])
def test_a_wrong_byte_never_comes_out(at: int, part_size: int) -> None:
    backend, entry = stored(part_size)
    objects(backend)["key"] = DATA[:at] + b"\0" + DATA[at + 1 :]
    workers = Workers(2)
    starts = [0, *accumulate(CHUNKS)]
    bad = next(n for n in range(len(CHUNKS)) if starts[n] <= at < starts[n + 1])
    span = (starts[bad], starts[bad + 1])
    for n, length in enumerate(CHUNKS):
        into = memoryview(bytearray(length))
        if n == bad:
            with pytest.raises(DamagedFile) as caught:
                read_chunk(backend, "key", entry, starts[n], n, into)
            assert list(caught.value.ranges) == [span]
        else:
            read_chunk(backend, "key", entry, starts[n], n, into)
            assert into == DATA[starts[n] : starts[n + 1]]
    file = StoredFile(backend, "key", entry, workers)
    one = memoryview(bytearray(1))
    with pytest.raises(DamagedFile):
        file.read(at, 1)
    with pytest.raises(DamagedFile):
        file.fill([(at, one)], all_chunks=False)
    elsewhere = (at + 50) % 100
    with pytest.raises(DamagedFile):
        file.fill([(elsewhere, one)])
    file.fill([(elsewhere, one)], all_chunks=False)
    assert one == DATA[elsewhere : elsewhere + 1]
    raw = VerifiedFile(backend, "key", entry)
    raw.seek(at)
    with pytest.raises(DamagedFile):
        raw.read(1)
    raw.seek(elsewhere)
    assert raw.read(1) == DATA[elsewhere : elsewhere + 1]
    assert damaged_ranges(backend, "key", entry, workers) == [span]
    workers.close()


@pytest.mark.parametrize("length", [0, 16, 50, 99, 100, 120])
def test_who_verifies_is_told_of_each_byte_once(length: int, part_size: int) -> None:
    """Also of those that are not there: who shows how far it is gets to the end."""
    backend, entry = stored(part_size)
    objects(backend)["key"] = (DATA + bytes(20))[:length]
    whole = max(start for start in [0, *accumulate(CHUNKS)] if start <= length)
    for workers in (None, Workers(2)):
        done: list[int] = []
        ranges = damaged_ranges(backend, "key", entry, workers, done.append)
        assert sum(done) == len(DATA)
        assert all(n > 0 for n in done)
        assert ranges == ([(whole, 100)] if length < 100 else [(100, length)] if length > 100 else [])
        if workers:
            workers.close()


def test_one_cannot_go_to_before_the_beginning() -> None:
    backend, entry = stored()
    file = VerifiedFile(backend, "key", entry)
    assert file.seek(-1, 2) == 99
    for offset, whence in [(-1, 0), (-100, 1), (-101, 2)]:
        with pytest.raises(ValueError, match="negative"):
            file.seek(offset, whence)
    assert file.read() == DATA[-1:]
    assert file.seek(200) == 200 and file.read() == b""


def test_what_was_pruned_while_it_was_read_is_not_called_damaged() -> None:
    backend = new_memory()
    store = store_on(backend, keep_last=1)
    file = store.checkpoint(write(store)).open("a.bin")
    write(store)
    store.close()
    with pytest.raises(CheckpointNotFound):
        file.read()
