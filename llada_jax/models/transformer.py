"""The LLaDA Transformer in Flax NNX: pre-norm RMSNorm, rotary positions, attention (bidirectional
unless a Mask says otherwise), SwiGLU.

The block is that of the published LLaDA-8B (arXiv 2502.09992, section 2.2 and appendix B.2), which
has no biases; biases, norms of queries and keys, and the shifted output are there for weights that
come from Llama, Qwen2 and Qwen3. The network receives tokens and returns scores of tokens: it does
not know which token is the mask, nor how much of the row is masked.

Parameters are float32 and carry logical axis names (llada_jax.cluster.sharding.RULES); the L blocks
are stacked on one leading dim and run by one scan. Norms, rotary embedding, softmax and the loss
are float32, matrix products in `dtype`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from llada_jax.cluster.sharding import RULES, axis_size, constrain
from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, Mask
from llada_jax.models.attention import attend
from llada_jax.models.layers import run_layers
from llada_jax.models.products import project, project_int8
from llada_jax.models.recomputation import REMAT_POLICIES
from llada_jax.models.token_scores import ALIGNED, TokenScores, token_scores

# Columns that a GPU multiplies at once.
TILE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a checkpoint must agree on; two models of the same Architecture have the same
    parameters.

    rope_scaling: (), or what stretches the rotary frequencies for rows longer than those of the
        pretraining, as in Llama 3.1: (factor, low_freq_factor, high_freq_factor, original length in
        tokens), see `rotary_frequencies`.
    qk_norm: "none", "full" (over the whole query or key vector), or "per_head".
    attention_bias: "none", "qkv" (as Qwen2), or "qkvo" (as Llama with attention_bias: true).
    output_shift: the scores at position i come from position i - 1, as autoregressive weights
        predict (Dream, arXiv 2508.15487); the first position of a segment keeps its own.

    Raises:
        UserError: rope_scaling is neither () nor four such numbers.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float = 500_000.0
    rope_scaling: tuple[float, ...] = ()
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: str = "none"
    attention_bias: str = "none"
    output_shift: bool = False

    def __post_init__(self) -> None:
        # run.json holds it as a list, which has no hash.
        object.__setattr__(self, "rope_scaling", tuple(self.rope_scaling))
        if self.rope_scaling and not _is_scaling(*self.rope_scaling):
            raise UserError(
                f"model.rope_scaling={self.rope_scaling} must be (), or four positive numbers "
                "(factor, low_freq_factor, high_freq_factor, original length) of which the second "
                "is less than the third and the last is whole; take those of the checkpoint's "
                "config.json, or () for frequencies that are not scaled."
            )


def _is_scaling(*numbers: float) -> bool:
    """Whether these can be Architecture.rope_scaling."""
    if len(numbers) != 4 or not all(
        type(n) in (int, float) and math.isfinite(n) and n > 0 for n in numbers
    ):
        return False
    _, low, high, original = numbers
    return low < high and original == round(original)


def parameter(
    key: Array | None,
    shape: tuple[int, ...],
    names: tuple[str, ...],
    std: float = 0.0,
    *,
    fill: float = 1.0,
) -> nnx.Param:
    """Returns a float32 parameter: `fill` where `key` is None, otherwise a normal truncated at 3
    standard deviations.
    """
    if key is None:
        return nnx.Param(jnp.full(shape, fill, jnp.float32), logical=names)
    return nnx.Param(
        std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32), logical=names
    )


def rms_norm(x: Array, scale: Array, eps: float, num_dims: int = 1) -> Array:
    """RMSNorm over the last `num_dims` dims, scaled, all in float32; the result has the dtype of x.

    The published code casts before it scales. The gradient of the scale is a sum over all tokens,
    though, and would then be one of bfloat16 products, off by up to 20%.
    """
    axes = tuple(range(-num_dims, 0))
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


def normed_stream(x_BTD: Array, scale_D: Array, eps: float) -> Array:
    """Returns the norm of the residual stream, which the products of half a layer or the head read.

    The sharding is stated before and after. Without the first, TPUs gather what the norm reads in
    float32; without the second, they split the norm of a layer over the axis `tensor` and exchange
    queries, keys and values, and the positions that the head splits over it are split in all layers
    too: each of them gathers its input, and GPUs copy it to the layout of the gather and back.
    """
    names = ("act_batch", "act_position", "act_embed")
    return constrain(rms_norm(constrain(x_BTD, *names), scale_D, eps), *names)


def add_bias(x: Array, bias: Array) -> Array:
    """Returns x + bias in the dtype of x, added in float32: the gradient of a bias is a sum over
    all tokens, and takes the dtype of the addition.
    """
    return (x.astype(jnp.float32) + bias).astype(x.dtype)


def embed(table_VD: Array, tokens_BT: Array, dtype: Any) -> Array:
    """Returns the rows of the tokens, [B, T, D] in `dtype`.

    Gathered first and cast then, so that the gradient is scattered into a float32 table. In masked
    diffusion half of all tokens meet in the row of the mask: a bfloat16 sum stops growing once it
    is 256 times as large as what is added, and at 16,384 tokens that row lost half of its gradient.

    Where the width is split over two axes, they are exchanged for rows and positions one after the
    other: at once XLA would first put the whole array on every device.
    """
    x_BTD = table_VD[tokens_BT].astype(dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[RULES["act_position"]] == 1:
        return x_BTD
    return constrain(x_BTD, "act_whole_batch", "act_position", "act_part_of_embed")


def rotary_frequencies(head_dim: int, theta: float, scaling: tuple[float, ...] = ()) -> Array:
    """Returns the rotary angles of position 1, float32 [H/2] (RoFormer, arXiv 2104.09864, eq. 15),
    scaled as in Llama 3.1.

    What turns less than low_freq_factor times within the original length is slowed down by the
    factor, what turns more than high_freq_factor times is kept, and between them the two are mixed
    in proportion to the turns.
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if not scaling:
        return frequency
    factor, low, high, original = scaling
    turns = original / (2 * math.pi) * frequency
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequency + (1 - kept) * frequency / factor


def rotary_angles(
    positions_BT: Array, head_dim: int, theta: float, scaling: tuple[float, ...] = ()
) -> tuple[Array, Array]:
    """Returns cos and sin of the rotary angles, float32 [B, T, H/2]."""
    angle = positions_BT[..., None].astype(jnp.float32) * rotary_frequencies(
        head_dim, theta, scaling
    )
    names = ("act_batch", "act_position", None)
    return constrain(jnp.cos(angle), *names), constrain(jnp.sin(angle), *names)


def rotate(x_BTNH: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (i, i + H/2) of every head, in float32: bfloat16 cannot tell position 257
    from 256.
    """
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def shift(x_BTD: Array, segment_ids_BT: Array | None) -> Array:
    """Moves every position's vector to the next one; the first position of each segment keeps its
    own.
    """
    before_BTD = jnp.concatenate([x_BTD[:, :1], x_BTD[:, :-1]], axis=1)
    if segment_ids_BT is not None:
        before_BT = jnp.concatenate([segment_ids_BT[:, :1], segment_ids_BT[:, :-1]], axis=1)
        before_BTD = jnp.where((before_BT == segment_ids_BT)[..., None], before_BTD, x_BTD)
    return constrain(before_BTD, "act_batch", "act_position", "act_embed")


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + SwiGLU(norm(x)).

    Initialisation ("mitchell", as in the published config): every matrix has standard deviation
    1/sqrt(its input width); the two that write to the residual stream have it divided by sqrt(2
    (layer + 1)), layer counted from 0; norms are 1, biases 0. gradient_dtype: see Transformer.
    """

    def __init__(
        self, a: Architecture, key: Array, layer: Array, gradient_dtype: Any = None
    ) -> None:
        self.gradient_dtype = gradient_dtype
        D, N, K, H, F = a.d_model, a.num_heads, a.num_kv_heads, a.head_dim, a.d_ff
        keys = jax.random.split(key, 7)
        residual = (2.0 * (layer + 1)) ** -0.5
        self.attn_norm = parameter(None, (D,), ("norm",))
        self.q = parameter(keys[0], (D, N, H), ("embed", "heads", "head"), D**-0.5)
        self.k = parameter(keys[1], (D, K, H), ("embed", "kv_heads", "head"), D**-0.5)
        self.v = parameter(keys[2], (D, K, H), ("embed", "kv_heads", "head"), D**-0.5)
        self.attn_out = parameter(
            keys[3], (N, H, D), ("heads", "head", "embed"), (N * H) ** -0.5 * residual
        )
        if a.attention_bias != "none":
            self.q_bias = parameter(None, (N, H), ("heads", "head"), fill=0.0)
            self.k_bias = parameter(None, (K, H), ("kv_heads", "head"), fill=0.0)
            self.v_bias = parameter(None, (K, H), ("kv_heads", "head"), fill=0.0)
        if a.attention_bias == "qkvo":
            self.attn_out_bias = parameter(None, (D,), ("norm",), fill=0.0)
        # "full": over the whole vector before the split into heads, as `attention_layer_norm` of
        # the published code.
        if a.qk_norm == "full":
            self.q_norm = parameter(None, (N, H), ("heads", "head"))
            self.k_norm = parameter(None, (K, H), ("kv_heads", "head"))
        if a.qk_norm == "per_head":
            self.q_norm = parameter(None, (H,), ("head",))
            self.k_norm = parameter(None, (H,), ("head",))
        self.ff_norm = parameter(None, (D,), ("norm",))
        self.ff_gate = parameter(keys[4], (D, F), ("embed", "mlp"), D**-0.5)
        self.ff_up = parameter(keys[5], (D, F), ("embed", "mlp"), D**-0.5)
        self.ff_out = parameter(keys[6], (F, D), ("mlp", "embed"), F**-0.5 * residual)

    def __call__(
        self,
        x_BTD: Array,
        cos: Array,
        sin: Array,
        segment_ids_BT: Array | None,
        *,
        a: Architecture,
        attention: str,
        mask: Mask,
    ) -> Array:
        with jax.named_scope("attention"):
            q_BTNH, k_BSKH, v_BSKH = self.queries_keys_values(x_BTD, cos, sin, a=a)
            out_BTNH = attend(
                q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, implementation=attention, mask=mask
            )
            # The outputs of a kernel are kept where it returns them (REMAT_POLICIES), together
            # with the statistics that its backward pass reads; a second name would keep a second
            # copy.
            if attention == "xla":
                out_BTNH = checkpoint_name(out_BTNH, "attention")
            x_BTD = self.add_attention(x_BTD, out_BTNH, a=a)
        return self.add_feed_forward(x_BTD, a=a)

    def times(
        self, name: str, x: Array, num_in: int = 1, *, padding: tuple[int, int] = (0, 0)
    ) -> Array:
        """Returns x times one of the matrices, whose first `num_in` dims are inputs.

        A matrix in int8 has a scale next to it.
        A matrix with an adapter is never added up: x A B costs little next to x W, while W + A B
        and its gradient would each take the memory of W.

        padding: rows and columns of zeros that the matrix gets; for one without scale and adapter.
        """
        product = functools.partial(project, gradient_dtype=self.gradient_dtype)
        kernel = getattr(self, name)[...]
        if any(padding):
            kernel = jnp.pad(kernel, [(0, more) for more in padding])
        if hasattr(self, f"{name}_scale"):
            y = project_int8(x, kernel, getattr(self, f"{name}_scale")[...], num_in)
        else:
            y = product(x, kernel, num_in)
        if not hasattr(self, f"{name}_a"):
            return y
        a, b = getattr(self, f"{name}_a")[...], getattr(self, f"{name}_b")[...]
        low = product(x, a.reshape(*kernel.shape[:num_in], -1), num_in)
        return y + product(low, b.reshape(-1, *kernel.shape[num_in:]))

    def queries_keys_values(
        self, x_BTD: Array, cos: Array, sin: Array, *, a: Architecture
    ) -> tuple[Array, Array, Array]:
        """Returns q [B, T, N, H], k and v [B, T, K, H], normed and rotated where they are to be."""
        y_BTD = normed_stream(x_BTD, self.attn_norm[...], a.norm_eps)
        q_BTNH = self.times("q", y_BTD)
        k_BSKH = self.times("k", y_BTD)
        v_BSKH = self.times("v", y_BTD)
        if a.attention_bias != "none":
            q_BTNH = add_bias(q_BTNH, self.q_bias[...])
            k_BSKH = add_bias(k_BSKH, self.k_bias[...])
            v_BSKH = add_bias(v_BSKH, self.v_bias[...])
        if a.qk_norm != "none":
            num_dims = 2 if a.qk_norm == "full" else 1
            q_BTNH = rms_norm(q_BTNH, self.q_norm[...], a.norm_eps, num_dims)
            k_BSKH = rms_norm(k_BSKH, self.k_norm[...], a.norm_eps, num_dims)
        names = ("act_batch", "act_position", "act_kv_heads", None)
        q_BTNH = constrain(rotate(q_BTNH, cos, sin), "act_batch", "act_position", "act_heads", None)
        return q_BTNH, constrain(rotate(k_BSKH, cos, sin), *names), constrain(v_BSKH, *names)

    def add_attention(self, x_BTD: Array, out_BTNH: Array, *, a: Architecture) -> Array:
        x_BTD = x_BTD + self.times("attn_out", out_BTNH, 2)
        if a.attention_bias == "qkvo":
            x_BTD = add_bias(x_BTD, self.attn_out_bias[...])
        return constrain(x_BTD, "act_batch", "act_position", "act_embed")

    def add_feed_forward(self, x_BTD: Array, *, a: Architecture) -> Array:
        with jax.named_scope("feed_forward"):
            y_BTD = normed_stream(x_BTD, self.ff_norm[...], a.norm_eps)
            names = ("act_batch", "act_position", "act_mlp")
            more = self.missing_columns(a)
            gate_BTF = constrain(self.times("ff_gate", y_BTD, padding=(0, more)), *names)
            up_BTF = constrain(self.times("ff_up", y_BTD, padding=(0, more)), *names)
            h_BTF = constrain(jax.nn.silu(gate_BTF) * up_BTF, *names)
            x_BTD = x_BTD + self.times("ff_out", h_BTF, padding=(more, 0))
            return constrain(x_BTD, "act_batch", "act_position", "act_embed")

    def missing_columns(self, a: Architecture) -> int:
        """Returns by how much the feed-forward width is widened with zeros, which change no result.

        GPUs multiply whole tiles of 128 columns, whose rows begin at multiples of 16 bytes. On an
        H200 a step of LLaDA-1B, whose width is 5634, takes 251 ms with 5760 columns and 282 ms
        with 5640. A width of less than 20 tiles is rounded up to a multiple of 8 only, so that the
        zeros never cost more than 5%. Widths that the mesh splits, and matrices with a scale or an
        adapter, stay as they are.
        """
        mesh = jax.sharding.get_abstract_mesh()
        is_split = not mesh.empty and axis_size(mesh, "mlp") > 1
        is_plain = not hasattr(self, "ff_up_scale") and not any(
            hasattr(self, f"{name}_a") for name in ("ff_gate", "ff_up", "ff_out")
        )
        multiple = TILE if a.d_ff >= 20 * TILE else ALIGNED
        return -a.d_ff % multiple if is_plain and not is_split else 0


class Transformer(nnx.Module):
    """Embedding, L blocks, final norm and head.

    Args:
        a: the Architecture.
        key: of the initialisation. Embedding and head have standard deviation 1/sqrt(D), so that
            logits start with unit variance and the loss near log V + 1/2 (12.25 nats at V =
            126,464).
        dtype: of the matrix products.
        gradient_dtype: of the gradients of the matrices where devices add up their parts: float32,
            or None for `dtype`. All other gradients are float32 there.
        attention: implementation, see llada_jax.models.attention.attend.
        mask: what a position may see within its segment; an objective names it.
        remat: "none" or a key of REMAT_POLICIES.
        nll_chunk: peak memory of the logits in `token_nll`, in positions per row. None: what keeps
            the logits of a device below 1 GiB, whatever the batch is.
        capacity: (rows, length, ways) -> of how many positions `token_nll` computes logits at
            first, on each of the `ways` devices that share the rows; those of the others follow
            where more carry loss. None: of all.
        is_unrolled: compile every layer by itself, and not one loop over them.
    """

    def __init__(
        self,
        a: Architecture,
        key: Array,
        *,
        dtype: Any = jnp.float32,
        gradient_dtype: Any = None,
        attention: str = "xla",
        mask: Mask = BIDIRECTIONAL,
        remat: str = "none",
        nll_chunk: int | None = None,
        capacity: Callable[[int, int, int], int] | None = None,
        is_unrolled: bool = False,
    ) -> None:
        self.a, self.dtype, self.attention, self.mask = a, dtype, attention, mask
        self.remat, self.nll_chunk, self.gradient_dtype = remat, nll_chunk, gradient_dtype
        self.capacity, self.is_unrolled = capacity, is_unrolled
        # what Model.bind found instead of stacked blocks
        self.layers: tuple[dict, ...] | None = None
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        V, D = a.vocab_size, a.d_model
        self.embed = parameter(embed_key, (V, D), ("vocab", "embed"), D**-0.5)
        make_blocks = nnx.vmap(
            lambda key, layer: Block(a, key, layer, gradient_dtype), in_axes=(0, 0), out_axes=0
        )
        self.blocks = make_blocks(
            jax.random.split(blocks_key, a.num_layers), jnp.arange(a.num_layers)
        )
        self.final_norm = parameter(None, (D,), ("norm",))
        if not a.tie_embeddings:
            self.lm_head = parameter(head_key, (D, V), ("embed", "vocab"), D**-0.5)

    def hidden(self, tokens_BT: Array, segment_ids_BT: Array | None, positions_BT: Array) -> Array:
        """Returns what the head reads: [B, T, D] in `dtype`, after the final norm and, if there is
        one, the shift. A head applied to some of the positions gives the logits of those positions.
        """
        cos, sin = rotary_angles(
            positions_BT, self.a.head_dim, self.a.rope_theta, self.a.rope_scaling
        )
        x_BTD = constrain(
            embed(self.embed[...], tokens_BT, self.dtype), "act_batch", "act_position", "act_embed"
        )

        def run_block(block: Block, x_BTD: Array, _: None) -> tuple[Array, None]:
            x_BTD = block(
                x_BTD,
                cos,
                sin,
                segment_ids_BT,
                a=self.a,
                attention=self.attention,
                mask=self.mask,
            )
            return x_BTD, None

        def checkpointed(step: Callable) -> Callable:
            if self.remat == "none":
                return step
            # outside of a loop, what is computed again is what XLA would merge with the first time
            policy = REMAT_POLICIES[self.remat]
            return jax.checkpoint(step, policy=policy, prevent_cse=self.is_unrolled)

        x_BTD, _ = self.run_layers(run_block, x_BTD, checkpointed=checkpointed)
        x_BTD = normed_stream(x_BTD, self.final_norm[...], self.a.norm_eps)
        return shift(x_BTD, segment_ids_BT) if self.a.output_shift else x_BTD

    def run_layers(self, *args: Any, **kwargs: Any) -> tuple[Array, Any]:
        """See llada_jax.models.layers.run_layers, which this hands its own layers."""
        kwargs |= {"layers": self.layers, "is_unrolled": self.is_unrolled}
        return run_layers(self.blocks, *args, **kwargs)

    def head_kernel(self) -> Array:
        """Returns what the hidden vectors are multiplied by, float32 [D, V]."""
        return self.embed[...].T if self.a.tie_embeddings else self.lm_head[...]

    def head(self, x_BTD: Array) -> Array:
        """Returns float32 logits [..., V] of the hidden vectors [..., D] of any positions."""
        with jax.named_scope("head"):
            return project(x_BTD, self.head_kernel(), out_dtype=jnp.float32)

    def __call__(
        self, tokens_BT: Array, segment_ids_BT: Array | None, positions_BT: Array
    ) -> Array:
        """Returns float32 logits [B, T, V] for int32 tokens, segment ids (0 is padding) and
        positions [B, T].
        """
        return self.head(self.hidden(tokens_BT, segment_ids_BT, positions_BT))

    def token_nll(
        self,
        noisy_BT: Array,
        targets_BT: Array,
        where_BT: Array,
        segment_ids_BT: Array | None,
        positions_BT: Array,
    ) -> TokenScores:
        """Returns -log p(target) at the positions `where_BT`, zero elsewhere, without ever holding
        [B, T, V].
        """
        return token_scores(
            self.hidden(noisy_BT, segment_ids_BT, positions_BT),
            targets_BT,
            where_BT,
            self.head_kernel(),
            dtype=self.dtype,
            gradient_dtype=self.gradient_dtype,
            nll_chunk=self.nll_chunk,
            capacity=self.capacity,
        )


def num_matmul_parameters(a: Architecture) -> int:
    """Returns how many parameters a token is multiplied by: all matrices with the head, without the
    embedding lookup, the norms and the biases.
    """
    attention = a.d_model * a.head_dim * 2 * (a.num_heads + a.num_kv_heads)
    feed_forward = 3 * a.d_model * a.d_ff
    return a.num_layers * (attention + feed_forward) + a.d_model * a.vocab_size


def num_parameters(a: Architecture) -> int:
    """Returns the number of parameters (8,015,581,184 for LLaDA-8B)."""
    norms = a.d_model * (2 * a.num_layers + 1)
    norms += {
        "none": 0,
        "full": a.num_layers * a.head_dim * (a.num_heads + a.num_kv_heads),
        "per_head": a.num_layers * a.head_dim * 2,
    }[a.qk_norm]
    biases = {
        "none": 0,
        "qkv": a.num_layers * a.head_dim * (a.num_heads + 2 * a.num_kv_heads),
        "qkvo": a.num_layers * (a.head_dim * (a.num_heads + 2 * a.num_kv_heads) + a.d_model),
    }[a.attention_bias]
    embedding = 0 if a.tie_embeddings else a.d_model * a.vocab_size
    return num_matmul_parameters(a) + embedding + norms + biases
