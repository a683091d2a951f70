"""Ceph's S3 service (RGW) on this machine, from Debian's packages: one monitor, one manager, one disk in memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from conftest import require
from services import KEYS, Server, _die_with_us, _free_port, _running

__all__ = ["ceph_rgw_server"]

_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mgr", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_PATIENCE = 120
"""Seconds that a command may take; most of them wait until the cluster is up."""
_CONF = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{port}]
public addr = 127.0.0.1
keyring = {folder}/keyring
run dir = {folder}
admin socket =
log file = {folder}/$name.log
crash dir = {folder}
setuser match path =
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon max pg per osd = 1000
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 2147483648
mon data = {folder}/mon
osd data = {folder}/osd
mgr data = {folder}/mgr
mgr initial modules =
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{{rgw}}
"""
_EVERYTHING = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")


class _Cluster:
    """The daemons below the service, each of which dies with the tests."""

    def __init__(self, folder: Path, ends: ExitStack) -> None:
        self._folder = folder
        self._ends = ends

    def run(self, *command: str) -> None:
        done = subprocess.run(
            [*command, "-c", "ceph.conf"], cwd=self._folder, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"

    def start(self, *command: str) -> None:
        with (self._folder / f"{command[0]}.out").open("wb") as out:
            process = subprocess.Popen(
                [*command, "-f", "-c", "ceph.conf"], cwd=self._folder, stdout=out, stderr=out, preexec_fn=_die_with_us
            )
        self._ends.callback(process.wait)
        self._ends.callback(process.kill)


@contextmanager
def ceph_rgw_server() -> Iterator[Server]:
    """Ceph RGW 16, "the old S3": it obeys conditions on a PUT, not on the completion of an upload; it compares Content-MD5, and no CRCs."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    for program in _PROGRAMS:
        require(shutil.which(program, path=path), f"needs {program}: apt-get install ceph-mon ceph-mgr ceph-osd radosgw")
    with tempfile.TemporaryDirectory(prefix="ceph") as name, ExitStack() as ends:
        folder, port, fsid = Path(name), _free_port(), str(uuid.uuid4())
        cluster, rgw = _Cluster(folder, ends), _free_port()
        conf = _CONF.format(fsid=fsid, port=port, folder=folder).format(rgw=rgw)
        (folder / "ceph.conf").write_text(conf)
        for part in ("mon", "osd", "mgr"):
            (folder / part).mkdir()
        for i, entity in enumerate(("mon.", "client.admin", "client.rgw", "mgr.x", "osd.0")):
            create = () if i else ("--create-keyring",)
            cluster.run("ceph-authtool", "keyring", *create, "--gen-key", "-n", entity, *_EVERYTHING)
        cluster.run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{port}]", "monmap")
        cluster.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring")
        cluster.start("ceph-mon", "-i", "a")
        disk = str(uuid.uuid4())
        cluster.run("ceph", "osd", "new", disk)
        cluster.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        cluster.start("ceph-mgr", "-i", "x")
        cluster.start("ceph-osd", "-i", "0")
        admin = ("--uid=tests", "--display-name=tests", f"--access-key={KEYS[0]}", f"--secret-key={KEYS[1]}")
        cluster.run("radosgw-admin", "user", "create", *admin)
        command = ["radosgw", "-n", "client.rgw", "-f", "-c", "ceph.conf"]
        with _running(command, rgw, folder) as server:
            yield server
