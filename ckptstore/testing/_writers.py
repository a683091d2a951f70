"""The part of the conformance suite that is about large objects, written in parts."""

from __future__ import annotations

import itertools
from typing import cast

import pytest

from ..errors import AlreadyExists, NotFound
from ..protocol import GatheringWriter
from ._conformance import Conformance, in_parallel, some_bytes

__all__ = ["WriterConformance"]


class WriterConformance(Conformance):
    """What `ckptstore.protocol.PartWriter` demands."""

    @pytest.mark.parametrize("size", [0, 1, 1000])
    def test_writer_stores_the_bytes(self, size: int) -> None:
        self.write("data/x/state.pt", *([some_bytes(size)] if size else []))
        assert self.raw_get("data/x/state.pt") == some_bytes(size)
        assert [*self.raw_keys()] == ["data/x/state.pt"]

    def test_parts_come_in_any_order_and_from_any_thread(self) -> None:
        part = self.backend.capabilities.part_size
        cuts = [0, part, 2 * part + 123, 3 * part + 123, 3 * part + 130]  # one longer than part_size, and a short last one
        data = some_bytes(cuts[-1])
        writer = self.backend.open_writer("data/x/state.pt")

        def write(i: int) -> None:
            start, stop = cuts[i : i + 2]
            buffer = bytearray(data[start:stop])
            writer.write(start, memoryview(buffer), i)
            buffer[:] = bytes(len(buffer))  # it belonged to the writer only until the call returned

        write(3)
        in_parallel(3, write)
        writer.finish()
        assert self.backend.stat("data/x/state.pt").size == len(data)
        read = bytearray(len(data))
        self.backend.read_into("data/x/state.pt", 0, memoryview(read))
        assert read == data
        assert self.raw_get("data/x/state.pt") == data

    def test_a_part_may_come_in_pieces(self) -> None:
        storage = self.backend.capabilities
        if not storage.gathers:
            pytest.skip("the backend does not say that it takes them")
        part = max(storage.part_size, storage.min_part)
        data = some_bytes(2 * part + 7)
        writer = cast(GatheringWriter, self.backend.open_writer("data/x/state.pt"))
        for number, cuts in enumerate(
            ([0, 1, 100_000, part], [part, 2 * part - 1, 2 * part], [2 * part, 2 * part + 3, len(data)])
        ):
            pieces = [bytearray(data[start:stop]) for start, stop in itertools.pairwise(cuts)]
            writer.write_pieces(cuts[0], [memoryview(piece) for piece in pieces], number)
            for piece in pieces:
                piece[:] = bytes(len(piece))  # as above
        writer.finish()
        assert self.raw_get("data/x/state.pt") == data

    def test_nothing_is_visible_before_finish(self) -> None:
        other = self.another()
        writer = self.backend.open_writer("data/x/state.pt")
        for step in (0, 1):
            assert "data/x/state.pt" not in self.keys()
            assert self.raw_get("data/x/state.pt") is None
            with pytest.raises(NotFound):
                other.stat("data/x/state.pt")
            if step == 0:
                writer.write(0, memoryview(b"abc"), 0)
        writer.finish()
        assert other.stat("data/x/state.pt").size == 3

    def test_abort_leaves_nothing(self) -> None:
        for parts in ([], [b"abc"]):
            writer = self.backend.open_writer("data/x/state.pt")
            for part in parts:
                writer.write(0, memoryview(part), 0)
            writer.abort()
            writer.abort()
            assert [*self.raw_keys()] == []
            assert self.keys() == []
        self.write("data/x/state.pt", b"the key is still free")

    def test_abort_after_finish_does_nothing(self) -> None:
        writer = self.backend.open_writer("data/x/state.pt")
        writer.write(0, memoryview(b"abc"), 0)
        writer.finish()
        writer.abort()
        assert self.raw_get("data/x/state.pt") == b"abc"

    def test_finish_never_overwrites(self) -> None:
        if self.finish_may_overwrite:
            pytest.skip("the storage cannot tell")
        writer = self.backend.open_writer("data/x/state.pt")
        writer.write(0, memoryview(b"second"), 0)
        self.raw_put("data/x/state.pt", b"first")
        with pytest.raises(AlreadyExists):
            writer.finish()
        writer.abort()
        assert self.raw_get("data/x/state.pt") == b"first"
        assert [*self.raw_keys()] == ["data/x/state.pt"]

    def test_many_writers_in_one_new_folder(self) -> None:
        def write(i: int) -> None:
            writer = self.backend.open_writer(f"data/x/{i}")
            writer.write(0, memoryview(b"%d" % i), 0)
            writer.finish()

        in_parallel(8, write)
        assert {self.raw_get(f"data/x/{i}") for i in range(8)} == {b"%d" % i for i in range(8)}
        assert len(self.raw_keys()) == 8

    def test_exactly_one_finish_wins(self) -> None:
        if self.finish_may_overwrite or not self.backend.capabilities.atomic_create:
            pytest.skip("the backend does not promise it")

        def write(i: int) -> bool:
            writer = self.another().open_writer("data/x/state.pt")
            writer.write(0, memoryview(b"%d" % i), 0)
            try:
                writer.finish()
            except AlreadyExists:
                writer.abort()
                return False
            return True

        won = in_parallel(self.threads, write)
        assert sum(won) == 1
        assert self.raw_get("data/x/state.pt") == b"%d" % won.index(True)
        assert len(self.raw_keys()) == 1

    def test_leftovers_can_be_deleted(self) -> None:
        self.raw_put("log/1", b"x")
        writer = self.backend.open_writer("data/x/state.pt")
        writer.write(0, memoryview(b"abc"), 0)
        leftovers = [info.key for info in self.another().list("data/x/")]
        assert "data/x/state.pt" not in leftovers
        assert sorted(self.raw_keys()) == [*leftovers, "log/1"]  # what is stored is also listed
        self.another().delete(leftovers)
        assert [*self.raw_keys()] == ["log/1"]
        writer.abort()
        assert [*self.raw_keys()] == ["log/1"]

    def test_finishing_may_be_started_before(self) -> None:
        for key in ("data/a", "data/b", "data/c"):
            writer = self.backend.open_writer(key)
            writer.write(0, memoryview(some_bytes(1000)), 0)
            writer.start_finish()
            if key == "data/a":
                started = writer
            elif key == "data/b":
                writer.abort()
            else:
                writer.finish()
        started.finish()
        assert self.raw_get("data/a") == self.raw_get("data/c") == some_bytes(1000)
        assert self.raw_get("data/b") is None
