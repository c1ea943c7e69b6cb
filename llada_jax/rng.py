"""The only place where random keys are made: each is a fold of (purpose, seed, step, global row),
none is stored.

Hence the same step draws the same numbers on 1, 2 or 64 hosts, with or without gradient
accumulation, before and after a restart.
"""

import zlib

import jax


def key_for(purpose: str, seed: int, *indices) -> jax.Array:
    """Returns the key of one purpose ("init", "corruption", ...) folded with integers, which may be
    traced.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key


def keys_for_rows(key: jax.Array, row_B: jax.Array) -> jax.Array:
    """Returns one key a row, a function of the row's global number alone. row_B int32 [B] -> keys
    [B].
    """
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)
