"""Attention over packed, padded rows: one reference and the accelerators' kernels, by name.

Every implementation takes q_BTNH, k_BSKH, v_BSKH (rotary already applied), segment ids and the
Mask, and returns [B, T, N, H] in the dtype of q. What a query may see is defined once, by
`llada_jax.masks.may_attend`: each kernel derives its own form of it here, or refuses a mask that it
cannot express. Outputs at padding (segment 0) mean nothing and differ between the kernels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from llada_jax.cluster.sharding import RULES, spec
from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, Mask, may_attend, own_columns
from llada_jax.models.by_head import attention_by_head
from llada_jax.models.splash import splash_attention
from llada_jax.models.split_rows import (
    attend_to_gathered_keys,
    attend_with_exchanged_heads,
    check_exchange,
    exchange_for,
)

# What `attend` calls attend_in_pieces and cudnn_on_canvases. No choices of a config: they are not
# for training.
IN_PIECES = "xla in pieces"
ON_CANVASES = "cudnn on canvases"
MOST_SCORES = 1 << 28  # 1 GiB of float32
# Tokens in a row from which a CPU is faster head by head. The scores of shorter ones fit its cache.
BY_HEAD_FROM = 256


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
    query_segment_BT, index_T = (
        own_columns(array, start, q_BTNH.shape[1]) for array in (segment_ids_BT, index_S)
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
    # Query heads that share a key/value head.
    num_groups = q_BTNH.shape[2] // k_BSKH.shape[2]
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
    """The reference for rows of any length and padding, as scoring and sampling read them: as many
    queries at a time as fit where a device holds no more than `most_scores` scores.

    LLaDA-8B would have 64 GiB of them for 32 rows of 4,096 tokens. The queries are halved until the
    scores fit, or until their number is odd. A backward pass computes the scores of a piece again.
    """
    B, T, N, _ = q_BTNH.shape
    mesh = jax.sharding.get_abstract_mesh()
    # Inside shard_map the shapes are those of one device along the axes that it splits.
    num_devices = math.prod(
        size
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    )
    num_pieces, num_scores = 1, B * N * T * k_BSKH.shape[1] // num_devices
    while num_scores // num_pieces > most_scores and T % (2 * num_pieces) == 0:
        num_pieces *= 2
    if num_pieces == 1:
        return xla_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, mask=mask, start=start)
    length = T // num_pieces

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def piece(number: Array) -> Array:
        q_BPNH = jax.lax.dynamic_slice_in_dim(q_BTNH, number * length, length, axis=1)
        first = number * length + (0 if start is None else start)
        return xla_attention(q_BPNH, k_BSKH, v_BSKH, segment_ids_BT, mask=mask, start=first)

    out = jax.lax.map(piece, jnp.arange(num_pieces))
    return jnp.moveaxis(out, 0, 1).reshape(q_BTNH.shape)


def cudnn_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BT: Array | None,
    *,
    mask: Mask,
    start: Array | int | None = None,
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

    start: see `xla_attention`; for bidirectional masks alone.
    """
    check_expressible("cudnn", mask)
    query_lengths = key_lengths = None
    if segment_ids_BT is not None:
        is_real_BS = segment_ids_BT > 0
        is_real_BT = own_columns(is_real_BS, start, q_BTNH.shape[1])
        query_lengths, key_lengths = (
            is_real.sum(axis=1).astype(jnp.int32) for is_real in (is_real_BT, is_real_BS)
        )
        if start is not None:
            # These columns may all be padding of a row that is not. One query of zeros then, whose
            # gradients are zeros: cuDNN would leave those of the keys unwritten.
            query_lengths = jnp.maximum(query_lengths, 1)
        q_BTNH = jnp.where(is_real_BT[:, :, None, None], q_BTNH, 0)
        k_BSKH, v_BSKH = (jnp.where(is_real_BS[:, :, None, None], x, 0) for x in (k_BSKH, v_BSKH))
    try:
        out_BTNH = jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            is_causal=mask.causal,
            query_seq_lengths=query_lengths,
            key_value_seq_lengths=key_lengths,
            implementation="cudnn",
        )
    # Heads of more than 128 are for Hopper and newer, and jax asks the devices of this process.
    except NotImplementedError as error:
        raise UserError(
            f"The attention kernel 'cudnn' is not for these devices: {str(error).rstrip('.')}; set "
            "config.model.attention to auto or xla."
        ) from error
    if segment_ids_BT is None:
        return out_BTNH
    return jnp.where(is_real_BT[:, :, None, None], out_BTNH, 0)


def cudnn_on_canvases(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BT: Array | None,
    *,
    mask: Mask,
    start: Array | int | None = None,
) -> Array:
    """cuDNN flash attention for the rows of a sampler: padded on either side, and forwards alone.

    cuDNN takes padding as a length, and so on the right only. The keys of whole rows are therefore
    moved to the front: in whatever order a bidirectional softmax sees its keys, it gives the same.
    Queries at padding attend to the keys of their row: what they give is never read, and cuDNN
    leaves nothing unwritten then. Segments above 1 count as segment 1.

    A window of queries leaves its keys where they are, in the cache, and names the padding in an
    array of the shape of its scores, which is small.

    start: not read. Queries are those of any columns, and whole rows see what they see.
    """
    del start
    assert mask == BIDIRECTIONAL, mask
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    query_lengths = key_lengths = is_real_B1TS = None
    if segment_ids_BT is not None and T < S:
        is_real_B1TS = jnp.broadcast_to((segment_ids_BT > 0)[:, None, None], (B, 1, T, S))
    elif segment_ids_BT is not None:
        is_real_BS = segment_ids_BT > 0
        order_BS = jnp.argsort(~is_real_BS, axis=1, stable=True)
        k_BSKH, v_BSKH = (
            jnp.take_along_axis(x, order_BS[:, :, None, None], axis=1) for x in (k_BSKH, v_BSKH)
        )
        # A row that is all padding would be a softmax over nothing.
        key_lengths = jnp.maximum(is_real_BS.sum(axis=1), 1).astype(jnp.int32)
        query_lengths = jnp.full(B, T, jnp.int32)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=is_real_B1TS,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        implementation="cudnn",
    )


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
    "xla_by_head": attention_by_head,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
    "triton": triton_attention,
}

# Where a kernel runs; what XLA compiles runs everywhere.
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


def check_shape(name: str, *, sequence_length: int, head_dim: int, dtype: Any) -> None:
    """Raises UserError when the kernel `name`, which a config may ask for, takes no such arrays on
    any device; what XLA compiles takes all.

    Args:
        sequence_length: of the queries and keys that the kernel sees, in tokens.
        head_dim, dtype: of q, k and v.
    """
    T, of_dtype = sequence_length, jnp.dtype(dtype).name
    item_bytes = jnp.dtype(dtype).itemsize
    needs = []
    if name == "splash":
        needs = [(T % 128 == 0, f"a sequence length that is a multiple of 128, not {T}")]
    elif name == "cudnn":
        needs = [
            (item_bytes == 2, f"numbers of 16 bits, not {of_dtype}"),
            (
                head_dim % 8 == 0 and head_dim <= 256,
                f"heads of a multiple of 8 and at most 256, not {head_dim}",
            ),
            (T % 2 == 0, f"an even sequence length, not {T}"),
        ]
    elif name == "triton":
        # Its tiles have 128 tokens or the whole row, and powers of two in both directions; those
        # with more bytes per token do not fit the shared memory of any GPU.
        is_tiled = T % 128 == 0 or (T < 128 and T.bit_count() == 1)
        most = 256 // item_bytes
        needs = [
            (is_tiled, f"a sequence length that is a multiple of 128, not {T}"),
            (
                head_dim <= most,
                f"heads of at most {most} in {of_dtype}, not {head_dim}",
            ),
        ]
    for is_met, need in needs:
        if not is_met:
            raise UserError(
                f"The attention kernel {name!r} needs {need}; set config.model.attention to auto "
                "or xla."
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
                "The attention kernel 'cudnn' cannot keep the documents or parts of a row apart, "
                "as config.data.attend_across_documents=False and config.data.split_probability "
                "above 0 ask; set config.model.attention to auto or triton."
            )
        check_expressible(name, mask)
        return name
    if platform == "cpu" and sequence_length >= BY_HEAD_FROM:
        return "xla_by_head"
    if sequence_length % 128:
        return "xla"
    if platform == "tpu":
        return "splash"
    is_half = jnp.dtype(dtype).itemsize == 2
    if is_gpu and is_half and head_dim % 8 == 0 and head_dim <= 128 and not mask.has_blocks:
        return "triton" if packed else "cudnn"
    return "xla"


def choose_for_canvases(
    *, platform: str, num_devices: int, mask: Mask, head_dim: int, dtype: Any
) -> str:
    """Returns what samplers and scores of answers attend with: ON_CANVASES on one GPU, which has no
    scores in memory, and IN_PIECES elsewhere.

    Args: see `choose`. num_devices: of the mesh; XLA splits what it compiles itself.
    """
    is_one_gpu = platform in ("gpu", "cuda") and num_devices == 1
    is_half = jnp.dtype(dtype).itemsize == 2
    takes_heads = is_half and head_dim % 8 == 0 and head_dim <= 128
    return ON_CANVASES if is_one_gpu and takes_heads and mask == BIDIRECTIONAL else IN_PIECES


def attend_from_canvas(attention: str) -> Callable[..., Array]:
    """Returns the implementation for windows of a canvas, by the name of that for whole rows."""
    return cudnn_on_canvases if attention == ON_CANVASES else attend_in_pieces


def attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BT: Array | None,
    *,
    implementation: str,
    mask: Mask,
) -> Array:
    """Attention by the named implementation, with rows, heads and positions split over the mesh.

    XLA splits rows and heads of the reference itself. It cannot look into a kernel, which would
    then run on every device with all rows: kernels run inside shard_map, each device on its own
    rows and heads. Where the mesh splits positions, see llada_jax.models.split_rows.

    Args:
        q_BTNH, k_BSKH, v_BSKH: [B, T, N, H] and [B, T, K, H] twice; K divides N.
        segment_ids_BT: int32, 0 is padding; None means that each row is one segment.
        implementation: a key of IMPLEMENTATIONS, IN_PIECES or ON_CANVASES.
        mask: what a query may see within its segment.

    Returns:
        [B, T, N, H] in the dtype of q.

    Raises:
        UserError: the kernel cannot express the mask, or the mesh splits its rows and the kernel
            cannot attend to them.
    """
    arrays = (q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    mesh, is_reference = jax.sharding.get_abstract_mesh(), implementation in ("xla", IN_PIECES)
    if implementation == ON_CANVASES:
        return cudnn_on_canvases(*arrays, mask=mask)
    num_parts = 1 if mesh.empty else mesh.shape[RULES["act_position"]]
    # The rows of a sampler may have any length; XLA then splits the program as it can.
    if num_parts > 1 and not (is_reference and q_BTNH.shape[1] % num_parts):
        # by head is a matter of speed on one CPU
        is_reference = implementation.startswith("xla")
        name = IN_PIECES if is_reference else implementation
        kernel = functools.partial(_kernel(name), mask=mask)
        tensor = 1 if is_reference else mesh.shape[RULES["act_heads"]]
        per_device = {
            "num_heads": q_BTNH.shape[2] // tensor,
            "num_kv_heads": k_BSKH.shape[2] // tensor,
        }
        check_exchange(name, mask, **per_device, num_parts=num_parts)
        if exchange_for(name, mask, **per_device, num_parts=num_parts) == "heads":
            return attend_with_exchanged_heads(kernel, *arrays)
        return attend_to_gathered_keys(kernel, *arrays, is_reference=is_reference)
    kernel = functools.partial(_kernel(implementation), mask=mask)
    if is_reference or mesh.empty:
        return kernel(*arrays)
    heads = spec(("act_batch", None, "act_heads", None))
    segments = None if segment_ids_BT is None else spec(("act_batch", None))
    sharded = jax.shard_map(
        kernel, in_specs=(heads, heads, heads, segments), out_specs=heads, check_vma=False
    )
    return sharded(*arrays)


def _kernel(implementation: str) -> Callable[..., Array]:
    return attend_in_pieces if implementation == IN_PIECES else IMPLEMENTATIONS[implementation]
