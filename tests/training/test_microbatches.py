"""A step in several microbatches is the step of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax.cluster.sharding import make_mesh
from llada_jax.models.transformer import TokenScores
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.training.state import TrainState
from llada_jax.training.step import make_train_step, split_microbatches

MASK, B, T = 9, 8, 16


def linear_in_position(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    return TokenScores(jnp.where(where_BT, params["w"][positions_BT] ** 2, 0.0), where_BT)


def after_one_step(num_microbatches: int) -> TrainState:
    # rows that are filled differently, so that a mean of the means of parts would be another number
    length_B = np.arange(1, B + 1) * 2
    is_real = np.arange(T) < length_B[:, None]
    batch = {
        "tokens": np.zeros((B, T), np.int32),
        "segment_ids": is_real.astype(np.int32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        "is_maskable": is_real,
    }
    objective, optimizer = masked_diffusion(mask_id=MASK), optax.sgd(1.0)
    params = {"w": jnp.linspace(0.5, 1.5, T)}
    zero = (jnp.float32(0), jnp.float32(0))
    names = ("loss", "nelbo", "masked_accuracy", "grad_norm", "param_norm", "learning_rate")
    metrics = dict.fromkeys((*names, "skipped"), zero)
    metrics["nll_by_t"] = (jnp.zeros(10), jnp.zeros(10))
    state = TrainState(jnp.int32(0), params, optimizer.init(params), {}, metrics)
    options = {"seed": 3, "num_rows": B, "ema_decay": 0.0, "num_microbatches": num_microbatches}
    step = make_train_step(objective, linear_in_position, optimizer, lambda step: 1.0, **options)
    return jax.jit(step)(state, batch)


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
def test_parameters_and_metrics_do_not_depend_on_the_number_of_microbatches(num_microbatches):
    whole, parts = after_one_step(1), after_one_step(num_microbatches)
    assert float(jnp.abs(whole.params["w"] - jnp.linspace(0.5, 1.5, T)).max()) > 1e-3
    for expected, actual in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("num_rows", "num_microbatches", "ways", "expected"),
    [
        (8, 2, 1, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (8, 2, 2, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        # a device has one row of a microbatch
        (8, 2, 4, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (8, 8, 1, [[0], [1], [2], [3], [4], [5], [6], [7]]),
        (6, 2, 1, [[0, 2, 4], [1, 3, 5]]),
        (16, 2, 4, [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]),
    ],
)
def test_two_rows_that_mirror_each_other_stay_together_on_their_device(
    num_rows, num_microbatches, ways, expected
):
    batch = {"row": jnp.arange(num_rows), "tokens": 10 * jnp.arange(num_rows)[:, None]}
    with jax.set_mesh(make_mesh({"fsdp": ways, "tensor": 8 // ways})):
        parts = split_microbatches(batch, num_microbatches)
    assert parts["row"].tolist() == expected
    assert (parts["tokens"][..., 0] == 10 * parts["row"]).all()
    # device d has the rows d * num_rows / ways and following ones before and after
    for rows in np.array(expected):
        of_devices = np.repeat(np.arange(ways), len(rows) // ways)
        np.testing.assert_array_equal(rows // (num_rows // ways), of_devices)
