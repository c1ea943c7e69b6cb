"""Arrays on a disk or in a bucket, read with tensorstore within a bounded amount of memory."""

import itertools
import math
import os
from typing import Any

import numpy as np
import tensorstore


def kvstore_of(directory: str) -> dict:
    """Returns tensorstore's description of a directory; local, gs:// or s3://."""
    scheme, colon, rest = directory.partition("://")
    if not colon:
        return {"driver": "file", "path": f"{directory}/"}
    if scheme == "s3":
        return s3_spec(f"{directory}/")
    bucket, _, path = rest.partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}


# How much is being fetched at a time: enough to hide the latency of an object store.
READ_BYTES = 64 << 20


def read_chunks(store: tensorstore.TensorStore) -> np.ndarray:
    """Returns a whole array. On top of the array itself this needs memory for READ_BYTES of its
    chunks, or for one chunk if that is larger.

    `store.read()` of everything would hold all chunks and the array at once, twice its size.
    """
    chunk: tuple = store.chunk_layout.read_chunk.shape or store.shape
    starts = list(
        itertools.product(*(range(0, size, step) for size, step in zip(store.shape, chunk)))
    )
    if len(starts) == 1:
        return np.ascontiguousarray(store.read().result())
    array = np.empty(store.shape, store.dtype.numpy_dtype)
    at_once = max(1, READ_BYTES // (math.prod(chunk) * array.itemsize))
    for i in range(0, len(starts), at_once):
        boxes = [
            tuple(
                slice(first, min(first + step, size))
                for first, step, size in zip(start, chunk, store.shape)
            )
            for start in starts[i : i + at_once]
        ]
        for box, reading in [(box, store[box].read()) for box in boxes]:
            array[box] = reading.result()
    return array


def s3_spec(url: str) -> dict:
    """Returns tensorstore's description of s3://bucket/path, with the endpoint and credentials that
    AWS's own tools take from the environment.
    """
    bucket, _, path = url.removeprefix("s3:").lstrip("/").partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
    # The default looks for files first, and complains when there are none.
    if "AWS_ACCESS_KEY_ID" in os.environ:
        spec["aws_credentials"] = {"type": "environment"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    # Without one the store is AWS itself, whose endpoint and region tensorstore finds by the
    # bucket's name.
    if endpoint:
        spec["endpoint"] = endpoint
        spec["aws_region"] = (
            os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        )
    return spec
