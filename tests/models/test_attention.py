"""Every attention kernel against the reference, in interpret mode, and the choice between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.cluster.sharding import make_mesh
from llada_jax.models.attention import (
    attend,
    choose,
    splash_attention,
    triton_attention,
    xla_attention,
)

B, T, H = 2, 256, 64


def inputs(num_heads, num_kv_heads, head_dim=H):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, T, num_heads, head_dim)).astype(np.float32)
    k, v = (rng.normal(size=(B, T, num_kv_heads, head_dim)).astype(np.float32) for _ in "kv")
    segments = np.ones((B, T), np.int32)
    segments[0, 100:] = 2
    segments[1, 200:] = 0
    return q, k, v, segments


def value_and_gradients(attention, q, k, v, segments):
    weight = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    weight = weight * (segments > 0)[:, :, None, None]  # what padding attends to means nothing

    def loss(q, k, v):
        out = attention(q, k, v, jnp.asarray(segments))
        return jnp.sum(out * weight), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return np.asarray(out)[segments > 0], grads


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("kernel", [splash_attention, triton_attention])
def test_kernels_equal_the_reference_with_packing_padding_and_grouped_heads(
    kernel, num_heads, num_kv_heads, causal
):
    arrays = inputs(num_heads, num_kv_heads)
    out, grads = value_and_gradients(
        functools.partial(kernel, causal=causal, interpret=True), *arrays
    )
    expected, expected_grads = value_and_gradients(
        functools.partial(xla_attention, causal=causal), *arrays
    )
    np.testing.assert_allclose(out, expected, atol=2e-5)
    for grad, expected_grad in zip(grads, expected_grads):
        np.testing.assert_allclose(grad, expected_grad, atol=2e-4)


def test_the_reference_equals_jax_nn():
    q, k, v, segments = inputs(4, 2)
    is_same = segments[:, :, None] == segments[:, None, :]
    expected = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(is_same)[:, None])
    np.testing.assert_allclose(xla_attention(q, k, v, segments, causal=False), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "packed", "sequence_length", "chosen"),
    [
        ("cpu", True, 4096, "xla"),
        ("tpu", True, 4096, "splash"),
        ("tpu", False, 100, "xla"),
        ("gpu", False, 4096, "cudnn"),
        ("cuda", True, 4096, "triton"),
        ("gpu", False, 64, "xla"),
    ],
)
def test_auto_follows_the_platform_of_the_mesh(platform, packed, sequence_length, chosen):
    shape = dict(platform=platform, packed=packed, sequence_length=sequence_length)
    assert choose("auto", **shape, head_dim=128, dtype="bfloat16") == chosen
    assert choose("xla", **shape, head_dim=128, dtype="bfloat16") == "xla"
    if platform != "tpu":
        assert choose("auto", **shape, head_dim=128, dtype="float32") == "xla"
        assert choose("auto", **shape, head_dim=256, dtype="bfloat16") == "xla"


@pytest.mark.slow
def test_a_kernel_on_a_mesh_runs_per_device_and_equals_the_reference(monkeypatch):
    from llada_jax.models import attention

    interpreted = functools.partial(splash_attention, interpret=True)
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "splash", interpreted)
    q, k, v, segments = inputs(4, 2)
    expected = xla_attention(q, k, v, segments, causal=False)
    with jax.set_mesh(make_mesh({"data": 4, "tensor": 2}, devices=jax.devices())):
        q, k, v, segments = (jnp.concatenate([jnp.asarray(x)] * 2) for x in (q, k, v, segments))
        out = jax.jit(functools.partial(attend, implementation="splash", causal=False))(
            q, k, v, segments
        )
    is_real = np.asarray(segments[:B] > 0)
    np.testing.assert_allclose(
        np.asarray(out)[:B][is_real], np.asarray(expected)[is_real], atol=2e-5
    )


@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_attention_is_handed_lengths_and_never_a_mask(monkeypatch, packed):
    """cuDNN itself needs a GPU; what it is called with does not."""
    seen = {}
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, k, v, **kwargs: seen.update(kwargs) or q
    )
    from llada_jax.models.attention import cudnn_attention

    q, k, v, segments = inputs(2, 2)
    cudnn_attention(q, k, v, jnp.asarray(segments) if packed else None, causal=False)
    assert seen["implementation"] == "cudnn"
    assert "mask" not in seen
    if packed:
        np.testing.assert_array_equal(seen["query_seq_lengths"], [256, 200])
    else:
        assert seen["query_seq_lengths"] is None
