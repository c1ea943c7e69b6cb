"""lm-evaluation-harness in several processes of one run: all are asked for the same, and the first
writes.
"""

import contextlib
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.errors import require

# What the harness adds to the name of a cache; a HarnessModel has rank 0 in every process.
CACHE_SUFFIX = "_rank0.db"


@contextlib.contextmanager
def cache_of_first(use_cache: str | None) -> Iterator[str | None]:
    """Yields the name of a cache in which this process finds what the cache of the first process
    holds. That of the others is gone after the block: only the first writes where it was asked to.

    The harness asks for what its cache lacks, and all processes must be asked for the same.
    """
    if use_cache is None or jax.process_count() == 1:
        yield use_cache
        return
    open_cache = require("sqlitedict", extra="eval").SqliteDict
    is_first = jax.process_index() == 0
    answers: dict = {}
    if is_first and Path(f"{use_cache}{CACHE_SUFFIX}").exists():
        with open_cache(f"{use_cache}{CACHE_SUFFIX}") as cache:
            answers = dict(cache)
    answers = _from_first(answers)
    with tempfile.TemporaryDirectory() as folder:
        if is_first:
            yield use_cache
            return
        with open_cache(f"{folder}/{CACHE_SUFFIX}") as cache:
            cache.update(answers)
            cache.commit()
        yield f"{folder}/"


def _from_first(value: Any) -> Any:
    """Returns what the first process was called with, in all processes."""
    content = np.frombuffer(pickle.dumps(value), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    # the others need an array of the same size to receive it
    content = np.resize(content, size)
    return pickle.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(content))))
