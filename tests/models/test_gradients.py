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
ROWS = 16  # that the reference computes at a time, and adds up in float64


def batch_of(num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (noisy, clean, is masked) of a bound's usual batch, in which about half of all tokens
    are masked.
    """
    rng = np.random.default_rng(0)
    # runs of one letter, so that the gradients do not average out to noise
    tokens_BT = np.repeat(rng.integers(0, V // 4, (num_tokens // T, T // 8)), 8, axis=1)
    is_masked_BT = rng.random(tokens_BT.shape) < rng.random((len(tokens_BT), 1))
    return np.where(is_masked_BT, MASK_ID, tokens_BT), tokens_BT, is_masked_BT


def gradient_of(model):
    """Returns a function of parameters and a batch: {path: float64 gradient} of the sum over masked
    tokens, added up over the batch in one call.
    """

    def loss(params, noisy_BT, tokens_BT, is_masked_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(T), tokens_BT.shape)
        return model.nll_fn(
            params, noisy_BT, tokens_BT, is_masked_BT, None, positions_BT
        ).nll_BT.sum()

    gradient = jax.jit(jax.grad(loss))

    def named(params, batch) -> dict[str, np.ndarray]:
        named = {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(grad, np.float64)
            for path, grad in jax.tree_util.tree_leaves_with_path(gradient(params, *batch))
        }
        return {**named, "the mask's row": named["embed"][-1]}

    return named


def as_multiplied(params):
    """Returns float32 parameters with the values that a bfloat16 network multiplies by: it rounds
    embedding and matrices, and neither norms nor biases.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf
            if "norm" in (name := jax.tree_util.keystr(path)) or "bias" in name
            else leaf.astype(jnp.bfloat16).astype(jnp.float32)
        ),
        params,
    )


def distance(found: dict, expected: dict) -> dict[str, float]:
    return {
        path: np.linalg.norm(found[path] - grad) / np.linalg.norm(grad)
        for path, grad in expected.items()
    }


@pytest.mark.slow
def test_all_bfloat16_gradients_equal_those_of_float32_however_many_tokens_are_summed():
    """Most of what separates them is that the network of rounded matrices is another one, and that
    does not average out; next to the float32 gradients of that network, little is left.
    """
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
    model = make_model(a)
    params = model.init(jax.random.key(0))
    in_float32 = gradient_of(model)
    # in pieces of the vocabulary, as in training
    in_bfloat16 = gradient_of(make_model(a, dtype=jnp.bfloat16, nll_chunk=16))

    def reference(params, batch) -> dict[str, np.ndarray]:
        parts = [
            in_float32(params, [array[row : row + ROWS] for array in batch])
            for row in range(0, len(batch[0]), ROWS)
        ]
        return {path: sum(part[path] for part in parts) for path in parts[0]}

    for num_tokens in (1_024, 65_536):
        batch = batch_of(num_tokens)
        found = in_bfloat16(params, batch)
        errors = distance(found, reference(params, batch))
        assert max(errors.values()) < 0.035, (num_tokens, errors)
        of_rounded = reference(as_multiplied(params), batch)
        errors = distance(found, of_rounded)
        assert max(errors.values()) < 0.015, (num_tokens, errors)
        row = "the mask's row"
        length = np.linalg.norm(found[row]) / np.linalg.norm(of_rounded[row])
        assert length == pytest.approx(1, abs=0.01), num_tokens
