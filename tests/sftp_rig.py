"""An SFTP server (asyncssh's), as a process that serves one folder: ``python sftp_rig.py FOLDER``."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["PASSWORD", "USER", "sftp_server"]

USER, PASSWORD = "tester", "sftp-secret"


@contextmanager
def sftp_server(folder: Path) -> Iterator[int]:
    """Serve `folder` as the root of a file system for the length of the block; yields the port, on 127.0.0.1."""
    process = subprocess.Popen([sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    with process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


async def _serve(folder: str) -> None:
    import asyncssh

    class Login(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return True

        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, password: str) -> bool:
            return (username, password) == (USER, PASSWORD)

    acceptor = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=Login,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=folder.encode()),
    )
    print(acceptor.get_port(), flush=True)
    await asyncio.to_thread(sys.stdin.read)  # ends with the process that started this one


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
