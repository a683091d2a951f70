"""The library of an integration: is it there, and of a version that we know?"""

from __future__ import annotations

from importlib import metadata

from ..errors import WrongVersion

__all__ = ["require_version"]


def require_version(library: str, extra: str, least: tuple[int, ...], below: int) -> str:
    """Return the version of the installed `library`.

    Raises:
        WrongVersion: it is older than `least`, or its first number is `below` or more, or it is not there at all.
    """
    wanted = f"needs {library} >= {'.'.join(map(str, least))}, < {below}: pip install 'ckptstore[{extra}]'"
    try:
        version = metadata.version(library)
    except metadata.PackageNotFoundError:
        raise WrongVersion(f"ckptstore.integrations.{extra} {wanted}; it is not installed") from None
    numbers = tuple(int(part) for part in version.split(".")[: len(least)] if part.isdigit())
    if not least <= numbers or numbers[0] >= below:
        raise WrongVersion(f"ckptstore.integrations.{extra} {wanted}; {version} is installed")
    return version
