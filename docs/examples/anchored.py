"""An objective of your own with a reference model: masked diffusion that stays near its start.

The reference is the network as it was when the run began: fresh, or config.checkpoint.init_from.
"""

import functools

import jax
import jax.numpy as jnp

from llada_jax.objectives.corruption import corrupt_exactly_k, sample_t
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.objectives.objective import Objective, start_as_reference


def anchored(*, mask_id: int, bos_id: int, vocab_size: int, strength: float = 0.1) -> Objective:
    """Returns the objective; `strength` weighs the squared distance to the reference's nll."""
    del bos_id, vocab_size
    return Objective(
        loss=functools.partial(anchored_loss, mask_id=mask_id, strength=strength),
        bound=masked_diffusion(mask_id=mask_id).bound,
        bound_name="nelbo",
        # all parameters are trained, and a copy of them is the reference
        split_parameters=start_as_reference,
        has_reference=True,
        # the loss asks the reference once, without gradients
        other_passes=1,
    )


def anchored_loss(nll_fn, params, batch, key, row_B, *, num_rows, step, frozen, mask_id, strength):
    """Returns the summed loss, the number of maskable tokens, and sums and counts to log."""
    del step
    tokens_BT, is_maskable_BT = batch["tokens"], batch["is_maskable"]
    t_key, mask_key = jax.random.split(key)
    t_B = sample_t(t_key, row_B, num_rows=num_rows, t_sampling="stratified")
    noisy_BT, is_masked_BT, weight_B = corrupt_exactly_k(
        mask_key, tokens_BT, t_B, is_maskable_BT, row_B, mask_id=mask_id
    )
    corrupted = (noisy_BT, tokens_BT, is_masked_BT, batch["segment_ids"], batch["positions"])
    nll_BT, reference_BT = (nll_fn(p, *corrupted).nll_BT for p in (params, frozen))
    nelbo_sum = jnp.sum(weight_B * nll_BT.sum(axis=1))
    drift_sum = jnp.sum(weight_B * jnp.square(nll_BT - reference_BT).sum(axis=1))
    loss_sum = nelbo_sum + strength * drift_sum
    count = is_maskable_BT.sum().astype(jnp.float32)
    metrics = {
        "loss": (loss_sum, count),
        "nelbo": (nelbo_sum, count),
        "drift": (drift_sum, count),
    }
    return loss_sum, count, metrics
