"""The network with a shadow of some columns: what it would say of them if it did not see them."""

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.cluster.sharding import constrain
from llada_jax.errors import UserError
from llada_jax.masks import Mask, may_attend
from llada_jax.models.attention import attend_where
from llada_jax.models.transformer import Block, Transformer, embed, normed_stream, rotary_angles


def sees_with_shadow(
    mask: Mask, segment_ids_BT: Array, *, start: int | Array, length: int
) -> Array:
    """Returns whether each query may attend to each key of rows with their shadow behind them, bool
    [B, T + length, T + length].

    The row sees itself as `may_attend` says, and never the shadow. A column of the shadow sees what
    the column start + i of which it is the shadow sees, but for that column itself, and all of the
    shadow.
    """
    T = segment_ids_BT.shape[1]
    shadow_L = start + jnp.arange(length)
    index_S = jnp.concatenate([jnp.arange(T), shadow_L])
    segment_BS = jnp.concatenate(
        [segment_ids_BT, jax.lax.dynamic_slice_in_dim(segment_ids_BT, start, length, axis=1)],
        axis=1,
    )
    row_BST = may_attend(
        mask,
        query_segment=segment_BS[:, :, None],
        key_segment=segment_ids_BT[:, None, :],
        query_index=index_S[:, None],
        key_index=jnp.arange(T)[None, :],
    )
    is_own_ST = (jnp.arange(T + length)[:, None] >= T) & (index_S[:, None] == jnp.arange(T))
    is_shadow_S1 = (jnp.arange(T + length) >= T)[:, None]
    # All of the shadow, also at padding: no softmax may be over nothing.
    shadow_BSL = is_shadow_S1 & jnp.ones((*segment_BS.shape, length), bool)
    return jnp.concatenate([row_BST & ~is_own_ST, shadow_BSL], axis=2)


def hidden_with_shadow(
    network: Transformer,
    tokens_BT: Array,
    segment_ids_BT: Array,
    positions_BT: Array,
    shadow_token: int | Array,
    *,
    start: int | Array,
    length: int,
) -> tuple[Array, Array]:
    """Returns what the head reads of the columns start ... start + length - 1, and of their shadow,
    both [B, length, D].

    Args:
        shadow_token: the token in every place of the shadow.

    Raises:
        UserError: the output is shifted, or the network looks to the left alone.
    """
    a = network.a
    if a.output_shift or network.mask.causal:
        raise UserError(
            "This network reads from left to right or scores a token at the position before it "
            "(output_shift), and has no shadow of a block; use another rule than revise=wino."
        )

    def block_of(array: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, start, length, axis=1)

    shadow_BL = jnp.broadcast_to(shadow_token, (tokens_BT.shape[0], length)).astype(tokens_BT.dtype)
    tokens_BS = jnp.concatenate([tokens_BT, shadow_BL], axis=1)
    positions_BS = jnp.concatenate([positions_BT, block_of(positions_BT)], axis=1)
    sees_BSS = sees_with_shadow(network.mask, segment_ids_BT, start=start, length=length)
    angles = rotary_angles(positions_BS, a.head_dim, a.rope_theta, a.rope_scaling)
    x_BSD = constrain(
        embed(network.embed[...], tokens_BS, network.dtype), "act_batch", None, "act_embed"
    )

    def run_block(block: Block, x_BSD: Array, _: None) -> tuple[Array, None]:
        q_BSNH, k_BSKH, v_BSKH = block.queries_keys_values(x_BSD, *angles, a=a)
        out_BSNH = attend_where(q_BSNH, k_BSKH, v_BSKH, sees_BSS)
        x_BSD = block.add_attention(x_BSD, out_BSNH, a=a)
        return block.add_feed_forward(x_BSD, a=a), None

    x_BSD, _ = network.run_layers(run_block, x_BSD)
    x_BSD = normed_stream(x_BSD, network.final_norm[...], a.norm_eps)
    return block_of(x_BSD), x_BSD[:, tokens_BT.shape[1] :]
