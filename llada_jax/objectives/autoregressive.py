"""Next-token prediction on the same data with the same (causal) network: the control experiment."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from llada_jax.masks import CAUSAL
from llada_jax.objectives.objective import Objective


def autoregressive(*, bos_id: int) -> Objective:
    """Returns the objective; its likelihood is exact, so that the loss is its own bound."""
    loss = functools.partial(autoregressive_loss, bos_id=bos_id)
    return Objective(loss=loss, bound=loss, bound_name="nll", mask=CAUSAL)


def autoregressive_loss(
    nll_fn: Callable,
    params: dict,
    batch: dict,
    key: Array,
    row_B: Array,
    *,
    num_rows: int,
    bos_id: int,
    step: Array | int = 0,
    frozen: dict | None = None,
) -> tuple[Array, Array, dict]:
    """Returns the summed -log p(x_i | x_<i), the number of predicted tokens, and sums and counts to
    log.

    The row is shifted right by one with `bos_id` in front, so that every token is predicted once
    and the mean nll is comparable with the masked diffusion bound on the same rows. `key`, `row_B`,
    `num_rows`, `step` and `frozen` are part of the signature of every objective; nothing here is
    random or annealed.
    """
    del key, row_B, num_rows, step, frozen
    tokens_BT, where_BT = batch["tokens"], batch["is_maskable"]
    # a document's first token must not be predicted from another document's last
    starts_BT = batch["positions"] == 0
    shifted_BT = jnp.where(starts_BT, bos_id, jnp.roll(tokens_BT, 1, axis=1))
    scores = nll_fn(
        params, shifted_BT, tokens_BT, where_BT, batch["segment_ids"], batch["positions"]
    )
    count = where_BT.sum().astype(jnp.float32)
    loss_sum = scores.nll_BT.sum()
    metrics = {
        "loss": (loss_sum, count),
        "nll": (loss_sum, count),
        "accuracy": (scores.is_correct_BT.sum().astype(jnp.float32), count),
    }
    return loss_sum, count, metrics
