"""What sft_loss makes of the masks that it draws, by arithmetic in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.models.transformer import TokenScores
from llada_jax.objectives.sft import sft_loss, times_of_documents
from llada_jax.rng import key_for

MASK, KEY, NUM_RECORDS = 9, key_for("test", 0), 200


@pytest.mark.parametrize("t_sampling", ["stratified", "iid", "mirrored"])
def test_each_of_two_complementary_rows_has_times_and_weights_of_its_own(t_sampling):
    T, records = 12, np.repeat(np.arange(NUM_RECORDS), 2)
    segments = np.tile(np.repeat([1, 2], [7, 5]), (2 * NUM_RECORDS, 1))
    answers = np.isin(np.arange(T), [3, 4, 5, 6, 10, 11]) & (segments > 0)
    tokens = np.random.default_rng(0).integers(1, 8, (NUM_RECORDS, T))[records]
    seen = {}

    def nll_fn(params, noisy_BT, targets_BT, where_BT, *rest):
        seen.update(noisy=noisy_BT, where=where_BT)
        return TokenScores(jnp.where(where_BT, targets_BT * 1.0, 0.0), where_BT)

    batch = {"tokens": tokens, "segment_ids": segments, "positions": None, "is_maskable": answers}
    settings = dict(eps=0.05, max_mask_ratio=0.5, complementary=True, prompt_dropout=0.5)
    metrics = sft_loss(
        nll_fn,
        {},
        batch,
        KEY,
        jnp.arange(2 * NUM_RECORDS),
        num_rows=2 * NUM_RECORDS,
        mask_id=MASK,
        t_sampling=t_sampling,
        weight="none",
        **settings,
    )[2]
    t_key = jax.random.split(KEY)[0]
    drawn = times_of_documents(
        t_key, segments, records, num_rows=NUM_RECORDS, t_sampling=t_sampling
    )
    is_second = (np.arange(2 * NUM_RECORDS) % 2 == 1)[:, None]
    t = np.where(is_second, 1 - np.float64(drawn), drawn)
    p = np.where(is_second, 0.95 - 0.45 * np.float64(drawn), 0.05 + 0.45 * np.float64(drawn))
    where = np.asarray(seen["where"])
    assert float(metrics["nelbo"][0]) == pytest.approx((tokens / p)[where].sum(), rel=1e-5)
    assert float(metrics["loss"][1]) == 4 * NUM_RECORDS
    for found, weights in zip(metrics["nll_by_t"], (tokens[where], None)):
        expected = np.histogram(t[where], bins=10, range=(0, 1), weights=weights)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    # a prompt is dropped in both rows of a record, whatever its time is
    is_dropped = (np.asarray(seen["noisy"]) == MASK)[:, [0, 7]]
    np.testing.assert_array_equal(is_dropped[::2], is_dropped[1::2])
    times = np.asarray(drawn)[::2, [0, 7]][is_dropped[::2]]
    # 5 standard errors of the mean of 200 uniform times
    assert times.mean() == pytest.approx(0.5, abs=5 * (1 / 12 / NUM_RECORDS) ** 0.5)
