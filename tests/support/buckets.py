"""Buckets on emulators that listen on loopback."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from support.required import library
from support.runs import free_port

SLOW_LINK = str(Path(__file__).with_name("slow_link.py"))

# Scheme -> the emulator's library, the client's library, and the command that serves on a port.
EMULATORS = {
    "s3": (
        "moto",
        "s3fs",
        lambda host, port: [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)],
    ),
    "gs": (
        "gcp_storage_emulator",
        "gcsfs",
        lambda host, port: [
            sys.executable,
            "-c",
            "from gcp_storage_emulator.__main__ import main; main()",
            "start",
            f"--host={host}",
            f"--port={port}",
            "--in-memory",
            "--default-bucket=bucket",
        ],
    ),
}


# Where clients of this process find the bucket of a scheme: the same port for all tests, because
# fsspec keeps its clients.
_PORTS: dict[str, int] = {}


def environment_of(scheme: str, host: str = "127.0.0.1") -> dict[str, str]:
    """What a user of such an emulator, or of a store of his own, puts into the environment.

    host: the address at which the client finds this machine.
    """
    url = f"http://{host}:{_PORTS[scheme]}"
    return {
        "s3": {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        },
        "gs": {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        },
    }[scheme]


@contextlib.contextmanager
def emulated(
    scheme: str, log: Path, *, listens_on: str = "127.0.0.1", latency_s: float = 0.0
) -> Iterator[str]:
    """Yields the URL of an empty bucket; while it is there, the environment leads every client, of
    any process of this machine, to it. Another machine needs `environment_of`.

    Args:
        listens_on: "0.0.0.0" for clients of other machines too.
        latency_s: by which every answer is late.
    """
    server, client, command = EMULATORS[scheme]
    library(server)
    library(client)
    seen = _PORTS.setdefault(scheme, free_port())
    port = free_port() if latency_s else seen
    before = dict(os.environ)
    with contextlib.ExitStack() as until_end, open(log, "wb") as file:
        here = "127.0.0.1" if latency_s else listens_on
        process = subprocess.Popen(command(here, port), stdout=file, stderr=file)
        until_end.callback(process.wait)
        until_end.callback(process.kill)
        if latency_s:
            words = [SLOW_LINK, listens_on, str(seen), str(port), str(latency_s)]
            link = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file)
            until_end.callback(link.wait)
            until_end.callback(link.kill)
        deadline = time.monotonic() + 60
        for waited_for in {port, seen}:
            while socket.socket().connect_ex(("127.0.0.1", waited_for)):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        os.environ.update(environment_of(scheme))
        try:
            if scheme == "s3":
                import s3fs

                s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
            yield f"{scheme}://bucket"
        finally:
            os.environ.clear()
            os.environ.update(before)
