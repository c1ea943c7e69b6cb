"""Attention over packed, padded rows: one reference and the accelerators' kernels, by name.

Every implementation takes q_BTNH, k_BSKH, v_BSKH (rotary already applied), segment ids and the
Mask, and returns [B, T, N, H] in the dtype of q. What a query may see is defined once, by
`llada_jax.masks.may_attend`: each kernel derives its own form of it here, or refuses a mask that it
cannot express. Outputs at padding (segment 0) mean nothing and differ between the kernels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llada_jax.cluster.sharding import RULES, spec
from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, Mask, may_attend

# What `attend` calls attend_in_pieces. No choice of a config: it is not for training.
IN_PIECES = "xla in pieces"
MOST_SCORES = 1 << 28  # 1 GiB of float32


def xla_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BT: Array | None,
    *,
    mask: Mask,
    start: Array | int | None = None,
) -> Array:
    """The reference: softmax(q k^T / sqrt(H)) v in float32, materialising the scores [B, N, T, S].

    start: the queries are those of the columns start ... start + T - 1 of rows of S columns, whose
        segment ids are then [B, S]; None where T is S. May be traced.
    """
    # A row that is one segment under a bidirectional mask hides nothing: no pass over the scores.
    if segment_ids_BT is None and mask == BIDIRECTIONAL:
        return attend_where(q_BTNH, k_BSKH, v_BSKH, None)
    index_S = jnp.arange(k_BSKH.shape[1])
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros((1, len(index_S)), jnp.int32)
    query_segment_BT, index_T = segment_ids_BT, index_S
    if start is not None:
        query_segment_BT, index_T = (
            jax.lax.dynamic_slice_in_dim(array, start, q_BTNH.shape[1], axis=-1)
            for array in (segment_ids_BT, index_S)
        )
    allowed_BTS = may_attend(
        mask,
        query_segment=query_segment_BT[:, :, None],
        key_segment=segment_ids_BT[:, None, :],
        query_index=index_T[:, None],
        key_index=index_S[None, :],
    )
    return attend_where(q_BTNH, k_BSKH, v_BSKH, allowed_BTS)


def attend_where(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, allowed_BTS: Array | None) -> Array:
    """Softmax attention of queries to the keys that they may see; None: to all.

    The heads are moved to the front once, and grouped heads are repeated: CPUs are fast at batched
    products whose batch dims come first, and at a softmax over four dims (a fifth dim for the
    groups costs 18% of a training step there).
    """
    num_groups = q_BTNH.shape[2] // k_BSKH.shape[2]  # query heads that share a key/value head
    k_BSNH, v_BSNH = (
        jnp.repeat(x, num_groups, axis=2) if num_groups > 1 else x for x in (k_BSKH, v_BSKH)
    )
    q_BNTH, k_BNSH, v_BNSH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BSNH, v_BSNH))
    scores_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, preferred_element_type=jnp.float32)
    scores_BNTS = scores_BNTS * q_BTNH.shape[-1] ** -0.5
    if allowed_BTS is not None:
        # The lowest finite number and not -inf, whose difference with itself is NaN.
        lowest = jnp.finfo(jnp.float32).min
        scores_BNTS = jnp.where(allowed_BTS[:, None], scores_BNTS, lowest)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.swapaxes(jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS, v_BNSH), 1, 2)


def attend_in_pieces(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BT: Array | None,
    *,
    mask: Mask,
    start: Array | int | None = None,
    most_scores: int = MOST_SCORES,
) -> Array:
    """The reference for rows of any length and padding, as scoring and sampling read them: so many
    queries at a time that a device holds no more than `most_scores` scores.

    LLaDA-8B would have 64 GiB of them for 32 rows of 4,096 tokens. The queries are halved until the
    scores fit, or until their number is odd. Not for training: its backward pass keeps all scores.
    """
    B, T, N, _ = q_BTNH.shape
    mesh = jax.sharding.get_abstract_mesh()
    num_devices = 1 if mesh.empty else mesh.size
    num_pieces, num_scores = 1, B * N * T * k_BSKH.shape[1] // num_devices
    while num_scores // num_pieces > most_scores and T % (2 * num_pieces) == 0:
        num_pieces *= 2
    if num_pieces == 1:
        return xla_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, mask=mask, start=start)
    length = T // num_pieces

    def piece(number: Array) -> Array:
        q_BPNH = jax.lax.dynamic_slice_in_dim(q_BTNH, number * length, length, axis=1)
        first = number * length + (0 if start is None else start)
        return xla_attention(q_BPNH, k_BSKH, v_BSKH, segment_ids_BT, mask=mask, start=first)

    out = jax.lax.map(piece, jnp.arange(num_pieces))
    return jnp.moveaxis(out, 0, 1).reshape(q_BTNH.shape)


@functools.cache
def splash_head_mask(mask: Mask, T: int) -> Any:
    """Returns the splash attention mask of one head, [T, T]; segments are handed to the kernel.

    FullMask and CausalMask cost nothing in the kernel: it skips no tile or half of them, and
    computes the diagonal. Blocks become a lazy mask, of which splash reads one tile at a time: it
    skips hidden tiles and keeps each different partial tile once, where a dense array of [T, T]
    would take 1 GiB at 32k positions.

    Cached, so that all layers share one object: splash caches what it derives from a mask by the
    identity of the object.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash

    if mask.causal:
        return splash.CausalMask((T, T))
    if not mask.has_blocks:
        return splash.FullMask((T, T))

    class LazyMask(splash.Mask):
        """`may_attend` within one segment, for the rows and columns that are asked for."""

        shape = (T, T)

        def __getitem__(self, slices: tuple[slice, slice]) -> np.ndarray:
            rows, columns = (np.arange(T)[part] for part in slices)
            return may_attend(
                mask,
                query_segment=np.zeros((len(rows), 1), np.int32),
                key_segment=np.zeros((1, len(columns)), np.int32),
                query_index=rows[:, None],
                key_index=columns[None, :],
            )

    return LazyMask()


def splash_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BT: Array | None,
    *,
    mask: Mask,
    interpret: bool = False,
) -> Array:
    """TPU splash attention (jax.experimental.pallas.ops.tpu.splash_attention): every Mask, with
    packing and padding as segment ids.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, N, H = q_BTNH.shape
    tile = next((tile for tile in (512, 256, 128) if T % tile == 0), None)
    if tile is None:
        raise UserError(
            f"Splash attention needs a sequence length that is a multiple of 128, not {T}; set "
            "config.model.attention to auto or xla."
        )
    tiles = kernels.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_kv_compute=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_kv_dkv_compute=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
    )
    # Grouped heads: one call of the multi-query kernel for each key/value head and its queries,
    # so that keys and values are never repeated in memory.
    is_grouped = k_BSKH.shape[2] != N
    make = kernels.make_splash_mqa if is_grouped else kernels.make_splash_mha
    num_masks = N // k_BSKH.shape[2] if is_grouped else N
    kernel = make(
        mask=masks.MultiHeadMask([splash_head_mask(mask, T)] * num_masks),
        block_sizes=tiles,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        # The name of output and normaliser, which its backward pass reads: rematerialisation keeps
        # them (see REMAT_POLICIES), or the whole kernel would run a second time.
        residual_checkpoint_name="attention",
    )

    def one_row(q_NTH: Array, k_KSH: Array, v_KSH: Array, segments: Array | None) -> Array:
        ids = None if segments is None else kernels.SegmentIds(q=segments, kv=segments)
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


def cudnn_attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segment_ids_BT: Array | None, *, mask: Mask
) -> Array:
    """cuDNN flash attention for rows of one document, padded on the right: it sees only segments 0
    and 1.

    Padding goes in as lengths and never as a bool mask, which jax turns into a bias of the shape of
    the scores. Packed documents cannot go in at all, which only `choose` can refuse: the ids are
    not known while this is traced.

    cuDNN does not write beyond the length, neither its output nor its gradients, and what lies
    there in memory may be NaN. Inputs and output are therefore 0 at padding: the gradient of that
    choice is 0 there too, whatever the kernel has left, and without it a NaN at one position of
    padding would be in the gradient of every matrix.
    """
    check_expressible("cudnn", mask)
    lengths = None
    if segment_ids_BT is not None:
        is_real_BT11 = (segment_ids_BT > 0)[:, :, None, None]
        lengths = (segment_ids_BT > 0).sum(axis=1).astype(jnp.int32)
        q_BTNH, k_BSKH, v_BSKH = (jnp.where(is_real_BT11, x, 0) for x in (q_BTNH, k_BSKH, v_BSKH))
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        is_causal=mask.causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return out_BTNH if segment_ids_BT is None else jnp.where(is_real_BT11, out_BTNH, 0)


def triton_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BT: Array | None,
    *,
    mask: Mask,
    interpret: bool = False,
) -> Array:
    """Segment-aware flash attention for GPUs (jax.experimental.pallas.ops.gpu.attention), for
    packed documents.
    """
    from jax.experimental.pallas.ops.gpu.attention import mha

    check_expressible("triton", mask)
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k_BSKH, v_BSKH))
    return mha(
        q_BTNH,
        k,
        v,
        segment_ids_BT,
        sm_scale=q_BTNH.shape[-1] ** -0.5,
        causal=mask.causal,
        interpret=interpret,
    )


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "xla": xla_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
    "triton": triton_attention,
}

# Where a kernel runs; xla runs everywhere.
PLATFORMS = {
    "splash": ("tpu",),
    "cudnn": ("gpu", "cuda"),
    "triton": ("gpu", "cuda"),
}

# Kernels whose only arguments about the mask are segments or lengths, and `causal`.
WITHOUT_BLOCKS = ("cudnn", "triton")


def check_expressible(name: str, mask: Mask) -> None:
    """Raises UserError when the kernel `name` cannot express the mask."""
    if name in WITHOUT_BLOCKS and mask.has_blocks:
        raise UserError(
            f"The attention kernel {name!r} cannot express blocks, and the mask has "
            f"block_length={mask.block_length}; set config.model.attention to auto or xla."
        )


def choose(
    name: str,
    *,
    platform: str,
    packed: bool,
    mask: Mask,
    sequence_length: int,
    head_dim: int,
    dtype: Any,
) -> str:
    """Returns the implementation to use: `name` itself, or what suits the platform for "auto".

    Args:
        name: "auto" or a key of IMPLEMENTATIONS.
        platform: of the mesh's devices, not of this process' default backend: compiling for absent
            devices works.
        packed: whether segment ids above 1 occur, which cuDNN's lengths cannot express.
        mask: what a query may see within its segment.
        sequence_length: in tokens; the kernels want a multiple of 128.
        head_dim, dtype: of q, k and v. The GPU kernels take 16 bits and heads of at most 128, cuDNN
            in multiples of 8.

    Raises:
        UserError: the named kernel does not run on the platform, or cannot express the mask or
            packed documents.
    """
    is_gpu = platform in ("gpu", "cuda")
    if name != "auto":
        if platform not in PLATFORMS.get(name, (platform,)):
            raise UserError(
                f"The attention kernel {name!r} runs on {PLATFORMS[name][0]}, and the mesh is of "
                f"{platform} devices; set config.model.attention to auto or xla."
            )
        if name == "cudnn" and packed:
            raise UserError(
                "The attention kernel 'cudnn' cannot keep the documents of a row apart, as "
                "config.data.attend_across_documents=False asks; set config.model.attention to "
                "auto or triton."
            )
        check_expressible(name, mask)
        return name
    if sequence_length % 128:
        return "xla"
    if platform == "tpu":
        return "splash"
    is_half = jnp.dtype(dtype).itemsize == 2
    if is_gpu and is_half and head_dim % 8 == 0 and head_dim <= 128 and not mask.has_blocks:
        return "triton" if packed else "cudnn"
    return "xla"


def attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BT: Array | None,
    *,
    implementation: str,
    mask: Mask,
) -> Array:
    """Attention by the named implementation, with rows and heads split over the mesh.

    XLA splits the reference itself. It cannot look into a kernel, which would then run on every
    device with all rows: kernels run inside shard_map, each device on its own rows and heads.

    Args:
        q_BTNH, k_BSKH, v_BSKH: [B, T, N, H] and [B, T, K, H] twice; K divides N.
        segment_ids_BT: int32, 0 is padding; None means that each row is one segment.
        implementation: a key of IMPLEMENTATIONS, or IN_PIECES.
        mask: what a query may see within its segment.

    Returns:
        [B, T, N, H] in the dtype of q.

    Raises:
        UserError: the kernel cannot express the mask, or the mesh splits its rows.
    """
    if implementation == IN_PIECES:
        return attend_in_pieces(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, mask=mask)
    kernel = functools.partial(IMPLEMENTATIONS[implementation], mask=mask)
    mesh = jax.sharding.get_abstract_mesh()
    if implementation == "xla" or mesh.empty:
        return kernel(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    if mesh.shape[RULES["act_position"]] > 1:
        raise UserError(
            f"The attention kernel {implementation!r} needs whole rows; set config.mesh.sequence=1 "
            "or config.model.attention=xla."
        )
    heads = spec(("act_batch", None, "act_heads", None))
    segments = None if segment_ids_BT is None else spec(("act_batch", None))
    sharded = jax.shard_map(
        kernel, in_specs=(heads, heads, heads, segments), out_specs=heads, check_vma=False
    )
    return sharded(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
