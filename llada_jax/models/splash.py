"""The attention kernel of TPUs: splash attention, and its masks and tiles."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llada_jax.errors import UserError
from llada_jax.masks import Mask, may_attend, own_columns

# Of one query and head, for the large tiles of splash: 128 numbers in bfloat16.
_MOST_BYTES_OF_LARGE_TILES = 256


@functools.cache
def splash_head_mask(mask: Mask, T: int, S: int) -> Any:
    """Returns the splash attention mask of one head, [T, S]; segments are handed to the kernel.

    T is S but for a bidirectional mask, under which it does not matter which columns the queries
    are those of.

    FullMask and CausalMask cost nothing in the kernel: it skips no tile or half of them, and
    computes the diagonal. Blocks become a lazy mask, of which splash reads one tile at a time: it
    skips hidden tiles and keeps each different partial tile once, where a dense array of [T, T]
    would take 1 GiB at 32k positions.

    Cached, so that all layers share one object: splash caches what it derives from a mask by the
    identity of the object.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash

    if mask.causal:
        return splash.CausalMask((T, S))
    if not mask.has_blocks:
        return splash.FullMask((T, S))

    class LazyMask(splash.Mask):
        """`may_attend` within one segment, for the rows and columns that are asked for."""

        shape = (T, S)

        def __getitem__(self, slices: tuple[slice, slice]) -> np.ndarray:
            rows, columns = (np.arange(S)[part] for part in slices)
            return may_attend(
                mask,
                query_segment=np.zeros((len(rows), 1), np.int32),
                key_segment=np.zeros((1, len(columns)), np.int32),
                query_index=rows[:, None],
                key_index=columns[None, :],
            )

    return LazyMask()


def _splash_tile(length: int, most: int = 512) -> int:
    """Returns the side of splash's tiles; raises UserError where none divides the length."""
    for tile in (2048, 1024, 512, 256, 128):
        if tile <= most and length % tile == 0:
            return tile
    raise UserError(
        f"Splash attention needs a sequence length that is a multiple of 128, not {length}; set "
        "config.model.attention to auto or xla."
    )


def _splash_tiles(T: int, S: int, mask: Mask, item_bytes: int) -> dict[str, Any]:
    """Returns the arguments of splash's BlockSizes for T queries and S keys.

    Rows of one or two large tiles of keys have one backward kernel instead of two, which computes
    scores and their gradients once: 5 products instead of 7. It writes the gradient of the queries
    once for each tile of keys, which would take too much memory for long rows. Tiles that a mask
    hides in part are small, so that more of them are hidden as a whole.

    Args:
        item_bytes: of one query and head. Large tiles of more do not fit the memory of a kernel.
    """
    q_tile, kv_tile = _splash_tile(T, 1024), _splash_tile(S, 2048)
    sees_all = not mask.causal and not mask.has_blocks
    is_fused = sees_all and S // kv_tile <= 2 and item_bytes <= _MOST_BYTES_OF_LARGE_TILES
    if not is_fused:
        q_tile, kv_tile = _splash_tile(T), _splash_tile(S)
    tiles = {
        "block_q": q_tile,
        "block_kv": kv_tile,
        "block_kv_compute": min(kv_tile, 512),
        "block_q_dkv": q_tile,
        "block_kv_dkv": kv_tile,
        "block_kv_dkv_compute": min(kv_tile, 512),
    }
    if is_fused:
        return {**tiles, "use_fused_bwd_kernel": True}
    return {**tiles, "block_q_dq": q_tile, "block_kv_dq": kv_tile}


def splash_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BT: Array | None,
    *,
    mask: Mask,
    start: Array | int | None = None,
    interpret: bool = False,
) -> Array:
    """TPU splash attention (jax.experimental.pallas.ops.tpu.splash_attention): every Mask, with
    packing and padding as segment ids.

    start: see `xla_attention`; for bidirectional masks alone.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, N, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    tiles = kernels.BlockSizes(**_splash_tiles(T, S, mask, H * q_BTNH.dtype.itemsize))
    # Grouped heads: one call of the multi-query kernel for each key/value head and its queries,
    # so that keys and values are never repeated in memory.
    is_grouped = k_BSKH.shape[2] != N
    make = kernels.make_splash_mqa if is_grouped else kernels.make_splash_mha
    num_masks = N // k_BSKH.shape[2] if is_grouped else N
    kernel = make(
        mask=masks.MultiHeadMask([splash_head_mask(mask, T, S)] * num_masks),
        block_sizes=tiles,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        # The name of output and normaliser, which its backward pass reads: rematerialisation keeps
        # them (see REMAT_POLICIES), or the whole kernel would run a second time.
        residual_checkpoint_name="attention",
    )

    def one_row(q_NTH: Array, k_KSH: Array, v_KSH: Array, segments_S: Array | None) -> Array:
        ids = None
        if segments_S is not None:
            ids = kernels.SegmentIds(q=own_columns(segments_S, start, T), kv=segments_S)
        if not is_grouped:
            return kernel(q_NTH, k_KSH, v_KSH, segment_ids=ids)
        q_KGTH = q_NTH.reshape(k_KSH.shape[0], -1, T, H)
        group = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))
        return group(q_KGTH, k_KSH, v_KSH).reshape(q_NTH.shape)

    # Splash does not scale: the queries are scaled before they come in.
    scaled_q = q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (scaled_q, k_BSKH, v_BSKH))
    if segment_ids_BT is None:
        out = jax.vmap(lambda q, k, v: one_row(q, k, v, None))(q, k, v)
    else:
        out = jax.vmap(one_row)(q, k, v, segment_ids_BT)
    return jnp.swapaxes(out, 1, 2).astype(q_BTNH.dtype)
