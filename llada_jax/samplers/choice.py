"""Which token is proposed for a position: what may be chosen, and the draw."""

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.rng import keys_for_rows


def without_ids(logits_BTV: Array, ids_n: Array) -> Array:
    """Returns the logits with those of some ids at -inf: the rest share their probability.

    ids_n int32 [n]; n may be 0.
    """
    if ids_n.shape[0] == 0:
        return logits_BTV
    return logits_BTV.at[..., ids_n].set(-jnp.inf)


def keep_likely(logits_BTV: Array, *, top_k: Array, top_p: Array) -> Array:
    """Returns the logits with the unlikely tokens at -inf.

    First all but the `top_k` most likely are left out (0 keeps all), then all that the most likely
    tokens with a probability of at least `top_p` together do not need (1.0 keeps all; nucleus
    sampling, arXiv 1904.09751). The most likely token is always kept, and so are tokens that tie
    with the last one kept.
    """
    V = logits_BTV.shape[-1]
    sorted_BTV = -jnp.sort(-logits_BTV, axis=-1)
    is_first_k_V = jnp.arange(V) < jnp.where(top_k > 0, top_k, V)
    sorted_BTV = jnp.where(is_first_k_V, sorted_BTV, -jnp.inf)
    p_BTV = jax.nn.softmax(sorted_BTV, axis=-1)
    before_BTV = jnp.cumsum(p_BTV, axis=-1) - p_BTV
    # At 1.0 nothing is cut: the cumulative sum reaches 1 in float32 before the tail does.
    is_needed_BTV = (before_BTV < top_p) | (top_p >= 1.0)
    is_kept_BTV = (is_needed_BTV & is_first_k_V).at[..., 0].set(True)
    lowest_BT1 = jnp.min(jnp.where(is_kept_BTV, sorted_BTV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BTV >= lowest_BT1, logits_BTV, -jnp.inf)


def pick_tokens(
    logits_BTV: Array,
    keys_B: Array,
    positions_BT: Array,
    *,
    mask_id: Array,
    num_ids: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    is_stochastic: bool,
    is_filtered: bool,
) -> Array:
    """Returns the proposed token of every position, int32 [B, T]; never `mask_id`, and below
    `num_ids`.

    Gumbel-max: argmax(l + T g) draws from softmax(l / T), and equals the published argmax(exp(l)
    / (-log u)^T). mode="high": the float32 uniform behind the default mode has too few bits for the
    tail of a large vocabulary (arXiv 2409.02908), which is why the published code resorts to
    float64. The noise of a position depends on the key of its row and the position alone: neither
    the width of the canvas nor the size of a block changes it.
    """
    id_V = jnp.arange(logits_BTV.shape[-1])
    is_excluded_V = (id_V == mask_id) | (id_V >= num_ids)
    logits_BTV = jnp.where(is_excluded_V, -jnp.inf, logits_BTV)
    if is_stochastic:
        if is_filtered:
            tempered_BTV = logits_BTV / temperature
            kept_BTV = keep_likely(tempered_BTV, top_k=top_k, top_p=top_p)
            logits_BTV = jnp.where(kept_BTV > -jnp.inf, logits_BTV, -jnp.inf)
        keys_BT = jax.vmap(keys_for_rows)(keys_B, positions_BT)

        def noise(key: Array) -> Array:
            return jax.random.gumbel(key, logits_BTV.shape[2:], mode="high")

        logits_BTV = logits_BTV + temperature * jax.vmap(jax.vmap(noise))(keys_BT)
    return jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
