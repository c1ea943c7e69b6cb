"""What may be proposed: top-k, top-p, suppressed ids, and noise that knows the position alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_networks import MASK, PAD, fixed_distribution

from llada_jax.errors import UserError
from llada_jax.samplers.choice import keep_likely, pick_tokens, without_ids
from llada_jax.samplers.text import generate_tokens


@pytest.mark.parametrize("is_stochastic", [False, True])
def test_neither_the_mask_nor_an_id_without_a_token_is_picked_however_likely(is_stochastic):
    """First in this file, because a sampler that reveals masks as masks never ends."""
    keys_B = jax.random.split(jax.random.key(0), 4)
    positions_BT = jnp.broadcast_to(jnp.arange(32), (4, 32))
    logits_BTV = jnp.zeros((4, 32, 8)).at[..., jnp.array([3, 6, 7])].set(50.0)
    numbers = {"mask_id": 3, "num_ids": 6, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    picked_BT = pick_tokens(
        logits_BTV, keys_B, positions_BT, is_stochastic=is_stochastic, is_filtered=False, **numbers
    )
    assert set(np.unique(picked_BT)) == ({0, 1, 2, 4, 5} if is_stochastic else {0})


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), top_k=st.integers(0, 9), top_p=st.floats(0.01, 1.0))
def test_the_likely_tokens_are_those_of_plain_numpy(seed, top_k, top_p):
    logits_V = np.random.default_rng(seed).normal(size=8).astype(np.float32) * 2
    kept_V = np.asarray(
        keep_likely(jnp.asarray(logits_V)[None, None], top_k=top_k, top_p=np.float32(top_p))
    )[0, 0]
    order = np.argsort(-logits_V)[: top_k or 8]
    p = np.exp(logits_V[order].astype(np.float64))
    p /= p.sum()
    before = np.cumsum(p) - p
    if np.abs(before - top_p).min() < 1e-5:
        return  # rounding decides
    needed = order if top_p == 1.0 else order[(before < top_p) | (np.arange(len(p)) == 0)]
    assert set(np.flatnonzero(kept_V > -np.inf)) == set(needed)
    np.testing.assert_array_equal(kept_V[needed], logits_V[needed])


def test_draws_stay_within_the_likely_tokens_and_keep_their_odds():
    logits_V = np.log(np.array([0.4, 0.3, 0.2, *[0.1 / 13] * 13])).astype(np.float32)
    request = {
        "mask_id": MASK,
        "pad_id": PAD,
        "gen_length": 32,
        "steps": 1,
        "batch_size": 64,
        "temperature": 1.0,
    }
    tokens_BT, _ = generate_tokens(fixed_distribution, logits_V, [[]] * 64, top_k=3, **request)
    share_3 = np.bincount(tokens_BT.ravel(), minlength=16)[:3] / tokens_BT.size
    # 2,048 draws: five standard errors, exceeded by a correct sampler once in a million seeds.
    np.testing.assert_allclose(share_3, np.array([0.4, 0.3, 0.2]) / 0.9, atol=5 * 0.5 / 2048**0.5)
    assert tokens_BT.max() == 2
    tokens_BT, _ = generate_tokens(fixed_distribution, logits_V, [[]] * 64, top_p=0.6, **request)
    assert set(tokens_BT.ravel().tolist()) == {0, 1}


@pytest.mark.parametrize("kind", [list, np.array, jnp.array])
def test_suppressed_ids_are_never_sampled(kind):
    logits_V = np.arange(16, dtype=np.float32)
    request = {"mask_id": MASK, "pad_id": PAD, "gen_length": 4, "suppress": kind([14, 13])}
    tokens_BT, _ = generate_tokens(fixed_distribution, logits_V, [[]], **request)
    assert tokens_BT.tolist() == [[12] * 4]


def test_logits_that_are_off_leave_their_probability_to_the_others():
    logits_BTV = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    p_BTV = jax.nn.softmax(without_ids(logits_BTV, jnp.array([0])))
    np.testing.assert_allclose(p_BTV, [[[0.0, 0.5, 0.5]]], atol=1e-6)


def test_the_noise_of_a_position_does_not_depend_on_the_window():
    keys_B = jax.random.split(jax.random.key(0), 2)
    numbers = {"mask_id": 15, "num_ids": 16, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def pick(first, length):
        positions_BT = jnp.broadcast_to(jnp.arange(first, first + length), (2, length))
        logits_BTV = jnp.zeros((2, length, 16))
        return pick_tokens(
            logits_BTV, keys_B, positions_BT, is_stochastic=True, is_filtered=False, **numbers
        )

    np.testing.assert_array_equal(pick(0, 8)[:, 3:6], pick(3, 3))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"top_k": -1, "temperature": 1.0}, "top_k=-1 must not be negative"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p=0.0 must be greater than 0"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p=1.5 must be greater than 0 and at most 1"),
        ({"top_k": 5}, "temperature=0 draws nothing"),
        ({"top_p": 0.5}, "temperature=0 draws nothing"),
        ({"suppress": [-1]}, "suppress=-1 is not the id of a token"),
        ({"suppress": [1.5]}, "suppress=1.5 is not the id of a token"),
        ({"suppress": [True]}, "suppress=True is not the id of a token"),
        ({"suppress": [16], "num_ids": 16}, "ids are 0 to 15"),
        ({"suppress": range(15), "num_ids": 16}, "leave none of the 16 ids"),
        ({"suppress": range(14), "num_ids": 16, "eos_id": 14, "eos": "never"}, "none of the 16"),
        ({"eos": "lasst", "eos_id": 14}, "Did you mean 'last'?"),
        ({"eos": "never"}, "eos=never needs eos_id"),
    ],
)
def test_impossible_options_are_refused_with_a_remedy(changes, sentence):
    request = {"mask_id": MASK, "pad_id": PAD, "gen_length": 4} | changes
    with pytest.raises(UserError) as error:
        generate_tokens(fixed_distribution, np.zeros(16, np.float32), [[1]], **request)
    assert sentence in str(error.value)
