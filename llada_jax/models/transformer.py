"""The LLaDA Transformer in Flax NNX: pre-norm RMSNorm, rotary positions, bidirectional attention, SwiGLU, no biases.

The block is that of the published LLaDA-8B (arXiv 2502.09992, section 2.2 and appendix B.2). The network receives tokens
and returns scores of tokens: what a mask is, and how much of the row is masked, it is never told.

Parameters are float32 and carry logical axis names (llada_jax.sharding.RULES); the L blocks are stacked on one leading
dim and run by one scan. Norms, rotary embedding, softmax and the loss are float32, matrix products in `dtype`.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from llada_jax.models.attention import attend
from llada_jax.sharding import constrain

# what the backward pass keeps; everything else of a block is computed again
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a checkpoint must agree on; two models of the same Architecture have the same parameters."""

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: str = "none"


class TokenScores(NamedTuple):
    """nll_BT: -log p(target) in nats, float32; is_correct_BT: whether no token scores higher than the target."""

    nll_BT: Array
    is_correct_BT: Array


def parameter(key: Array | None, shape: tuple[int, ...], names: tuple[str, ...], std=0.0) -> nnx.Param:
    """Returns a float32 parameter: ones where `key` is None, otherwise a normal truncated at 3 standard deviations."""
    if key is None:
        return nnx.Param(jnp.ones(shape, jnp.float32), logical=names)
    return nnx.Param(std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32), logical=names)


def rms_norm(x: Array, scale: Array, eps: float, num_dims: int = 1) -> Array:
    """RMSNorm over the last `num_dims` dims: float32 inside, cast back to the dtype of x, then scaled."""
    axes = tuple(range(-num_dims, 0))
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def project(x: Array, kernel: Array, num_in: int = 1, out_dtype=None) -> Array:
    """Contracts the last `num_in` dims of x with the first of the kernel, in the dtype of x; accumulates in `out_dtype`.

    As one matrix product over all B * T rows: the gradient of a kernel then contracts one dim and not two, for which XLA on
    CPUs has no fast path (2 to 5 times slower). Where the positions are sharded too, B and T cannot be merged.
    """
    kernel = kernel.astype(x.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["sequence"] > 1:
        return jnp.tensordot(x, kernel, num_in, preferred_element_type=out_dtype)
    rows, outs = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
    flat_x, flat_kernel = x.reshape(math.prod(rows), -1), kernel.reshape(-1, math.prod(outs))
    return jnp.matmul(flat_x, flat_kernel, preferred_element_type=out_dtype).reshape(*rows, *outs)


def rotary_angles(positions_BT: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Returns cos and sin of the rotary angles, float32 [B, T, H/2] (RoFormer, arXiv 2104.09864, eq. 15)."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions_BT[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (i, i + H/2) of every head, in float32: bfloat16 cannot tell position 257 from 256."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + SwiGLU(norm(x)).

    Initialisation ("mitchell", as in the published config): every matrix has standard deviation 1/sqrt(its input width);
    the two that write to the residual stream have it divided by sqrt(2 (layer + 1)), layer counted from 0; norms are 1.
    """

    def __init__(self, a: Architecture, key: Array, layer: Array):
        D, N, K, H, F = a.d_model, a.num_heads, a.num_kv_heads, a.head_dim, a.d_ff
        keys = jax.random.split(key, 7)
        residual = (2.0 * (layer + 1)) ** -0.5
        self.attn_norm = parameter(None, (D,), ("norm",))
        self.q = parameter(keys[0], (D, N, H), ("embed", "heads", "head"), D**-0.5)
        self.k = parameter(keys[1], (D, K, H), ("embed", "kv_heads", "head"), D**-0.5)
        self.v = parameter(keys[2], (D, K, H), ("embed", "kv_heads", "head"), D**-0.5)
        self.attn_out = parameter(keys[3], (N, H, D), ("heads", "head", "embed"), (N * H) ** -0.5 * residual)
        if a.qk_norm == "full":  # over the whole vector before the split into heads, as `attention_layer_norm`
            self.q_norm = parameter(None, (N, H), ("heads", "head"))
            self.k_norm = parameter(None, (K, H), ("kv_heads", "head"))
        if a.qk_norm == "per_head":
            self.q_norm = parameter(None, (H,), ("head",))
            self.k_norm = parameter(None, (H,), ("head",))
        self.ff_norm = parameter(None, (D,), ("norm",))
        self.ff_gate = parameter(keys[4], (D, F), ("embed", "mlp"), D**-0.5)
        self.ff_up = parameter(keys[5], (D, F), ("embed", "mlp"), D**-0.5)
        self.ff_out = parameter(keys[6], (F, D), ("mlp", "embed"), F**-0.5 * residual)

    def __call__(self, x_BTD, cos, sin, segment_ids_BT, *, a: Architecture, attention: str, causal: bool) -> Array:
        with jax.named_scope("attention"):
            y_BTD = rms_norm(x_BTD, self.attn_norm[...], a.norm_eps)
            q_BTNH = project(y_BTD, self.q[...])
            k_BSKH = project(y_BTD, self.k[...])
            v_BSKH = project(y_BTD, self.v[...])
            if a.qk_norm != "none":
                num_dims = 2 if a.qk_norm == "full" else 1
                q_BTNH = rms_norm(q_BTNH, self.q_norm[...], a.norm_eps, num_dims)
                k_BSKH = rms_norm(k_BSKH, self.k_norm[...], a.norm_eps, num_dims)
            q_BTNH = constrain(rotate(q_BTNH, cos, sin), "act_batch", "act_position", "act_heads", None)
            k_BSKH = rotate(k_BSKH, cos, sin)
            out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, implementation=attention, causal=causal)
            out_BTNH = checkpoint_name(out_BTNH, "attention")
            x_BTD = x_BTD + project(out_BTNH, self.attn_out[...], 2)
            x_BTD = constrain(x_BTD, "act_batch", "act_position", "act_embed")
        with jax.named_scope("feed_forward"):
            y_BTD = rms_norm(x_BTD, self.ff_norm[...], a.norm_eps)
            gate_BTF = project(y_BTD, self.ff_gate[...])
            up_BTF = project(y_BTD, self.ff_up[...])
            h_BTF = constrain(jax.nn.silu(gate_BTF) * up_BTF, "act_batch", "act_position", "act_mlp")
            x_BTD = x_BTD + project(h_BTF, self.ff_out[...])
            return constrain(x_BTD, "act_batch", "act_position", "act_embed")


class Transformer(nnx.Module):
    """Embedding, L blocks, final norm and head.

    Args:
        a: the Architecture.
        key: of the initialisation. Embedding and head have standard deviation 1/sqrt(D), so that logits start with unit
            variance and the loss near log V + 1/2 (12.25 nats at V = 126,464).
        dtype: of the matrix products.
        attention: implementation, a key of llada_jax.models.attention.IMPLEMENTATIONS.
        remat: "none" or a key of REMAT_POLICIES.
        nll_chunk: positions of a row whose logits exist at one time in `token_nll`.
        causal: positions see only earlier ones; for the autoregressive control experiment alone.
    """

    def __init__(
        self, a: Architecture, key: Array, *, dtype=jnp.float32, attention="xla", remat="none", nll_chunk=1024,
        causal=False,
    ):  # fmt: skip
        self.a, self.dtype, self.attention, self.remat = a, dtype, attention, remat
        self.nll_chunk, self.causal = nll_chunk, causal
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        V, D = a.vocab_size, a.d_model
        self.embed = parameter(embed_key, (V, D), ("vocab", "embed"), D**-0.5)
        make_blocks = nnx.vmap(lambda key, layer: Block(a, key, layer), in_axes=(0, 0), out_axes=0)
        self.blocks = make_blocks(jax.random.split(blocks_key, a.num_layers), jnp.arange(a.num_layers))
        self.final_norm = parameter(None, (D,), ("norm",))
        if not a.tie_embeddings:
            self.lm_head = parameter(head_key, (D, V), ("embed", "vocab"), D**-0.5)

    def hidden(self, tokens_BT: Array, segment_ids_BT: Array | None, positions_BT: Array) -> Array:
        """Returns what the head reads: [B, T, D] in `dtype`, after the final norm."""
        cos, sin = rotary_angles(positions_BT, self.a.head_dim, self.a.rope_theta)
        x_BTD = constrain(self.embed[...].astype(self.dtype)[tokens_BT], "act_batch", "act_position", "act_embed")
        graphdef, stacked = nnx.split(self.blocks)

        def run_block(x_BTD, params):
            block = nnx.merge(graphdef, params)
            x_BTD = block(x_BTD, cos, sin, segment_ids_BT, a=self.a, attention=self.attention, causal=self.causal)
            return x_BTD, None

        if self.remat != "none":
            run_block = jax.checkpoint(run_block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        x_BTD, _ = jax.lax.scan(run_block, x_BTD, stacked)
        return rms_norm(x_BTD, self.final_norm[...], self.a.norm_eps)

    def head(self, x_BTD: Array) -> Array:
        """Returns float32 logits [..., V]."""
        kernel_DV = self.embed[...].T if self.a.tie_embeddings else self.lm_head[...]
        with jax.named_scope("head"):
            return project(x_BTD, kernel_DV, out_dtype=jnp.float32)

    def __call__(self, tokens_BT: Array, segment_ids_BT: Array | None, positions_BT: Array) -> Array:
        """Returns float32 logits [B, T, V] for int32 tokens, segment ids (0 is padding) and positions [B, T]."""
        return self.head(self.hidden(tokens_BT, segment_ids_BT, positions_BT))

    def token_nll(
        self, noisy_BT: Array, targets_BT: Array, where_BT: Array, segment_ids_BT: Array | None, positions_BT: Array
    ) -> TokenScores:
        """Returns -log p(target) at the positions `where_BT`, zero elsewhere, without ever holding [B, T, V].

        The row is cut into chunks of at most `nll_chunk` positions; their logits are computed again in the backward
        pass. Chunks are strided (position i * num_chunks + j is in chunk j), so that a sharded T stays where it is.
        """
        x_BTD = self.hidden(noisy_BT, segment_ids_BT, positions_BT)
        B, T = targets_BT.shape
        num_chunks = next(n for n in range(max(1, -(-T // self.nll_chunk)), T + 1) if T % n == 0)

        def score(x_BCD, targets_BC, where_BC):
            logits_BCV = constrain(self.head(x_BCD), "act_batch", "act_position", "act_vocab")
            is_target_BCV = jnp.arange(logits_BCV.shape[-1]) == targets_BC[..., None]  # no gather: V may be sharded
            target_logit_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0), axis=-1)
            nll_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - target_logit_BC
            is_correct_BC = target_logit_BC >= jax.lax.stop_gradient(logits_BCV).max(axis=-1)
            return TokenScores(jnp.where(where_BC, nll_BC, 0.0), is_correct_BC & where_BC)

        if num_chunks == 1:
            return score(x_BTD, targets_BT, where_BT)

        def chunked(array):
            return jnp.moveaxis(array.reshape(B, T // num_chunks, num_chunks, *array.shape[2:]), 2, 0)

        scores = jax.lax.map(
            lambda chunk: jax.checkpoint(score, prevent_cse=False)(*chunk),
            jax.tree.map(chunked, (x_BTD, targets_BT, where_BT)),
        )
        return jax.tree.map(lambda array_nBC: jnp.moveaxis(array_nBC, 0, 2).reshape(B, T), scores)


def num_matmul_parameters(a: Architecture) -> int:
    """Returns how many parameters a token is multiplied by: all matrices with the head, without the embedding lookup."""
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
    embedding = 0 if a.tie_embeddings else a.d_model * a.vocab_size
    return num_matmul_parameters(a) + embedding + norms
