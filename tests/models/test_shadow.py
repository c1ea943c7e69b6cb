"""The shadow of a block: what it sees, and what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, Mask
from llada_jax.models.model import make_model
from llada_jax.models.shadow import sees_with_shadow
from llada_jax.models.transformer import Architecture

V, MASK, T, START, LENGTH = 32, 31, 10, 4, 3
SEGMENTS_BT = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 10])


def network(num_layers, **changes):
    shape = dict(vocab_size=V, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32)
    model = make_model(Architecture(num_layers=num_layers, **shape, **changes))
    return model, model.init(jax.random.key(2))


def rows():
    tokens_BT = np.random.default_rng(0).integers(0, V - 1, (2, T))
    positions_BT = np.maximum(np.arange(T) - (SEGMENTS_BT == 0).sum(axis=1, keepdims=True), 0)
    return jnp.asarray(tokens_BT), jnp.asarray(SEGMENTS_BT), jnp.asarray(positions_BT)


@pytest.mark.parametrize("mask", [BIDIRECTIONAL, Mask(block_length=5)])
def test_the_shadow_sees_all_but_its_own_token_and_is_seen_by_nothing_else(mask):
    sees_BSS = np.asarray(
        sees_with_shadow(mask, jnp.asarray(SEGMENTS_BT), start=START, length=LENGTH)
    )
    for row, query, key in np.ndindex(*sees_BSS.shape):
        column = query if query < T else START + query - T
        if key >= T:
            expected = query >= T
        else:
            expected = SEGMENTS_BT[row, column] == SEGMENTS_BT[row, key]
            if mask.block_length:
                expected &= key // mask.block_length <= column // mask.block_length
            if query >= T:
                expected &= key != column
        assert sees_BSS[row, query, key] == expected, (row, query, key)


@pytest.mark.slow
def test_the_row_is_as_it_is_without_a_shadow():
    model, params = network(2)
    expected_BTV = model.logits_fn(params, *rows(), start=START, length=LENGTH)
    logits_BTV, _ = model.shadow_fn(params, *rows(), MASK, start=START, length=LENGTH)
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=2e-5)


@pytest.mark.slow
def test_the_shadow_of_one_layer_is_a_row_that_holds_it_in_place_of_the_token():
    """Keys of one layer depend on their own token alone, so that a longer row, in which the token
    in question is padding and the masks of the shadow are at the end, gives the same.
    """
    model, params = network(1)
    tokens_BT, segments_BT, positions_BT = rows()
    _, shadow_BTV = model.shadow_fn(
        params, tokens_BT, segments_BT, positions_BT, MASK, start=START, length=LENGTH
    )
    block = slice(START, START + LENGTH)
    longer = [
        jnp.concatenate([tokens_BT, jnp.full((2, LENGTH), MASK)], axis=1),
        jnp.concatenate([segments_BT, segments_BT[:, block]], axis=1),
        jnp.concatenate([positions_BT, positions_BT[:, block]], axis=1),
    ]
    for i in range(LENGTH):
        without = [longer[0], longer[1].at[:, START + i].set(0), longer[2]]
        expected_BTV = model.logits_fn(params, *without)
        np.testing.assert_allclose(shadow_BTV[:, i], expected_BTV[:, T + i], atol=2e-5)


def test_a_shifted_output_has_no_shadow():
    model, params = network(1, output_shift=True)
    with pytest.raises(UserError, match="use another rule than revise=wino"):
        model.shadow_fn(params, *rows(), MASK, start=START, length=LENGTH)
