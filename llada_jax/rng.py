"""The only place where random keys are made: each is a fold of (purpose, seed, step, global row).

None of them is stored. Hence a step draws the same numbers on 1, 2 or 64 hosts, with or without
gradient accumulation, before and after a restart.
"""

import zlib
from typing import Any

import jax


def key_for(purpose: str, seed: int, *indices: Any) -> jax.Array:
    """Returns the key of one purpose ("init", "corruption", ...), folded with integers that may be
    traced.
    """
    # by name, because JAX_DEFAULT_PRNG_IMPL in the environment would change all noise
    key = jax.random.key(seed, impl="threefry2x32")
    # crc32, because Python's own hash of a text differs from process to process
    key = jax.random.fold_in(key, zlib.crc32(purpose.encode()))
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key


def keys_for_rows(key: jax.Array, row_B: jax.Array) -> jax.Array:
    """Returns one key per row, which depends on nothing but `key` and the row's global number.

    row_B int32 [B] -> keys [B].
    """
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)
