"""Real shared file systems on one machine, each with its servers and two clients that cache for themselves.

``python shared_rigs.py KIND FOLDER`` mounts one on FOLDER/a and FOLDER/b, says "ready", and takes it down when its standard input ends,
which it also does when whoever started it is killed. It must run in network and process namespaces of its own, as `command` has it:
the servers use fixed ports, and the kernel ends them with the first process of the namespace, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

__all__ = ["KINDS", "MOUNTS", "command", "missing"]

MOUNTS = "CKPTSTORE_TEST_MOUNTS"
"""The environment variable with the folder of two mounts that are there already."""

_PATIENCE = 60
"""Seconds that a server or a client may take to begin."""
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
_SIOCSIFFLAGS, _SIOCSIFADDR, _IFF_UP = 0x8914, 0x8916, 1
_ADDRESS = "10.77.0.1"  # GlusterFS and MooseFS do not want to be on 127.0.0.1


def _run(*arguments: object) -> None:
    subprocess.run([str(a) for a in arguments], check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


def _start(*arguments: object) -> None:
    subprocess.Popen([str(a) for a in arguments], stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)


def _wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not begin")
        time.sleep(0.1)


def _listens(port: int) -> bool:
    lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
    return any(int(address.partition(":")[2], 16) == port and state == "0A" for _, address, _, state, *_ in map(str.split, lines))


def _network() -> None:
    """Give the loopback interface of this new namespace an address beside 127.0.0.1. See netdevice(7)."""
    with socket.socket() as sock:
        for call, request in (
            (_SIOCSIFADDR, struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton(_ADDRESS))),
            (_SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP)),
        ):
            fcntl.ioctl(sock, call, request)


def _both(folder: Path, mount: Callable[[Path, str], None]) -> None:
    for name in ("a", "b"):
        place = folder / name
        place.mkdir()
        mount(place, name)
        _wait(lambda place=place: os.path.ismount(place), f"the mount {name}")


def _folders(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)


@contextmanager
def _seaweedfs(folder: Path) -> Iterator[None]:
    _folders(folder, "data", "cache-a", "cache-b")
    os.chdir(folder)  # it also writes here
    ports = random.sample(range(20000, 30000), 8)  # each names a socket in /tmp, which we share with other namespaces
    names = [f"{part}.port{more}" for part in ("master", "volume", "filer", "admin") for more in ("", ".grpc")]
    numbers = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    local = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    _start("weed", "mini", f"-dir={folder}/data", *local, "-s3=false", "-webdav=false", "-admin.ui=false", *numbers)
    _wait(lambda: all(_listens(port) for port in ports[:6]), "the filer")
    filer = f"-filer=127.0.0.1:{ports[4]}.{ports[5]}"
    _both(folder, lambda place, name: _start("weed", "mount", filer, f"-dir={place}", f"-cacheDir={folder}/cache-{name}"))
    yield


@contextmanager
def _glusterfs(folder: Path) -> Iterator[None]:
    """Two copies of everything, one server."""
    _folders(folder, "state", "copy-1", "copy-2")
    places = f"option working-directory {folder}/state\noption run-directory {folder}\noption glusterd-sockfile {folder}/sock\n"
    (folder / "glusterd.vol").write_text(
        f"volume management\ntype mgmt/glusterd\noption transport-type socket\n{places}end-volume\n"
    )
    own = ["unshare", "--pid", "--fork", "--mount-proc"]  # they look themselves up in /proc, and crash if that has others
    control = folder / "sock"
    logs = ["-l", folder / "glusterd.log", "-p", folder / "pid"]
    _start(*own, "glusterd", "--no-daemon", "-f", folder / "glusterd.vol", *logs)
    gluster = [*own, "gluster", "--mode=script", f"--glusterd-sock={control}", "volume"]
    # It listens before it knows what it is asked for.
    _wait(lambda: not subprocess.run([*gluster, "list"], stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode, "glusterd")
    _run(*gluster, "create", "v", "replica", 2, *(f"{_ADDRESS}:{folder}/copy-{n}" for n in (1, 2)), "force")
    _run(*gluster, "start", "v")
    how = [f"--volfile-server={_ADDRESS}", "--volfile-id=v"]
    _both(folder, lambda place, name: _run("glusterfs", *how, "-l", folder / f"{name}.log", place))
    yield


@contextmanager
def _moosefs(folder: Path) -> Iterator[None]:
    _folders(folder, "master", "chunks", "disk")
    (folder / "master" / "metadata.mfs").write_bytes(b"MFSM NEW")
    (folder / "exports").write_text("* / rw,alldirs,maproot=0\n")
    (folder / "disks").write_text(f"{folder}/disk\n")
    us = "WORKING_USER = root\nWORKING_GROUP = root\n"
    (folder / "master.cfg").write_text(f"{us}DATA_PATH = {folder}/master\nEXPORTS_FILENAME = {folder}/exports\n")
    chunks = f"{us}DATA_PATH = {folder}/chunks\nHDD_CONF_FILENAME = {folder}/disks\nMASTER_HOST = {_ADDRESS}\n"
    (folder / "chunks.cfg").write_text(chunks)
    _start("mfsmaster", "-c", folder / "master.cfg", "-f", "start")
    _wait(lambda: all(_listens(port) for port in (9419, 9420, 9421)), "the master")
    _start("mfschunkserver", "-c", folder / "chunks.cfg", "-f", "start")
    _wait(lambda: _listens(9422), "the chunk server")
    _both(folder, lambda place, name: _start("mfsmount", place, "-H", _ADDRESS, "-f"))
    yield


@contextmanager
def _cephfs(folder: Path) -> Iterator[None]:
    """One of each: monitor, manager, a store of objects in memory, server of metadata."""
    _folders(folder, "mon", "mgr", "osd", "mds", "run")
    conf = folder / "ceph.conf"
    keys = f"keyring = {folder}/keys\n"
    sizes = "osd pool default size = 1\nosd pool default min size = 1\nmon allow pool size one = true\nosd crush chooseleaf type = 0\n"
    places = "".join(f"[{part}]\n{part} data = {folder}/{part}\n" for part in ("mon", "mgr", "osd", "mds"))
    # A client that looks at what another one has just written waits for the next tick.
    memory = "osd objectstore = memstore\nmemstore device bytes = 4294967296\nmds tick interval = 0.1\n"
    run = f"run dir = {folder}/run\nadmin socket = {folder}/run/$name.$pid\nlog file = {folder}/$name.log\n"
    conf.write_text(f"[global]\nfsid = {uuid.uuid4()}\nmon host = {_ADDRESS}\n{keys}{sizes}{memory}{run}{places}")
    every = [word for part in ("mon", "mgr", "osd", "mds") for word in ("--cap", part, "allow *")]
    new = "--create-keyring"
    for name in ("mon.", "client.admin", "mgr.x", "osd.0", "mds.x"):
        _run("ceph-authtool", folder / "keys", *([new] if new else ()), "--gen-key", "-n", name, *every)
        new = ""
    _run("monmaptool", "--create", "--add", "x", _ADDRESS, "--fsid", conf.read_text().split()[3], folder / "map")
    _run("ceph-mon", "-c", conf, "--mkfs", "-i", "x", "--monmap", folder / "map", "--keyring", folder / "keys")
    _start("ceph-mon", "-c", conf, "-f", "-i", "x")
    ceph = ["ceph", "-c", conf]
    osd = uuid.uuid4()
    _run(*ceph, "osd", "new", osd)
    _run("ceph-osd", "-c", conf, "-i", 0, "--mkfs", "--osd-uuid", osd)
    for program, name in (("ceph-mgr", "x"), ("ceph-osd", 0), ("ceph-mds", "x")):
        _start(program, "-c", conf, "-f", "-i", name)
    for pool in ("meta", "data"):
        _run(*ceph, "osd", "pool", "create", pool, 8)
    _run(*ceph, "fs", "new", "fs", "meta", "data")
    _wait(
        lambda: b"up:active" in subprocess.run([*map(str, ceph), "mds", "stat"], stdout=subprocess.PIPE).stdout,
        "the server of metadata",
    )
    _both(folder, lambda place, name: _start("ceph-fuse", "-c", conf, "-f", place))
    yield


KINDS: dict[str, tuple[Callable[[Path], AbstractContextManager[None]], tuple[str, ...]]] = {
    "cephfs": (_cephfs, ("ceph", "ceph-authtool", "monmaptool", "ceph-mon", "ceph-mgr", "ceph-osd", "ceph-mds", "ceph-fuse")),
    "glusterfs": (_glusterfs, ("glusterd", "gluster", "glusterfs")),
    "moosefs": (_moosefs, ("mfsmaster", "mfschunkserver", "mfsmount")),
    "seaweedfs": (_seaweedfs, ("weed", "fusermount3")),
}
"""How each kind is started, and the programs that it needs."""


def missing(kind: str) -> list[str]:
    """Return what the rig needs and this machine does not have."""
    found = [name for name in ("unshare", *KINDS[kind][1]) if not shutil.which(name)]
    return [*found, *(() if os.path.exists("/dev/fuse") else ["/dev/fuse"]), *(() if os.geteuid() == 0 else ["root"])]


def command(kind: str, folder: Path) -> list[str]:
    """Return the command that starts a rig."""
    return ["unshare", "--net", "--pid", "--fork", "--kill-child", sys.executable, __file__, kind, str(folder)]


def _main(kind: str, folder: Path) -> None:
    _network()
    try:
        with KINDS[kind][0](folder):
            print("ready", flush=True)
            sys.stdin.read()
    finally:
        for name in ("a", "b"):
            if os.path.ismount(folder / name):
                subprocess.run(["umount", "-l", str(folder / name)], check=False)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
