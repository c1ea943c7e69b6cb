"""Corruption and losses against closed forms, enumeration and the binomial distribution."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.masks import CAUSAL
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture, TokenScores
from llada_jax.objectives.autoregressive import autoregressive_loss
from llada_jax.objectives.corruption import (
    bell_density,
    capacity_for,
    corrupt,
    corrupt_exactly_k,
    sample_t,
)
from llada_jax.objectives.masked_diffusion import masked_diffusion, masked_diffusion_loss
from llada_jax.rng import key_for

MASK = 9
KEY = key_for("test", 0)


def batch_of(tokens_BT, lengths=None):
    tokens_BT = np.asarray(tokens_BT, np.int32)
    B, T = tokens_BT.shape
    lengths = np.full(B, T) if lengths is None else np.asarray(lengths)
    is_real = np.arange(T) < lengths[:, None]
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return {
        "tokens": tokens_BT,
        "segment_ids": is_real.astype(np.int32),
        "positions": positions,
        "is_maskable": is_real,
    }


def uniform_model(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    """Gives every one of `params` tokens the same probability."""
    return TokenScores(jnp.where(where_BT, jnp.log(params), 0.0), where_BT)


@pytest.mark.slow
@pytest.mark.parametrize("masking", ["bernoulli", "exact_count"])
@pytest.mark.parametrize("t_sampling", ["stratified", "iid"])
def test_a_uniform_model_scores_log_V(masking, t_sampling):
    B, T, V = 4096, 32, 50.0
    batch = batch_of(np.zeros((B, T)), lengths=1 + np.arange(B) % T)
    loss_sum, count, metrics = masked_diffusion_loss(
        uniform_model,
        V,
        batch,
        KEY,
        jnp.arange(B),
        num_rows=B,
        mask_id=MASK,
        masking=masking,
        t_sampling=t_sampling,
    )
    assert count == batch["is_maskable"].sum()
    tolerance = (
        1e-5 if masking == "exact_count" else 0.05
    )  # exact counts leave no noise at all here
    assert float(loss_sum / count) == pytest.approx(math.log(V), rel=tolerance)
    sums, counts = metrics["nll_by_t"]
    np.testing.assert_allclose(sums / counts, math.log(V), rtol=1e-5)
    assert float(metrics["masked_accuracy"][0] / metrics["masked_accuracy"][1]) == 1.0


def table_model(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    """A denoiser that looks at the whole noisy row: a table with one distribution for each (noisy
    row, position).
    """
    base = 10 ** jnp.arange(noisy_BT.shape[1])
    row_B = jnp.sum(noisy_BT * base, axis=1) % params.shape[0]
    log_p = jax.nn.log_softmax(params[row_B])  # [B, T, V]
    nll = -jnp.take_along_axis(log_p, targets_BT[..., None], -1)[..., 0]
    return TokenScores(jnp.where(where_BT, nll, 0.0), where_BT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("masking", "t_sampling"),
    [("bernoulli", "stratified"), ("exact_count", "stratified"), ("exact_count", "bell")],
)
def test_the_estimate_is_the_exact_bound_found_by_enumerating_all_masks(masking, t_sampling):
    T, V = 4, 3
    tokens = np.array([2, 0, 1, 1])
    table = jax.random.normal(jax.random.key(0), (997, T, V))

    def nats_under(mask):
        noisy = np.where(mask, MASK, tokens)[None]
        args = (jnp.asarray(noisy), jnp.asarray(tokens[None]), jnp.asarray(mask)[None], None, None)
        return float(table_model(table, *args).nll_BT.sum())

    # LLaDA eq. 6: k uniform on 1..T, then a mask of k tokens uniformly, weight T / k
    exact = 0.0
    for k in range(1, T + 1):
        masks = [np.isin(np.arange(T), chosen) for chosen in itertools.combinations(range(T), k)]
        exact += np.mean([nats_under(mask) for mask in masks]) * (T / k) / T
    B = 40_000
    batch = batch_of(np.tile(tokens, (B, 1)))
    loss_sum, count, _ = jax.jit(
        functools.partial(
            masked_diffusion_loss,
            table_model,
            num_rows=B,
            mask_id=MASK,
            masking=masking,
            t_sampling=t_sampling,
        )
    )(table, batch, KEY, jnp.arange(B))
    assert float(loss_sum) / B == pytest.approx(
        exact, rel=0.02 if masking == "exact_count" else 0.05
    )
    assert float(loss_sum / count) == pytest.approx(float(loss_sum) / B / T, rel=1e-6)


def test_masks_are_bernoulli_with_the_rows_own_probability():
    B, T, eps = 64, 4000, 1e-3
    t_B = jnp.linspace(0.0, 1.0, B)
    tokens = jnp.ones((B, T), jnp.int32)
    noisy, is_masked, weight = corrupt(
        KEY, tokens, t_B, tokens > 0, jnp.arange(B), mask_id=MASK, eps=eps
    )
    p = (1 - eps) * np.asarray(t_B) + eps
    np.testing.assert_allclose(weight, 1 / p, rtol=1e-6)
    z = (np.asarray(is_masked.sum(1)) - T * p) / np.sqrt(T * p * (1 - p) + 1e-9)
    assert np.abs(z[:-1]).max() < 4.5
    assert is_masked[-1].all()  # t = 1 masks everything
    np.testing.assert_array_equal(noisy, np.where(is_masked, MASK, tokens))


@pytest.mark.slow
@settings(max_examples=30)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.floats(0, 0.9999))
def test_exact_count_masks_exactly_k_maskable_tokens(lengths, t):
    T = 12
    batch = batch_of(np.ones((len(lengths), T)), lengths)
    t_B = jnp.full(len(lengths), t, jnp.float32)
    rows = jnp.arange(len(lengths))
    noisy, is_masked, weight = corrupt_exactly_k(
        KEY, batch["tokens"], t_B, jnp.asarray(batch["is_maskable"]), rows, mask_id=MASK
    )
    for length, masked, w in zip(lengths, np.asarray(is_masked), np.asarray(weight)):
        k = min(max(1, math.ceil(np.float32(t) * np.float32(length))), length)
        assert masked.sum() == k
        assert not masked[length:].any()
        assert w == pytest.approx(length / k if length else 0.0)


@pytest.mark.parametrize("t_sampling", ["stratified", "mirrored"])
def test_stratified_t_covers_every_stratum_once_and_is_uniform(t_sampling):
    B = 64
    for step in range(20):
        t_B = np.asarray(
            sample_t(key_for("t", 0, step), jnp.arange(B), num_rows=B, t_sampling=t_sampling)
        )
        assert sorted(np.floor(t_B * B).astype(int).clip(0, B - 1)) == list(range(B))
    draws = [
        sample_t(key_for("t", 1, step), jnp.arange(4), num_rows=4, t_sampling=t_sampling)
        for step in range(300)
    ]
    assert np.mean(np.asarray(draws)[:, 0]) == pytest.approx(
        0.5, abs=0.07
    )  # each row alone is U(0, 1)


@pytest.mark.parametrize("t_sampling", ["mirrored", "bell"])
def test_the_times_of_two_neighbouring_rows_mirror_each_other(t_sampling):
    t_B = np.asarray(sample_t(KEY, jnp.arange(7), num_rows=7, t_sampling=t_sampling), np.float64)
    np.testing.assert_allclose(t_B[1::2], 1 - t_B[:6:2], atol=1e-6)
    assert len(set(t_B)) == 7


@pytest.mark.parametrize(
    ("t_sampling", "rows"), [*(("mirrored", rows) for rows in (1, 2, 3, 8)), ("stratified", 96)]
)
def test_there_is_room_for_the_masks_of_any_device_in_nearly_every_step(t_sampling, rows):
    B, T = 96, 512
    tokens_BT = jnp.zeros((B, T), jnp.int32)

    def num_masked(step):
        t_key, mask_key = jax.random.split(jax.random.key(step))
        t_B = sample_t(t_key, jnp.arange(B), num_rows=B, t_sampling=t_sampling)
        is_masked_BT = corrupt(
            mask_key, tokens_BT, t_B, tokens_BT == 0, jnp.arange(B), mask_id=MASK, eps=1e-3
        )[1]
        return is_masked_BT.reshape(B // rows, -1).sum(axis=1)

    most = jax.jit(jax.lax.map, static_argnums=0)(num_masked, jnp.arange(50)).max()
    room = capacity_for(t_sampling)(rows, T, B // rows)
    assert most <= room
    # half of the rows, one that has no other half, and little more
    assert room <= T * (rows / 2 + 1) + 4 * math.sqrt(rows * T / 4) + 128


def test_all_of_a_device_may_be_masked_where_its_rows_have_a_window_of_times_or_independent_ones():
    assert capacity_for("stratified")(4, 512, 2) == 4 * 512
    assert capacity_for("iid") is None
    assert capacity_for("iid", complementary=True)(4, 512, 2) < 0.6 * 4 * 512


@pytest.mark.parametrize("width", [0.05, 0.2, 0.3, 10.0])
def test_times_of_a_bell_are_evenly_spread_quantiles_of_the_cut_normal(width):
    B = 1000
    bell = scipy.stats.truncnorm(-0.5 / width, 0.5 / width, loc=0.5, scale=width)
    t_B = sample_t(KEY, jnp.arange(B), num_rows=B, t_sampling="bell", bell_width=width)
    t_B = np.sort(np.asarray(t_B, np.float64))
    assert t_B[0] >= 0
    assert t_B[-1] < 1
    below_B = bell.cdf(t_B)
    # one in each of B strata, and in every second one at the same place
    np.testing.assert_allclose(below_B[2:] - below_B[:-2], 2 / B, rtol=5e-3)
    assert 0 <= below_B[0] < 1 / B + 1e-6 < below_B[1] + 2e-6
    np.testing.assert_allclose(bell_density(jnp.float32(t_B), width), bell.pdf(t_B), rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("t_sampling", ["stratified", "iid", "bell"])
def test_of_two_complementary_rows_every_token_is_masked_once_and_the_logged_bound_stays(
    t_sampling,
):
    B, T = 20_000, 12
    tokens_BT = np.repeat(np.random.default_rng(0).integers(0, 8, (B // 2, T)), 2, axis=0)
    batch = batch_of(tokens_BT, lengths=np.repeat(1 + np.arange(B // 2) % T, 2))
    seen = []

    def spy(params, noisy_BT, targets_BT, where_BT, *rest):
        seen.append((noisy_BT, where_BT))
        # costs as many nats as the row has masks, so that the weights of both rows matter
        nll_BT = jnp.where(where_BT, where_BT.sum(axis=1, keepdims=True).astype(jnp.float32), 0.0)
        return TokenScores(nll_BT, where_BT)

    settings_ = dict(mask_id=MASK, weight="none", complementary=True, t_sampling=t_sampling)
    _, _, metrics = masked_diffusion_loss(
        spy, {}, batch, KEY, jnp.arange(B), num_rows=B, eps=1e-6, **settings_
    )
    ((noisy_BT, is_masked_BT),) = seen
    np.testing.assert_array_equal(is_masked_BT[::2] ^ is_masked_BT[1::2], batch["is_maskable"][::2])
    assert not (is_masked_BT[::2] & is_masked_BT[1::2]).any()
    np.testing.assert_array_equal(noisy_BT, np.where(is_masked_BT, MASK, tokens_BT))
    # sum over k ~ U{1..L} of k * k * L / k, for rows of 1 to T tokens
    lengths = 1 + np.arange(B // 2) % T
    expected = np.mean(lengths * (lengths + 1) / 2) / np.mean(lengths)
    nats, tokens = metrics["nelbo"]
    assert float(nats / tokens) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("masking", ["bernoulli", "exact_count"])
@pytest.mark.parametrize("t_sampling", ["stratified", "iid", "bell"])
def test_a_row_is_corrupted_alike_alone_and_within_its_batch(masking, t_sampling):
    B, T = 8, 16
    batch = batch_of(np.arange(B * T).reshape(B, T) % 7)
    seen = []

    def spy(params, noisy_BT, *rest):
        seen.append(np.asarray(noisy_BT))
        return uniform_model(params, noisy_BT, *rest)

    settings_ = dict(num_rows=B, mask_id=MASK, masking=masking, t_sampling=t_sampling)
    masked_diffusion_loss(spy, 7.0, batch, KEY, jnp.arange(B), **settings_)
    rows = jnp.array([5, 2])
    part = {name: array[np.asarray(rows)] for name, array in batch.items()}
    masked_diffusion_loss(spy, 7.0, part, KEY, rows, **settings_)
    np.testing.assert_array_equal(seen[0][[5, 2]], seen[1])


@pytest.mark.parametrize("t_sampling", ["stratified", "bell"])
def test_without_weight_the_loss_changes_and_the_logged_bound_does_not(t_sampling):
    B = 256
    batch = batch_of(np.zeros((B, 16)))
    weighted, plain = (
        masked_diffusion_loss(
            uniform_model,
            7.0,
            batch,
            KEY,
            jnp.arange(B),
            num_rows=B,
            mask_id=MASK,
            weight=weight,
            t_sampling=t_sampling,
        )
        for weight in ("1/p", "none")
    )
    num_masked = float(plain[2]["masked_accuracy"][1])
    assert float(plain[0]) == pytest.approx(num_masked * math.log(7), rel=1e-5)
    assert float(weighted[0]) != pytest.approx(float(plain[0]), rel=0.1)
    assert plain[2]["nelbo"][0] == weighted[2]["nelbo"][0] == weighted[0]


def test_the_bound_of_held_out_text_is_that_of_uniform_times_whatever_the_training_draws():
    batch, params = batch_of(np.arange(64 * 16).reshape(64, 16) % MASK), 7.0
    bounds = [
        masked_diffusion(mask_id=MASK, **settings).bound(
            uniform_model, params, batch, KEY, jnp.arange(64), num_rows=64
        )
        for settings in ({}, {"t_sampling": "bell", "weight": "none"}, {"t_sampling": "mirrored"})
    ]
    jax.tree.map(np.testing.assert_array_equal, bounds[0], bounds[1])
    jax.tree.map(np.testing.assert_array_equal, bounds[0], bounds[2])
    # exact counts leave no noise in the bound of a uniform model
    assert float(bounds[0][0] / bounds[0][1]) == pytest.approx(math.log(7), rel=1e-5)


def test_rows_without_any_mask_or_any_token_give_finite_sums():
    batch = batch_of(np.zeros((3, 4)), lengths=[1, 0, 2])
    for masking in ("bernoulli", "exact_count"):
        loss_sum, count, metrics = masked_diffusion_loss(
            uniform_model, 7.0, batch, KEY, jnp.arange(3), num_rows=3, mask_id=MASK, masking=masking
        )
        assert count == 3
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss_sum, metrics)))


@pytest.mark.slow
def test_padding_never_enters_loss_or_gradient():
    a = Architecture(
        vocab_size=11, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=16
    )
    model = make_model(a)
    params = jax.jit(model.init)(KEY)
    tokens = np.random.default_rng(0).integers(0, 8, (4, 8))
    lengths = [8, 3, 1, 5]
    other = np.where(np.arange(8) < np.array(lengths)[:, None], tokens, 7 - tokens)

    def loss(params, batch):
        return masked_diffusion_loss(
            model.nll_fn, params, batch, KEY, jnp.arange(4), num_rows=4, mask_id=MASK
        )[0]

    results = [
        jax.jit(jax.value_and_grad(loss))(params, batch_of(rows, lengths))
        for rows in (tokens, other)
    ]
    assert results[0][0] == results[1][0] > 0
    jax.tree.map(np.testing.assert_array_equal, results[0][1], results[1][1])


@pytest.mark.slow
def test_the_autoregressive_control_is_the_chain_rule():
    a = Architecture(
        vocab_size=11, num_layers=2, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=16
    )
    model = make_model(a, mask=CAUSAL)
    params = jax.jit(model.init)(KEY)
    batch = batch_of(np.random.default_rng(0).integers(0, 8, (3, 6)), lengths=[6, 4, 6])
    loss_sum, count, _ = autoregressive_loss(
        model.nll_fn, params, batch, KEY, jnp.arange(3), num_rows=3, bos_id=10
    )
    logits_fn = jax.jit(model.logits_fn)
    expected = 0.0
    for row, length in zip(batch["tokens"], [6, 4, 6]):
        for i in range(length):  # one token after the other, from the prefix alone
            prefix = np.zeros((1, 6), np.int32)
            prefix[0, : i + 1] = np.concatenate([[10], row[:i]])
            segments = (np.arange(6) <= i).astype(np.int32)[None]
            logits = logits_fn(params, prefix, segments, batch["positions"][:1])[0, i]
            expected -= float(jax.nn.log_softmax(logits)[row[i]])
    assert count == 16
    assert float(loss_sum) == pytest.approx(expected, rel=1e-5)


def test_each_document_of_a_row_is_predicted_from_its_own_tokens_alone():
    table_VV = np.random.default_rng(0).uniform(size=(11, 11)).astype(np.float32)

    def bigram(params, shifted_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
        return TokenScores(jnp.where(where_BT, params[shifted_BT, targets_BT], 0.0), where_BT)

    rows = [[[1, 2, 3], [4], [5, 6]], [[7, 7], [1, 1, 2, 2]]]
    batch = batch_of([sum(documents, []) for documents in rows])
    lengths = [[len(document) for document in documents] for documents in rows]
    batch["positions"] = np.array([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    batch["segment_ids"] = np.array([np.repeat(1 + np.arange(len(row)), row) for row in lengths])
    loss_sum, count, _ = autoregressive_loss(
        bigram, table_VV, batch, KEY, jnp.arange(2), num_rows=2, bos_id=10
    )
    expected = sum(
        table_VV[before, token]
        for document in sum(rows, [])
        for before, token in zip([10, *document], document)
    )
    assert count == 12
    assert float(loss_sum) == pytest.approx(expected, rel=1e-5)
