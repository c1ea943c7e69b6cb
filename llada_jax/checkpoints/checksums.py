"""A checksum of every array of a state, which is the same on every mesh and number of hosts."""

import jax
import jax.numpy as jnp
import numpy as np


def checksums(items: dict) -> dict[str, dict[str, int]]:
    """Returns {item: {path of an array: the sum of its bits read as unsigned integers, modulo
    2**32}}.

    A sum and not a CRC, because a sum does not depend on the order: each device sums its own
    shard, and the result is the same on every mesh and any number of hosts. Any single flipped bit
    changes it.
    """
    sums = jax.device_get(_sums_of_bits(items))
    return {
        item: {
            path_text(path): int(number)
            for path, number in jax.tree_util.tree_leaves_with_path(tree)
        }
        for item, tree in sums.items()
    }


@jax.jit
def _sums_of_bits(tree):
    def sum_of_bits(leaf):
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned)
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(sum_of_bits, tree)


def checksum_of_float32(array: np.ndarray) -> int:
    """Returns the same checksum of one float32 array in the memory of this host."""
    # Summed in 64 bits: with 32, numpy would have to be trusted to wrap around without a warning.
    return int(array.view(np.uint32).sum(dtype=np.uint64)) % 2**32


def path_text(path) -> str:
    """Returns the path of a leaf as it is written into records and indexes: "params/blocks/q"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
