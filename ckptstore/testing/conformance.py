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
import threading

import pytest

from ..checksum import crc64nvme
from ..errors import AlreadyExists, BackendError, InvalidURL, NotFound
from ..protocol import Backend, Capabilities, ObjectInfo
from ._conformance import in_parallel, some_bytes
from ._writers import WriterConformance

__all__ = ["BackendConformance"]

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


class BackendConformance(WriterConformance):
    """Subclass it, name the subclass ``Test…``, and let pytest collect it."""

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

    @pytest.mark.parametrize("size", [0, 1, 1 << 16])
    def test_put_stores_the_bytes(self, size: int) -> None:
        self.backend.put_if_absent("log/1", some_bytes(size))
        assert self.raw_get("log/1") == some_bytes(size)
        assert self.another().get("log/1", size) == some_bytes(size)
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

            won = in_parallel(self.threads, put)
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

        in_parallel(3, work)

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
        self.raw_put("log/1", some_bytes(1000))
        assert self.backend.get("log/1", 1000) == some_bytes(1000)
        for limit in (999, 0):
            with pytest.raises(BackendError):
                self.backend.get("log/1", limit)

    @pytest.mark.parametrize(("start", "stop"), [(0, 1000), (0, 1), (999, 1000), (123, 877), (0, 0), (1000, 1000)])
    def test_read_into_fills_exactly_the_buffer(self, start: int, stop: int) -> None:
        self.raw_put("data/x", some_bytes(1000))
        whole = bytearray(b"?" * (stop - start + 20))
        self.backend.read_into("data/x", start, memoryview(whole)[10 : 10 + stop - start])
        assert bytes(whole) == b"?" * 10 + some_bytes(1000)[start:stop] + b"?" * 10

    @pytest.mark.parametrize(("offset", "size"), [(0, 1001), (999, 2), (1000, 1), (5000, 1)])
    def test_short_data_is_an_error(self, offset: int, size: int) -> None:
        self.raw_put("data/x", some_bytes(1000))
        with pytest.raises(BackendError):
            self.backend.read_into("data/x", offset, memoryview(bytearray(size)))

    def test_stat_tells_the_size(self) -> None:
        for size in (0, 1, 1000):
            self.raw_put(f"data/{size}", some_bytes(size))
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
            self.raw_put(key, some_bytes(i))
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
