"""What a step asks of the network: the logits of the current block, and no others.

The network is a function, or another one where there is a cache or a shadow:

    logits_fn(tokens_BT, segment_ids_BT, positions_BT, start=, length=) -> float32 [B, length, V]
    cached_fn(tokens_BW, segment_ids_BT, positions_BW, cache, start=, length=) -> logits, cache
    shadow_fn(tokens_BT, segment_ids_BT, positions_BT, mask_id, start=, length=) -> logits, logits

With cache=None, `cached_fn` computes whole rows (W = T) and returns what `logits_fn` returns, and
the cache. Otherwise it computes the columns start ... start + W - 1 alone, against what the cache
has of all others, and returns the logits of the first `length` of them, and the cache with the
window's own keys and values. It is one function, because two would each bring the parameters into
the compiled program. `shadow_fn` returns the logits of the window and those of its shadow: as many
masks in the same positions, of which each sees what the window's token in its place sees, but for
that token itself, and all other masks of the shadow; nothing else sees the shadow.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from llada_jax.errors import UserError


class Network(NamedTuple):
    """What a request may call; the last two are None where nothing asks for them."""

    logits_fn: Callable
    cached_fn: Any
    shadow_fn: Any


class Rows(NamedTuple):
    """What the network sees: int32 arrays [B, T]."""

    tokens_BT: Array
    segment_ids_BT: Array
    positions_BT: Array


def checked(logits_BTV: Array, *, num_rows: int, length: int) -> Array:
    """Returns the logits as float32; UserError for any other shape than [num_rows, length, V]."""
    if logits_BTV.ndim != 3 or logits_BTV.shape[:2] != (num_rows, length):
        raise UserError(
            f"logits_fn returned logits of shape {logits_BTV.shape} for length={length}; it must "
            "return those of the columns start ... start + length - 1 alone, shape [B, length, V] "
            f"= [{num_rows}, {length}, V]."
        )
    return logits_BTV.astype(jnp.float32)


def with_unprompted(rows: Rows, is_fixed_BT: Array, mask_id: Array) -> Rows:
    """Returns twice the rows, for guidance: as they are, and with all that is given masked."""
    unprompted_BT = jnp.where(is_fixed_BT, mask_id, rows.tokens_BT)
    return Rows(
        jnp.concatenate([rows.tokens_BT, unprompted_BT]),
        jnp.tile(rows.segment_ids_BT, (2, 1)),
        jnp.tile(rows.positions_BT, (2, 1)),
    )


def guided(both_BTV: Array, cfg_scale: Array) -> Array:
    """Classifier-free guidance of `with_unprompted` rows: un + (w + 1)(l - un)."""
    logits_BTV, unprompted_BTV = jnp.split(both_BTV, 2)
    return unprompted_BTV + (cfg_scale + 1) * (logits_BTV - unprompted_BTV)


def empty_cache(cached_fn: Callable, rows: Rows, *, length: int) -> Any:
    """Returns zeros in the shape of the cache that `cached_fn` gives for these rows."""
    shapes = jax.eval_shape(lambda *rows: cached_fn(*rows, None, start=0, length=length)[1], *rows)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def sharding_beside(network: Any) -> jax.sharding.Sharding | None:
    """Returns where the canvas belongs: whole on every device that holds parameters of the network;
    None if no parameters are bound to it.
    """
    shardings = [leaf.sharding for leaf in jax.tree.leaves(network) if isinstance(leaf, jax.Array)]
    for sharding in shardings:
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
    return shardings[0] if shardings else None


def place_everywhere(tree: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """Returns a tree of numpy arrays and random keys on the devices of a sharding, which may be
    those of several processes, all of which have the same tree.

    jax.device_put takes random keys to the devices of its own process only. Between processes it
    also compares each array, and NaN, as which confidences begin, differs from itself.
    """

    def is_key(leaf: Any) -> bool:
        return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    def unwrapped(leaf: Any) -> Any:
        return np.asarray(jax.random.key_data(leaf)) if is_key(leaf) else leaf

    def wrapped_like(leaf: Any, data: Array) -> Array:
        return (
            jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf)) if is_key(leaf) else data
        )

    arrays = jax.tree.map(unwrapped, tree)
    if sharding is None or sharding.is_fully_addressable:
        # One call for all arrays, which are then moved at the same time.
        placed = jax.device_put(arrays, sharding)
    else:
        placed = jax.tree.map(
            lambda leaf: jax.make_array_from_callback(
                np.shape(leaf), sharding, np.asarray(leaf).__getitem__
            ),
            arrays,
        )
    return jax.tree.map(wrapped_like, tree, placed)


def as_partial(function: Callable) -> jax.tree_util.Partial:
    """Returns a function as a pytree, which jax.jit takes as an argument."""
    if isinstance(function, jax.tree_util.Partial):
        return function
    return jax.tree_util.Partial(function)
