"""Attention in float64, and inputs on which kernels are compared with it."""

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.masks import Mask, may_attend

B, T, H = 2, 256, 64
BLOCKS = Mask(block_length=32)
ODD_BLOCKS = Mask(block_length=48)  # does not divide the tiles of a kernel

# Ids of the segments of two rows: one document each, two documents, padding on either side.
SEGMENTS = {
    "whole": None,
    "packed": np.array([[1] * 100 + [2] * 156, [1] * 30 + [2] * 30 + [3] * 196]),
    "padded": np.array([[1] * 256, [1] * 200 + [0] * 56]),
    "left-padded": np.array([[0] * 100 + [1] * 156, [1] * 256]),
    "packed and padded": np.array([[1] * 100 + [2] * 156, [1] * 70 + [2] * 130 + [0] * 56]),
}


def inputs(num_heads, num_kv_heads, *, rows=B, length=T, head_dim=H, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(rows, length, num_heads, head_dim)).astype(np.float32)
    k, v = (
        rng.normal(size=(rows, length, num_kv_heads, head_dim)).astype(np.float32) for _ in "kv"
    )
    return q, k, v


def allowed(mask, segments, length=T):
    """Returns what may be attended to, bool [rows or 1, length, length]."""
    segments = np.ones((1, length), int) if segments is None else np.asarray(segments)
    index = np.arange(length)
    return np.asarray(
        may_attend(
            mask,
            query_segment=segments[:, :, None],
            key_segment=segments[:, None, :],
            query_index=index[:, None],
            key_index=index[None, :],
        )
    )


def reference(q, k, v, segments, mask, out_grad):
    """Returns attention in float64 and plain numpy, and the gradients of sum(out * out_grad)."""
    q, k, v, out_grad = (np.asarray(x, np.float64) for x in (q, k, v, out_grad))
    num_groups, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    k, v = (np.repeat(x, num_groups, axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) * scale
    scores = np.where(allowed(mask, segments, q.shape[1])[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", weights, v)
    # by hand: the derivative of a softmax is weights * (gradient - its mean under the weights)
    weights_grad = np.einsum("btnh,bsnh->bnts", out_grad, v)
    mean = (weights * weights_grad).sum(-1, keepdims=True)
    scores_grad = weights * (weights_grad - mean) * scale
    k_grad = np.einsum("bnts,btnh->bsnh", scores_grad, q)
    v_grad = np.einsum("bnts,btnh->bsnh", weights, out_grad)
    grouped = (*k.shape[:2], -1, num_groups, k.shape[3])
    return out, (
        np.einsum("bnts,bsnh->btnh", scores_grad, k),
        k_grad.reshape(grouped).sum(3),
        v_grad.reshape(grouped).sum(3),
    )


def check(kernel, arrays, segments, mask):
    """Compares outputs and gradients where they are read: not at padding."""
    q, k, v = arrays
    is_read = np.ones(q.shape[:2], bool) if segments is None else segments > 0
    out_grad = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    out_grad = out_grad * is_read[:, :, None, None]
    ids = None if segments is None else jnp.asarray(segments, jnp.int32)

    def loss(q, k, v):
        out = kernel(q, k, v, ids, mask=mask)
        return jnp.sum(out * out_grad), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    expected, expected_grads = reference(q, k, v, segments, mask, out_grad)
    np.testing.assert_allclose(np.asarray(out)[is_read], expected[is_read], atol=2e-5)
    for name, grad, expected_grad in zip("qkv", grads, expected_grads):
        np.testing.assert_allclose(grad, expected_grad, atol=2e-4, err_msg=name)
