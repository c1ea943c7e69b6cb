"""The two passes of the network that guidance takes, and what it makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.samplers.network import Rows, guided, with_unprompted


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5, 2.0])
def test_guidance_takes_the_odds_that_the_prompt_makes_to_a_power(cfg_scale):
    """p_prompted (p_prompted / p_unprompted)^w, normalised: no guidance is p_prompted itself."""
    prompted, unprompted = np.random.default_rng(0).dirichlet(np.ones(7), size=(2, 3, 4))
    expected = prompted * (prompted / unprompted) ** cfg_scale
    expected /= expected.sum(axis=-1, keepdims=True)
    both = jnp.log(jnp.asarray(np.concatenate([prompted, unprompted]), jnp.float32))
    found = jax.nn.softmax(guided(both, jnp.float32(cfg_scale)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_the_second_pass_sees_masks_where_tokens_are_given_and_what_was_generated():
    tokens = jnp.array([[1, 2, 3, 9], [4, 9, 5, 9]])
    is_fixed = jnp.array([[True, True, False, False], [True, False, False, False]])
    rows = with_unprompted(Rows(tokens, tokens * 0 + 1, tokens * 0 + 7), is_fixed, jnp.int32(9))
    assert rows.tokens_BT.tolist() == [*tokens.tolist(), [9, 9, 3, 9], [9, 9, 5, 9]]
    assert rows.segment_ids_BT.tolist() == [[1] * 4] * 4
    assert rows.positions_BT.tolist() == [[7] * 4] * 4
