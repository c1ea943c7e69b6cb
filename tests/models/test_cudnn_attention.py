"""cuDNN attention without a GPU: what it is asked for, and what its padding may hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention import SEGMENTS, B, H, check, inputs, reference

from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, CAUSAL
from llada_jax.models.attention import cudnn_attention


@pytest.mark.parametrize("mask", [BIDIRECTIONAL, CAUSAL])
@pytest.mark.parametrize("segments", ["whole", "padded"])
def test_cudnn_attention_is_handed_lengths_and_never_a_mask(monkeypatch, segments, mask):
    """cuDNN needs a GPU; what jax.nn is asked to let it compute is computed here by XLA."""
    seen = {}
    real = jax.nn.dot_product_attention

    def stand_in(q, k, v, *, implementation, **kwargs):
        seen.update(kwargs, implementation=implementation)
        return real(q, k, v, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    check(cudnn_attention, inputs(4, 2), SEGMENTS[segments], mask)
    assert seen["implementation"] == "cudnn"
    assert not {"mask", "bias"} & set(seen)
    if segments == "padded":
        np.testing.assert_array_equal(seen["query_seq_lengths"].shape, [B])
    else:
        assert seen["query_seq_lengths"] is None


def test_what_cudnn_does_not_take_on_these_devices_is_said_in_a_sentence(monkeypatch):
    def refuses(*_, **__):
        raise NotImplementedError("The head dim must be <= 128 and a multiple of 8, but got 192.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", refuses)
    q, k, v = inputs(4, 2)[:3]
    with pytest.raises(UserError, match="for these devices: The .* but got 192; set config.model"):
        cudnn_attention(q, k, v, None, mask=BIDIRECTIONAL)


def leaves_padding_unwritten(real):
    """Returns a kernel like cuDNN's in memory full of NaN: what lies beyond the lengths is NaN, in
    its output and in its gradients.
    """

    def beyond_is_nan(x, lengths):
        beyond = jnp.arange(x.shape[1]) >= lengths[:, None]
        return jnp.where(beyond[:, :, None, None], jnp.nan, x)

    def computed(lengths):
        of_queries, of_keys = lengths
        given = {"query_seq_lengths": of_queries, "key_value_seq_lengths": of_keys}
        return lambda q, k, v: real(q, k, v, implementation="xla", **given)

    @jax.custom_vjp
    def kernel(q, k, v, lengths):
        return beyond_is_nan(computed(lengths)(q, k, v), lengths[0])

    def forward(q, k, v, lengths):
        return kernel(q, k, v, lengths), (q, k, v, lengths)

    def backward(saved, out_grad):
        *arrays, (of_queries, of_keys) = saved
        _, pull = jax.vjp(computed((of_queries, of_keys)), *arrays)
        # a row without queries writes no gradients of its keys either
        of_keys = jnp.where(of_queries > 0, of_keys, 0)
        grads = zip(pull(out_grad), (of_queries, of_keys, of_keys), strict=True)
        return (*(beyond_is_nan(grad, lengths) for grad, lengths in grads), None)

    kernel.defvjp(forward, backward)
    return lambda q, k, v, *, query_seq_lengths, key_value_seq_lengths, **_: kernel(
        q, k, v, (query_seq_lengths, key_value_seq_lengths)
    )


@pytest.mark.slow
def test_what_cudnn_leaves_unwritten_at_padding_reaches_neither_output_nor_gradients(monkeypatch):
    """Not even where the inputs are NaN there, as after a layer that did not write them."""
    stand_in = leaves_padding_unwritten(jax.nn.dot_product_attention)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    segments = np.array([[1] * 256, [1] * 200 + [0] * 56])
    q, k, v = inputs(4, 2)
    # with gradients that are 0 at padding, as the reference has them
    check(cudnn_attention, (q, k, v), segments, BIDIRECTIONAL)
    full_of_nan = [np.where((segments > 0)[:, :, None, None], x, np.nan) for x in (q, k, v)]
    ids = jnp.asarray(segments, jnp.int32)
    weight = jnp.ones((H, H), jnp.float32)

    def loss(weight, q, k, v):
        # as a network does: the gradient of a matrix sums over all positions
        q, k, v = (x @ weight for x in (q, k, v))
        return cudnn_attention(q, k, v, ids, mask=BIDIRECTIONAL).sum()

    clean = jax.grad(loss)(weight, q, k, v)
    assert np.isfinite(clean).all()
    out = cudnn_attention(*full_of_nan, ids, mask=BIDIRECTIONAL)
    np.testing.assert_array_equal(out, cudnn_attention(q, k, v, ids, mask=BIDIRECTIONAL))
    for grad in jax.grad(lambda *x: cudnn_attention(*x, ids, mask=BIDIRECTIONAL).sum(), (0, 1, 2))(
        *full_of_nan
    ):
        assert np.isfinite(grad).all()


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 128, 192])
def test_columns_of_a_row_that_are_all_padding_leave_nothing_unwritten(monkeypatch, first):
    """As where several devices share a row: the last 64 columns of the second one are empty."""
    real = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", leaves_padding_unwritten(real))
    segments = np.array([[1] * 256, [1] * 150 + [0] * 106])
    ids = jnp.asarray(segments, jnp.int32)
    q, k, v = inputs(4, 2)
    own = slice(first, first + 64)
    weight = np.zeros_like(q)
    weight[:, own] = (segments > 0)[:, own, None, None]

    def loss(q, k, v):
        out = cudnn_attention(q[:, own], k, v, ids, mask=BIDIRECTIONAL, start=first)
        return jnp.sum(out * weight[:, own]), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    expected, expected_grads = reference(q, k, v, segments, BIDIRECTIONAL, weight)
    is_read = (segments > 0)[:, own]
    np.testing.assert_allclose(np.asarray(out)[is_read], expected[:, own][is_read], atol=2e-5)
    assert np.all(np.asarray(out)[~is_read] == 0)
    for name, grad, expected_grad in zip("qkv", grads, expected_grads):
        np.testing.assert_allclose(grad, expected_grad, atol=2e-4, err_msg=name)
