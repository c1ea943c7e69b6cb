"""A masked denoiser of a distribution that can be enumerated, and its bound by enumeration."""

import functools
import itertools
import math
import types

import jax.numpy as jnp
import numpy as np

SYMBOLS, LENGTH = 3, 4
MASK, PAD, BOS = 3, 0, 3
IDS = types.SimpleNamespace(mask_id=MASK, pad_id=PAD, bos_id=BOS)

TABLE = (
    np.random.default_rng(3).dirichlet(np.full(SYMBOLS**LENGTH, 0.5)).reshape((SYMBOLS,) * LENGTH)
)


def marginal(known: dict[int, int], place: int) -> np.ndarray:
    """Returns p(x_place | known), float64 [SYMBOLS]."""
    index = tuple(known.get(i, slice(None)) for i in range(LENGTH))
    axes = [i for i in range(LENGTH) if i not in known]
    table = TABLE[index]
    others = tuple(axis for axis, i in enumerate(axes) if i != place)
    weight = table.sum(axis=others)
    return weight / weight.sum()


def _all_logits() -> np.ndarray:
    """Returns log p(x_i | what is not masked) of every partly masked row, [4, 4, 4, 4, LENGTH, V].

    A wrong denoiser, so that the bound is not tight and differs from set to set: it is too sure
    where it sees little.
    """
    logits = np.zeros((SYMBOLS + 1,) * LENGTH + (LENGTH, SYMBOLS + 1), np.float32)
    for row in itertools.product(range(SYMBOLS + 1), repeat=LENGTH):
        known = {i: x for i, x in enumerate(row) if x != MASK}
        for place in range(LENGTH):
            if place not in known:
                sharpness = 1 + 0.5 * (LENGTH - len(known))
                logits[(*row, place, slice(0, SYMBOLS))] = sharpness * np.log(
                    marginal(known, place)
                )
                logits[(*row, place, MASK)] = -1e9
    return logits


LOGITS = _all_logits()


def _hidden(params, tokens_BT, segment_ids_BT, positions_BT):
    """The tokens of the whole row next to each position, wherever its padding is."""
    at_BTL = jax_one_hot(positions_BT, segment_ids_BT)
    row_BL = jnp.einsum("btl,bt->bl", at_BTL, tokens_BT)
    # positions that the row does not have are masked
    row_BL = jnp.where(at_BTL.sum(axis=1) > 0, row_BL, MASK)
    return jnp.concatenate(
        [jnp.broadcast_to(row_BL[:, None], (*tokens_BT.shape, LENGTH)), positions_BT[..., None]], -1
    )


def jax_one_hot(positions_BT, segment_ids_BT):
    at_BTL = positions_BT[..., None] == jnp.arange(LENGTH)
    return jnp.where(at_BTL & (segment_ids_BT[..., None] > 0), 1, 0)


def _head(params, hidden_BTD):
    return jnp.asarray(LOGITS)[tuple(jnp.moveaxis(hidden_BTD, -1, 0))]


MODEL = types.SimpleNamespace(hidden_fn=_hidden, head_fn=_head)


@functools.cache
def nll(row: tuple, place: int, hidden: frozenset) -> float:
    """Returns -log of the denoiser's probability of row[place] when `hidden` places are masked."""
    seen = tuple(MASK if i in hidden else x for i, x in enumerate(row))
    logits = LOGITS[(*seen, place)].astype(np.float64)
    return float(np.log(np.exp(logits).sum()) - logits[row[place]])


def bound_by_enumeration(row: tuple, answer: range, *, eps: float | None = None) -> float:
    """Returns the expected log-likelihood bound of the places `answer` given all others.

    Without eps, eq. 6 of LLaDA: the mean over k = 1..L, and over the sets of k places, of
    L / k * nll. With eps, eq. 5: the mean over p ~ U(eps, 1) of nll / p under independent masks,
    integrated numerically.
    """
    length = len(answer)
    p = (np.arange(20000) + 0.5) / 20000 * (1 - (eps or 0)) + (eps or 0)
    total = 0.0
    for k in range(1, length + 1):
        for chosen in itertools.combinations(answer, k):
            summed = sum(nll(row, place, frozenset(chosen)) for place in chosen)
            if eps is None:
                total += summed / k / math.comb(length, k)
            else:
                total += summed * float(np.mean(p ** (k - 1) * (1 - p) ** (length - k)))
    return -total
