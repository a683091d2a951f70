"""From a URL's scheme to its backend: by name, imported when first used."""

from __future__ import annotations

import difflib
from importlib import import_module

from .errors import UnknownScheme
from .protocol import Backend

__all__ = ["ENTRY_POINT_GROUP", "backend_class", "schemes"]

ENTRY_POINT_GROUP = "ckptstore.backends"
"""Third-party packages register ``scheme = "package.module:Class"`` in this entry-point group."""

_BUILTIN = {
    "file": "ckptstore.backends.local:LocalBackend",
    "gs": "ckptstore.backends.gcs:GcsBackend",
    "memory": "ckptstore.backends.memory:MemoryBackend",
    "s3": "ckptstore.backends.s3:S3Backend",
    "shared": "ckptstore.backends.shared:SharedBackend",
}
_EXTRAS = {
    "abfs": "azure",
    "abfss": "azure",
    "az": "azure",
    "gcs": "gcs",
    "gs": "gcs",
    "s3": "s3",
    "s3a": "s3fs",
    "s3fs": "s3fs",
    "sftp": "sftp",
    "ssh": "sftp",
}
"""Schemes that need ``pip install 'ckptstore[extra]'``."""


def _third_party() -> dict[str, str]:
    from importlib.metadata import entry_points  # slow to import, and rarely needed

    return {ep.name: ep.value for ep in entry_points(group=ENTRY_POINT_GROUP)}


def schemes() -> list[str]:
    """Return every scheme that has a backend of its own, sorted; those of fsspec can be opened too."""
    return sorted({*_BUILTIN, *_third_party()})


def backend_class(scheme: str) -> type[Backend]:
    """Import and return the backend class for `scheme`.

    Raises:
        UnknownScheme: nothing is registered under it, or what is cannot be imported; says what is known, and the nearest match.
    """
    target = _BUILTIN.get(scheme) or _third_party().get(scheme)
    if target is None:
        return _of_fsspec(scheme)
    module, _, name = target.partition(":")
    try:
        backend: type[Backend] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as exc:
        raise UnknownScheme(f"the backend for {scheme}:// ({target}) cannot be imported: {exc}{_install(scheme)}") from exc
    return backend


def _install(scheme: str) -> str:
    return f"; pip install 'ckptstore[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else ""


def _of_fsspec(scheme: str) -> type[Backend]:
    fsspec = import_module("ckptstore.backends.fsspec")
    try:
        found: type[Backend] | None = fsspec.backend_for(scheme)
    except ImportError as exc:
        raise UnknownScheme(f"{scheme}:// needs a package that is not there: {exc}{_install(scheme)}") from exc
    if found is None and scheme in _EXTRAS:  # known to fsspec when the package is there
        raise UnknownScheme(f"{scheme}:// needs a package that is not there{_install(scheme)}")
    if found is None:
        known = schemes()
        near = difflib.get_close_matches(scheme, [*known, *fsspec.protocols()], 1)
        hint = f"; did you mean {near[0]}://?" if near else "."
        raise UnknownScheme(f"unknown URL scheme {scheme!r}{hint} Known: {', '.join(known)}, fsspec's, or a plain path.")
    return found
