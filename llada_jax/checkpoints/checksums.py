"""A checksum of every array of a state, which is the same on every mesh and number of hosts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# How new checkpoints are summed. 1: the plain sum of the bits, which does not see swapped layers or
# reversed columns; checkpoints that do not name a scheme have it. 2: the elements are first
# scrambled with their positions.
SCHEME = 2
SCHEMES = (1, 2)

# Elements that numpy sums at a time, few enough for the cache: a larger block takes thrice as long.
BLOCK = 1 << 16


def checksums(items: dict, *, scheme: int = SCHEME) -> dict[str, dict[str, int]]:
    """Returns {item: {path of an array: the sum of its scrambled elements, modulo 2**32}}.

    An element is scrambled with its position: read as an unsigned integer, combined with a hash of
    its indices, and mapped to another number by a bijection. Any change of one element is therefore
    found, and any other change, such as two swapped layers, except for one in 2**32. What is added
    up does not depend on the order of the addition: each device sums its own shard, and the result
    is the same on every mesh and any number of hosts, which a CRC would not be.

    Args:
        scheme: one of SCHEMES.
    """
    # One program for all arrays, and one transfer: a state has dozens of them.
    sums = jax.device_get(_sums(items, scheme=scheme))
    return {
        item: {
            path_text(path): int(number)
            for path, number in jax.tree_util.tree_leaves_with_path(tree)
        }
        for item, tree in sums.items()
    }


@functools.partial(jax.jit, static_argnames="scheme")
def _sums(tree, *, scheme: int):
    return jax.tree.map(functools.partial(_sum, scheme=scheme), tree)


# A function of its own, because a parameter and its moments have the same shape: it is traced once
# for all of them.
@functools.partial(jax.jit, static_argnames="scheme")
def _sum(leaf, *, scheme: int):
    # The bits and not the value: 0.0 and -0.0 differ, and a NaN equals itself.
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    if scheme != 1:
        bits = _scrambled(bits ^ _position_hash(leaf.shape, jnp))
    return jnp.sum(bits, dtype=jnp.uint32)


def checksum_of_array(array: np.ndarray, *, scheme: int = SCHEME, first: int = 0) -> int:
    """Returns the same checksum of one array in the memory of this host, of any dtype up to 32
    bits.

    Args:
        first: the array is a part of a larger one, from this index of the first of at least two
            dims on. The checksum of the whole is the sum of those of its parts, modulo 2**32.
    """
    rows = array.view(f"uint{8 * array.itemsize}").reshape(-1, array.shape[-1] if array.ndim else 1)
    # the indices of the last dim, and of all others together
    lead = _position_hash(array.shape[:-1], np, first)
    lead = np.broadcast_to(lead, array.shape[:-1]).reshape(-1, 1)
    last = _index_hash(max(array.ndim - 1, 0), rows.shape[1], np)
    total, step = 0, max(1, BLOCK // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        block = rows[start : start + step].astype(np.uint32, copy=False)
        if scheme != 1:
            position = lead[start : start + step] + last if array.ndim else lead
            block = _scrambled(block ^ position)
        # Summed in 64 bits: with 32, numpy would have to be trusted to wrap around silently.
        total += int(block.sum(dtype=np.uint64))
    return total % 2**32


def _position_hash(shape: tuple[int, ...], xp, first: int = 0):
    """Returns uint32 that broadcasts to `shape`: the sum over the dims of a hash of the index,
    which in the first dim starts at `first`.

    Not the number of the element in the whole array, which does not fit into 32 bits for the
    largest arrays. xp: numpy or jax.numpy.
    """
    total = xp.zeros((1,) * len(shape), xp.uint32)
    for dim, size in enumerate(shape):
        total = total + xp.expand_dims(
            _index_hash(dim, size, xp, 0 if dim else first),
            tuple(other for other in range(len(shape)) if other != dim),
        )
    return total


def _index_hash(dim: int, size: int, xp, first: int = 0):
    """Returns uint32 [size], numbers without a pattern that differ from dim to dim."""
    indices = xp.arange(first, first + size, dtype=xp.uint32)
    return _scrambled(indices + np.uint32((dim + 1) * 0x9E3779B9 % 2**32))


def _scrambled(x):
    """Returns the bijection of 32 bits with which MurmurHash3 ends (its `fmix32`; Austin Appleby,
    public domain), in which each bit of x changes about half of the bits.
    """
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def path_text(path) -> str:
    """Returns the path of a leaf as it is written into records and indexes: "params/blocks/q"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
