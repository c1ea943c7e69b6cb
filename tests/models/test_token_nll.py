"""The chunked negative log-likelihood of tokens against the log-softmax of whole logits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.networks import SMALL, perturbed, random_inputs, variant
from support.programs import shapes_of

from llada_jax.cluster.sharding import make_mesh
from llada_jax.models.attention import IN_PIECES
from llada_jax.models.model import make_model
from llada_jax.models.token_scores import MOST_LOGITS


@pytest.mark.slow
@pytest.mark.parametrize("nll_chunk", [1, 2, 3, 5, 12, 1024, None])
def test_chunked_nll_and_its_gradient_equal_the_log_softmax_of_the_logits(nll_chunk):
    model = make_model(SMALL, nll_chunk=nll_chunk)
    params = perturbed(model)
    tokens, segments, positions = random_inputs(SMALL)
    targets, where = (tokens * 7 + 3) % SMALL.vocab_size, tokens % 3 > 0
    weight = jax.random.uniform(jax.random.key(5), tokens.shape)

    def chunked(params):
        return jnp.sum(
            weight * model.nll_fn(params, tokens, targets, where, segments, positions).nll_BT
        )

    def direct(params):
        log_p = jax.nn.log_softmax(model.logits_fn(params, tokens, segments, positions))
        return -jnp.sum(weight * where * jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0])

    (ours, our_grad), (theirs, their_grad) = (
        jax.jit(jax.value_and_grad(f))(params) for f in (chunked, direct)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), our_grad, their_grad
    )
    best = np.argmax(jax.jit(model.logits_fn)(params, tokens, segments, positions), axis=-1)
    assert 0 < where.mean() < 1
    nll_fn = jax.jit(model.nll_fn)
    for guess, is_right in (
        (targets, best == targets),
        (best, True),
        ((best + 1) % SMALL.vocab_size, False),
    ):
        scores = nll_fn(params, tokens, guess, where, segments, positions)
        np.testing.assert_array_equal(scores.is_correct_BT, is_right & where)


@pytest.mark.slow
def test_a_shifted_output_shifts_the_loss_like_the_logits():
    model = make_model(variant(output_shift=True), nll_chunk=4)
    params = perturbed(model)
    tokens, segments, positions = random_inputs(SMALL)
    segments = segments.at[:, 7:].set(2)
    scores = jax.jit(model.nll_fn)(params, tokens, tokens, tokens >= 0, segments, positions)
    log_p = jax.nn.log_softmax(jax.jit(model.logits_fn)(params, tokens, segments, positions))
    expected = -np.take_along_axis(np.asarray(log_p), np.asarray(tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores.nll_BT, expected, atol=1e-5)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_without_a_chunk_the_logits_of_a_device_are_bounded_whatever_the_batch_is(num_devices):
    # Rows, vocabulary and batch of an evaluation of LLaDA-8B, of which all other arrays are small.
    a = variant(vocab_size=126_464)
    batch = [jax.ShapeDtypeStruct((64, 4096), dtype) for dtype in (jnp.int32, bool)]

    def largest(**kwargs) -> int:
        model = make_model(a, attention=IN_PIECES, **kwargs)

        def nll(params, tokens, where):
            return model.nll_fn(params, tokens, tokens, where, None, tokens)

        with jax.set_mesh(make_mesh({"data": num_devices}, jax.devices()[:num_devices])):
            traced = jax.make_jaxpr(nll)(model.abstract, *batch)
        # a trace has the arrays of all devices together
        return max(map(math.prod, shapes_of(traced.jaxpr))) // num_devices

    assert 0.9 * MOST_LOGITS < largest() <= MOST_LOGITS
    assert largest(nll_chunk=1024) * num_devices == 64 * 4096 * 126_464 // 4


@pytest.mark.slow
def test_logits_of_all_positions_never_exist_at_once():
    a = variant(vocab_size=50_000)
    B, T, chunk = 4, 256, 16
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    where = jax.ShapeDtypeStruct((B, T), bool)

    def temporary_bytes(nll_chunk):
        model = make_model(a, nll_chunk=nll_chunk)

        def loss(params, tokens, where):
            return model.nll_fn(params, tokens, tokens, where, None, tokens).nll_BT.sum()

        compiled = jax.jit(jax.grad(loss)).lower(model.abstract, tokens, where).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits = B * T * a.vocab_size * 4
    assert temporary_bytes(T) > all_logits
    assert temporary_bytes(chunk) < all_logits / 2  # of which most is the head's own gradient
