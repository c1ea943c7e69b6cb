"""What is drawn at random has the right distribution, and depends on the seed and the row alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from support.toy_networks import (
    MASK,
    PAD,
    VOCAB,
    fixed_distribution,
    toy_logits,
    toy_params,
    windowed,
    without_tokens,
)

from llada_jax.samplers.canvas import make_canvas
from llada_jax.samplers.denoise import denoise
from llada_jax.samplers.remasking import REMASKING
from llada_jax.samplers.text import generate_tokens


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_samples_follow_the_tempered_softmax(temperature):
    logits_V = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)
    tokens_BT, _ = generate_tokens(
        fixed_distribution,
        logits_V,
        [[]] * 200,
        mask_id=MASK,
        pad_id=PAD,
        gen_length=64,
        steps=4,
        temperature=temperature,
        remasking="random",
        batch_size=200,
    )
    ordinary = np.arange(VOCAB) != MASK
    p_V = np.where(ordinary, np.exp(logits_V / temperature), 0.0)
    p_V /= p_V.sum()
    observed_V = np.bincount(tokens_BT.ravel(), minlength=VOCAB)
    expected_V = p_V * tokens_BT.size
    chi_square = ((observed_V - expected_V) ** 2)[ordinary] / expected_V[ordinary]
    assert chi_square.sum() < 50.0, (
        "14 degrees of freedom: a correct sampler exceeds this once in 150,000 seeds"
    )
    assert observed_V[MASK] == 0


def first_revealed(remasking, *, num_rows):
    """Counts in which of 16 places the first token of a row is revealed."""
    canvas = make_canvas([[]] * num_rows, gen_length=16, mask_id=MASK, pad_id=PAD)
    state = next(
        denoise(
            Partial(fixed_distribution, np.arange(VOCAB, dtype=np.float32)),
            canvas.tokens_BT,
            jax.random.key(1),
            mask_id=MASK,
            gen_length=16,
            block_length=16,
            steps=16,
            remasking=remasking,
            **without_tokens(canvas),
        )
    )
    assert (np.asarray(state.is_new_BT).sum(axis=1) == 1).all()
    return np.asarray(state.is_new_BT).sum(axis=0)


def test_random_remasking_reveals_every_place_equally_often():
    count_T = first_revealed("random", num_rows=4000)
    chi_square = ((count_T - 250.0) ** 2 / 250.0).sum()
    assert chi_square < 55.0, (
        "15 degrees of freedom: a correct sampler exceeds this once in 500,000 seeds"
    )


def test_low_confidence_reveals_the_leftmost_of_equals():
    assert first_revealed("low_confidence", num_rows=5).tolist() == [5] + [0] * 15


@pytest.mark.slow
def test_confidence_ignores_the_temperature():
    """Token 0 is certain in place 2 only, so place 2 comes first however hot the choice of tokens
    is.
    """

    @windowed
    def logits_fn(tokens_BT, segment_ids_BT, positions_BT):
        certain_BT = jnp.where(positions_BT == 2, 40.0, 0.0)
        return certain_BT[..., None] * jax.nn.one_hot(jnp.zeros_like(tokens_BT), VOCAB)

    canvas = make_canvas([[]] * 50, gen_length=4, mask_id=MASK, pad_id=PAD)
    settings = {"mask_id": MASK, "gen_length": 4, "block_length": 4, "steps": 4} | without_tokens(
        canvas
    )
    for state in denoise(
        logits_fn, canvas.tokens_BT, jax.random.key(0), temperature=2.0, **settings
    ):
        assert np.asarray(state.is_new_BT)[:, 2].all()
        break


@pytest.mark.slow
@pytest.mark.parametrize("remasking", REMASKING)
def test_a_row_draws_the_same_whatever_else_is_sampled_with_it(remasking):
    request = {
        "mask_id": MASK,
        "pad_id": PAD,
        "gen_length": 16,
        "steps": 4,
        "temperature": 1.0,
        "remasking": remasking,
    }
    prompts = [[1, 2], [3] * 5, [], [4]]
    together, _ = generate_tokens(toy_logits, toy_params(), prompts, seed=5, **request)
    in_pairs, _ = generate_tokens(
        toy_logits, toy_params(), prompts, seed=5, batch_size=2, **request
    )
    replaced, _ = generate_tokens(
        toy_logits, toy_params(), [[9], [3] * 5, [7] * 30, [4]], seed=5, **request
    )
    other_seed, _ = generate_tokens(toy_logits, toy_params(), prompts, seed=6, **request)
    np.testing.assert_array_equal(together, in_pairs)
    np.testing.assert_array_equal(together[[1, 3]], replaced[[1, 3]])
    assert (together != other_seed).any()


def joint_and_conditionals():
    """A distribution over three tokens out of four, and its exact conditionals for every noisy row:
    [5, 5, 5, 3, 4], where the index 4 is a masked token.
    """
    rng = np.random.default_rng(1)
    joint = rng.dirichlet(np.full(64, 1.5)).reshape(4, 4, 4)
    conditionals = np.zeros((5, 5, 5, 3, 4))
    for noisy in itertools.product(range(5), repeat=3):
        seen = tuple(slice(None) if token == 4 else slice(token, token + 1) for token in noisy)
        for place in range(3):
            others = tuple(axis for axis in range(3) if axis != place)
            conditionals[(*noisy, place, seen[place])] = joint[seen].sum(axis=others)
    return joint, conditionals / conditionals.sum(axis=-1, keepdims=True)


def test_one_token_per_step_in_random_order_draws_from_the_joint_distribution():
    """With exact conditionals, every order of revealing gives the joint distribution itself."""
    joint, conditionals = joint_and_conditionals()

    @windowed
    def exact(log_p, tokens_BT, segment_ids_BT, positions_BT):
        index = jnp.minimum(tokens_BT[:, -3:], 4)
        logits_BTV = jnp.full((*tokens_BT.shape, 5), -jnp.inf)
        rows = log_p[index[:, 0], index[:, 1], index[:, 2]]
        return logits_BTV.at[:, -3:, :4].set(rows)

    num_rows = 4000
    tokens_BT, num_steps_B = generate_tokens(
        exact,
        np.log(conditionals).astype(np.float32),
        [[]] * num_rows,
        mask_id=4,
        pad_id=0,
        gen_length=3,
        remasking="random",
        temperature=1.0,
        batch_size=num_rows,
    )
    assert (num_steps_B == 3).all()
    observed = np.bincount(tokens_BT @ np.array([16, 4, 1]), minlength=64)
    expected = joint.ravel() * num_rows
    # Outcomes that are expected less than five times are one class.
    is_rare = expected < 5
    observed = np.append(observed[~is_rare], observed[is_rare].sum())
    expected = np.append(expected[~is_rare], expected[is_rare].sum())
    keep = expected > 0
    chi_square = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    assert chi_square < 130.0, (
        "at most 63 degrees of freedom: a correct sampler exceeds this once in 500,000 seeds"
    )
    # It is a test of the joint: the product of the marginals would fail it.
    product = np.einsum("i,j,k->ijk", *(joint.sum(axis=a) for a in ((1, 2), (0, 2), (0, 1))))
    distance = ((product - joint) ** 2 / joint).sum() * num_rows
    assert distance > 1000
