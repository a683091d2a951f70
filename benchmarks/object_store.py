"""Saving and loading 1 GiB on S3 beside other clients, on one real server (SeaweedFS, on this machine), in alternating rounds.

Each client does what its users do: it writes what ``torch.save`` makes and reads it back with ``torch.load``. Only `Store` checks every
byte that it loads. CPU seconds are those of the client's process; the server's are not in them. Each round begins with another client.
"""

import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import boto3
import obstore
import s3fs
import torch
from obstore.store import S3Store
from s3torchconnector import S3Checkpoint, S3ClientConfig

import ckptstore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from services import seaweedfs_server

MIB = 1 << 20
SIZE = int(os.environ.get("BENCH_MIB", "1024")) * MIB
ROUNDS = 3


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


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that a call takes, and the CPU seconds of this process meanwhile."""
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu


state = {f"layer{i}": torch.rand(SIZE // 32 // 4) for i in range(32)}
with seaweedfs_server(Path(sys.argv[1])) as server:
    os.environ.update(server.env)
    all_clients = clients(server.endpoint_url, server.new_bucket())
    names = list(all_clients)
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {(n, way): [] for n in names for way in ("save", "load")}
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            save, load = all_clients[name]
            seconds[name, "save"].append(timed(save))
            seconds[name, "load"].append(timed(load))
figures: dict[str, str | float] = {"server": "SeaweedFS", "state (MiB)": SIZE // MIB, "rounds": ROUNDS}
for way in ("save", "load"):
    for name in names:
        wall, cpu = (median(column) for column in zip(*seconds[name, way], strict=True))
        figures[f"{way}, {name}"] = f"{SIZE / MIB / wall:.0f} MiB/s, {cpu / (SIZE / 1e9):.2f} CPU s/GB"
    best = min(median(w for w, _ in seconds[name, way]) for name in names[1:])
    figures[f"{way}: ckptstore's speed by that of the fastest other"] = round(
        best / median(w for w, _ in seconds["ckptstore", way]), 2
    )
print(json.dumps(figures))
