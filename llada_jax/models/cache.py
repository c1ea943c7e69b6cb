"""The network with the keys and values of columns that it does not compute again.

For a bidirectional network that is an approximation: every key depends on every token of the row,
so a cache is stale as soon as one of them changes. Under a causal mask it is exact.
"""

from typing import Any, NamedTuple

import jax
from jax import Array

from llada_jax.cluster.sharding import constrain
from llada_jax.errors import UserError
from llada_jax.models.attention import attend_from_canvas
from llada_jax.models.transformer import Block, Transformer, embed, normed_stream, rotary_angles


class KeysValues(NamedTuple):
    """What attention may see of rows, rotated: [B, T, K, H] of a layer, [L, B, T, K, H] of all.

    A network without a loop over its layers has a tuple of L arrays instead: a window is written
    into each where it is, and a kernel reads it from there.
    """

    keys: Any
    values: Any


def _run_block(
    block: Block,
    x_BWD: Array,
    angles: tuple[Array, Array],
    segment_ids_BT: Array,
    cache: KeysValues | None,
    start: Array | int,
    network: Transformer,
) -> tuple[Array, KeysValues]:
    """Returns one layer's output at the window, and keys and values of all columns of the row."""
    a = network.a
    q_BWNH, k_BWKH, v_BWKH = block.queries_keys_values(x_BWD, *angles, a=a)
    k_BTKH, v_BTKH = k_BWKH, v_BWKH
    if cache is not None:
        k_BTKH, v_BTKH = (
            jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
            for old, new in zip(cache, (k_BWKH, v_BWKH), strict=True)
        )
    attend = attend_from_canvas(network.attention)
    out_BWNH = attend(q_BWNH, k_BTKH, v_BTKH, segment_ids_BT, mask=network.mask, start=start)
    x_BWD = block.add_attention(x_BWD, out_BWNH, a=a)
    return block.add_feed_forward(x_BWD, a=a), KeysValues(k_BTKH, v_BTKH)


def hidden_with_cache(
    network: Transformer,
    tokens_BW: Array,
    segment_ids_BT: Array,
    positions_BW: Array,
    cache: KeysValues | None = None,
    start: Array | int = 0,
) -> tuple[Array, KeysValues]:
    """Returns what the head reads of some columns, [B, W, D], and keys and values of the rows.

    The columns are start ... start + W - 1 of the rows whose segment ids are given; `start` may be
    traced. All other columns are seen as they were when `cache` was made. cache=None computes whole
    rows, W = T.

    Raises:
        UserError: the output is shifted, so that the first column's vector lies outside.
    """
    a = network.a
    if a.output_shift:
        raise UserError(
            "This network scores a token at the position before it (output_shift), for which there "
            "is no cache; use cache=none."
        )
    angles = rotary_angles(positions_BW, a.head_dim, a.rope_theta, a.rope_scaling)
    x_BWD = constrain(
        embed(network.embed[...], tokens_BW, network.dtype),
        "act_batch",
        "act_position",
        "act_embed",
    )

    def run_block(
        block: Block, x_BWD: Array, layer_cache: KeysValues | None
    ) -> tuple[Array, KeysValues]:
        return _run_block(block, x_BWD, angles, segment_ids_BT, layer_cache, start, network)

    x_BWD, new_cache = network.run_layers(run_block, x_BWD, cache)
    return normed_stream(x_BWD, network.final_norm[...], a.norm_eps), new_cache
