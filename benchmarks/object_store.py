"""Saving and loading 1 GiB on S3 beside other clients, on real servers on this machine, in alternating rounds.

Each client does what its users do: it writes what ``torch.save`` makes and reads it back with ``torch.load``. Only `Store` checks every
byte that it loads. "The limit" is what no client can beat on that server: as many bytes, ready in memory, pushed through bare sockets in
parts of the same size, with nothing computed, compared or looked at. CPU seconds are those of the client's process; the server's are told
beside them, because both share the CPUs: where it takes many times as many, no client can be much faster than another.

SeaweedFS compares the CRC-64/NVME of each part. It hashes all it gets three times with MD5, which is half of what it does, and no option
changes that. rclone takes less, and compares only Content-MD5, which `Store` sends to it in place of the CRC, and of the others none. MD5
alone takes 1.5 s for a GB. When an object is first looked at, rclone reads and hashes the whole of it: `Store` looks at once, to compare
sizes, so that this is part of its saves, and of no load that counts.
"""

import io
import os
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import boto3
import obstore
import s3fs
import torch
from botocore.config import Config
from obstore.store import S3Store
from paired import MIB, SIZE, Target, figure, large, paired, report
from s3torchconnector import S3Checkpoint, S3ClientConfig
from services import rclone_server, seaweedfs_server

import ckptstore

OURS = "ckptstore"
LIMIT = "the limit"
ROUNDS = 3
PART, CONNECTIONS = 8 * MIB, 8
CONNECTOR = "s3torchconnector"
SERVERS = [
    ("SeaweedFS", seaweedfs_server, "", set[str]()),
    # It ignores conditions, and refuses the chunks with a checksum at their end that the connector sends.
    ("rclone serve s3", rclone_server, "&single_writer=1&checksum=when_required", {CONNECTOR}),
]
"""Each with options for ours, and the clients that cannot use it."""


def clients(url: str, bucket: str, options: str) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return how each client saves and loads."""
    store = ckptstore.Store(f"s3://{bucket}/ours?keep_last=1&endpoint_url={url}{options}")
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
        OURS: (lambda: store.save(state, step=0), store.load),
        "boto3 transfer manager": (by_sdk, from_sdk),
        "s3fs": (by_s3fs, from_s3fs),
        CONNECTOR: (by_connector, from_connector),
        "obstore": (by_obstore, from_obstore),
    }


def limit(url: str, bucket: str) -> Callable[[], object]:
    """Return what uploads as many bytes as fast as can be."""
    unsigned = Config(signature_version="s3v4", s3={"payload_signing_enabled": False, "addressing_style": "path"})
    sdk = boto3.client("s3", endpoint_url=url, config=unsigned)
    data = memoryview(bytearray(os.urandom(MIB)) * (SIZE // MIB))
    place = urlsplit(url)
    name = {"Bucket": bucket, "Key": "limit/state.pt"}

    def some(upload: str, numbers: range) -> list[dict[str, object]]:
        parts = []
        with socket.create_connection((str(place.hostname), int(place.port or 80))) as connection:
            for number in numbers:
                signed = {**name, "UploadId": upload, "PartNumber": number + 1}
                target = urlsplit(sdk.generate_presigned_url("upload_part", signed))
                part = data[number * PART : (number + 1) * PART]
                head = f"PUT {target.path}?{target.query} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: {len(part)}\r\n\r\n"
                connection.sendall(head.encode())
                connection.sendall(part)
                answer = HTTPResponse(connection)
                answer.begin()
                assert answer.status == 200, answer.read()
                answer.read()
                parts.append({"PartNumber": number + 1, "ETag": answer.getheader("ETag")})
        return parts

    def by_sockets() -> None:
        upload = str(sdk.create_multipart_upload(**name)["UploadId"])
        ways = [range(first, -(-SIZE // PART), CONNECTIONS) for first in range(CONNECTIONS)]
        parts = [part for found in threads.map(lambda numbers: some(upload, numbers), ways) for part in found]
        parts.sort(key=lambda part: int(str(part["PartNumber"])))
        sdk.complete_multipart_upload(**name, UploadId=upload, MultipartUpload={"Parts": parts})

    threads = ThreadPoolExecutor(CONNECTIONS)
    return by_sockets


def client_cpu(result: dict[str, Any]) -> float:
    """Return the CPU seconds that our process takes for a GB."""
    return round(median(result["runs"][OURS]["cpu"]) / (SIZE / 1e9), 2)


def server_cpu(pid: int) -> float:
    """Return the CPU seconds that a process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


state = large()
results: list[dict[str, Any]] = []
for name, start, options, cannot in SERVERS:
    (folder := Path(sys.argv[1]) / name).mkdir()
    with start(folder) as server:
        os.environ.update(server.env)
        bucket = server.new_bucket()
        ways = clients(server.endpoint_url, bucket, options)
        for number, what in enumerate(("save", "load")):
            calls = {way: pair[number] for way, pair in ways.items() if way not in cannot}
            targets = [Target(OURS, other, round(1 / 1.3, 2)) for other in calls if other != OURS]
            if what == "save":
                calls[LIMIT] = limit(server.endpoint_url, bucket)
            before = server_cpu(server.pid)
            results.append(result := paired(f"{what} on S3 ({name})", calls, ROUNDS, targets, size=SIZE))
            if LIMIT in calls:
                runs = result["runs"]
                ratios = [a / b for a, b in zip(runs[OURS]["wall"], runs[LIMIT]["wall"], strict=True)]
                results.append(figure(f"time of a save on S3 ({name}) beside the limit", round(median(ratios), 2), "times"))
            taken = (server_cpu(server.pid) - before) / (len(calls) * (ROUNDS + 1) * SIZE / 1e9)
            note = f"the server takes {taken:.1f} s for a GB, on the same {len(os.sched_getaffinity(0))} CPUs"
            results.append(figure(f"client CPU of a {what} on S3 ({name})", client_cpu(result), "s/GB", 1.2, note))
report(*results)
