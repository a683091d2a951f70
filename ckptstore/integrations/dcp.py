"""`torch.distributed.checkpoint` on a store: every rank writes and reads its own files, one commit record publishes them all.

The coordinator (rank 0 of the process group) begins a transaction and tells the others its id with their plans; what each rank has written
and made durable comes back with its results; the coordinator takes these files into the transaction and commits. Where any rank fails,
DCP raises on all of them, and there is no commit. A checkpoint's folder is laid out as torch's own `FileSystemReader` reads it.
"""

from ._dcp_metadata import BY
from ._dcp_reader import StoreReader, load_newest
from ._dcp_writer import StoreWriter

__all__ = ["BY", "StoreReader", "StoreWriter", "load_newest"]
