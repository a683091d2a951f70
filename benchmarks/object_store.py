"""Saving and loading 1 GiB on S3 beside other clients, on one real server (SeaweedFS, on this machine), in alternating rounds.

Each client does what its users do: it writes what ``torch.save`` makes and reads it back with ``torch.load``. Only `Store` checks every
byte that it loads. CPU seconds are those of the client's process; the server's are not in them. Each round begins with another client.
"""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import boto3
import obstore
import s3fs
import torch
from obstore.store import S3Store
from paired import SIZE, Target, large, paired, report
from s3torchconnector import S3Checkpoint, S3ClientConfig
from services import seaweedfs_server

import ckptstore


def clients(url: str, bucket: str) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return how each client saves and loads."""
    store = ckptstore.Store(f"s3://{bucket}/ours?keep_last=1&endpoint_url={url}")
    sdk = boto3.client("s3", endpoint_url=url)
    fs = s3fs.S3FileSystem(endpoint_url=url, skip_instance_cache=True)
    connector = S3Checkpoint("us-east-1", endpoint=url, s3client_config=S3ClientConfig(force_path_style=True))
    rust = S3Store(bucket, endpoint=url, client_options={"allow_http": True}, virtual_hosted_style_request=False)

    def by_sdk() -> None:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        sdk.upload_fileobj(file, bucket, "sdk/state.pt")

    def from_sdk() -> object:
        file = io.BytesIO()
        sdk.download_fileobj(bucket, "sdk/state.pt", file)
        file.seek(0)
        return torch.load(file)

    def by_s3fs() -> None:
        with fs.open(f"{bucket}/s3fs/state.pt", "wb") as file:
            torch.save(state, file)

    def from_s3fs() -> object:
        fs.invalidate_cache()
        return torch.load(io.BytesIO(fs.cat_file(f"{bucket}/s3fs/state.pt")))

    def by_connector() -> None:
        with connector.writer(f"s3://{bucket}/connector/state.pt") as file:
            torch.save(state, file)

    def from_connector() -> object:
        with connector.reader(f"s3://{bucket}/connector/state.pt") as file:
            return torch.load(file)

    def by_obstore() -> None:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        obstore.put(rust, "obstore/state.pt", file)

    def from_obstore() -> object:
        return torch.load(io.BytesIO(obstore.get(rust, "obstore/state.pt").bytes()))

    return {
        "ckptstore": (lambda: store.save(state, step=0), store.load),
        "boto3 transfer manager": (by_sdk, from_sdk),
        "s3fs": (by_s3fs, from_s3fs),
        "s3torchconnector": (by_connector, from_connector),
        "obstore": (by_obstore, from_obstore),
    }


state = large()
with seaweedfs_server(Path(sys.argv[1])) as server:
    os.environ.update(server.env)
    ways = clients(server.endpoint_url, server.new_bucket())
    ours, *others = ways
    results = []
    for number, what in enumerate(("save", "load")):
        calls = {name: pair[number] for name, pair in ways.items()}
        targets = [Target(ours, other, round(1 / 1.3, 2)) for other in others]
        results.append(paired(f"{what} on S3 (SeaweedFS)", calls, 3, targets, size=SIZE))
report(*results)
