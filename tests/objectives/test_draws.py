"""Random draws: how evenly times cover [0, 1), and whether each step draws afresh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax.models.transformer import TokenScores
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.objectives.objective import Objective
from llada_jax.objectives.sft import sft
from llada_jax.rng import key_for
from llada_jax.samplers.text import generate_tokens
from llada_jax.training.state import TrainState
from llada_jax.training.step import make_train_step

MASK, T = 9, 64


def batch_of(num_real: int, num_rows: int) -> dict:
    is_real = np.broadcast_to(np.arange(num_rows)[:, None] < num_real, (num_rows, T))
    zeros = np.zeros((num_rows, T), np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (num_rows, T))
    return {
        "tokens": zeros,
        "segment_ids": is_real.astype(np.int32),
        "positions": positions,
        "is_maskable": is_real,
    }


def harder_with_more_masks(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    """Surprised by 4 nats times the share of masks in the row: the bound per token is 2 nats."""
    share_B = where_BT.mean(axis=1, keepdims=True)
    return TokenScores(jnp.where(where_BT, 4.0 * share_B, 0.0), where_BT)


def spread_of_bound(num_real: int, num_rows: int) -> tuple[float, float]:
    """Returns mean and standard deviation of the bound per token over 400 draws."""
    bound = masked_diffusion(mask_id=MASK).bound
    batch = batch_of(num_real, num_rows)

    def nats_per_token(key):
        rows = jnp.arange(num_rows)
        loss_sum, count, _ = bound(
            harder_with_more_masks, {}, batch, key, rows, num_rows=num_rows, step=0, frozen={}
        )
        return loss_sum / count

    nats = jax.jit(jax.vmap(nats_per_token))(jax.random.split(jax.random.key(0), 400))
    return float(nats.mean()), float(nats.std())


@pytest.mark.slow
def test_a_batch_that_is_filled_up_with_empty_rows_is_as_good_as_a_batch_of_its_real_rows():
    mean, spread = spread_of_bound(30, 64)
    mean_alone, spread_alone = spread_of_bound(30, 30)
    expected = 4 * (T + 1) / (2 * T)  # the mean of k / L for k uniform on 1..L
    assert mean == pytest.approx(expected, abs=4 * spread / 20 + 1e-3)
    assert mean_alone == pytest.approx(expected, abs=4 * spread_alone / 20 + 1e-3)
    # of times spread evenly, all of which move together within one of 30 intervals; drawn
    # independently, they would give 4 / sqrt(12 * 30), which is 5 times as much
    even = 4 / (30 * np.sqrt(12))
    assert spread == pytest.approx(even, rel=0.2)
    assert spread_alone == pytest.approx(even, rel=0.2)


def test_a_batch_without_a_single_token_has_a_bound_of_nothing():
    bound = masked_diffusion(mask_id=MASK).bound
    loss_sum, count, _ = bound(
        harder_with_more_masks,
        {},
        batch_of(0, 4),
        jax.random.key(0),
        jnp.arange(4),
        num_rows=4,
        step=0,
        frozen={},
    )
    assert (float(loss_sum), float(count)) == (0.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("t_sampling", ["stratified", "iid"])
@pytest.mark.parametrize("make", [masked_diffusion, sft])
def test_every_token_is_masked_half_of_the_time(make, t_sampling):
    """Were times and masks drawn from one key, some tokens would be masked always."""
    B, seen = 4000, []
    batch = {
        "tokens": np.zeros((B, 8), np.int32),
        "segment_ids": np.tile([1, 1, 1, 1, 2, 2, 2, 2], (B, 1)),
        "positions": np.tile([0, 1, 2, 3] * 2, (B, 1)),
        "is_maskable": np.ones((B, 8), bool),
    }

    def nll_fn(params, noisy_BT, targets_BT, where_BT, *rest):
        seen.append(np.asarray(where_BT))
        return TokenScores(jnp.where(where_BT, 1.0, 0.0), where_BT)

    make(mask_id=MASK, t_sampling=t_sampling).loss(
        nll_fn, {}, batch, key_for("test", 0), jnp.arange(B), num_rows=B, step=0, frozen={}
    )
    # 5 standard deviations of independent masks
    np.testing.assert_allclose(seen[0].mean(axis=0), 0.5, atol=5 * 0.5 / B**0.5)


def rate(step):
    return 0.1 / (1.0 + step)


@functools.cache
def logged_in_each_step(num_steps: int) -> dict[str, np.ndarray]:
    """Returns {metric: its sum in each step} of a run of which every batch is the same.

    "draw": a uniform number from the key of the loss; "where": which tokens were masked, as the
    sum of their positions; "learning_rate".
    """
    diffusion = masked_diffusion(mask_id=MASK).loss
    seen = {}

    def records_masks(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
        seen["where"] = jnp.sum(
            where_BT * (1.0 + jnp.arange(where_BT.size).reshape(where_BT.shape))
        )
        return TokenScores(jnp.where(where_BT, params["w"], 0.0), where_BT)

    def loss(nll_fn, params, batch, key, row_B, **more):
        loss_sum, count, metrics = diffusion(records_masks, params, batch, key, row_B, **more)
        one = jnp.float32(1)
        extra = {"where": (seen["where"], one), "draw": (jax.random.uniform(key), one)}
        return loss_sum, count, {"loss": metrics["loss"], **extra}

    optimizer, params = optax.sgd(0.0), {"w": jnp.float32(1.0)}
    zero = (jnp.float32(0), jnp.float32(0))
    names = ("loss", "where", "draw", "grad_norm", "param_norm", "learning_rate", "skipped")
    state = TrainState(jnp.int32(0), params, optimizer.init(params), {}, dict.fromkeys(names, zero))
    options = {"seed": 0, "num_rows": 4, "num_microbatches": 1, "ema_decay": 0.0}
    step = jax.jit(make_train_step(Objective(loss, loss, "loss"), None, optimizer, rate, **options))
    logged = {name: [] for name in names}
    for _ in range(num_steps):
        state = step(state._replace(metrics=dict.fromkeys(names, zero)), batch_of(4, 4))
        for name in names:
            logged[name].append(float(state.metrics[name][0]))
    return {name: np.array(values) for name, values in logged.items()}


def test_every_step_masks_other_tokens_of_the_same_batch():
    logged = logged_in_each_step(12)
    assert len(set(logged["where"])) == 12
    assert len(set(logged["draw"])) == 12
    assert logged["draw"].std() > 0.1  # and not one offset that creeps along; uniform: 0.29


def test_the_logged_learning_rate_is_that_of_the_schedule_in_the_same_step():
    expected = 0.1 / (1.0 + np.arange(12, dtype=np.float64))
    np.testing.assert_allclose(logged_in_each_step(12)["learning_rate"], expected, rtol=1e-6)


PROPOSALS = []


def keeps_the_leftmost_and_records_proposals(logits_BTV, choices_BT, keys_B):
    jax.debug.callback(lambda choices: PROPOSALS.append(np.asarray(choices)), choices_BT)
    return -jnp.broadcast_to(jnp.arange(choices_BT.shape[1], dtype=jnp.float32), choices_BT.shape)


def test_every_step_of_the_sampler_proposes_with_noise_of_its_own(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "recording_rule", sys.modules[__name__])
    PROPOSALS.clear()

    def uniform_logits(params, tokens_BT, segment_ids_BT, positions_BT, start=0, length=None):
        return jnp.zeros((tokens_BT.shape[0], length or tokens_BT.shape[1], 8))

    generate_tokens(
        uniform_logits,
        {},
        np.zeros((2, 1), np.int32),
        mask_id=7,
        pad_id=6,
        gen_length=16,
        block_length=16,
        steps=16,
        temperature=1.0,
        remasking="recording_rule:keeps_the_leftmost_and_records_proposals",
    )
    jax.effects_barrier()
    assert len(PROPOSALS) == 16
    # the last column is proposed afresh in every step, and uniformly: of 15 neighbours in each of
    # two rows about one in seven agree by chance
    last = np.array([choices[:, -1] for choices in PROPOSALS])
    assert (last[1:] == last[:-1]).mean() < 0.5
    assert (PROPOSALS[0][0] == PROPOSALS[0][1]).mean() < 0.6
