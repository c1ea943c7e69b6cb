"""Attention for CPUs: one head of one row at a time, so that its scores stay in the cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from llada_jax.masks import BIDIRECTIONAL, Mask, may_attend


def attention_by_head(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BS: Array | None,
    *,
    mask: Mask,
) -> Array:
    """Softmax attention in float32, of which no more than one head's scores [T, S] exist at a time.

    The scores of all heads would be written to memory and read again by every operation of a
    softmax. The backward pass computes them again from the logarithm of their sums, which is kept
    with the output.
    """
    B, T, N, H = q_BTNH.shape
    num_groups = N // k_BSKH.shape[2]
    heads = (
        q_BTNH,
        *(jnp.repeat(x, num_groups, axis=2) if num_groups > 1 else x for x in (k_BSKH, v_BSKH)),
    )
    # G counts the heads of all rows. Each has a batch dim of 1 for itself, without which the
    # products of the scores take XLA half as long again on a CPU.
    q_G1TH, k_G1SH, v_G1SH = (jnp.swapaxes(x, 1, 2).reshape(B * N, 1, -1, H) for x in heads)
    segment_ids_G1S = None
    if segment_ids_BS is not None:
        segment_ids_G1S = jnp.repeat(segment_ids_BS, N, axis=0)[:, None]
    out_G1TH = _attend(mask, q_G1TH, k_G1SH, v_G1SH, segment_ids_G1S)
    return jnp.swapaxes(out_G1TH.reshape(B, N, T, H), 1, 2)


def _scores(mask: Mask, q_1TH: Array, k_1SH: Array, segment_ids_1S: Array | None) -> Array:
    scores_1TS = jnp.einsum("GTH,GSH->GTS", q_1TH, k_1SH, preferred_element_type=jnp.float32)
    scores_1TS = scores_1TS * q_1TH.shape[-1] ** -0.5
    if segment_ids_1S is None and mask == BIDIRECTIONAL:
        return scores_1TS
    index_S = jnp.arange(k_1SH.shape[1])
    if segment_ids_1S is None:
        segment_ids_1S = jnp.zeros_like(index_S)[None]
    may_1TS = may_attend(
        mask,
        query_segment=segment_ids_1S[:, :, None],
        key_segment=segment_ids_1S[:, None, :],
        query_index=index_S[:, None],
        key_index=index_S[None, :],
    )
    # every position sees itself, so that no query's scores are the lowest number alone
    return jnp.where(may_1TS, scores_1TS, jnp.finfo(jnp.float32).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    mask: Mask, q_G1TH: Array, k_G1SH: Array, v_G1SH: Array, segment_ids_G1S: Array | None
) -> Array:
    return _forward(mask, q_G1TH, k_G1SH, v_G1SH, segment_ids_G1S)[0]


def _forward(mask: Mask, *arrays: Array | None) -> tuple[Array, tuple]:
    def head(arrays: tuple) -> tuple[Array, Array]:
        q_1TH, k_1SH, v_1SH, segment_ids_1S = arrays
        scores_1TS = _scores(mask, q_1TH, k_1SH, segment_ids_1S)
        best_1T = scores_1TS.max(axis=-1)
        weights_1TS = jnp.exp(scores_1TS - best_1T[..., None])
        sum_1T = weights_1TS.sum(axis=-1)
        out_1TH = jnp.einsum(
            "GTS,GSH->GTH",
            weights_1TS.astype(v_1SH.dtype),
            v_1SH,
            preferred_element_type=jnp.float32,
        )
        return (out_1TH / sum_1T[..., None]).astype(q_1TH.dtype), best_1T + jnp.log(sum_1T)

    out_G1TH, normalizer_G1T = jax.lax.map(head, arrays)
    # by these names recomputation knows what to keep (llada_jax.models.recomputation)
    out_G1TH = checkpoint_name(out_G1TH, "attention")
    normalizer_G1T = checkpoint_name(normalizer_G1T, "attention")
    return out_G1TH, (*arrays, out_G1TH, normalizer_G1T)


def _backward(mask: Mask, saved: tuple, grad_G1TH: Array) -> tuple[Any, ...]:
    *arrays, out_G1TH, normalizer_G1T = saved
    # the mean of the gradients of a query's weights, under these weights
    mean_G1T = jnp.sum(grad_G1TH.astype(jnp.float32) * out_G1TH, axis=-1)

    def head(arrays: tuple) -> tuple[Array, Array, Array]:
        q_1TH, k_1SH, v_1SH, segment_ids_1S, grad_1TH, normalizer_1T, mean_1T = arrays
        scores_1TS = _scores(mask, q_1TH, k_1SH, segment_ids_1S)
        # Relative to their maximum, as in the forward pass, and then brought to the sum of 1. In
        # one loop with the mask or with a slice of what was kept, exponentials take XLA ten times
        # as long; a reduction keeps them apart.
        best_1T = scores_1TS.max(axis=-1)
        weights_1TS = jnp.exp(scores_1TS - best_1T[..., None])
        share_1T1 = jnp.exp(best_1T - normalizer_1T)[..., None]
        grad_weights_1TS = jnp.einsum(
            "GTH,GSH->GTS", grad_1TH, v_1SH, preferred_element_type=jnp.float32
        )
        scale_1T1 = share_1T1 * q_1TH.shape[-1] ** -0.5
        grad_scores_1TS = weights_1TS * ((grad_weights_1TS - mean_1T[..., None]) * scale_1T1)
        grad_scores_1TS = grad_scores_1TS.astype(q_1TH.dtype)
        # Both as [H, S] first: a product that has the transposed scores on its left takes XLA
        # twice as long on a CPU.
        shared_1TH = (grad_1TH * share_1T1).astype(grad_1TH.dtype)
        grad_v_1HS = jnp.einsum("GTH,GTS->GHS", shared_1TH, weights_1TS.astype(grad_1TH.dtype))
        grad_k_1HS = jnp.einsum("GTH,GTS->GHS", q_1TH, grad_scores_1TS)
        return (
            jnp.einsum("GTS,GSH->GTH", grad_scores_1TS, k_1SH),
            jnp.swapaxes(grad_k_1HS, 1, 2),
            jnp.swapaxes(grad_v_1HS, 1, 2),
        )

    return *jax.lax.map(head, (*arrays, grad_G1TH, normalizer_G1T, mean_G1T)), None


_attend.defvjp(_forward, _backward)
