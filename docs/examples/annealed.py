"""An objective of your own: masked diffusion whose weight is annealed over the first steps.

It begins with the plain sum of nll, which has less variance, and moves to the weight 1/p of the
bound.
"""

import functools

import jax
import jax.numpy as jnp

from llada_jax.objectives.corruption import corrupt, sample_t
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.objectives.objective import Objective


def annealed(*, mask_id: int, bos_id: int, vocab_size: int, anneal_steps: int = 1000) -> Objective:
    """Returns the objective; held-out text is scored with the bound of masked_diffusion."""
    del bos_id, vocab_size
    return Objective(
        loss=functools.partial(annealed_loss, mask_id=mask_id, anneal_steps=anneal_steps),
        bound=masked_diffusion(mask_id=mask_id).bound,
        bound_name="nelbo",
    )


def annealed_loss(
    nll_fn, params, batch, key, row_B, *, num_rows, step, frozen, mask_id, anneal_steps
):
    """Returns the summed loss, the number of maskable tokens, and sums and counts to log."""
    del frozen
    tokens_BT, is_maskable_BT = batch["tokens"], batch["is_maskable"]
    t_key, mask_key = jax.random.split(key)
    t_B = sample_t(t_key, row_B, num_rows=num_rows, t_sampling="stratified")
    noisy_BT, is_masked_BT, weight_B = corrupt(
        mask_key, tokens_BT, t_B, is_maskable_BT, row_B, mask_id=mask_id, eps=1e-3
    )
    scores = nll_fn(
        params, noisy_BT, tokens_BT, is_masked_BT, batch["segment_ids"], batch["positions"]
    )
    share = jnp.minimum(step / anneal_steps, 1.0)
    nll_B = scores.nll_BT.sum(axis=1)
    loss_sum = jnp.sum((1.0 - share + share * weight_B) * nll_B)
    count = is_maskable_BT.sum().astype(jnp.float32)
    metrics = {
        "loss": (loss_sum, count),
        "nelbo": (jnp.sum(weight_B * nll_B), count),
        "annealed_share": (share.astype(jnp.float32), jnp.float32(1)),
    }
    return loss_sum, count, metrics
