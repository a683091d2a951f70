"""Real processes for fault tests: forked from a warm parent, so that what they import is imported once."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckptstore import Store
from ckptstore.bases import base_keys, bases_of

_ANSWER = 200.0
"""Seconds after which a process that says nothing is taken to hang: it may have got no processor for a minute."""


class Channel:
    """One JSON value per line, both ways."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._buffer = b""

    def send(self, *message: Any) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def recv(self) -> list[Any]:
        """Return the next message. Raises EOFError when the other side is gone."""
        while b"\n" not in self._buffer:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                raise EOFError("the other process ended")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: list[Any] = json.loads(line)
        return message


class Child:
    """A process that runs ``function(channel, *arguments)`` of a test module."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)  # process ids come again
        sock.settimeout(_ANSWER)
        self._channel = Channel(sock)

    def send(self, *message: Any) -> None:
        """Say something to it."""
        try:
            self._channel.send(*message)
        except BrokenPipeError:
            self.recv()  # why it failed
            raise

    def recv(self) -> list[Any]:
        """Return its next message. Raises EOFError when it has ended, AssertionError with its traceback when it failed."""
        message = self._channel.recv()
        assert message[0] != "failed", message[1]
        return message

    def signal(self, number: int) -> None:
        """Send a signal, if it still is."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """End it, whatever it has to say. Idempotent."""
        if self._pidfd >= 0:
            self.signal(signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1
            self._channel.socket.close()

    def expect(self, kind: str) -> list[Any]:
        """Return what follows `kind` in its next message, which must be of that kind."""
        message = self.recv()
        assert message[0] == kind, message
        return message[1:]

    def rest(self) -> list[list[Any]]:
        """Return all messages up to its end."""
        messages: list[list[Any]] = []
        try:
            while True:
                messages.append(self.recv())
        except EOFError:
            select.select([self._pidfd], [], [], _ANSWER)  # its other descriptors may close after this socket
            self.close()
            return messages

    def kill(self) -> list[list[Any]]:
        """Send SIGKILL; once the process is gone, return what it had still said."""
        self.signal(signal.SIGKILL)
        return self.rest()

    def stop(self) -> None:
        """Send SIGSTOP, and return when the process has stopped."""
        self.signal(signal.SIGSTOP)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """Return when the process has stopped (itself, for instance)."""
        deadline = time.monotonic() + _ANSWER
        while _state(self.pid) != "T":
            assert time.monotonic() < deadline, "it did not stop"
            time.sleep(0.001)

    def proceed(self) -> None:
        """Send SIGCONT."""
        self.signal(signal.SIGCONT)


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:  # proc(5): the field after the name in brackets
        return file.read().rpartition(")")[2].split()[0]


class Nursery:
    """A process that has imported some modules, and called their ``warm_up()``, and forks children.

    It runs no threads, so a fork of it is a whole process.
    """

    def __init__(self, *modules: str) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(1.5 * _ANSWER)  # what it imports may be large, and the machine busy
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error", __file__, str(theirs.fileno()), *modules]
        self._process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()])
        theirs.close()
        self._channel = Channel(self._socket)
        self._children: list[Child] = []
        assert self._channel.recv() == ["ready"]
        self._socket.settimeout(_ANSWER)

    def start(self, function: Callable[..., object], *arguments: Any) -> Child:
        """Fork a child that runs ``function(channel, *arguments)``; arguments travel as JSON."""
        ours, theirs = socket.socketpair()
        call = json.dumps([function.__module__, function.__qualname__, arguments]).encode()
        socket.send_fds(self._socket, [call], [theirs.fileno()])
        theirs.close()
        child = Child(self._channel.recv()[0], ours)
        self._children.append(child)
        return child

    def close(self) -> None:
        """End it and all its children."""
        for child in self._children:
            child.close()
        self._socket.close()
        self._process.wait()


def nursery(*modules: str) -> Iterator[Nursery]:
    """The body of a fixture."""
    it = Nursery(*modules)
    try:
        yield it
    finally:
        it.close()


def in_fork(work: Callable[[], object]) -> int:
    """Fork this process, whatever threads it has; return the child's exit status: 0 if what `work` returned there is true."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads, which is what this is about
        child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def warm_up() -> None:
    """Have everything imported and initialised that a save and a resume need. In a nursery by the name of this module."""
    import torch

    state = {"weights": torch.arange(4.0), "step": 1}
    with Store("memory://warm") as store:
        store.save(state, rng=True)
        store.resume(state)


def litter(store: Store) -> list[str]:
    """Return the files in the store's folder that no record names and no protocol needs."""
    root = Path(store.url)
    kept = {f"data/{c.id}/{file}" for c in store.checkpoints() for file in (*c.files, "manifest.json")}
    kept |= {key for name in bases_of(store._engine.head().record) for key in base_keys(name)}
    found = (p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir() or not any(p.iterdir()))
    return [f for f in found if f not in kept and f != "log/hint" and not (f.startswith("log/") and f[4:].isdigit())]


def _serve(sock: socket.socket, modules: list[str]) -> None:
    for module in modules:
        warm_up = getattr(importlib.import_module(module), "warm_up", None)
        if warm_up:
            warm_up()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    channel = Channel(sock)
    channel.send("ready")
    while True:
        call, fds, _, _ = socket.recv_fds(sock, 1 << 16, 1)
        if not call:
            sock.close()
            return
        pid = os.fork()
        if not pid:
            sock.close()
            _run(socket.socket(fileno=fds[0]), *json.loads(call))
        os.close(fds[0])
        # An ended child stays a zombie up to here, so that nobody can be sent its signals by mistake.
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        channel.send(pid)


def _run(sock: socket.socket, module: str, function: str, arguments: list[Any]) -> None:
    channel = Channel(sock)
    try:
        prctl, set_ptracer, anybody = ctypes.CDLL(None).prctl, 0x59616D61, ctypes.c_ulong(-1)
        prctl(set_ptracer, anybody, 0, 0, 0)  # Yama would let only our parent trace us
        getattr(importlib.import_module(module), function)(channel, *arguments)
    except BaseException:
        with suppress(OSError):
            channel.send("failed", traceback.format_exc())
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
