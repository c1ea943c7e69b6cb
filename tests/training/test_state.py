"""One step of training, with a model so small that its update is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax.config import default_config
from llada_jax.objectives.objective import Objective
from llada_jax.training.optim import make_optimizer
from llada_jax.training.state import TrainState
from llada_jax.training.step import make_train_step, optimizer_knobs

RATE = 0.5
ADAM = optax.adam(RATE)


def loss(nll_fn, params, batch, key, row_B, *, num_rows, step, frozen):
    """Loss w * x over the rows: its gradient is the sum of x, and not finite where an x is not."""
    loss_sum = jnp.sum(params["w"] * batch["x"][:, 0])
    count = jnp.float32(num_rows)
    return loss_sum, count, {"loss": (loss_sum, count)}


def trained_on(
    rows: list[list[float]], *, skip_nonfinite: bool, optimizer=ADAM, start=1.0
) -> TrainState:
    params = {"w": jnp.float32(start)}
    zero = (jnp.float32(0), jnp.float32(0))
    metrics = dict.fromkeys(("loss", "grad_norm", "param_norm", "learning_rate", "skipped"), zero)
    state = TrainState(
        jnp.int32(0), params, optimizer.init(params), jax.tree.map(jnp.copy, params), metrics
    )
    step = make_train_step(
        Objective(loss, loss, "loss"),
        None,
        optimizer,
        lambda step: RATE,
        seed=0,
        num_rows=2,
        num_microbatches=1,
        ema_decay=0.1,  # below the warm-up, which follows the step number: the same in all steps
        skip_nonfinite=skip_nonfinite,
    )
    for row in rows:
        state = jax.jit(step)(state, {"x": jnp.array(row, jnp.float32)[:, None]})
    return state


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [np.inf, -np.inf]])
def test_a_skipped_step_changes_nothing_but_the_step_number_and_its_counter(bad):
    good = [[1.0, 2.0], [3.0, -1.0], [2.0, 2.0]]
    without = trained_on(good, skip_nonfinite=True)
    with_bad = trained_on([good[0], bad, *good[1:]], skip_nonfinite=True)
    assert int(with_bad.step) == int(without.step) + 1
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(with_bad, name), getattr(without, name))
    skipped = with_bad.metrics.pop("skipped")
    assert [float(value) for value in skipped] == [1.0, 4.0]
    without.metrics.pop("skipped")
    jax.tree.map(np.testing.assert_array_equal, with_bad.metrics, without.metrics)


@pytest.mark.parametrize(
    ("start", "bad"),
    [
        (1e30, [1e9, 1e9]),  # the loss exceeds float32, and its slope of 1e9 does not
        (1.0, [2e38, 2e38]),  # the slope of 4e38 exceeds it, and half of that does not
    ],
)
def test_loss_and_gradient_must_both_be_finite(start, bad):
    good = [1.0, 2.0]
    without = trained_on([good], skip_nonfinite=True, start=start)
    with_bad = trained_on([good, bad], skip_nonfinite=True, start=start)
    assert float(with_bad.metrics["skipped"][0]) == 1
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(with_bad, name), getattr(without, name))
    unskipped = trained_on([good, bad], skip_nonfinite=False, start=start).metrics
    finite = [np.isfinite(float(unskipped[name][0])) for name in ("loss", "grad_norm")]
    assert sorted(finite) == [False, True]  # it is one of them alone


def test_the_logged_norms_are_those_of_the_mean_gradient_and_of_the_new_parameters():
    state = trained_on([[1.0, 2.0], [3.0, -1.0]], skip_nonfinite=True)
    # Adam's first step moves w from 1 by the rate
    norms = {"grad_norm": 1.5 + 1.0, "param_norm": 1.0 - RATE + abs(float(state.params["w"]))}
    for name, total in norms.items():
        assert tuple(map(float, state.metrics[name])) == pytest.approx((total, 2.0), rel=1e-5)


def test_without_skipping_the_numbers_stop_being_finite():
    state = trained_on([[1.0, 2.0], [np.nan, 1.0]], skip_nonfinite=False)
    assert not np.isfinite(float(state.params["w"]))
    assert not np.isfinite(float(state.metrics["grad_norm"][0]))
    assert float(state.metrics["skipped"][0]) == 0


def test_skipping_changes_no_step_that_is_finite():
    rows = [[1.0, 2.0], [3.0, -1.0]]
    states = [trained_on(rows, skip_nonfinite=flag) for flag in (True, False)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_after_a_skipped_update_the_learning_rate_is_still_that_of_the_step():
    rates = np.array([0.5, 0.25, 0.125, 0.0625])
    optimizer = make_optimizer(
        lambda step: jnp.asarray(rates, jnp.float32)[step],
        **{**optimizer_knobs(default_config().optimizer), "name": "lion", "weight_decay": 0.0},
    )
    rows = [[1, 1], [1, np.nan], [1, 1], [1, 1]]
    state = trained_on(rows, skip_nonfinite=True, optimizer=optimizer)
    # Lion moves by the sign of the gradient times the rate: the second rate is left out
    assert float(state.params["w"]) == 1.0 - rates[[0, 2, 3]].sum()
