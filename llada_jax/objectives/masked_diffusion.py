"""The masked diffusion loss: a Monte Carlo bound on -log p(x) (LLaDA, arXiv 2502.09992, eq. 3;
docs/math.md).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.masks import BIDIRECTIONAL
from llada_jax.objectives.corruption import (
    bell_density,
    capacity_for,
    corrupt,
    corrupt_exactly_k,
    rank_of_real_rows,
    sample_t,
    sums_by_t,
)
from llada_jax.objectives.objective import Objective


def masked_diffusion(
    *,
    mask_id: int,
    eps: float = 1e-3,
    t_sampling: str = "stratified",
    bell_width: float = 0.2,
    masking: str = "bernoulli",
    weight: str = "1/p",
    complementary: bool = False,
) -> Objective:
    """Returns the objective; takes the arguments of masked_diffusion_loss.

    Whatever the settings of the training loss, held-out text is scored at uniform times with an
    exact count of masks: the same expectation as the continuous-time bound, without the floor eps
    and with less variance (LLaDA, arXiv 2502.09992, eq. 6).
    """
    loss = functools.partial(
        masked_diffusion_loss,
        mask_id=mask_id,
        eps=eps,
        t_sampling=t_sampling,
        bell_width=bell_width,
        masking=masking,
        weight=weight,
        complementary=complementary,
    )
    bound = functools.partial(
        masked_diffusion_loss, mask_id=mask_id, masking="exact_count", is_whole_batch=True
    )
    return Objective(
        loss=loss,
        bound=bound,
        bound_name="nelbo",
        mask=BIDIRECTIONAL,
        copies=2 if complementary else 1,
        capacity=capacity_for(t_sampling, complementary=complementary),
    )


def masked_diffusion_loss(
    nll_fn: Callable,
    params: dict,
    batch: dict,
    key: Array,
    row_B: Array,
    *,
    num_rows: int,
    mask_id: int,
    eps: float = 1e-3,
    t_sampling: str = "stratified",
    bell_width: float = 0.2,
    masking: str = "bernoulli",
    weight: str = "1/p",
    complementary: bool = False,
    is_whole_batch: bool = False,
    step: Array | int = 0,
    frozen: dict | None = None,
) -> tuple[Array, Array, dict]:
    """Returns the summed loss over masked tokens, the number of maskable tokens, and sums and
    counts to log.

    Args:
        nll_fn, params, batch, key, row_B, num_rows: see Objective in objective.py.
        mask_id: the token that stands for "masked".
        eps: floor of the masking probability, p = (1 - eps) t + eps (Bernoulli masking only).
        t_sampling: "stratified", "mirrored", "iid" or "bell". A bell visits the extremes of t less
            often, which the weight makes up for: it is divided by the density, so that the bound
            stays one.
        bell_width: standard deviation of the bell.
        masking: "bernoulli", or "exact_count" with weight L/k.
        weight: "1/p" for the bound; "none" trains on the plain sum of nll over masked tokens, while
            the logged `nelbo` always carries the weight.
        complementary: rows 2 i and 2 i + 1 are one record, and the second is masked where the first
            is not, so that every token is learned (LLaDA2.0, arXiv 2512.15745). It takes
            masking="bernoulli" and weight="none": of a row that was masked almost whole, the
            complement has almost no mask, and 1/p no bound.
        is_whole_batch: the batch is not a microbatch, so that times can be stratified over the rows
            that hold tokens; the last held-out batch is filled up with rows that hold none.
        step, frozen: part of the signature of every objective; not used here.

    A row that happens to have no masked token adds nothing to the sum and its tokens to the count,
    which keeps the estimate unbiased; nothing is ever divided by a row's own number of masks.
    """
    del step, frozen
    tokens_BT, is_maskable_BT = batch["tokens"], batch["is_maskable"]
    t_key, mask_key = jax.random.split(key)
    # 1. how noisy each row is
    copies = 2 if complementary else 1
    record_B = row_B // copies
    place_B: Array = record_B
    num_places: Array | int = num_rows // copies
    if is_whole_batch:
        place_B, num_places = rank_of_real_rows(is_maskable_BT)
    t_B = sample_t(
        t_key, place_B, num_rows=num_places, t_sampling=t_sampling, bell_width=bell_width
    )
    # 2. which tokens are masked
    if masking == "bernoulli":
        noisy_BT, is_masked_BT, weight_B = corrupt(
            mask_key, tokens_BT, t_B, is_maskable_BT, record_B, mask_id=mask_id, eps=eps
        )
        if complementary:
            is_second_B = row_B % 2 == 1
            is_masked_BT = (is_masked_BT != is_second_B[:, None]) & is_maskable_BT
            noisy_BT = jnp.where(is_masked_BT, mask_id, tokens_BT)
            t_B = jnp.where(is_second_B, 1.0 - t_B, t_B)
            weight_B = jnp.where(is_second_B, 1.0 / (1.0 - 1.0 / weight_B + 2.0**-24), weight_B)
    else:
        assert masking == "exact_count", masking
        noisy_BT, is_masked_BT, weight_B = corrupt_exactly_k(
            mask_key, tokens_BT, t_B, is_maskable_BT, row_B, mask_id=mask_id
        )
    if t_sampling == "bell":
        weight_B /= bell_density(t_B, bell_width)
    # 3. how surprised the network is by the tokens under the masks
    scores = nll_fn(
        params, noisy_BT, tokens_BT, is_masked_BT, batch["segment_ids"], batch["positions"]
    )
    # 4. sums and counts; the global division happens in the train step
    nll_B = scores.nll_BT.sum(axis=1)
    num_masked_B = is_masked_BT.sum(axis=1).astype(jnp.float32)
    num_maskable = is_maskable_BT.sum().astype(jnp.float32)
    nelbo_sum = jnp.sum(weight_B * nll_B)
    loss_sum = nelbo_sum if weight == "1/p" else jnp.sum(nll_B)
    metrics = {
        "loss": (loss_sum, num_maskable),
        "nelbo": (nelbo_sum, num_maskable),
        "masked_accuracy": (scores.is_correct_BT.sum().astype(jnp.float32), num_masked_B.sum()),
        "nll_by_t": sums_by_t(t_B, nll_B, num_masked_B),
    }
    return loss_sum, num_maskable, metrics
