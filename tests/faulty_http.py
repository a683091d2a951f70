"""A reverse proxy in front of a real HTTP service, which does to chosen requests what networks and services do.

It reads each request whole, and sends it on as it came: with its ``Host``, which is part of an S3 signature. A request without a
``Content-Length`` is refused (411).
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

__all__ = [
    "Answer",
    "Exchange",
    "Fault",
    "FaultyProxy",
    "Late",
    "Request",
    "answer",
    "conflict_after",
    "cut",
    "cut_request",
    "error_inside",
    "lost",
    "silent",
    "silent_after",
    "stale",
    "unanswered",
]


@dataclass(frozen=True)
class Request:
    """One request of a client."""

    method: str
    path: str
    """With the query, as it came."""
    headers: list[tuple[str, str]]
    body: bytes

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True)
class Answer:
    """One answer of the service, or of ours in its place."""

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


@dataclass
class Exchange:
    """A request that waits for its answer, for a fault to deal with."""

    request: Request
    forward: Callable[[], Answer]
    """Sends the request to the service, and returns its answer."""
    forward_half: Callable[[], None]
    """Sends the service half of the body, and hangs up."""
    reply: Callable[[Answer], None]
    """Sends an answer to the client."""
    reset: Callable[[], None]
    """Breaks the connection to the client (RST)."""
    wait: Callable[[], object]
    """Returns when the client hangs up."""


Fault = Callable[[Exchange], None]


def lost(x: Exchange) -> None:
    """The request never arrives, and the connection breaks."""
    x.reset()


def unanswered(x: Exchange) -> None:
    """The request takes effect, and the connection breaks before the answer."""
    x.forward()
    x.reset()


def silent(x: Exchange) -> None:
    """The request never arrives, and nothing is said, for as long as the client waits."""
    x.wait()


def silent_after(x: Exchange) -> None:
    """The request takes effect, and nothing is said, for as long as the client waits."""
    x.forward()
    x.wait()


def cut(x: Exchange) -> None:
    """The answer breaks off in the middle."""
    whole = x.forward()
    x.reply(Answer(whole.status, [*whole.headers, ("X-Cut", "1")], whole.body[: len(whole.body) // 2]))
    x.reset()


def cut_request(x: Exchange) -> None:
    """The connections break when half of the body has been sent."""
    x.forward_half()
    x.reset()


def conflict_after(x: Exchange) -> None:
    """The request takes effect, and the answer is 412: something on the way has sent it twice."""
    done = x.forward()
    if done.status < 300:
        answer(412, "PreconditionFailed")(x)
    else:  # part of an upload, say, which is not complete yet
        x.reply(done)


def answer(status: int, code: str) -> Fault:
    """The service refuses the request with an error of S3's kind, and does nothing."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>because</Message></Error>".encode()
    return lambda x: x.reply(Answer(status, [("Content-Type", "application/xml")], body))


def error_inside(x: Exchange) -> None:
    """The service says 200, and then, in the body, that it failed: so CompleteMultipartUpload does."""
    answer(200, "InternalError")(x)


class Late:
    """The client hears nothing of the request, which takes effect when `arrive` is called."""

    def __init__(self) -> None:
        self._kept: list[Callable[[], Answer]] = []

    def __call__(self, x: Exchange) -> None:
        self._kept.append(x.forward)
        x.reset()

    def arrive(self) -> None:
        """Let all that was kept take effect now."""
        while self._kept:
            self._kept.pop(0)()


def stale(before: Answer) -> Fault:
    """The service answers as it did before."""
    return lambda x: x.reply(before)


class FaultyProxy:
    """Use it as a context manager; `url` is where clients reach the service through it."""

    def __init__(self, upstream: str) -> None:
        place = urlsplit(upstream)
        self._upstream = (place.hostname or "", place.port or 80)
        self._lock = threading.Lock()
        self._plan: list[tuple[Fault, Callable[[Request], bool]]] = []
        self.requests: list[Request] = []
        """All that came, without their bodies."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet, else each answer waits 40 ms for an acknowledgement
            disable_nagle_algorithm = True

            def _serve(self) -> None:
                proxy._serve(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _serve

            def handle_expect_100(self) -> bool:
                super().handle_expect_100()
                self.wfile.flush()  # the client waits for it
                return True

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128  # whom a full queue turns away comes back after a second

            def handle_error(self, *_: Any) -> None:
                pass  # clients hang up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def inject(self, fault: Fault, when: Callable[[Request], bool] = lambda _: True) -> None:
        """Deal with the next request for which `when` holds by `fault`, once."""
        with self._lock:
            self._plan.append((fault, when))

    def strike_number(self, n: int, fault: Fault) -> None:
        """Deal with request number `n` from now on, from 1, by `fault`, once."""
        with self._lock:
            at = len(self.requests) + n
            self._plan.append((fault, lambda _: len(self.requests) == at))

    @property
    def pending(self) -> bool:
        """Whether a fault has not struck yet."""
        return bool(self._plan)

    def heal(self) -> None:
        """Forget the faults that have not struck."""
        self._plan.clear()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.headers.get("Transfer-Encoding"):
            handler.close_connection = True
            handler.send_error(411)
            return
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        request = Request(handler.command, handler.path, list(handler.headers.items()), body)
        with self._lock:
            self.requests.append(Request(request.method, request.path, request.headers, b""))
            found = next((item for item in self._plan if item[1](request)), None)
            if found:
                self._plan.remove(found)

        def reply(it: Answer) -> None:
            handler.send_response_only(it.status)
            length = str(len(it.body))
            for name, value in it.headers:
                if name.lower() == "content-length":
                    length = value  # of the whole, if it breaks off; and that of an answer to HEAD
                elif name.lower() not in ("transfer-encoding", "connection"):
                    handler.send_header(name, value)
            handler.send_header("Content-Length", length)
            handler.end_headers()
            if request.method != "HEAD":
                handler.wfile.write(it.body)
            handler.wfile.flush()

        def reset() -> None:
            handler.close_connection = True
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()

        exchange = Exchange(
            request,
            lambda: self.send(request),
            lambda: self.send_half(request),
            reply,
            reset,
            lambda: handler.connection.recv(1),
        )
        if found:
            found[0](exchange)
        else:
            reply(exchange.forward())

    def send(self, request: Request) -> Answer:
        """Send a request to the service, and return its answer."""
        with self._sent(request, request.body) as connection:
            got = connection.getresponse()
            return Answer(got.status, got.getheaders(), got.read())

    def send_half(self, request: Request) -> None:
        """Send the service half of the body that the head announces, and hang up."""
        with self._sent(request, request.body[: len(request.body) // 2]):
            pass

    @contextmanager
    def _sent(self, request: Request, body: bytes) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection(*self._upstream, timeout=60)
        try:
            connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers:
                connection.putheader(name, value)
            connection.endheaders(body)
            yield connection
        finally:
            connection.close()

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
