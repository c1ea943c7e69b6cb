"""Gradients in bfloat16 against those in float32, as the tokens per device grow.

A bfloat16 sum stops growing once it is 256 times as large as what is added. A gradient that is
summed so is right for the short rows of a unit test and loses most of its length in a real run.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture

V, T, MASK_ID = 32, 64, 31  # the mask is the last row of the embedding


def gradients(model, params, num_tokens: int) -> dict:
    """Returns {path: float64 gradient} of the mean over masked tokens of a bound's usual batch, in
    which about half of all tokens are masked.
    """
    rng = np.random.default_rng(0)
    # runs of one letter, so that the gradients do not average out to noise
    tokens_BT = np.repeat(rng.integers(0, V // 4, (num_tokens // T, T // 8)), 8, axis=1)
    is_masked_BT = rng.random(tokens_BT.shape) < rng.random((len(tokens_BT), 1))
    noisy_BT = np.where(is_masked_BT, MASK_ID, tokens_BT)
    positions_BT = np.broadcast_to(np.arange(T), tokens_BT.shape)

    def loss(params):
        nll_BT = model.nll_fn(
            params, noisy_BT, tokens_BT, jnp.asarray(is_masked_BT), None, positions_BT
        ).nll_BT
        return nll_BT.sum() / num_tokens

    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(grad, np.float64)
        for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params))
    }


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1024, 16384])
def test_all_bfloat16_gradients_equal_those_of_float32_however_many_tokens_are_summed(num_tokens):
    a = Architecture(
        vocab_size=V,
        num_layers=1,
        d_model=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        d_ff=32,
        rope_theta=100.0,
        qk_norm="per_head",
        attention_bias="qkvo",
    )
    exact = make_model(a)
    params = exact.init(jax.random.key(0))
    expected = gradients(exact, params, num_tokens)
    # in pieces of the vocabulary, as in training
    found = gradients(make_model(a, dtype=jnp.bfloat16, nll_chunk=16), params, num_tokens)
    assert found.keys() == expected.keys()
    found["the mask's row"], expected["the mask's row"] = found["embed"][-1], expected["embed"][-1]
    errors = {
        path: np.linalg.norm(found[path] - grad) / np.linalg.norm(grad)
        for path, grad in expected.items()
    }
    assert max(errors.values()) < 0.035, errors
