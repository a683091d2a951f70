"""The S3 backend on real servers: the conformance suite, the data path, checksums, listings, options."""

from __future__ import annotations

import ctypes
import http.client
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from s3_rig import PART, TIMEOUT, Service, keys, loses, on_wire, once, passes, says, some_bytes, write

from ckptstore import errors
from ckptstore.backends import _s3_bucket as bucket_module
from ckptstore.backends import s3 as s3_module
from ckptstore.backends.s3 import S3Backend
from ckptstore.errors import StoreWarning
from ckptstore.protocol import Backend
from ckptstore.testing import BackendConformance

pytest_plugins = ("s3_fixtures",)


# --- conformance


class Conformance(BackendConformance):
    finish_may_overwrite = True  # no key of a data file is ever used twice, so that it is not worth a condition
    rounds = 2
    many = 30  # see test_pages
    server: Service

    @pytest.fixture
    def _open_place(self, _server: Service, tmp_path: Path) -> Iterator[None]:
        self.server, self.location = _server, _server.place()
        self.bucket, _, self.root = self.location.partition("/")
        self.secrets = [_server.secret, _server.key_id]
        self.place = tmp_path
        self.backend = self.make_backend(tmp_path)
        yield
        self.backend.close()

    @pytest.fixture(autouse=True)
    def _opened(self, _open_place: None) -> None:
        """The suite's own fixture opens the backend before it could ask for a server."""

    def make_backend(self, place: Path) -> Backend:
        return self.server.backend(self.location)

    @property
    def raw(self) -> Any:
        return self.server.client

    def raw_get(self, key: str) -> bytes | None:
        try:
            data: bytes = self.raw.get_object(Bucket=self.bucket, Key=f"{self.root}/{key}")["Body"].read()
        except self.raw.exceptions.NoSuchKey:
            return None
        return data

    def raw_put(self, key: str, data: bytes) -> None:
        self.raw.put_object(Bucket=self.bucket, Key=f"{self.root}/{key}", Body=data)

    def raw_keys(self) -> Sequence[str]:
        pages = self.raw.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{self.root}/")
        keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        for item in self.raw.list_multipart_uploads(Bucket=self.bucket, Prefix=f"{self.root}/").get("Uploads", ()):
            upload = re.sub("[^0-9A-Za-z]", lambda m: f"={ord(m[0]):02X}", item["UploadId"])
            keys.append(f"{item['Key']}.{upload}.partial")
        return [key.removeprefix(f"{self.root}/") for key in keys]

    def test_unfinished_uploads_are_leftovers(self) -> None:
        for name in ("b", "a"):
            self.backend.open_writer(f"data/x/{name}").write(0, memoryview(bytes(PART)), 0)
        self.write("data/x/a-b", b"x")
        self.raw_put("log/1", b"x")
        found = self.keys("data/")
        assert found == sorted(found)
        assert [re.sub(r"\..*\.", ".", key) for key in found] == ["data/x/a-b", "data/x/a.partial", "data/x/b.partial"]
        assert sorted(self.raw_keys()) == [*found, "log/1"]
        assert self.keys("data/", found[1]) == found[2:]
        self.backend.delete(found)
        self.backend.delete(found)
        assert [*self.raw_keys()] == ["log/1"]


class TestSeaweedFS(Conformance):
    @pytest.fixture
    def _server(self, server: Service) -> Service:
        return server


class TestMoto(Conformance):
    @pytest.fixture
    def _server(self, simple_server: Service) -> Service:
        return simple_server


# --- the data path


def test_parts_go_out_as_they_are_and_the_service_checks_and_keeps_the_checksum(backend: S3Backend) -> None:
    data = some_bytes(3 * PART + 7)
    with on_wire(backend, passes) as seen:
        checksum = write(backend, "data/x/state.pt", data)
    assert seen == {"CreateMultipartUpload": 1, "UploadPart": 4, "CompleteMultipartUpload": 1, "HeadObject": 1}
    assert checksum is not None and checksum.startswith("crc64nvme:")
    assert checksum == s3_module.spelled(s3_module.crc64nvme(data)) == backend.stat("data/x/state.pt").checksum


@pytest.mark.parametrize("size", [PART, 2 * PART])
def test_a_slow_connection_needs_to_take_only_a_little_within_its_time_out(
    backend: S3Backend, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Python's `sendall` must be done with all that it is given before the time-out, which at first is that for connecting."""
    given: list[int] = []
    send = http.client.HTTPConnection.send

    def sends(self: Any, data: Any) -> None:
        given.append(len(data))
        send(self, data)

    monkeypatch.setattr(http.client.HTTPConnection, "send", sends)
    write(backend, "data/x/state.pt", bytes(size))
    assert sum(given) > size
    assert max(given) <= 1 << 18


def test_a_file_of_one_part_is_one_request(backend: S3Backend) -> None:
    with on_wire(backend, passes) as seen:
        checksum = write(backend, "data/x/state.pt", b"abc")
    assert seen == {"PutObject": 1}
    assert checksum == "crc64nvme:05e5cabb3fc1faeb"


def test_a_short_first_part_goes_along_once_there_is_a_second(backend: S3Backend) -> None:
    backend = S3Backend.open(backend.url.removeprefix("s3://"), {**backend._bucket._options, "part_size": "6M"})
    first, second = some_bytes(PART), some_bytes(PART, 1)
    writer = backend.open_writer("data/x/state.pt")
    buffer = bytearray(first)
    writer.write(0, memoryview(buffer), 0)
    buffer[:] = bytes(len(buffer))
    with on_wire(backend, once(says(503, "SlowDown")), "UploadPart"), pytest.raises(errors.Throttled):
        writer.write(len(first), memoryview(second), 1)
    writer.write(len(first), memoryview(second), 1)  # as what is above repeats it
    writer.finish()
    read = bytearray(2 * PART)
    backend.read_into("data/x/state.pt", 0, memoryview(read))
    assert read == first + second


@pytest.mark.parametrize("size", [3, 2 * PART])
def test_bytes_changed_on_the_way_are_refused_by_the_service(
    backend: S3Backend, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    write(backend, "data/x/ok", b"")
    for module in (s3_module, bucket_module):
        monkeypatch.setattr(module, "crc64nvme", lambda data, before=0: 12345)
    writer = backend.open_writer("data/x/state.pt")
    with pytest.raises(errors.Transient, match="changed on their way"):
        writer.write(0, memoryview(bytes(size)), 0)
        writer.finish()
    with pytest.raises(errors.Transient, match="changed on their way"):
        backend.put_if_absent("log/1", b"x")
    writer.abort()
    assert keys(backend) == ["data/x/ok"]


def test_a_wrong_checksum_of_the_whole_is_refused(backend: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "combine", lambda parts: 12345)
    with pytest.raises(errors.BackendError):
        write(backend, "data/x/state.pt", bytes(2 * PART))
    assert not [key for key in keys(backend) if not key.endswith(".partial")]


@pytest.mark.parametrize("removable", [True, False])
def test_what_arrived_otherwise_than_sent_is_removed(simple_server: Service, removable: bool) -> None:
    """A service that knows no checksums, and stores less than it got."""
    backend = simple_server.backend()

    def cuts(send: Any, request: Any) -> Any:
        place = {**backend._bucket._always, "Key": f"{backend._bucket.root}data/x/state.pt"}
        stored = simple_server.client.put_object(**place, Body=b"ab")
        return says(200, headers={"ETag": stored["ETag"]})(send, request)

    writer = backend.open_writer("data/x/state.pt")
    writer.write(0, memoryview(b"abc"), 0)
    refuses = passes if removable else says(403, "AccessDenied")
    expected = errors.BackendError if removable else errors.Ambiguous
    with (
        on_wire(backend, cuts, "PutObject"),
        on_wire(backend, refuses, "DeleteObjects"),
        pytest.raises(errors.BackendError, match="arrived as 2 bytes") as caught,
    ):
        writer.finish()
    assert type(caught.value) is expected
    assert keys(backend) == ([] if removable else ["data/x/state.pt"])


def test_what_is_read_goes_straight_to_its_place(backend: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    data = some_bytes(PART)
    write(backend, "data/x/state.pt", data)
    given: list[int] = []
    connections: list[object] = []
    connect, readinto = http.client.HTTPConnection.connect, http.client.HTTPResponse.readinto

    def connects(self: Any) -> None:
        connections.append(self)
        connect(self)

    def reads(self: Any, buffer: memoryview) -> int:
        given.append(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))
        return readinto(self, buffer)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", connects)
    monkeypatch.setattr(http.client.HTTPResponse, "readinto", reads)
    into = bytearray(len(data))
    start = ctypes.addressof(ctypes.c_char.from_buffer(into))
    for offset in (0, PART // 2):
        backend.read_into("data/x/state.pt", offset, memoryview(into)[offset : offset + PART // 2])
    assert into == data
    assert given and all(start <= where < start + PART for where in given)
    assert not connections, "each answer was read to its end, so that the connection can be used again"


def test_what_is_read_by_another_urllib3_gets_there_too(backend: S3Backend) -> None:
    """It need not have what we look for below it."""
    data = some_bytes(PART)
    write(backend, "data/x/state.pt", data)

    class Other(io.BytesIO):
        status = 206

    def answers(send: Any, request: Any) -> Any:
        real = send(request)
        return AWSResponse(request.url, 206, real.headers, Other(real.content))

    into = bytearray(len(data))
    with on_wire(backend, answers, "GetObject") as seen:
        backend.read_into("data/x/state.pt", 0, memoryview(into))
    assert into == data
    assert seen == {"GetObject": 1}


def test_reads_are_of_one_version(backend: S3Backend) -> None:
    write(backend, "data/x/state.pt", b"first version")
    buffer = memoryview(bytearray(5))
    backend.read_into("data/x/state.pt", 0, buffer)
    backend.replace("data/x/state.pt", b"other content")
    with pytest.raises(errors.Unreadable, match="overwritten"):
        backend.read_into("data/x/state.pt", 8, buffer)
    backend.stat("data/x/state.pt")  # whoever begins anew
    backend.read_into("data/x/state.pt", 0, buffer)
    assert bytes(buffer) == b"other"


def test_reads_of_a_service_that_cannot_compare_versions(backend: S3Backend) -> None:
    def refuses(send: Any, request: Any) -> Any:
        return says(412, "PreconditionFailed")(send, request) if "If-Match" in request.headers else None

    write(backend, "data/x/state.pt", b"first version")
    backend.stat("data/x/state.pt")
    buffer = memoryview(bytearray(5))
    with on_wire(backend, refuses, "GetObject") as seen:
        for _ in range(3):
            backend.read_into("data/x/state.pt", 0, buffer)
        assert bytes(buffer) == b"first"
        assert seen == {"GetObject": 4}  # it was asked once
        backend.replace("data/x/state.pt", b"other content")
        with pytest.raises(errors.Unreadable, match="overwritten"):
            backend.read_into("data/x/state.pt", 0, buffer)


def test_the_memory_of_versions_is_bounded(backend: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "_PINS", 2)
    for i in range(4):
        backend.replace(f"data/{i}", b"x")
        backend.stat(f"data/{i}")
    backend.replace("log/1", b"x")
    backend.stat("log/1")
    assert [*backend._pins] == ["data/2", "data/3"]


def test_an_answer_without_its_last_bytes_is_an_error(backend: S3Backend) -> None:
    write(backend, "data/x/state.pt", b"0123456789")

    def cuts(send: Any, request: Any) -> Any:
        answer = send(request)
        answer.raw.read(4)
        return answer

    with on_wire(backend, cuts, "GetObject"):
        with pytest.raises(errors.Transient):
            backend.read_into("data/x/state.pt", 0, memoryview(bytearray(10)))
        with pytest.raises(errors.Transient):
            backend.get("data/x/state.pt", 100)


def test_used_on_both_sides_of_a_fork(backend: S3Backend) -> None:
    backend.replace("hint", b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads around
        child = os.fork()
    if not child:
        try:
            os._exit(0 if backend.get("hint", 10) == b"x" else 1)
        except BaseException:
            os._exit(2)
    assert backend.get("hint", 10) == b"x"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- checksums of services that do not know ours


def test_a_service_that_ignores_the_checksum_is_noticed(simple_server: Service) -> None:
    del simple_server.options["checksum"]
    backend = simple_server.backend()
    with pytest.warns(StoreWarning, match="checksum=when_required"):
        backend.put_if_absent("log/1", b"x")
    assert write(backend, "data/x/small", b"abc") == "md5:900150983cd24fb0d6963f7d28e17f72"
    assert write(backend, "data/x/large", some_bytes(2 * PART)) is None
    assert backend.stat("data/x/large").size == 2 * PART


@pytest.mark.parametrize("size", [3, 2 * PART])
@pytest.mark.parametrize("code", ["NotImplemented", "InvalidArgument"])
def test_a_service_that_refuses_the_checksum_is_noticed(backend: S3Backend, size: int, code: str) -> None:
    """Whatever is sent first; and Content-MD5 goes along instead, with deletions as well."""

    def refuses(send: Any, request: Any) -> Any:
        if any(name.lower().startswith("x-amz-checksum-") and name != "x-amz-checksum-mode" for name in request.headers):
            return says(501 if code == "NotImplemented" else 400, code)(send, request)
        if request.headers.get("Content-MD5"):
            with_md5[request.method] += 1
        return None

    data = some_bytes(size)
    with_md5: Counter[str] = Counter()
    with on_wire(backend, refuses):
        with pytest.warns(StoreWarning, match="Content-MD5"):
            write(backend, "data/x/state.pt", data)
        backend.put_if_absent("log/1", b"x")
        with pytest.raises(errors.AlreadyExists):
            backend.put_if_absent("log/1", b"x")
        read = bytearray(size)
        backend.read_into("data/x/state.pt", 0, memoryview(read))
        assert read == data
        backend.delete(["data/x/state.pt", "log/1"])
    assert with_md5 == {"PUT": 2 + (size + PART - 1) // PART, "POST": 1}
    assert keys(backend) == []


def test_changes_on_the_way_to_a_service_without_checksums_are_refused(server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = server.backend(checksum="when_required")
    monkeypatch.setattr(bucket_module, "_md5", lambda data: "AAAAAAAAAAAAAAAAAAAAAA==")
    with on_wire(backend, passes) as seen, pytest.raises(errors.Transient, match="changed on their way"):
        backend.put_if_absent("log/1", b"x")
    assert seen == {"PutObject": 1}


def test_the_sdk_s_own_setting_is_obeyed(simple_server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    del simple_server.options["checksum"]
    simple_server.backend().put_if_absent("log/1", b"x")  # no warning


# --- listings and deletions


@pytest.mark.parametrize("operation", ["ListObjectsV2", "ListMultipartUploads"])
def test_a_listing_error_is_never_an_end(backend: S3Backend, operation: str) -> None:
    backend.replace("data/x", b"x")
    backend.replace("data/y", b"x")
    root = f"List{'Bucket' if operation == 'ListObjectsV2' else 'MultipartUploads'}Result"
    for answer, error in (
        (says(500, "InternalError"), errors.Transient),
        (says(403, "AccessDenied"), errors.PermissionDenied),
        (loses(TIMEOUT, after=True), errors.Transient),
        (says(200, f"<{root}><IsTruncated>true</IsTruncated></{root}>"), errors.BackendError),
    ):
        with on_wire(backend, answer, operation), pytest.raises(error):
            keys(backend)
    assert keys(backend) == ["data/x", "data/y"]


def test_pages(backend: S3Backend) -> None:
    def small_pages(params: dict[str, Any], **_: Any) -> None:
        params["MaxKeys"] = 2

    def small_uploads(params: dict[str, Any], **_: Any) -> None:
        params["MaxUploads"] = 2

    events = backend._bucket._connected().meta.events
    events.register("provide-client-params.s3.ListObjectsV2", small_pages)
    events.register("provide-client-params.s3.ListMultipartUploads", small_uploads)
    for i in range(5):
        backend.replace(f"data/{i}", b"x")
        backend.open_writer(f"data/{i}").write(0, memoryview(bytes(PART)), 0)
    with on_wire(backend, passes) as seen:
        found = keys(backend)
    assert seen == {"ListObjectsV2": 3, "ListMultipartUploads": 3}
    assert [re.sub(r"\..*\.", ".", key) for key in found] == [f"data/{i}{s}" for i in range(5) for s in ("", ".partial")]
    backend.delete(found)
    assert keys(backend) == []


def test_deletions_of_more_than_one_request_takes(backend: S3Backend) -> None:
    backend.replace("data/x", b"x")
    with on_wire(backend, passes) as seen:
        backend.delete([*(f"data/{i}" for i in range(1000)), "data/x"])
    assert seen == {"DeleteObjects": 2}
    assert keys(backend) == []


def test_services_that_list_in_no_order(backend: S3Backend) -> None:
    """As S3 Express does, which refuses to begin after a key, too."""
    unordered = S3Backend(backend._bucket, ordered=False)
    for i in range(5):
        backend.replace(f"log/{i}", b"x")

    def shuffled(parsed: dict[str, Any], **_: Any) -> None:
        parsed["Contents"].reverse()

    events = backend._bucket._connected().meta.events
    events.register("after-call.s3.ListObjectsV2", shuffled)
    assert keys(backend, "log/") == [f"log/{i}" for i in range(4, -1, -1)]
    with on_wire(backend, lambda send, request: passes(send, request) if "start-after" not in request.url else 1 / 0):
        assert [info.key for info in unordered.list("log/", "log/1")] == ["log/2", "log/3", "log/4"]
    assert not S3Backend.open("bucket--use1-az4--x-s3", {})._ordered


def test_a_folder_made_in_a_browser_is_no_object(backend: S3Backend) -> None:
    backend._bucket.call("put_object", "", Body=b"")
    assert keys(backend) == []


def test_a_deletion_refused_inside_the_answer_is_an_error(backend: S3Backend) -> None:
    backend.replace("data/x", b"x")
    for code, error in (
        ("AccessDenied", errors.PermissionDenied),
        ("InternalError", errors.Transient),
        ("SlowDown", errors.Throttled),
    ):
        entry = f"<Error><Key>data/x</Key><Code>{code}</Code><Message>no</Message></Error>"
        answer = says(200, f"<DeleteResult>{entry}</DeleteResult>")
        with on_wire(backend, answer, "DeleteObjects"), pytest.raises(error, match=code):
            backend.delete(["data/x"])
    entry = "<Error><Key>data/x</Key><Code>NoSuchKey</Code><Message>no</Message></Error>"
    with on_wire(backend, says(200, f"<DeleteResult>{entry}</DeleteResult>"), "DeleteObjects"):
        backend.delete(["data/x"])


# --- options


def test_options_reach_the_service(backend: S3Backend) -> None:
    sent: list[Mapping[str, str]] = []

    def record(send: Any, request: Any) -> Any:
        sent.append({k.lower(): v if isinstance(v, str) else v.decode() for k, v in request.headers.items()})
        return says(403, "AccessDenied")(send, request)

    options = {"sse": "aws:kms", "sse_kms_key_id": "key-1", "request_payer": "requester", "region": "eu-west-3"}
    backend = S3Backend.open(backend.url.removeprefix("s3://"), {**backend._bucket._options, **options})
    writer = backend.open_writer("data/x")
    with on_wire(backend, record):
        for call in (
            lambda: backend.put_if_absent("log/1", b"x"),
            lambda: writer.write(0, memoryview(bytes(PART)), 0),
            lambda: backend.get("log/1", 1),
            lambda: keys(backend, "log/"),
            lambda: backend.delete(["log/1"]),
        ):
            with pytest.raises(errors.PermissionDenied):
                call()
    assert len(sent) == 5
    assert all(h["x-amz-request-payer"] == "requester" and "/eu-west-3/s3/" in h["authorization"] for h in sent)
    assert all(h["x-amz-server-side-encryption"] == "aws:kms" for h in sent[:2])
    assert all(h["x-amz-server-side-encryption-aws-kms-key-id"] == "key-1" for h in sent[:2])


def test_encrypted_objects_have_no_md5() -> None:
    digest = '"900150983cd24fb0d6963f7d28e17f72"'
    assert bucket_module.recorded({"ETag": digest}) == "md5:900150983cd24fb0d6963f7d28e17f72"
    assert bucket_module.recorded({"ETag": digest, "ServerSideEncryption": "aws:kms"}) is None
    assert bucket_module.recorded({"ETag": '"900150983cd24fb0d6963f7d28e17f72-2"'}) is None
    assert bucket_module.recorded({"ChecksumCRC64NVME": "AAAAAAAAAAE=", "ChecksumType": "COMPOSITE"}) is None


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Amazon's buckets are hosts; others' are folders, unless the AWS configuration says otherwise."""
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    urls: list[str] = []

    def stop(send: Any, request: Any) -> Any:
        urls.append(request.url.partition("?")[0])
        raise ConnectionResetError

    for options in ({"region": "eu-central-1"}, {"endpoint_url": "https://minio.example.com:9000"}):
        backend = S3Backend.open("my-bucket/run", {**options, "anonymous": "1"})
        with on_wire(backend, stop), pytest.raises(errors.Transient):
            backend.get("log/1", 10)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://elsewhere.example.com")
    backend = S3Backend.open("my-bucket/run", {"anonymous": "1"})
    with on_wire(backend, stop), pytest.raises(errors.Transient):
        backend.get("log/1", 10)
    assert urls == [
        "https://my-bucket.s3.eu-central-1.amazonaws.com/run/log/1",
        "https://minio.example.com:9000/my-bucket/run/log/1",
        "http://elsewhere.example.com/my-bucket/run/log/1",
    ]
