"""Google Cloud Storage: four processes at once, uploads of which the service takes less than was sent, what the command line says."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import races
import stores
from gcs_rig import Answer, Request, Service, says, write
from procs import Nursery

from ckptstore import Store
from ckptstore.backends.gcs import GcsBackend
from ckptstore.cli import main
from ckptstore.errors import AlreadyExists, Ambiguous, BackendError, Transient

pytest_plugins = ("gcs_fixtures",)

_UNIT = 256 << 10
_BIG = bytes(range(256)) * (5 << 12)  # 5 MiB: a resumable upload
Obey = Callable[[], Answer]


def test_four_processes_create_and_one_wins_each_time(fake_gcs: Service, racers: Nursery) -> None:
    races.check_creations(racers, fake_gcs.url())


@pytest.mark.parametrize("owners", races.OWNERS)
def test_four_processes_save_under_one_name_and_none_loses(fake_gcs: Service, racers: Nursery, owners: str) -> None:
    races.check_saves(racers, fake_gcs.url(keep_last="all"), races.OWNERS[owners])


# --- uploads


def name_of(backend: GcsBackend, key: str) -> str:
    return f"{backend.url.partition('//')[2].partition('/')[2]}/{key}"


def test_a_service_that_takes_less_than_was_sent_gets_the_rest(fake_gcs: Service) -> None:
    """It may keep any multiple of 256 KiB of a request, of the last one, too, and says how much."""

    def takes_some(obey: Obey, request: Request) -> Answer:
        request.body = request.body[: 2 * _UNIT]
        return obey()

    backend = fake_gcs.backend()
    with fake_gcs.layer.fated(takes_some, "part") as seen:
        checksum = write(backend, "data/x", _BIG)
    assert seen["part"] >= len(_BIG) // (2 * _UNIT)
    assert fake_gcs.raw_get(name_of(backend, "data/x")) == _BIG
    assert backend.stat("data/x").checksum == checksum


@pytest.mark.parametrize(
    ("reached", "error", "message"),
    [({}, Transient, "took nothing"), ({"Range": "bytes=0-99999999"}, BackendError, "should be between")],
    ids=["nothing", "more than was sent"],
)
def test_a_service_that_lost_count(fake_gcs: Service, reached: dict[str, str], error: type[BackendError], message: str) -> None:
    backend = fake_gcs.backend()
    with fake_gcs.layer.fated(lambda obey, request: Answer(308, b"", reached), "part"), pytest.raises(error, match=message):
        write(backend, "data/x", _BIG)
    assert [*backend.list("")] == []


def test_a_service_that_forgets_what_it_had_confirmed(fake_gcs: Service) -> None:
    backend = fake_gcs.backend()
    writer = backend.open_writer("data/x")
    writer.write(0, memoryview(_BIG), 0)
    fated = fake_gcs.layer.fated(lambda obey, request: Answer(308, b"", {"Range": "bytes=0-9"}), "part")
    with fated, pytest.raises(BackendError, match="should be between") as caught:
        writer.finish()
    assert not isinstance(caught.value, Transient)
    writer.abort()
    assert [*backend.list("")] == []


@pytest.mark.parametrize("size", [3, len(_BIG)])
@pytest.mark.parametrize("about", [{"crc32c": "AAAAAA=="}, {"size": "2"}], ids=["checksum", "size"])
def test_what_arrived_otherwise_than_sent_is_removed(fake_gcs: Service, size: int, about: dict[str, str]) -> None:
    def other(obey: Obey, request: Request) -> Answer:
        answer = obey()
        return Answer(200, json.dumps({**json.loads(answer.body), **about}).encode()) if answer.status == 200 else answer

    backend = fake_gcs.backend()
    with fake_gcs.layer.fated(other, "create", "part"), pytest.raises(BackendError, match="damaged"):
        write(backend, "data/x", _BIG[:size])
    assert [*backend.list("")] == []


@pytest.mark.parametrize("size", [3, len(_BIG)])
def test_bytes_changed_on_the_way_are_refused(fake_gcs: Service, size: int) -> None:
    """A small file's checksum goes along, and the service compares it; a large one's is compared afterwards."""

    def changes(obey: Obey, request: Request) -> Answer:
        request.body = request.body.replace(b"\x00\x01\x02", b"\x00\x01\x03", 1)
        return obey()

    backend = fake_gcs.backend()
    with fake_gcs.layer.fated(changes, "create", "part"), pytest.raises(BackendError, match=r"CRC32C|damaged"):
        write(backend, "data/x", _BIG[:size])
    assert [*backend.list("")] == []


def test_an_error_inside_a_200_is_an_error(fake_gcs: Service) -> None:
    """Nothing was created, and nobody must believe it."""
    inside = Answer(200, says(500).body)
    backend = fake_gcs.backend()
    with fake_gcs.layer.fated(lambda obey, request: inside, "create"):
        with pytest.raises(Ambiguous, match="because"):
            backend.put_if_absent("log/x", b"record")
        with pytest.raises(Transient, match="because"):
            write(backend, "data/x", b"small")
    with fake_gcs.layer.fated(lambda obey, request: inside, "part"), pytest.raises(Transient, match="because"):
        write(backend, "data/x", _BIG)
    assert [*backend.list("")] == []


@pytest.mark.parametrize("size", [3, len(_BIG)])
def test_ones_own_write_is_no_conflict(fake_gcs: Service, size: int) -> None:
    """Something on the way sends it twice, and the answer is that of the second time."""

    def twice(obey: Obey, request: Request) -> Answer:
        answer = obey()
        return says(412) if answer.status == 200 else answer

    backend = fake_gcs.backend()
    with fake_gcs.layer.fated(twice, "create", "part"):
        checksum = write(backend, "data/x", _BIG[:size])
    assert backend.stat("data/x").checksum == checksum
    with pytest.raises(AlreadyExists):
        write(backend, "data/x", bytes(size))


def test_reads_are_of_one_generation(fake_gcs: Service) -> None:
    backend = fake_gcs.backend()
    backend.replace("data/x", b"first version")
    backend.stat("data/x")
    buffer = memoryview(bytearray(5))
    backend.read_into("data/x", 0, buffer)
    backend.replace("data/x", b"other content")
    with pytest.raises(BackendError, match="replaced"):
        backend.read_into("data/x", 6, buffer)


# --- the command line


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "gcloud auth"), (403, "Storage Object User"), (404, "bucket"), (429, "429"), (503, "503"), (400, "because")],
)
def test_each_trouble_is_one_line(fake_gcs: Service, capsys: pytest.CaptureFixture[str], status: int, advice: str) -> None:
    with fake_gcs.layer.fated(lambda obey, request: says(status)):
        assert main(["ls", fake_gcs.url(retry_seconds=0)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert advice in line


def test_a_folder_that_is_not_a_store(fake_gcs: Service, capsys: pytest.CaptureFixture[str]) -> None:
    url = fake_gcs.url()
    fake_gcs.raw_put(url.partition("?")[0].removeprefix(f"gs://{fake_gcs.bucket}/") + "/photos/1.jpg", b"x")
    assert main(["ls", url]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "no store" in line


def test_verify_remote_downloads_nothing(fake_gcs: Service, capsys: pytest.CaptureFixture[str]) -> None:
    url = fake_gcs.url()
    with Store(url) as store:
        made = stores.write(store, files={"state.pt": _BIG})

    def no_data(obey: Obey, request: Request) -> Answer:
        return says(500) if request.kind == "read" and request.path.endswith("state.pt") else obey()

    with fake_gcs.layer.fated(no_data):
        assert main(["verify", "--remote", url]) == 0
    assert "1 checkpoint whole" in capsys.readouterr().out
    (name,) = [key for key in fake_gcs.raw_keys("") if made in key and key.endswith("state.pt")]
    fake_gcs.raw_put(name, (fake_gcs.raw_get(name) or b"")[:-1] + b"x")
    assert main(["verify", "--remote", url]) == 1
    assert "state.pt" in capsys.readouterr().out
