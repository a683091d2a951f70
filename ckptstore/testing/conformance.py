"""What `ckptstore.protocol` demands of a backend, as tests to subclass::

    class TestMine(BackendConformance):
        def make_backend(self, place): return MyBackend.open(str(place / "store"), {})
        def raw_get(self, key): ...      # these three look at the storage itself, past the backend under test
        def raw_put(self, key, data): ...
        def raw_keys(self): ...

Durability cannot be seen from inside a process: cut the power, or trace the system calls, in tests of your own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from ..checksum import crc64nvme
from ..errors import AlreadyExists, BackendError, InvalidURL, NotFound
from ..protocol import Backend, Capabilities, ObjectInfo

__all__ = ["BackendConformance"]

_T = TypeVar("_T")

# Where the order of whole keys differs from the order within each folder, and where a prefix must end at a "/".
_KEYS = (
    *(
        "a-b",
        "a.b",
        "a/b-c",
        "a/b.c",
        "a/b/c.d",
        "a/b/c/d",
        "a/b/d/e/f/g/h/i/j/k",
        "a/c",
        "a0",
        "b",
        "Z",
        "-x",
        ".hidden",
        "x..y",
    ),
    *("log/000000000001", "log/000000000002", "log/000000000010", "logs/1", "log.x", "=6Danifest.json"),
    *("data/e1-s10-0123456789ab/state.pt", "data/e1-s10-0123456789ab.x"),
)
_PREFIXES = ("", "a/", "a/b/", "log/", "data/", "data/e1-s10-0123456789ab/", "no/", "lo/")
_STARTS = ("", "A", "a", "a/", "a/b/d", "a/b/d/", "a/b0", "log/000000000005", "logs", "zzz")


def _bytes(n: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(n)


def _parallel(n: int, work: Callable[[int], _T]) -> list[_T]:
    """Run ``work(0) … work(n - 1)`` in threads that start at the same moment; return the results."""
    barrier = threading.Barrier(n)

    def start(i: int) -> _T:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(start, range(n)))


class BackendConformance:
    """Subclass it, name the subclass ``Test…``, and let pytest collect it."""

    threads = 16
    """How many race for one key."""
    rounds = 5
    """How many times they do; fewer where a race is slow."""
    many = 1100
    """More objects than one page of the service's listing, and than one bulk delete, holds."""
    finish_may_overwrite = False
    """`PartWriter.finish` cannot tell whether its key is taken."""
    secrets: Sequence[str] = ()
    """Credentials that `make_backend` uses, which no message may show."""

    backend: Backend
    place: Path

    def make_backend(self, place: Path) -> Backend:
        """Return a new backend object for a place that is empty when a test starts. `place` is the test's own ``tmp_path``.

        Called again within one test, it MUST open the same place, as another process would.
        """
        raise NotImplementedError

    def raw_get(self, key: str) -> bytes | None:
        """Return the stored bytes of `key`, or None; without the backend under test."""
        raise NotImplementedError

    def raw_put(self, key: str, data: bytes) -> None:
        """Store `data` under `key`; without the backend under test."""
        raise NotImplementedError

    def raw_keys(self) -> Sequence[str]:
        """Return the keys of everything stored, leftovers included; without the backend under test."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _open_place(self, tmp_path: Path) -> Iterator[None]:
        self.place = tmp_path
        self.backend = self.make_backend(tmp_path)
        yield
        self.backend.close()

    def another(self) -> Backend:
        """Return a second backend object for the same place."""
        return self.make_backend(self.place)

    def keys(self, prefix: str = "", start_after: str = "") -> list[str]:
        """Return the listed keys."""
        return [info.key for info in self.backend.list(prefix, start_after)]

    def write(self, key: str, *parts: bytes) -> None:
        """Write one large object, part by part."""
        writer = self.backend.open_writer(key)
        offset = 0
        for number, part in enumerate(parts):
            writer.write(offset, memoryview(part), number)
            offset += len(part)
        writer.finish()

    # -- the object itself

    def test_is_a_backend(self) -> None:
        assert isinstance(self.backend, Backend)
        assert isinstance(self.backend.capabilities, Capabilities)
        with pytest.raises(dataclasses.FrozenInstanceError):
            self.backend.capabilities.durable = True  # type: ignore[misc]
        assert self.backend.capabilities.part_size > 0
        assert self.backend.capabilities.parallel > 0
        for name, text in type(self.backend).options.items():
            assert name.isidentifier()
            assert text.strip() and "\n" not in text

    def test_unknown_option_is_refused(self) -> None:
        with pytest.raises(InvalidURL):  # InvalidOption, unless the empty location is refused first
            type(self.backend).open("", {"no_such_option": "1"})

    def test_messages_hold_no_secret(self) -> None:
        assert self.backend.url
        with pytest.raises(NotFound) as caught:
            self.backend.get("no/such/key", 10)
        for secret in self.secrets:
            assert all(
                secret not in text for text in (self.backend.url, repr(self.backend), str(caught.value), repr(caught.value))
            )

    def test_opening_and_closing_touch_nothing(self) -> None:
        self.backend.close()
        self.backend.close()
        assert [*self.raw_keys()] == []

    # -- put_if_absent, replace

    def test_what_a_record_refers_to_is_made_ready_before_it_is_seen(self) -> None:
        seen: list[bytes | None] = []
        self.backend.put_if_absent("log/1", b"one", lambda: seen.append(self.raw_get("log/1")))
        assert seen == [None]
        assert self.raw_get("log/1") == b"one"

    @pytest.mark.parametrize("error", [AlreadyExists("a file"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
    def test_what_could_not_be_made_ready_is_never_referred_to(self, error: BaseException) -> None:
        def fail() -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            self.backend.put_if_absent("log/1", b"one", fail)
        assert caught.value is error
        assert self.raw_keys() == []
        self.backend.put_if_absent("log/1", b"one")

    def test_finishing_may_be_started_before(self) -> None:
        for key in ("data/a", "data/b", "data/c"):
            writer = self.backend.open_writer(key)
            writer.write(0, memoryview(_bytes(1000)), 0)
            writer.start_finish()
            if key == "data/a":
                started = writer
            elif key == "data/b":
                writer.abort()
            else:
                writer.finish()
        started.finish()
        assert self.raw_get("data/a") == self.raw_get("data/c") == _bytes(1000)
        assert self.raw_get("data/b") is None

    @pytest.mark.parametrize("size", [0, 1, 1 << 16])
    def test_put_stores_the_bytes(self, size: int) -> None:
        self.backend.put_if_absent("log/1", _bytes(size))
        assert self.raw_get("log/1") == _bytes(size)
        assert self.another().get("log/1", size) == _bytes(size)
        assert [*self.raw_keys()] == ["log/1"]

    @pytest.mark.parametrize("data", [b"first", b"second", b""])
    def test_put_never_overwrites(self, data: bytes) -> None:
        """Not even with the very same bytes: the layer above must learn that it was not this call."""
        self.raw_put("log/1", b"first")
        with pytest.raises(AlreadyExists):
            self.backend.put_if_absent("log/1", data)
        assert self.raw_get("log/1") == b"first"
        assert [*self.raw_keys()] == ["log/1"]

    def test_put_respects_what_a_writer_made(self) -> None:
        self.write("data/x", b"first")
        with pytest.raises(AlreadyExists):
            self.backend.put_if_absent("data/x", b"second")
        assert self.raw_get("data/x") == b"first"

    def test_exactly_one_put_wins(self) -> None:
        if not self.backend.capabilities.atomic_create:
            pytest.skip("the backend does not promise it")
        backends = [self.backend if i % 2 else self.another() for i in range(self.threads)]
        for turn in range(self.rounds):
            key = f"log/{turn}"

            def put(i: int, key: str = key) -> bool:
                try:
                    backends[i].put_if_absent(key, b"%d" % i)
                except AlreadyExists:
                    return False
                return True

            won = _parallel(self.threads, put)
            assert sum(won) == 1
            assert self.raw_get(key) == b"%d" % won.index(True)
        assert len(self.raw_keys()) == self.rounds

    def test_replace_creates_and_overwrites(self) -> None:
        for data in (b"first", b"2", b"", b"third and longer"):
            self.backend.replace("hint", data)
            assert self.raw_get("hint") == data
            assert self.another().get("hint", 100) == data
        assert [*self.raw_keys()] == ["hint"]

    def test_nobody_sees_half_an_object(self) -> None:
        """Readers run against writers of both kinds, and see nothing or one whole object."""
        whole = {bytes([i]) * (1 << 16) for i in range(4)}
        done = threading.Event()
        self.backend.replace("hint", bytes(1 << 16))

        def work(i: int) -> None:
            backend = self.another()
            if i == 0:
                try:
                    for turn in range(4 * self.rounds):
                        backend.replace("hint", bytes([turn % 4]) * (1 << 16))
                        backend.put_if_absent(f"log/{turn}", bytes([turn % 4]) * (1 << 16))
                finally:
                    done.set()
                return
            turn = 0
            while not (finished := done.is_set()) or turn < 4 * self.rounds:
                assert backend.get("hint", 1 << 16) in whole
                try:
                    assert backend.get(f"log/{turn}", 1 << 16) in whole
                except NotFound:
                    assert not finished
                else:
                    turn += 1

        _parallel(3, work)

    # -- reading

    @pytest.mark.parametrize("key", ["log/1", "no", "a/b/c/d/e"])
    def test_what_is_not_there_is_not_found(self, key: str) -> None:
        self.raw_put("log/10", b"x")
        with pytest.raises(NotFound):
            self.backend.get(key, 10)
        with pytest.raises(NotFound):
            self.backend.stat(key)
        with pytest.raises(NotFound):
            self.backend.read_into(key, 0, memoryview(bytearray(1)))

    def test_part_of_a_key_is_no_object(self) -> None:
        self.raw_put("data/x/state.pt", b"x")
        for call in (lambda: self.backend.get("data/x", 10), lambda: self.backend.stat("data/x")):
            with pytest.raises((NotFound, BackendError)):
                call()

    def test_get_keeps_its_limit(self) -> None:
        self.raw_put("log/1", _bytes(1000))
        assert self.backend.get("log/1", 1000) == _bytes(1000)
        for limit in (999, 0):
            with pytest.raises(BackendError):
                self.backend.get("log/1", limit)

    @pytest.mark.parametrize(("start", "stop"), [(0, 1000), (0, 1), (999, 1000), (123, 877), (0, 0), (1000, 1000)])
    def test_read_into_fills_exactly_the_buffer(self, start: int, stop: int) -> None:
        self.raw_put("data/x", _bytes(1000))
        whole = bytearray(b"?" * (stop - start + 20))
        self.backend.read_into("data/x", start, memoryview(whole)[10 : 10 + stop - start])
        assert bytes(whole) == b"?" * 10 + _bytes(1000)[start:stop] + b"?" * 10

    @pytest.mark.parametrize(("offset", "size"), [(0, 1001), (999, 2), (1000, 1), (5000, 1)])
    def test_short_data_is_an_error(self, offset: int, size: int) -> None:
        self.raw_put("data/x", _bytes(1000))
        with pytest.raises(BackendError):
            self.backend.read_into("data/x", offset, memoryview(bytearray(size)))

    def test_stat_tells_the_size(self) -> None:
        for size in (0, 1, 1000):
            self.raw_put(f"data/{size}", _bytes(size))
            info = self.backend.stat(f"data/{size}")
            assert info == ObjectInfo(f"data/{size}", size, info.checksum)

    def test_checksum_of_the_service_is_that_of_the_bytes(self) -> None:
        for data in (b"", b"123456789"):
            writer = self.backend.open_writer(f"data/{len(data)}")
            writer.write(0, memoryview(data), 0)
            checksum = writer.finish()
            assert self.backend.stat(f"data/{len(data)}").checksum == checksum
            known = {"crc64nvme": f"{crc64nvme(data):016x}", "md5": hashlib.md5(data, usedforsecurity=False).hexdigest()}
            if data:
                known["crc32c"] = "e3069283"  # the check value that catalogues of CRCs give for these digits
            kind, _, digits = (checksum or "").partition(":")
            assert digits == known.get(kind, digits)

    # -- list, delete

    def test_list_of_nothing_is_empty(self) -> None:
        assert self.keys() == []
        assert self.keys("log/") == []
        assert self.keys("log/", "log/5") == []

    def test_list_is_sorted_and_keeps_to_prefix_and_start(self) -> None:
        for i, key in enumerate(_KEYS):
            self.raw_put(key, _bytes(i))
        assert [*self.backend.list("")] == sorted((ObjectInfo(k, i) for i, k in enumerate(_KEYS)), key=lambda info: info.key)
        for prefix in _PREFIXES:
            for start in (*_STARTS, *_KEYS):
                expected = sorted(k for k in _KEYS if k.startswith(prefix) and k > start)
                assert self.keys(prefix, start) == expected, (prefix, start)

    def test_list_and_delete_go_past_one_page(self) -> None:
        keys = [f"log/{i:012d}" for i in range(self.many)]
        for key in reversed(keys):
            self.raw_put(key, b"")
        assert self.keys("log/") == keys
        assert self.keys("log/", keys[5]) == keys[6:]
        self.backend.delete(keys[1:])
        assert self.keys() == keys[:1]

    def test_delete_is_idempotent_and_exact(self) -> None:
        keys = ["a/b/c", "a/b/d", "a/b-c", "a/bc", "b"]
        for key in keys:
            self.raw_put(key, b"x")
        self.backend.delete([])
        self.backend.delete(["a/b/c", "nothing", "a/nothing/here", "a/b/c"])
        self.backend.delete(["a/b/c"])
        assert sorted(self.raw_keys()) == sorted(keys[1:])
        self.backend.delete(keys)
        assert [*self.raw_keys()] == []
        self.backend.put_if_absent("a/b/c", b"again")
        assert self.raw_get("a/b/c") == b"again"

    # -- writers

    @pytest.mark.parametrize("size", [0, 1, 1000])
    def test_writer_stores_the_bytes(self, size: int) -> None:
        self.write("data/x/state.pt", *([_bytes(size)] if size else []))
        assert self.raw_get("data/x/state.pt") == _bytes(size)
        assert [*self.raw_keys()] == ["data/x/state.pt"]

    def test_parts_come_in_any_order_and_from_any_thread(self) -> None:
        part = self.backend.capabilities.part_size
        cuts = [0, part, 2 * part + 123, 3 * part + 123, 3 * part + 130]  # one longer than part_size, and a short last one
        data = _bytes(cuts[-1])
        writer = self.backend.open_writer("data/x/state.pt")

        def write(i: int) -> None:
            start, stop = cuts[i : i + 2]
            buffer = bytearray(data[start:stop])
            writer.write(start, memoryview(buffer), i)
            buffer[:] = bytes(len(buffer))  # it belonged to the writer only until the call returned

        write(3)
        _parallel(3, write)
        writer.finish()
        assert self.backend.stat("data/x/state.pt").size == len(data)
        read = bytearray(len(data))
        self.backend.read_into("data/x/state.pt", 0, memoryview(read))
        assert read == data
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

        _parallel(8, write)
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

        won = _parallel(self.threads, write)
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
