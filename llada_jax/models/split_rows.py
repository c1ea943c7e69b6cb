"""Attention where the mesh splits the positions of a row over its axis `sequence`.

Every kernel attends from some columns of a row to all of it, or from all of it with some of its
heads. So there are two ways to bring a row together, and `exchange_for` takes the one that moves
fewer bytes:

keys    Each device gathers the keys and values of the whole row and attends from its own columns.
        A bidirectional network needs no balancing: all columns see the same number of keys.
heads   Each device hands out its columns and receives whole rows of its share of the heads
        (all-to-all, DeepSpeed Ulysses, arXiv 2309.14509); the outputs go back the same way. Kernel
        and mask are those of a row that is not split.

A ring of devices that hand on their keys (ring attention, arXiv 2310.01889) would move what `keys`
moves, and its backward pass would need each kernel's with statistics of the whole row, which none
of them offers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from llada_jax.cluster.sharding import RULES, spec
from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, Mask

_AXIS = RULES["act_position"]

# Kernels that take queries and keys of different lengths, if no query's column matters. Splash and
# cuDNN count columns from the first query, and Triton's kernel has one array of segment ids for
# queries and keys.
_FROM_SOME_COLUMNS = ("splash", "cudnn")


def exchange_for(
    name: str, mask: Mask, *, num_heads: int, num_kv_heads: int, num_parts: int
) -> str:
    """Returns how devices bring the parts of a row together: "keys", "heads", or "" where the
    kernel can do neither.

    Args:
        name: a key of llada_jax.models.attention.IMPLEMENTATIONS, or IN_PIECES.
        num_heads, num_kv_heads: of one device, after the tensor axis.
        num_parts: the size of the mesh axis `sequence`.
    """
    if name.startswith("xla"):
        # The reference knows the column of each query.
        return "keys"
    # "heads" first, for where both move as much: it keeps no keys of whole rows
    possible = ["heads"] if num_kv_heads % num_parts == 0 else []
    if name in _FROM_SOME_COLUMNS and mask == BIDIRECTIONAL:
        possible.append("keys")
    return min(
        possible,
        key=lambda exchange: exchanged_heads(exchange, num_heads, num_kv_heads, num_parts),
        default="",
    )


def exchanged_heads(exchange: str, num_heads: int, num_kv_heads: int, num_parts: int) -> int:
    """Returns what a device receives in the forward pass of a layer, in vectors of one head for
    each of its tokens: keys and values of all parts, or queries, keys, values and outputs once.
    """
    if exchange == "keys":
        return 2 * num_kv_heads * num_parts
    return 2 * (num_heads + num_kv_heads)


def check_exchange(
    name: str, mask: Mask, *, num_heads: int, num_kv_heads: int, num_parts: int
) -> None:
    """Raises UserError when the kernel cannot attend to rows in so many parts; see `exchange_for`
    for the arguments.
    """
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    if not exchange_for(name, mask, **heads, num_parts=num_parts):
        raise UserError(
            f"The attention kernel {name!r} needs whole rows here, and {num_kv_heads} key/value "
            f"heads per device cannot be dealt to config.mesh.sequence={num_parts} devices; make "
            "it a divisor of the heads, or set config.model.attention=xla."
        )


def attend_to_gathered_keys(
    kernel: Callable[..., Array],
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BT: Array | None,
    *,
    is_reference: bool,
) -> Array:
    """Returns attention by `kernel(q, k, v, segment_ids, start=...)`, in which each device attends
    from its own columns.

    Args:
        is_reference: the kernel is a program that XLA splits over all other axes of the mesh, by
            itself and also where they do not divide the rows, as a sampler's.
    """
    batch, heads = (None, None) if is_reference else ("act_batch", "act_heads")
    parts, row = spec((batch, "act_position", heads, None)), spec((batch, None))

    def from_own_columns(
        q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, ids_BS: Array | None, columns_T: Array
    ) -> Array:
        k_BSKH, v_BSKH = (
            jax.lax.all_gather(x, _AXIS, axis=1, tiled=True) for x in (k_BTKH, v_BTKH)
        )
        return kernel(q_BTNH, k_BSKH, v_BSKH, ids_BS, start=columns_T[0])

    split = jax.shard_map(
        from_own_columns,
        in_specs=(parts, parts, parts, None if segment_ids_BT is None else row, P(_AXIS)),
        out_specs=parts,
        axis_names={_AXIS} if is_reference else set(),
        check_vma=False,
    )
    # The columns as an array: the number of a device is not to be had where XLA splits some axes.
    return split(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, jnp.arange(q_BTNH.shape[1]))


def attend_with_exchanged_heads(
    kernel: Callable[..., Array],
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BT: Array | None,
) -> Array:
    """Returns attention by `kernel(q, k, v, segment_ids)`, in which each device attends from whole
    rows with its share of the heads. Consecutive heads stay together, and so do those of a group.
    """
    parts = spec(("act_batch", "act_position", "act_heads", None))
    row = None if segment_ids_BT is None else spec(("act_batch", None))

    def with_own_heads(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        q, k, v = (
            jax.lax.all_to_all(x, _AXIS, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v)
        )
        out = kernel(q, k, v, segment_ids)
        return jax.lax.all_to_all(out, _AXIS, split_axis=1, concat_axis=2, tiled=True)

    split = jax.shard_map(
        with_own_heads, in_specs=(parts, parts, parts, row), out_specs=parts, check_vma=False
    )
    return split(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
