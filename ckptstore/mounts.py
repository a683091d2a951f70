"""Which kind of file system a path is on, as the kernel names it."""

from __future__ import annotations

import os
import re

__all__ = ["file_system", "is_local", "is_shared", "two_may_link", "writes_past_cache"]

_MOUNTS = "/proc/self/mountinfo"  # proc_pid_mountinfo(5)
_SHARED = frozenset(
    {"afs", "beegfs", "ceph", "cifs", "gfs2", "gpfs", "lustre", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "smb3", "wekafs"}
)
_LOCAL = frozenset(
    {"bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "fuse.fuse-overlayfs", "fuseblk", "jfs", "msdos"}
    | {"nilfs2", "ntfs3", "overlay", "ramfs", "reiserfs", "rootfs", "squashfs", "tmpfs", "vfat", "xfs", "zfs"}
)

# Its clients look for the name in what each of them remembers, and then have the server replace whatever has it (seen with 4.48).
_TWO_MAY_LINK = frozenset({"fuse.seaweedfs"})
# Its client gathers what is written in its own memory. The kernel's copy is dropped with the next look at the file, whose time has changed.
_PAST_CACHE = frozenset({"fuse.juicefs"})


def file_system(path: str) -> str | None:
    """Return the kind of file system that `path` is on, or would be ("ext4", "nfs4", "fuse.juicefs"); None if it cannot be told.

    Found by the names of the mount points: device numbers of btrfs differ from those that the kernel lists.
    """
    path = os.path.realpath(path)
    best, kind = "", None
    try:
        with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                place, _, rest = line.partition(" - ")
                point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), place.split(" ")[4])
                inside = path == point or path.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= len(best):  # of two on one point, the later one is on top
                    best, kind = point, rest.split(" ")[0]
    except (OSError, IndexError):  # not Linux
        return None
    return kind


def is_shared(kind: str | None) -> bool:
    """Say whether several hosts mount file systems of this kind, or may: what FUSE shows is mostly elsewhere."""
    return kind in _SHARED or (kind is not None and kind.partition(".")[0] == "fuse" and kind not in _LOCAL)


def is_local(kind: str | None) -> bool:
    """Say whether file systems of this kind are on a disk, or in the memory, of this machine."""
    return kind in _LOCAL


def two_may_link(kind: str | None) -> bool:
    """Say whether two hosts can both win a `link` to one name on file systems of this kind, which no single host can find out."""
    return kind in _TWO_MAY_LINK


def writes_past_cache(kind: str | None) -> bool:
    """Say whether large new files are written faster past the kernel's cache (O_DIRECT), from and to wherever, on this kind of system."""
    return kind in _PAST_CACHE
