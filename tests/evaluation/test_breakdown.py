"""The parts of the bound: they add up to it, lie where they belong, and know their errors."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.datasets import SEQUENCE_LENGTH

from llada_jax.cluster.sharding import batch_sharding, one_device_mesh
from llada_jax.evaluation import likelihood
from llada_jax.evaluation.breakdown import NUM_PARTS, _shares, breakdown, breakdown_of_split
from llada_jax.models.transformer import TokenScores
from llada_jax.objectives.autoregressive import autoregressive
from llada_jax.objectives.masked_diffusion import masked_diffusion

B, T = 32, 16
OBJECTIVES = {
    "masked_diffusion": masked_diffusion(mask_id=256),
    "autoregressive": autoregressive(bos_id=257),
}


def surprised_by_position(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    """A network whose nll is 1 + position / 10, wherever a token is asked for."""
    return TokenScores(jnp.where(where_BT, 1.0 + positions_BT / 10, 0.0), where_BT)


def surprised_by_masks(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    """A network whose nll is the share of masks in the row."""
    share_B = where_BT.mean(axis=1, keepdims=True)
    return TokenScores(jnp.where(where_BT, share_B, 0.0), where_BT)


def batches(num=20):
    rng = np.random.default_rng(0)
    for _ in range(num):
        lengths = rng.integers(1, T + 1, B)
        is_maskable = np.arange(T) < lengths[:, None]
        yield {
            "tokens": rng.integers(0, 256, (B, T)).astype(np.int32),
            "segment_ids": is_maskable.astype(np.int32),
            "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
            "is_maskable": is_maskable,
        }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_part_of_the_row_has_its_own_mean_within_its_error(name):
    found = breakdown(OBJECTIVES[name], surprised_by_position, {}, batches(), num_rows=B)
    count_T = np.sum([batch["is_maskable"].sum(axis=0) for batch in batches()], axis=0)
    nats = (count_T * (1.0 + np.arange(T) / 10)).reshape(NUM_PARTS, -1).sum(axis=1)
    expected = nats / count_T.reshape(NUM_PARTS, -1).sum(axis=1)
    errors = np.array(found.by_position.standard_error)
    if name == "autoregressive":  # nothing is random
        np.testing.assert_allclose(found.by_position.mean, expected, rtol=1e-5)
    else:  # chance leaves 5 errors once in 200,000 runs
        assert np.all(np.abs(found.by_position.mean - expected) < 5 * errors)
        assert np.all(errors > 0)


def test_the_error_of_batches_of_one_size_is_that_of_their_mean():
    nats_N = np.random.default_rng(0).normal(size=5)
    found = _shares(np.tile(7 * nats_N[:, None], NUM_PARTS), np.full((5, NUM_PARTS), 7.0))
    np.testing.assert_allclose(found.mean, nats_N.mean())
    np.testing.assert_allclose(found.standard_error, nats_N.std(ddof=1) / 5**0.5)


def test_a_single_batch_and_draw_has_no_error():
    """Although 1 / 49 * 49 is not 1 in float64, so that a residual is left."""
    found = _shares(np.ones((1, NUM_PARTS)), np.full((1, NUM_PARTS), 49.0))
    np.testing.assert_allclose(found.mean, 1 / 49)
    assert np.isnan(found.standard_error).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_parts_weighted_by_their_tokens_add_up_to_the_bound(name):
    bound = likelihood.bound(
        OBJECTIVES[name], surprised_by_position, {}, batches(), num_rows=B, num_draws=2
    )
    found = breakdown(
        OBJECTIVES[name], surprised_by_position, {}, batches(), num_rows=B, num_draws=2
    )
    tokens = np.sum([b["is_maskable"].sum(axis=0) for b in batches()], axis=0)
    tokens = tokens.reshape(NUM_PARTS, -1).sum(axis=1)
    total = np.sum(np.array(found.by_position.mean) * tokens) / tokens.sum()
    assert total == pytest.approx(bound.nats_per_token, rel=1e-5)


def test_the_loss_by_time_rises_with_the_share_of_masks():
    found = breakdown(OBJECTIVES["masked_diffusion"], surprised_by_masks, {}, batches(), num_rows=B)
    assert np.all(np.diff(found.by_time.mean) > 0)
    assert (
        breakdown(
            OBJECTIVES["autoregressive"], surprised_by_masks, {}, batches(), num_rows=B
        ).by_time
        is None
    )


def test_a_split_is_read_like_that_of_the_bound(small_dataset):
    class Model:
        nll_fn = staticmethod(surprised_by_position)

    found = breakdown_of_split(
        Model,
        {},
        str(small_dataset),
        split="heldout",
        objective=OBJECTIVES["autoregressive"],
        batch_size=8,
        sequence_length=SEQUENCE_LENGTH,
        batch_sharding=batch_sharding(one_device_mesh()),
        attend_across_documents=True,
    )
    width = SEQUENCE_LENGTH // NUM_PARTS
    expected = [1 + (part * width + (width - 1) / 2) / 10 for part in range(NUM_PARTS)]
    np.testing.assert_allclose(found.by_position.mean, expected, rtol=1e-5)
