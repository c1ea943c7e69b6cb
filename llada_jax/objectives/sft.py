"""Supervised fine-tuning: the prompt stays clean and the answer is masked (LLaDA, arXiv 2502.09992,
eq. 5 and appendix B.1).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.masks import BIDIRECTIONAL
from llada_jax.objectives.corruption import (
    capacity_for,
    mirrored_strata,
    sums_by_t,
    sums_of_documents,
)
from llada_jax.objectives.masked_diffusion import masked_diffusion_loss
from llada_jax.objectives.objective import Objective
from llada_jax.rng import keys_for_rows

# What is folded into the key of a step for the draw of hidden prompts: times and masks come from
# its two halves, which runs of earlier versions must find again.
PROMPTS = 2


def sft(
    *,
    mask_id: int,
    eps: float = 1e-3,
    t_sampling: str = "stratified",
    weight: str = "1/p",
    masked: str = "answers",
    mean_over: str = "answers",
    max_mask_ratio: float = 1.0,
    complementary: bool = False,
    prompt_dropout: float = 0.0,
) -> Objective:
    """Returns the objective; takes the arguments of sft_loss.

    Held-out dialogues are scored as text is (masked_diffusion), on the tokens of answers alone and
    whatever the settings of the training loss: a bound on -log p(answer | prompt).
    """
    loss = functools.partial(
        sft_loss,
        mask_id=mask_id,
        eps=eps,
        t_sampling=t_sampling,
        weight=weight,
        masked=masked,
        mean_over=mean_over,
        max_mask_ratio=max_mask_ratio,
        complementary=complementary,
        prompt_dropout=prompt_dropout,
    )
    bound = functools.partial(
        masked_diffusion_loss, mask_id=mask_id, masking="exact_count", is_whole_batch=True
    )
    share = (eps + max_mask_ratio) / 2
    return Objective(
        loss=loss,
        bound=bound,
        bound_name="nelbo",
        mask=BIDIRECTIONAL,
        copies=2 if complementary else 1,
        capacity=capacity_for(t_sampling, share=share, complementary=complementary),
    )


def sft_loss(
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
    weight: str = "1/p",
    masked: str = "answers",
    mean_over: str = "answers",
    max_mask_ratio: float = 1.0,
    complementary: bool = False,
    prompt_dropout: float = 0.0,
    step: Array | int = 0,
    frozen: dict | None = None,
) -> tuple[Array, Array, dict]:
    """Returns the summed loss, the number of answers or of their tokens, and sums and counts to
    log.

    Every document of a row has a time of its own, as if it had the row for itself.

    Args:
        nll_fn, params, batch, key, row_B, num_rows: see Objective in objective.py.
        mask_id: the token that stands for "masked".
        eps, max_mask_ratio: bounds on the masking probability, p = eps + (max_mask_ratio - eps) t.
            The logged `nelbo` is a bound only while they are near 0 and 1.
        t_sampling: "stratified" over the rows of the global batch, "mirrored", or "iid".
        weight: "1/p", or "none", which trains on the plain nll of masked tokens.
        masked: "answers", or "documents": prompts are masked and scored too (iLLaDA, arXiv
            2606.25331).
        mean_over: "answers": the sum of a document is divided by its own number of maskable tokens,
            and the global sum by the number of documents that have some, as published. "tokens":
            the global sum is divided by the global number of maskable tokens.
        complementary: rows 2 i and 2 i + 1 are one record, and the second is masked where the first
            is not, with probability 1 - p, so that every token is learned (LLaDA2.0, arXiv
            2512.15745). With weight="1/p", max_mask_ratio must be below 1.
        prompt_dropout: the probability that a document's prompt is hidden behind masks, which are
            not scored, so that the network also learns answers without their prompts, which
            guidance asks for (SMDM, arXiv 2410.18514: 0.1).
        step, frozen: part of the signature of every objective; not used here.
    """
    del step, frozen
    tokens_BT, segment_ids_BT = batch["tokens"], batch["segment_ids"]
    is_maskable_BT = batch["is_maskable"] if masked == "answers" else segment_ids_BT > 0
    t_key, mask_key = jax.random.split(key)
    copies = 2 if complementary else 1
    record_B = row_B // copies
    # 1. how noisy each document is: the bounds hold for every token of it
    t_BT = times_of_documents(
        t_key, segment_ids_BT, record_B, num_rows=num_rows // copies, t_sampling=t_sampling
    )
    p_mask_BT = eps + (max_mask_ratio - eps) * t_BT
    # 2. which tokens are masked; drawn per row, so that a row is corrupted alike in any microbatch
    draw = jax.vmap(lambda k: jax.random.uniform(k, tokens_BT.shape[1:]))
    is_masked_BT = draw(keys_for_rows(mask_key, record_B)) < p_mask_BT
    if complementary:
        is_second_B1 = (row_B % 2 == 1)[:, None]
        is_masked_BT = is_masked_BT != is_second_B1
        p_mask_BT = jnp.where(is_second_B1, 1.0 - p_mask_BT, p_mask_BT)
        t_BT = jnp.where(is_second_B1, 1.0 - t_BT, t_BT)
    is_masked_BT &= is_maskable_BT
    # 3. which prompts are hidden
    is_hidden_BT = jnp.zeros_like(is_masked_BT)
    if prompt_dropout:
        is_dropped_BT = (
            draw_documents(jax.random.fold_in(key, PROMPTS), segment_ids_BT, record_B)
            < prompt_dropout
        )
        is_hidden_BT = is_dropped_BT & (segment_ids_BT > 0) & ~is_maskable_BT
    # 4. what the masked tokens cost
    return sums_of_corruption(
        nll_fn,
        params,
        {**batch, "is_maskable": is_maskable_BT},
        is_masked_BT,
        p_mask_BT,
        is_hidden_BT=is_hidden_BT,
        mask_id=mask_id,
        weight=weight,
        mean_over=mean_over,
        t_BT=t_BT,
    )


def sums_of_corruption(
    nll_fn: Callable,
    params: dict,
    batch: dict,
    is_masked_BT: Array,
    p_mask_BT: Array,
    *,
    mask_id: int,
    weight: str = "1/p",
    mean_over: str = "answers",
    t_BT: Array,
    is_hidden_BT: Array | bool = False,
) -> tuple[Array, Array, dict]:
    """Returns what sft_loss returns, of rows whose corruption has been drawn.

    Args:
        is_masked_BT: what is masked, all of it maskable.
        p_mask_BT: with which probability; float32.
        t_BT: the times, for the logged nll_by_t.
        is_hidden_BT: what is masked and not scored.
        The others are those of sft_loss.
    """
    tokens_BT, segment_ids_BT = batch["tokens"], batch["segment_ids"]
    is_maskable_BT = batch["is_maskable"]
    noisy_BT = jnp.where(is_masked_BT | is_hidden_BT, mask_id, tokens_BT)
    scores = nll_fn(params, noisy_BT, tokens_BT, is_masked_BT, segment_ids_BT, batch["positions"])
    num_tokens = is_maskable_BT.sum().astype(jnp.float32)
    nelbo_BT = scores.nll_BT / p_mask_BT
    loss_BT = nelbo_BT if weight == "1/p" else scores.nll_BT
    if mean_over == "answers":
        length_BS = sums_of_documents(is_maskable_BT, segment_ids_BT)
        length_BT = jnp.take_along_axis(length_BS, segment_ids_BT, axis=1)
        loss_sum = jnp.sum(loss_BT / jnp.maximum(length_BT, 1.0))
        count = (length_BS > 0).sum().astype(jnp.float32)
    else:
        assert mean_over == "tokens", mean_over
        loss_sum, count = jnp.sum(loss_BT), num_tokens
    num_masked = is_masked_BT.sum().astype(jnp.float32)
    metrics = {
        "loss": (loss_sum, count),
        "nelbo": (jnp.sum(nelbo_BT), num_tokens),
        "masked_accuracy": (scores.is_correct_BT.sum().astype(jnp.float32), num_masked),
        "nll_by_t": sums_by_t(t_BT, scores.nll_BT, is_masked_BT),
    }
    return loss_sum, count, metrics


def times_of_documents(
    key: Array, segment_ids_BT: Array, row_B: Array, *, num_rows: int, t_sampling: str
) -> Array:
    """Returns the time of each token's document, float32 [B, T] in [0, 1).

    stratified: the s-th documents of all rows take (u_s + r / num_rows) mod 1 with one u_s per
    step. mirrored: they take the times of `mirrored_strata`, with one offset u_s. iid: every
    document draws its own U(0, 1).
    """
    num_segments = segment_ids_BT.shape[1] + 1
    if t_sampling in ("stratified", "mirrored"):
        offset_BT = jax.random.uniform(key, (num_segments,))[segment_ids_BT]
        if t_sampling == "mirrored":
            return mirrored_strata(offset_BT, row_B[:, None], num_rows=num_rows)
        place_B = row_B.astype(jnp.float32) / num_rows
        return (offset_BT + place_B[:, None]) % 1.0
    assert t_sampling == "iid", t_sampling
    return draw_documents(key, segment_ids_BT, row_B)


def draw_documents(key: Array, segment_ids_BT: Array, row_B: Array) -> Array:
    """Returns a draw from U(0, 1) of each token's document, float32 [B, T]."""
    draw = jax.vmap(lambda k: jax.random.uniform(k, (segment_ids_BT.shape[1] + 1,)))
    return jnp.take_along_axis(draw(keys_for_rows(key, row_B)), segment_ids_BT, axis=1)
