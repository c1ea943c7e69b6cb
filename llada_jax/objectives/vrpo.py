"""Preferences: VRPO, direct preference optimisation of bounds (LLaDA 1.5, arXiv 2505.19223).

DPO (arXiv 2305.18290) compares log-likelihoods, which a masked diffusion model does not have; VRPO
compares Monte Carlo estimates of their bounds, and is about how to draw these: a fresh time for
every mask, and the same times and masks for the policy and the reference.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.data.batch import PAIR_FIELDS
from llada_jax.masks import BIDIRECTIONAL
from llada_jax.objectives.corruption import corrupt_documents, sums_of_documents
from llada_jax.objectives.masked_diffusion import masked_diffusion_loss
from llada_jax.objectives.objective import Objective, start_as_reference
from llada_jax.rng import keys_for_rows

HELDOUT = ("reward_margin", "reward_accuracy")


def vrpo(
    *,
    mask_id: int,
    beta: float = 0.1,
    num_times: int = 8,
    masks_per_time: int = 1,
    shared_draws: bool = True,
    eps: float = 1e-3,
    t_sampling: str = "stratified",
    masking: str = "bernoulli",
) -> Objective:
    """Returns the objective; takes the arguments of vrpo_loss and log_likelihoods.

    The reference is the network that the run begins with. Held-out pairs are scored with an exact
    count of masks, whatever the settings of the training loss; next to the bound on all of their
    answers, a run reports the margin and how often it is positive.
    """
    draws: dict[str, Any] = dict(
        mask_id=mask_id,
        num_times=num_times,
        masks_per_time=masks_per_time,
        eps=eps,
        t_sampling=t_sampling,
    )
    return Objective(
        loss=functools.partial(
            vrpo_loss, beta=beta, shared_draws=shared_draws, masking=masking, **draws
        ),
        bound=functools.partial(vrpo_bound, beta=beta, masking="exact_count", **draws),
        bound_name="nelbo",
        mask=BIDIRECTIONAL,
        batch=PAIR_FIELDS,
        split_parameters=start_as_reference,
        has_reference=True,
        heldout=HELDOUT,
        trained_passes=num_times * masks_per_time,
        other_passes=num_times * masks_per_time,
    )


def vrpo_loss(
    nll_fn: Callable,
    params: dict,
    batch: dict,
    key: Array,
    row_B: Array,
    *,
    num_rows: int,
    frozen: dict,
    beta: float = 0.1,
    shared_draws: bool = True,
    step: Array | int = 0,
    **draws: Any,
) -> tuple[Array, Array, dict]:
    """Returns the summed loss of the pairs, their number, and sums and counts to log.

    With b(y) the estimate of log p(y | prompt) by the policy less that by the reference, the loss
    of a pair is -log sigmoid(beta b(chosen) - beta b(rejected)).

    Args:
        nll_fn, params, batch, key, row_B: see Objective in objective.py.
        frozen: the parameters of the reference.
        beta: how much a nat of difference from the reference counts.
        shared_draws: whether policy and reference see the same times and masks, which cancels most
            of the noise of their difference (the paper's antithetic sampling). False is for
            measuring that.
        draws: of log_likelihoods.
        num_rows, step: part of the signature of every objective; not used here.
    """
    del num_rows, step
    policy_key, other_key = jax.random.split(key)
    reference_key = policy_key if shared_draws else other_key
    # 1. how likely the policy and the reference find each answer
    policy_BS = log_likelihoods(nll_fn, params, batch, policy_key, row_B, **draws)
    reference_BS = log_likelihoods(nll_fn, frozen, batch, reference_key, row_B, **draws)
    # 2. what the policy has gained, pair by pair
    reward_BS = beta * (policy_BS - reference_BS)
    chosen_BP, rejected_BP = halves_of_pairs(reward_BS)
    margin_BP = chosen_BP - rejected_BP
    # 3. sums over the pairs that are there
    length_BS = sums_of_documents(batch["is_maskable"], batch["segment_ids"])
    is_pair_BP = jnp.stack(halves_of_pairs(length_BS)).min(axis=0) > 0
    num_pairs = is_pair_BP.sum().astype(jnp.float32)

    def total(values_BP: Array) -> Array:
        return jnp.sum(jnp.where(is_pair_BP, values_BP, 0.0))

    loss_sum = -total(jax.nn.log_sigmoid(margin_BP))
    metrics = {
        "loss": (loss_sum, num_pairs),
        "nelbo": (-jnp.sum(policy_BS), jnp.sum(length_BS)),
        "reward_margin": (total(margin_BP), num_pairs),
        "reward_accuracy": (total((margin_BP > 0).astype(jnp.float32)), num_pairs),
        "chosen_reward": (total(chosen_BP), num_pairs),
        "rejected_reward": (total(rejected_BP), num_pairs),
    }
    return loss_sum, num_pairs, metrics


def vrpo_bound(
    nll_fn: Callable,
    params: dict,
    batch: dict,
    key: Array,
    row_B: Array,
    *,
    num_rows: int,
    frozen: dict,
    mask_id: int,
    **settings: Any,
) -> tuple[Array, Array, dict]:
    """Returns the bound on all answers of a held-out batch, as masked_diffusion_loss does, and the
    margins of its pairs.

    A finished model is scored without its reference, on any data: then there are no margins.

    Args:
        settings: of vrpo_loss. The others are those of masked_diffusion_loss.
    """
    loss_sum, count, metrics = masked_diffusion_loss(
        nll_fn,
        params,
        batch,
        key,
        row_B,
        num_rows=num_rows,
        mask_id=mask_id,
        masking="exact_count",
        is_whole_batch=True,
    )
    if frozen and "is_chosen" in batch:
        of_pairs = vrpo_loss(
            nll_fn,
            params,
            batch,
            key,
            row_B,
            num_rows=num_rows,
            frozen=frozen,
            mask_id=mask_id,
            **settings,
        )[2]
        metrics |= {name: of_pairs[name] for name in HELDOUT}
    return loss_sum, count, metrics


def log_likelihoods(
    nll_fn: Callable,
    params: dict,
    batch: dict,
    key: Array,
    row_B: Array,
    *,
    mask_id: int,
    num_times: int,
    masks_per_time: int,
    eps: float,
    t_sampling: str,
    masking: str,
) -> Array:
    """Returns an unbiased estimate of the bound on log p(answer | prompt) of every document, in
    nats: float32 [B, T + 1], of segment s of each row; 0 where there is none.

    It is a mean over num_times * masks_per_time forward passes. For a given number of them the
    variance is least with one mask per time, as the paper shows.

    Args:
        nll_fn, params, batch, row_B: see Objective in objective.py.
        num_times: times drawn for each document. masks_per_time: masks drawn for each time.
        t_sampling: "stratified" over the times of one document, or "iid" (as published).
        masking, eps: of corrupt_documents.
    """
    segment_ids_BT = batch["segment_ids"]
    num_draws = num_times * masks_per_time
    t_key, mask_key = jax.random.split(key)
    t_NBS = draw_times(t_key, segment_ids_BT, row_B, num_times=num_times, t_sampling=t_sampling)

    # The backward pass runs each network again: kept, the activations of all draws would take
    # num_draws times the memory, and the loss of a pair needs all draws before its gradient.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_draw(total_BS: Array, draw: tuple[Array, Array]) -> tuple[Array, None]:
        number, t_BS = draw
        is_masked_BT, weight_BT = corrupt_documents(
            jax.random.fold_in(mask_key, number),
            t_BS,
            batch["is_maskable"],
            segment_ids_BT,
            row_B,
            masking=masking,
            eps=eps,
        )
        noisy_BT = jnp.where(is_masked_BT, mask_id, batch["tokens"])
        scores = nll_fn(
            params, noisy_BT, batch["tokens"], is_masked_BT, segment_ids_BT, batch["positions"]
        )
        return total_BS - sums_of_documents(weight_BT * scores.nll_BT, segment_ids_BT), None

    draws = jnp.arange(num_draws), jnp.repeat(t_NBS, masks_per_time, axis=0)
    total_BS, _ = jax.lax.scan(add_draw, jnp.zeros(t_NBS.shape[1:], jnp.float32), draws)
    return total_BS / num_draws


def draw_times(
    key: Array, segment_ids_BT: Array, row_B: Array, *, num_times: int, t_sampling: str
) -> Array:
    """Returns the times of segment s of each row, float32 [num_times, B, T + 1] in [0, 1).

    stratified: (u + n / num_times) mod 1 with one u for each document. iid: all independent.
    """
    num_segments = segment_ids_BT.shape[1] + 1
    num_drawn = 1 if t_sampling == "stratified" else num_times
    # segments first: those of a row are then the same ones, also where a bucket has cut the row
    draw = jax.vmap(lambda k: jax.random.uniform(k, (num_segments, num_drawn)))
    t_NBS = jnp.moveaxis(draw(keys_for_rows(key, row_B)), -1, 0)
    if t_sampling == "stratified":
        return (t_NBS + jnp.arange(num_times).reshape(-1, 1, 1) / num_times) % 1.0
    assert t_sampling == "iid", t_sampling
    return t_NBS


def halves_of_pairs(values_BS: Array) -> tuple[Array, Array]:
    """Splits values of segments into those of chosen and of rejected documents: pair p of a row has
    the segments 2 p + 1 and 2 p + 2.
    """
    num_pairs = (values_BS.shape[1] - 1) // 2
    in_pairs = values_BS[:, 1 : 1 + 2 * num_pairs].reshape(values_BS.shape[0], num_pairs, 2)
    return in_pairs[..., 0], in_pairs[..., 1]
