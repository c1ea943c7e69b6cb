"""Bidirectional attention over packed, padded rows: one reference and the accelerators' kernels, by
name.

Every implementation takes q_BTNH, k_BSKH, v_BSKH (rotary already applied), segment ids and the
softmax scale, and returns [B, T, N, H] in the dtype of q. A query attends to the keys of its own
segment; segment 0 is padding, whose outputs mean nothing. `segment_ids_BT=None` says that nothing
is packed or padded.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.cluster.sharding import RULES, spec
from llada_jax.errors import UserError


def xla_attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segment_ids_BT: Array | None, *, causal: bool
) -> Array:
    """The reference: softmax(q k^T / sqrt(H)) v in float32, materialising the scores [B, N, T, S].

    Heads come first, once, and grouped heads are repeated: CPUs are fast at batched products whose
    batch dims stand in front, and at a softmax over four dims (a fifth for the groups costs 18% of
    a training step there).
    """
    num_groups = q_BTNH.shape[2] // k_BSKH.shape[2]  # query heads that share a key/value head
    k_BSNH, v_BSNH = (
        jnp.repeat(x, num_groups, axis=2) if num_groups > 1 else x for x in (k_BSKH, v_BSKH)
    )
    q_BNTH, k_BNSH, v_BNSH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BSNH, v_BSNH))
    scores_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, preferred_element_type=jnp.float32)
    scores_BNTS = scores_BNTS * q_BTNH.shape[-1] ** -0.5
    lowest = jnp.finfo(jnp.float32).min
    if segment_ids_BT is not None:
        attend_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
        scores_BNTS = jnp.where(attend_BTS[:, None], scores_BNTS, lowest)
    if causal:
        T = q_BTNH.shape[1]
        scores_BNTS = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores_BNTS, lowest)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.swapaxes(jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS, v_BNSH), 1, 2)


def splash_attention(
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, *, causal: bool, interpret: bool = False
) -> Array:
    """TPU splash attention (jax.experimental.pallas.ops.tpu.splash_attention); packing and padding
    as segment ids.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, N, H = q_BTNH.shape
    head_mask = masks.CausalMask((T, T)) if causal else masks.FullMask((T, T))
    block = next((b for b in (512, 256, 128) if T % b == 0), None)
    if block is None:
        raise UserError(
            f"Splash attention needs a sequence length that is a multiple of 128, not {T}; use xla."
        )
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    make = splash.make_splash_mha if k_BSKH.shape[2] == N else splash.make_splash_mqa
    num_masks = N if k_BSKH.shape[2] == N else N // k_BSKH.shape[2]
    kernel = make(
        mask=masks.MultiHeadMask([head_mask] * num_masks),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name="attention",  # output and normaliser: what its backward pass reads
    )

    def one_row(q_NTH, k_KSH, v_KSH, segments):
        ids = None if segments is None else splash.SegmentIds(q=segments, kv=segments)
        if k_KSH.shape[0] == q_NTH.shape[0]:
            return kernel(q_NTH, k_KSH, v_KSH, segment_ids=ids)
        q_KGTH = q_NTH.reshape(k_KSH.shape[0], -1, T, H)
        group = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))
        return group(q_KGTH, k_KSH, v_KSH).reshape(q_NTH.shape)

    scaled_q = q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (scaled_q, k_BSKH, v_BSKH))
    if segment_ids_BT is None:
        out = jax.vmap(lambda q, k, v: one_row(q, k, v, None))(q, k, v)
    else:
        out = jax.vmap(one_row)(q, k, v, segment_ids_BT)
    return jnp.swapaxes(out, 1, 2).astype(q_BTNH.dtype)


def cudnn_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, *, causal: bool) -> Array:
    """cuDNN flash attention; padding as lengths (rows are right-padded), never as a bool mask,
    which becomes a bias.
    """
    lengths = None if segment_ids_BT is None else (segment_ids_BT > 0).sum(axis=1).astype(jnp.int32)
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        is_causal=causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    if segment_ids_BT is None:
        return out_BTNH
    return jnp.where(
        (segment_ids_BT > 0)[:, :, None, None], out_BTNH, 0
    )  # rows beyond the length are not written


def triton_attention(
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, *, causal: bool, interpret: bool = False
) -> Array:
    """Segment-aware flash attention for GPUs (jax.experimental.pallas.ops.gpu.attention), for
    packed documents.
    """
    from jax.experimental.pallas.ops.gpu.attention import mha

    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k_BSKH, v_BSKH))
    return mha(
        q_BTNH,
        k,
        v,
        segment_ids_BT,
        sm_scale=q_BTNH.shape[-1] ** -0.5,
        causal=causal,
        interpret=interpret,
    )


IMPLEMENTATIONS = {
    "xla": xla_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
    "triton": triton_attention,
}


PLATFORMS = {
    "splash": ("tpu",),
    "cudnn": ("gpu", "cuda"),
    "triton": ("gpu", "cuda"),
}  # where a kernel runs


def choose(
    name: str, *, platform: str, packed: bool, sequence_length: int, head_dim: int, dtype
) -> str:
    """Returns the implementation for "auto" on the mesh's platform; UserError for a kernel that
    does not run there.

    Args:
        platform: of the mesh's devices, not of this process' default backend: compiling for absent
            devices works.
        packed: whether segment ids above 1 occur, which cuDNN's lengths cannot express.
        dtype: of q, k and v. The GPU kernels take 16 bits and heads of at most 128, cuDNN in
            multiples of 8.
    """
    if name != "auto":
        if platform not in PLATFORMS.get(name, (platform,)):
            raise UserError(
                f"The attention kernel {name!r} runs on {PLATFORMS[name][0]}, and the mesh is of "
                f"{platform}; set "
                "config.model.attention to auto or xla."
            )
        return name
    if platform == "tpu" and sequence_length % 128 == 0:
        return "splash"
    is_half = jnp.dtype(dtype).itemsize == 2
    if (
        platform in ("gpu", "cuda")
        and sequence_length % 128 == 0
        and is_half
        and head_dim % 8 == 0
        and head_dim <= 128
    ):
        return "triton" if packed else "cudnn"
    return "xla"


def attend(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, *, implementation: str, causal: bool) -> Array:
    """Attention by the named implementation; kernels run per device inside shard_map, rows and
    heads split.

    Shapes q [B, T, N, H], k and v [B, T, K, H], segment_ids [B, T] or None; returns [B, T, N, H].
    """
    if implementation == "xla" or jax.sharding.get_abstract_mesh().empty:
        return IMPLEMENTATIONS[implementation](
            q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, causal=causal
        )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape[RULES["act_position"]] > 1:
        raise UserError(
            f"The attention kernel {implementation!r} needs whole rows; set config.mesh.sequence=1 "
            "or xla."
        )
    heads = spec(("act_batch", None, "act_heads", None))
    segments = None if segment_ids_BT is None else spec(("act_batch", None))
    kernel = functools.partial(IMPLEMENTATIONS[implementation], causal=causal)
    sharded = jax.shard_map(
        kernel, in_specs=(heads, heads, heads, segments), out_specs=heads, check_vma=False
    )
    return sharded(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
