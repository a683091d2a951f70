"""Linux NFS on one machine, client and server, without either in its kernel: in user-mode Linux, which is a program.

`boot` starts one as a process whose root is this machine's, read-only. Started by that kernel as its first process (``nfs_rig.py FOLDER``),
this file exports a small disk, mounts it twice, on FOLDER/a and FOLDER/b, runs a command and turns the machine off.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["boot", "missing"]

_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
_MODULES = "/usr/lib/uml/modules"
_STATUS = "the command ended with status "
_POWER_OFF = 0x4321FEDC  # <linux/reboot.h>
_PROGRAMS = ("linux.uml", "unshare", "mkfs.ext4", "ip", "modprobe", "rpcbind", "exportfs", "rpc.mountd", "rpc.nfsd", "mount.nfs")
_PACKAGES = "user-mode-linux nfs-common nfs-kernel-server kmod iproute2 (Debian)"
_OPTIONS = {"3": "vers=3,nolock,mountproto=tcp", "4.2": "vers=4.2"}


def missing() -> list[str]:
    """Return what the rig needs and this machine does not have."""
    path = f"{os.environ['PATH']}:{_SBIN}"
    found = [name for name in _PROGRAMS if not shutil.which(name, path=path)]
    return [*found, *([f"of the packages {_PACKAGES}"] if found else []), *(() if os.geteuid() == 0 else ["root"])]


def boot(
    folder: Path, version: str, command: Sequence[str], environment: Mapping[str, str], seconds: float
) -> tuple[int | None, str]:
    """Run `command` (its program by absolute path) in the current folder, on a machine with NFS `version` mounted on ``a`` and ``b`` in
    the empty `folder`; a disk in memory is on ``tmp`` there.

    Returns its exit status, None if the machine did not get to its end, and what was said, which is also in ``log`` there meanwhile.
    Raises subprocess.TimeoutExpired.
    """
    for name in ("a", "b", "tmp", "srv", "lib"):
        (folder / name).mkdir()
    (folder / "lib" / "modules").symlink_to(_MODULES)
    disk = folder / "disk"
    with disk.open("wb") as file:
        file.truncate(4 << 30)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:{_SBIN}"})
    job = {"version": version, "command": [*command], "environment": dict(environment), "cwd": os.getcwd()}
    (folder / "job").write_text(json.dumps(job))
    kernel = ["linux.uml", "mem=2G", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"ubdb={disk}", "quiet"]
    console = ["con=null", "con0=null,fd:1", f"init={os.path.realpath(sys.executable)}", "--", __file__, str(folder)]
    # When the first process of the namespace ends, so do all of the machine's.
    log = folder / "log"
    with log.open("wb") as out:
        subprocess.run(
            ["unshare", "--pid", "--fork", "--kill-child", *kernel, *console],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=seconds,
        )
    said = log.read_text(errors="replace")
    status = re.search(f"^{_STATUS}([0-9]+)$", said, re.MULTILINE)
    return int(status[1]) if status else None, said


def _run(*arguments: str) -> None:
    subprocess.run(arguments, check=True, stdin=subprocess.DEVNULL)


def _mount(kind: str, device: str, place: str, options: str = "defaults") -> None:
    os.makedirs(place, exist_ok=True)
    _run("mount", "-t", kind, "-o", options, device, place)


def _serve(folder: str, version: str) -> None:
    for kind, place in (
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("tmpfs", "/run"),
        ("tmpfs", "/var/lib/nfs"),
        ("tmpfs", "/dev/shm"),
    ):
        _mount(kind, kind, place)
    _mount("tmpfs", "tmpfs", f"{folder}/tmp")
    os.symlink("/proc/self/fd", "/dev/fd")
    _run("ip", "link", "set", "lo", "up")
    for name in ("nfsd", "nfsv3", "nfsv4"):
        _run("modprobe", "-d", folder, name)
    _mount("ext4", "/dev/ubdb", f"{folder}/srv")
    _mount("nfsd", "nfsd", "/proc/fs/nfsd")
    os.makedirs("/var/lib/nfs/v4recovery")
    for name in ("etab", "rmtab"):
        Path("/var/lib/nfs", name).touch()
    # To the server both mounts are one client, which it would give delegations to: what no two hosts would have.
    Path("/proc/sys/fs/leases-enable").write_text("0")
    os.makedirs("/run/rpcbind")
    _run("rpcbind", "-w")
    _run("exportfs", "-i", "-o", "rw,sync,no_root_squash,no_subtree_check,fsid=0", f"127.0.0.1:{folder}/srv")
    _run("rpc.mountd")
    _run("rpc.nfsd", "4")
    for name in ("a", "b"):
        source = f"{folder}/srv" if version == "3" else "/"
        _mount("nfs", f"127.0.0.1:{source}", f"{folder}/{name}", f"{_OPTIONS[version]},nosharecache")


def _main(folder: str) -> None:
    status: object = "unknown"
    try:
        job = json.loads(Path(folder, "job").read_text())
        os.environ["PATH"] = f"{_SBIN}:/usr/bin:/bin"
        _serve(folder, job["version"])
        status = subprocess.run(job["command"], cwd=job["cwd"], env=job["environment"], stdin=subprocess.DEVNULL).returncode
    finally:
        print(f"\n{_STATUS}{status}", flush=True)
        os.sync()
        ctypes.CDLL(None).reboot(_POWER_OFF)


if __name__ == "__main__":
    _main(sys.argv[1])
