"""The forward process: how much of a row is masked, and which tokens (LLaDA, arXiv 2502.09992,
section 2.1).

Everything is drawn from one key per row, so that a row's corruption depends on nothing but its own
global number.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.rng import keys_for_rows

# Parts of [0, 1) in which the nll of masked tokens is logged.
NUM_T_BUCKETS = 10


def sample_t(
    key: Array,
    row_B: Array,
    *,
    num_rows: Array | int,
    t_sampling: str,
    bell_width: float = 0.2,
) -> Array:
    """Returns diffusion times t_B, float32 in [0, 1), for rows `row_B` of a global batch of
    `num_rows`.

    stratified: row r takes (u + r / num_rows) mod 1 with one u per step, so that a batch covers
    [0, 1) evenly and the variance of the loss falls (MD4, arXiv 2406.04329, section 4.3: antithetic
    sampling over the batch). mirrored: also evenly, see `mirrored_strata`. iid: every row draws its
    own U(0, 1). bell: mirrored times of the density `bell_density`, most of which lie around 1/2
    (arXiv 2605.13026).
    """
    if t_sampling == "iid":
        return jax.vmap(jax.random.uniform)(keys_for_rows(key, row_B))
    offset = jax.random.uniform(key)
    if t_sampling == "stratified":
        return (offset + row_B.astype(jnp.float32) / num_rows) % 1.0
    assert t_sampling in ("mirrored", "bell"), t_sampling
    t_B = mirrored_strata(offset, row_B, num_rows=num_rows)
    return t_B if t_sampling == "mirrored" else _quantile_of_bell(t_B, bell_width)


def mirrored_strata(offset: Array, row_B: Array, *, num_rows: Array | int) -> Array:
    """Returns times that cover [0, 1) evenly over the rows of a batch: one in each of `num_rows`
    parts of equal length, if their number is even.

    Row 2 i takes t = (offset + i / pairs) mod 1 and row 2 i + 1 takes 1 - t. Half of the tokens of
    any two such rows are masked, so that every device of a mesh has as many masked tokens as the
    others, in every step. Stratified by row, the rows of a device have a narrow window of times.

    Args:
        offset: from U(0, 1), one for all rows; a scalar, or of a shape that row_B broadcasts to.
        row_B: the rows' numbers in the batch.
    """
    num_pairs = (num_rows + 1) // 2
    t_B = (offset + (row_B // 2).astype(jnp.float32) / num_pairs) % 1.0
    return jnp.where(row_B % 2 == 0, t_B, jnp.minimum(1.0 - t_B, 1.0 - 2.0**-24))


def capacity_for(
    t_sampling: str, *, share: float = 0.5, complementary: bool = False
) -> Callable[[int, int, int], int] | None:
    """Returns the Objective.capacity of masks with these times.

    Args:
        share: the mean probability of a mask.
        complementary: whether a token is masked in one of the rows 2 i and 2 i + 1 each.
    """
    if complementary:
        return functools.partial(room_for_masks, share=0.5, is_mirrored=True)
    # Independent times may all be late.
    if t_sampling == "iid":
        return None
    return functools.partial(room_for_masks, share=share, is_mirrored=t_sampling != "stratified")


def room_for_masks(rows: int, length: int, ways: int, *, share: float, is_mirrored: bool) -> int:
    """Returns how many tokens of consecutive rows are masked, but for rare draws.

    Of all rows of a batch, and of two mirrored ones, `share` of the tokens. Besides, as many as a
    row has where their number is odd; and where they are not mirrored, as a microbatch takes every
    A-th pair, whose times may all lie late in their part of [0, 1). To that come 4 standard
    deviations of independent masks, rounded up to what fills the tiles of a matrix unit.

    Args:
        rows, length, ways: see Objective.capacity.
    """
    if ways > 1 and not is_mirrored:
        return rows * length
    more = rows % 2 if is_mirrored else min(rows, 2)
    tokens = (share * (rows - more) + more) * length + 4 * math.sqrt(rows * length / 4)
    return -(-math.ceil(tokens) // 128) * 128


def bell_density(t: Array, width: float) -> Array:
    """Returns the density of t_sampling="bell" in float32: a normal with mean 1/2 and standard
    deviation `width`, cut to [0, 1).
    """
    area = 1.0 - 2.0 * _tail_of_bell(width)
    return jax.scipy.stats.norm.pdf(t, 0.5, width) / area


def _quantile_of_bell(u: Array, width: float) -> Array:
    """Returns t in [0, 1), of which a share u of the bell lies below.

    Each half is computed from its own end: near 1, float32 has no room for the other tail.
    """
    tail = _tail_of_bell(width)
    distance = -width * jax.scipy.special.ndtri(tail + jnp.minimum(u, 1.0 - u) * (1.0 - 2.0 * tail))
    t = jnp.where(u < 0.5, 0.5 - distance, 0.5 + distance)
    return jnp.clip(t, 0.0, 1.0 - 2.0**-24)


def _tail_of_bell(width: float) -> Array:
    """Returns the share of the uncut normal below 0."""
    return jax.scipy.special.ndtr(jnp.float32(-0.5 / width))


def rank_of_real_rows(is_maskable_BT: Array) -> tuple[Array, Array]:
    """Returns each row's number among the rows that hold maskable tokens, int32 [B], and how many
    such rows there are, at least 1.

    `sample_t` receives these instead of rows and their number when a batch is padded with empty
    rows: the real ones come first, and would otherwise share one narrow window of times. This needs
    the whole batch, and a train step may see one microbatch of it.
    """
    is_real_B = is_maskable_BT.any(axis=1)
    return jnp.cumsum(is_real_B) - 1, jnp.maximum(is_real_B.sum(), 1)


def corrupt(
    key: Array,
    tokens_BT: Array,
    t_B: Array,
    is_maskable_BT: Array,
    row_B: Array,
    *,
    mask_id: int,
    eps: float,
) -> tuple[Array, Array, Array]:
    """Masks every maskable token independently with probability p = (1 - eps) t + eps (LLaDA, eq. 1
    with floor eps).

    Returns:
        noisy_BT int32, is_masked_BT bool, weight_B float32 = 1 / p, the NELBO weight of the row's
        masked tokens.
    """
    p_mask_B = (1.0 - eps) * t_B + eps
    draw = jax.vmap(lambda k: jax.random.uniform(k, tokens_BT.shape[1:]))
    is_masked_BT = (draw(keys_for_rows(key, row_B)) < p_mask_B[:, None]) & is_maskable_BT
    return jnp.where(is_masked_BT, mask_id, tokens_BT), is_masked_BT, 1.0 / p_mask_B


def corrupt_exactly_k(
    key: Array, tokens_BT: Array, t_B: Array, is_maskable_BT: Array, row_B: Array, *, mask_id: int
) -> tuple[Array, Array, Array]:
    """Masks exactly k = ceil(t L) of a row's L maskable tokens, at least one, without replacement
    (LLaDA, eq. 6).

    With t ~ U(0, 1], k is uniform on {1..L} and the weight L / k removes the noise of the number of
    masks.

    Returns:
        noisy_BT int32, is_masked_BT bool, weight_B float32 = L / k (0 for a row without maskable
        tokens).
    """
    length_B = is_maskable_BT.sum(axis=1)
    k_B = jnp.clip(jnp.ceil(t_B * length_B).astype(jnp.int32), 1, jnp.maximum(length_B, 1))
    draw = jax.vmap(lambda k: jax.random.uniform(k, tokens_BT.shape[1:]))
    priority_BT = jnp.where(is_maskable_BT, draw(keys_for_rows(key, row_B)), jnp.inf)
    rank_BT = jnp.argsort(jnp.argsort(priority_BT, axis=1), axis=1)
    is_masked_BT = (rank_BT < k_B[:, None]) & is_maskable_BT
    weight_B = length_B.astype(jnp.float32) / k_B
    return jnp.where(is_masked_BT, mask_id, tokens_BT), is_masked_BT, weight_B


def corrupt_documents(
    key: Array,
    t_BS: Array,
    is_maskable_BT: Array,
    segment_ids_BT: Array,
    row_B: Array,
    *,
    masking: str,
    eps: float,
) -> tuple[Array, Array]:
    """Draws the masks of rows whose documents each have a time of their own.

    Args:
        t_BS: the time of segment s of each row, float32 [B, T + 1].
        masking: "bernoulli", as in `corrupt`, or "exact_count", as in `corrupt_exactly_k`, of each
            document by itself.

    Returns:
        is_masked_BT bool, weight_BT float32, the NELBO weight of the document's masked tokens.
    """
    draw = jax.vmap(lambda k: jax.random.uniform(k, segment_ids_BT.shape[1:]))
    u_BT = draw(keys_for_rows(key, row_B))

    def of_document(values_BS: Array) -> Array:
        return jnp.take_along_axis(values_BS, segment_ids_BT, axis=1)

    if masking == "bernoulli":
        p_mask_BT = of_document((1.0 - eps) * t_BS + eps)
        return (u_BT < p_mask_BT) & is_maskable_BT, 1.0 / p_mask_BT
    assert masking == "exact_count", masking
    length_BS = sums_of_documents(is_maskable_BT, segment_ids_BT)
    k_BS = jnp.clip(jnp.ceil(t_BS * length_BS), 1.0, jnp.maximum(length_BS, 1.0))
    # documents in their order, maskable tokens of each in a random one, the other tokens at the end
    group_BT = jnp.where(is_maskable_BT, segment_ids_BT, segment_ids_BT.shape[1] + 1)
    place_BT = jnp.argsort(jnp.lexsort((u_BT, group_BT)), axis=1)
    rank_BT = place_BT - of_document(jnp.cumsum(length_BS, axis=1) - length_BS)
    is_masked_BT = (rank_BT < of_document(k_BS)) & is_maskable_BT
    return is_masked_BT, of_document(length_BS / k_BS)


def sums_of_documents(values_BT: Array, segment_ids_BT: Array) -> Array:
    """Returns the sum over segment s of each row, float32 [B, T + 1]."""
    add = jax.vmap(lambda values_T, ids_T: jax.ops.segment_sum(values_T, ids_T, ids_T.shape[0] + 1))
    return add(values_BT.astype(jnp.float32), segment_ids_BT)


def sums_by_t(t: Array, nll: Array, num_masked: Array) -> tuple[Array, Array]:
    """Returns the metric nll_by_t, float32 [10] each: the summed nll, unweighted, and the number of
    masked tokens by tenths of the time, which show how hard each level of noise is.

    Args:
        t, nll, num_masked: of rows [B] or of tokens [B, T], all of one shape.
    """
    bucket = jnp.minimum((t * NUM_T_BUCKETS).astype(jnp.int32), NUM_T_BUCKETS - 1)
    is_in = bucket == jnp.arange(NUM_T_BUCKETS).reshape(-1, *[1] * t.ndim)
    axes = tuple(range(1, is_in.ndim))
    # not a matrix product, which TPUs would round to bfloat16
    nll_sum, count = jnp.sum(is_in * nll, axes), jnp.sum(is_in * num_masked, axes)
    return nll_sum, count.astype(jnp.float32)
