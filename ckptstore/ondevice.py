"""From a file to a CUDA device, through a little page-locked memory of the host, in which every byte is checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .hostmemory import Buffer
from .reading import Chunks, Piece, StoredFile, overlapping, scatter

__all__ = ["read_through"]

_BYTES = 48 << 20
"""That are in memory of the host at once. At 50 GB/s, the device takes them in the time in which a disk gives a few."""


def read_through(file: StoredFile, host: Iterable[Piece], device: Iterable[tuple[int, torch.UntypedStorage]]) -> None:
    """Read the whole file, each chunk of it once, and put what is in it where it belongs. What is there is only good if this returns.

    Args:
        host: memory of the host.
        device: storages on CUDA devices, and which byte of the file is the first of each.

    Raises:
        DamagedFile
    """
    host, device = sorted(host, key=lambda piece: piece[0]), sorted(device, key=lambda placed: placed[0])
    in_host, on_device = [start for start, _ in host], [start for start, _ in device]
    bare = {d: torch.empty(0, dtype=torch.uint8, device=d) for d in {storage.device for _, storage in device}}
    longest = max((length for length, _ in file.entry.chunks), default=0)
    buffer = Buffer(max(1, min(file.entry.size, max(_BYTES, longest))), pinned=True)
    memory = torch.frombuffer(buffer.view(0, buffer.size), dtype=torch.uint8)
    for start, stop, *_ in Chunks(file.entry, file.key).spans(range(len(file.entry.chunks)), buffer.size):
        view = buffer.view(0, stop - start)
        file.fill([(start, view)], all_chunks=False)
        scatter(start, view, host[overlapping(in_host, start, stop)])
        try:
            _copy(start, memory[: stop - start], device[overlapping(on_device, start, stop)], bare)
        finally:  # nobody reads the buffer any more
            for d in bare:
                torch.cuda.current_stream(d).synchronize()


def _copy(
    start: int,
    data: torch.Tensor,
    placed: Sequence[tuple[int, torch.UntypedStorage]],
    bare: dict[torch.device, torch.Tensor],
) -> None:
    """Begin to copy what of `data`, which begins at byte `start`, belongs into each storage."""
    for first, storage in placed:
        low, high = max(start, first), min(start + len(data), first + storage.nbytes())
        if low < high:
            into = bare[storage.device].set_(storage)
            into[low - first : high - first].copy_(data[low - start : high - start], non_blocking=True)
