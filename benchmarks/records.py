"""How many rows/s does the loader read from a disk and from a bucket that answers late, and how
soon does a run begin that has 10,000 shards?

    python benchmarks/records.py [--latency 0.02] [--shards 10000] [--seconds 5]

Rows of 4096 tokens of LLaDA's vocabulary (16,904 bytes), 16 in a batch, in the loader's order. The
bucket is a small server on this machine that speaks as much of Google's JSON API as the clients
need (tensorstore, gcsfs) and delays every answer. Every measurement has a process of its own under
`ulimit -n 1024`. Prints two Markdown tables.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

T, V, BATCH_SIZE = 4096, 126_464, 16
PAGE = 1000  # objects in one page of a listing, as in Google's


def write_dataset(directory: Path, *, num_shards: int, records_per_shard: int) -> None:
    """Writes shards that all hold the same records, which reading does not know."""
    import numpy as np

    from llada_jax.data.records import FORMAT, encode_record, write_dataset_json
    from llada_jax.data.shards import write_shard

    rng = np.random.default_rng(0)
    records = [
        encode_record(rng.integers(V, size=T), np.arange(T) == 0, sequence_length=T, vocab_size=V)
        for _ in range(records_per_shard)
    ]
    directory.mkdir()
    write_shard(directory / "one", records)
    content = (directory / "one").read_bytes()
    (directory / "one").unlink()
    names = [f"train-{number:05d}.records" for number in range(num_shards)]
    for name in names:
        (directory / name).write_bytes(content)
    num_records = num_shards * records_per_shard
    counts = {"num_tokens": num_records * T, "num_bytes": num_records * T, "num_padding": 0}
    train: dict[str, object] = {"num_records": num_records, "num_documents": num_records, **counts}
    train["shards"] = [{"file": name, "num_records": records_per_shard} for name in names]
    tokenizer = {"kind": "bytes", "fingerprint": "beef", "vocab_size": V}
    described = {"format": FORMAT, "sequence_length": T, "fingerprint": "f00d", "source": {}}
    write_dataset_json(directory, {**described, "tokenizer": tokenizer, "splits": {"train": train}})


async def serve(folder: Path, port: int, latency_s: float) -> None:
    """Serves the files below a folder as the objects of the bucket "bucket"."""

    def answer(target: str, headers: str) -> tuple[str, bytes, str]:
        url = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(url.query))
        name = urllib.parse.unquote(url.path.partition("/b/bucket/o")[2]).lstrip("/")
        if url.path.endswith("/b/bucket"):
            return "200 OK", json.dumps({"name": "bucket"}).encode(), ""
        if not name:
            prefix, start = query.get("prefix", ""), int(query.get("pageToken", 0))
            parent = prefix.rpartition("/")[0]
            found = sorted(os.listdir(folder / parent)) if (folder / parent).is_dir() else []
            names = [name for file in found if (name := f"{parent}/{file}").startswith(prefix)]
            items = [described(name, folder / name) for name in names[start : start + PAGE]]
            page = {"kind": "storage#objects", "items": items}
            more = {"nextPageToken": str(start + PAGE)} if len(names) > start + PAGE else {}
            return "200 OK", json.dumps(page | more).encode(), ""
        file = folder / name
        if not file.is_file():
            return "404 Not Found", b"{}", ""
        if query.get("alt") != "media":
            return "200 OK", json.dumps(described(name, file)).encode(), ""
        size = file.stat().st_size
        asked = re.search(r"range: bytes=(\d+)-(\d*)", headers)
        first, last = (int(asked[1]), int(asked[2] or size - 1)) if asked else (0, size - 1)
        with open(file, "rb") as opened:
            opened.seek(first)
            data = opened.read(last - first + 1)
        range_headers = f"X-Goog-Generation: 1\r\nContent-Range: bytes {first}-{last}/{size}\r\n"
        return ("206 Partial Content" if asked else "200 OK"), data, range_headers

    def described(name: str, file: Path) -> dict:
        size = str(file.stat().st_size)
        return {"name": name, "bucket": "bucket", "size": size, "generation": "1"}

    async def talk(reader, writer) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                line, _, headers = head.partition("\r\n")
                status, body, more = answer(line.split()[1], headers.lower())
                await asyncio.sleep(latency_s)
                length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                writer.write(f"HTTP/1.1 {status}\r\n{length}{more}\r\n".encode() + body)
                await writer.drain()

    async with await asyncio.start_server(talk, "127.0.0.1", port, backlog=512) as server:
        await server.serve_forever()


def measure(path: str, *, num_threads: int, seconds: float) -> dict:
    """Returns what a process sees that opens a data set and reads from it."""
    from llada_jax.data.loader import describe, train_batches

    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    memory = _memory()
    begin = time.perf_counter()
    describe([(path, 1.0)], sequence_length=T)
    described = time.perf_counter()
    batches = train_batches(
        [(path, 1.0)],
        batch_size=BATCH_SIZE,
        sequence_length=T,
        seed=0,
        num_threads=num_threads,
    )
    next(batches)
    first = time.perf_counter()
    for _ in range(8 + num_threads):  # those that were read ahead
        next(batches)
    begun, cpu, num_batches = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begun < seconds:
        next(batches)
        num_batches += 1
    num_rows = num_batches * BATCH_SIZE
    return {
        "describe_s": described - begin,
        "first_batch_s": first - described,
        "rows_per_s": num_rows / (time.perf_counter() - begun),
        "cpu_us_per_row": (time.process_time() - cpu) / num_rows * 1e6,
        "memory_mb": (_memory() - memory) / 1e6,
        "num_open": len(os.listdir("/proc/self/fd")),
    }


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextlib.contextmanager
def bucket_of(folder: Path, latency_s: float):
    """Serves a folder in a process of its own; yields the environment of its clients."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(folder), str(port), str(latency_s)]
    )
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.05)
        url = f"http://127.0.0.1:{port}"
        yield {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        server.kill()
        server.wait()


def measured(path: str, environment: dict, *, num_threads: int, seconds: float) -> dict:
    words = [sys.executable, __file__, "--measure", path, str(num_threads), str(seconds)]
    result = subprocess.run(
        words, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--latency", type=float, default=0.02, help="seconds of every answer")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per measurement")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        folder, port, latency_s = arguments.serve
        return asyncio.run(serve(Path(folder), int(port), float(latency_s)))
    if arguments.measure:
        path, threads, seconds = arguments.measure
        return print(json.dumps(measure(path, num_threads=int(threads), seconds=float(seconds))))

    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    print(f"Machine: {names[0] if names else 'unknown processor'}, {os.cpu_count()} cores.\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_dataset(folder / "few", num_shards=20, records_per_shard=500)
        write_dataset(folder / "many", num_shards=arguments.shards, records_per_shard=2)
        with bucket_of(folder, arguments.latency) as environment:
            late = f"bucket, {1e3 * arguments.latency:.0f} ms"
            places = {"disk": (f"{folder}/", {}), late: ("gs://bucket/", environment)}
            print(
                "| records on | threads | rows/s | tokens/s | CPU per row |\n|---|---|---|---|---|"
            )
            for name, (top, env) in places.items():
                for threads in arguments.threads:
                    got = measured(f"{top}few", env, num_threads=threads, seconds=arguments.seconds)
                    print(
                        f"| {name} | {threads} | {got['rows_per_s']:,.0f} | "
                        f"{got['rows_per_s'] * T:,.0f} | {got['cpu_us_per_row']:.0f} us |",
                        flush=True,
                    )
            print(
                f"\n| {arguments.shards:,} shards on | dataset.json and the sizes of all shards | "
                "first batch | memory | open files afterwards |\n|---|---|---|---|---|"
            )
            for name, (top, env) in places.items():
                got = measured(f"{top}many", env, num_threads=4, seconds=arguments.seconds)
                print(
                    f"| {name} | {got['describe_s']:.2f} s | {1e3 * got['first_batch_s']:.0f} ms | "
                    f"{got['memory_mb']:.0f} MB | {got['num_open']} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
