"""Google Cloud Storage under test: fake-gcs-server behind an HTTP layer that does what that leaves out, or that lets things go wrong.

The layer is written from the reference of the JSON API, https://cloud.google.com/storage/docs/json_api/v1: it obeys the preconditions on
generations, compares CRC-32C, and holds resumable uploads, which the server behind it would take without conditions.
"""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from awscrt.checksums import crc32c

from ckptstore.backends.gcs import GcsBackend
from ckptstore.protocol import Backend

_UNIT = 256 << 10


@dataclass
class Request:
    """What a client has sent."""

    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes

    @property
    def kind(self) -> str:
        """What it is for, in a word."""
        if self.method == "GET":
            return "list" if self.path.endswith("/o") else "read" if self.query.get("alt") == "media" else "stat"
        if "upload_id" in self.query:
            return "cancel" if self.method == "DELETE" else "part"
        if self.method == "DELETE":
            return "delete"
        return "begin" if self.query.get("uploadType") == "resumable" else "create"


@dataclass
class Answer:
    """What goes back."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def says(status: int, message: str = "because") -> Answer:
    """Return an error, in the form that the service has for them."""
    return Answer(status, json.dumps({"error": {"code": status, "message": message}}).encode())


Fate = Callable[[Callable[[], Answer], Request], "Answer | None"]
"""Decides from (obey, request) what becomes of a request: an answer, or None to hang up without one."""


@dataclass
class _Upload:
    bucket: str
    about: dict[str, Any]
    condition: str | None
    data: bytearray = field(default_factory=bytearray)
    finished: Answer | None = None


class GcsLayer:
    """The layer, at `url`. `fate` decides what becomes of requests; `seen` counts them by kind."""

    def __init__(self, server: str) -> None:
        self._server = urlsplit(server).netloc
        self._one_at_a_time = threading.RLock()
        self._uploads: dict[str, _Upload] = {}
        self._numbers = itertools.count(1)
        self.seen: Counter[str] = Counter()
        self.fate: Fate | None = None
        layer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def handle_one_request(self) -> None:
                with suppress(ConnectionError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def do_GET(self) -> None:
                split = urlsplit(self.path)
                query = {k: v[-1] for k, v in parse_qs(split.query).items()}
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if len(body) < length:  # the client has hung up
                    self.close_connection = True
                    return
                answer = layer.handle(Request(self.command, split.path, query, self.headers, body))
                if answer is None:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)

            do_POST = do_PUT = do_DELETE = do_GET

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @contextmanager
    def fated(self, fate: Fate, *kinds: str) -> Iterator[Counter[str]]:
        """Let `fate` decide about requests of these kinds, or about all. Yields how many of each kind were sent."""
        self.seen.clear()
        self.fate = lambda obey, request: fate(obey, request) if not kinds or request.kind in kinds else obey()
        try:
            yield self.seen
        finally:
            self.fate = None

    def handle(self, request: Request) -> Answer | None:
        """Answer one request."""
        self.seen[request.kind] += 1
        obey = lambda: self.obey(request)  # noqa: E731
        return self.fate(obey, request) if self.fate else obey()

    def obey(self, request: Request) -> Answer:
        """Do what is asked, as the reference says."""
        if "upload_id" in request.query:
            return self._go_on(request)
        if match := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", request.path):
            return self._begin(match[1], request)
        match = re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)", request.path)
        if not match:
            return self.ask(request.method, request.path, request.query)
        with self._one_at_a_time:
            asked = request.query.pop("ifGenerationMatch", None) or request.query.pop("generation", None)
            if asked and asked != self.generation(match[1], unquote(match[2])):
                return says(412 if asked == "0" or request.method == "GET" else 404, "conditionNotMet")
            if request.method == "DELETE":
                return self.ask("DELETE", request.path, request.query)
        answer = self.ask("GET", request.path, request.query)
        if answer.status != 200 or not request.headers["Range"]:
            return answer
        # The server behind hangs up when asked for a range of an empty object.
        first, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
        if int(first) >= len(answer.body):
            return says(416, "Requested range not satisfiable")
        return Answer(206, answer.body[int(first) : int(last) + 1], answer.headers)

    def generation(self, bucket: str, name: str) -> str:
        """Return the generation of an object, "0" if there is none."""
        found = self.ask("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")
        return str(json.loads(found.body)["generation"]) if found.status == 200 else "0"

    def create(self, bucket: str, about: dict[str, Any], data: bytes, condition: str | None) -> Answer:
        """Make an object, if its generation is `condition`."""
        if about.get("crc32c") not in (None, base64.b64encode(crc32c(data).to_bytes(4, "big")).decode()):
            return says(400, "Provided CRC32C does not match the calculated one")
        with self._one_at_a_time:
            if condition is not None and condition != self.generation(bucket, about["name"]):
                return says(412, "At least one of the pre-conditions you specified did not hold.")
            query = {"uploadType": "media", "name": about["name"]}
            return self.ask("POST", f"/upload/storage/v1/b/{bucket}/o", query, data)

    def ask(self, method: str, path: str, query: dict[str, str] | None = None, data: bytes = b"") -> Answer:
        """Have the server behind do it."""
        parameters = "&".join(f"{k}={quote(v, safe='')}" for k, v in (query or {}).items())
        with closing(http.client.HTTPConnection(self._server)) as connection:
            connection.request(method, f"{path}?{parameters}", data or None, {"Content-Length": str(len(data))})
            response = connection.getresponse()
            return Answer(response.status, response.read(), {"Content-Type": response.headers["Content-Type"] or "text/plain"})

    def _begin(self, bucket: str, request: Request) -> Answer:
        condition = request.query.get("ifGenerationMatch")
        if request.query["uploadType"] == "multipart":
            return self.create(bucket, *_parts(request.body), condition)
        about = json.loads(request.body or b"{}")
        about.setdefault("name", request.query.get("name"))
        if request.query["uploadType"] == "media":
            return self.create(bucket, about, request.body, condition)
        if self.ask("GET", f"/storage/v1/b/{bucket}").status == 404:
            return says(404, "The specified bucket does not exist.")
        number = f"upload-{next(self._numbers)}"
        self._uploads[number] = _Upload(bucket, about, condition)
        here = request.headers["Host"]  # there may be a proxy in front
        return Answer(200, b"", {"Location": f"http://{here}{request.path}?uploadType=resumable&upload_id={number}"})

    def _go_on(self, request: Request) -> Answer:
        """See https://cloud.google.com/storage/docs/performing-resumable-uploads."""
        upload = self._uploads.get(request.query["upload_id"])
        if upload is None:
            return says(404, "no such upload")
        if request.method == "DELETE":
            del self._uploads[request.query["upload_id"]]
            return Answer(499)
        if upload.finished:
            return upload.finished
        span, _, total = request.headers["Content-Range"].removeprefix("bytes ").partition("/")
        if span != "*":
            start = int(span.partition("-")[0])
            if start > len(upload.data) or (total == "*" and len(request.body) % _UNIT):
                return says(400, "a gap, or no multiple of 256 KiB")
            upload.data[start:] = request.body
        if total == "*" or int(total) != len(upload.data):
            there = {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {}
            return Answer(308, b"", there)
        answer = self.create(upload.bucket, upload.about, bytes(upload.data), upload.condition)
        upload.finished = answer if answer.status == 200 else None
        return answer


def _parts(body: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the two parts of a ``multipart/related`` body: what is said of the object, and its data."""
    boundary = body.partition(b"\n")[0].rstrip()
    newline = b"\r\n" if body[len(boundary) :].startswith(b"\r\n") else b"\n"
    _, about, data, _ = body.split(boundary)
    return json.loads(about.partition(2 * newline)[2]), data.partition(2 * newline)[2].removesuffix(newline)


class Service:
    """A running service, reached through the layer in front of it."""

    def __init__(self, server: str) -> None:
        self.layer = GcsLayer(server)
        self.bucket = "bucket"
        made = json.dumps({"name": self.bucket}).encode()
        assert self.layer.ask("POST", "/storage/v1/b", {"project": "p"}, made).status == 200
        self.options = {"endpoint_url": self.layer.url, "anon": "1"}
        self._numbers = itertools.count(1)

    def place(self) -> str:
        """Return a bucket and a prefix that nobody has used."""
        return f"{self.bucket}/runs/{next(self._numbers)}"

    def backend(self, location: str = "", **options: str) -> GcsBackend:
        """Open a backend at a location, by default a new one."""
        return GcsBackend.open(location or self.place(), {**self.options, **options})

    def url(self, **options: Any) -> str:
        """Return the URL of a new store."""
        given = {**self.options, "retry_seconds": 20, **options}
        return f"gs://{self.place()}?" + "&".join(f"{k}={v}" for k, v in given.items())

    # --- past the backend and the layer

    def raw_get(self, name: str) -> bytes | None:
        """Return the content of an object."""
        answer = self.layer.ask("GET", self._path(name), {"alt": "media"})
        return answer.body if answer.status == 200 else None

    def raw_put(self, name: str, data: bytes) -> None:
        """Make or overwrite an object."""
        query = {"uploadType": "media", "name": name}
        assert self.layer.ask("POST", f"/upload/storage/v1/b/{self.bucket}/o", query, data).status == 200

    def raw_keys(self, prefix: str) -> list[str]:
        """Return the names of all objects with this prefix, without it."""
        found = json.loads(self.layer.ask("GET", f"/storage/v1/b/{self.bucket}/o", {"prefix": prefix}).body)
        return [item["name"].removeprefix(prefix) for item in found.get("items", ())]

    def _path(self, name: str) -> str:
        return f"/storage/v1/b/{self.bucket}/o/{quote(name, safe='')}"


def write(backend: Backend, key: str, data: bytes, part: int = 1 << 20) -> str | None:
    """Write an object in parts."""
    writer = backend.open_writer(key)
    for number, start in enumerate(range(0, len(data), part)):
        writer.write(start, memoryview(data)[start : start + part], number)
    return writer.finish()
