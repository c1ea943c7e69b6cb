"""The moving average of the parameters, on a problem whose best loss is an entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax.objectives.objective import Objective
from llada_jax.training.state import TrainState
from llada_jax.training.step import make_train_step, warmed_up_decay

NUM_LETTERS = 32
ODDS = np.arange(1, NUM_LETTERS + 1) ** 2 / np.sum(np.arange(1, NUM_LETTERS + 1) ** 2)
ENTROPY = -np.sum(ODDS * np.log(ODDS))


def cross_entropy(logits) -> jax.Array:
    return -jnp.sum(ODDS * jax.nn.log_softmax(logits))


def loss(nll_fn, params, batch, key, row_B, *, num_rows, step, frozen):
    loss_sum, count = cross_entropy(params["logits"]), jnp.float32(1)
    return loss_sum, count, {"loss": (loss_sum, count)}


def trained(num_steps: int, ema_decay: float) -> TrainState:
    optimizer, params = optax.adam(0.05), {"logits": jnp.zeros(NUM_LETTERS)}
    zero = (jnp.float32(0), jnp.float32(0))
    metrics = dict.fromkeys(("loss", "grad_norm", "param_norm", "learning_rate", "skipped"), zero)
    average = jax.tree.map(jnp.copy, params)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), average, metrics)
    step = jax.jit(
        make_train_step(
            Objective(loss, loss, "loss"),
            None,
            optimizer,
            lambda step: 0.05,
            seed=0,
            num_rows=1,
            num_microbatches=1,
            ema_decay=ema_decay,
        )
    )
    for _ in range(num_steps):
        state = step(state, {"x": jnp.zeros((1, 1))})
    return state


@pytest.mark.parametrize("ema_decay", [0.99, 0.9999])
def test_the_average_of_a_short_run_scores_what_the_parameters_score(ema_decay):
    state = trained(400, ema_decay)
    raw, average = (float(cross_entropy(tree["logits"])) for tree in (state.params, state.ema))
    uniform = np.log(NUM_LETTERS)
    assert raw - ENTROPY < 0.01 * (uniform - ENTROPY)  # it has learned something to forget
    assert average - ENTROPY < 0.01 * (uniform - ENTROPY)


def test_an_average_that_forgets_at_once_is_the_parameters_after_the_update():
    state = trained(3, 0.0)
    assert np.ptp(state.params["logits"]) > 0.1
    np.testing.assert_array_equal(state.ema["logits"], state.params["logits"])
    # the first decay of the warm-up is a tenth, and the parameters started from zero
    first = trained(1, 0.9)
    np.testing.assert_allclose(first.ema["logits"], 0.9 * first.params["logits"], rtol=1e-5)


def test_the_decay_grows_from_a_tenth_to_the_knob_and_the_initialisation_is_forgotten():
    decays = np.array([float(warmed_up_decay(0.9999, step)) for step in range(400)], np.float64)
    np.testing.assert_allclose(decays, (1 + np.arange(400)) / (10 + np.arange(400)), rtol=1e-6)
    assert decays.prod() < 1e-9  # with the constant decay 0.96 would be left
    assert float(warmed_up_decay(0.9999, 10**6)) == np.float32(0.9999)
    assert float(warmed_up_decay(0.05, 0)) == np.float32(0.05)
