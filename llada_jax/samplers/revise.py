"""Which tokens go back to the mask after they were kept: the published sampler revises nothing, and
these rules do.

A rule is written NAME or NAME=AMOUNT. All of them look at one row and at its current block:
finished blocks and given tokens stay. What they take back counts as hidden from then
on and is proposed again.

    NAME=X           takes a token back                                          default
    remdm-cap=X      with probability min(X, s)                                  0.008
    remdm-rescale=X  with probability X s                                        0.015
    remdm-loop=X     with probability X, while the loop lasts                    0.02
    wino=X           that the network finds less likely than X once it is        0.9
                     masked, if the step has kept more than one

ReMDM (arXiv 2503.00307, section 4) adds to every step a chance to be masked again, and reveals as
many tokens more, so that the number of hidden tokens after a step remains what the schedule says.
s = min(1, hidden after the step / revealed before it) is the greatest chance for which that is
possible, equation 10 there with counts in place of their expectations. In the loop 90% of the block
are revealed in the first 45% of its steps; then as many are revealed as are taken back, and the
rest comes in the last 5%.

WINO (arXiv 2507.18578) keeps many tokens on little evidence and verifies them: next to the block
the network reads a shadow of it, all masks, of which each sees everything but the token in its own
place. Of those that fail, the least likely are taken back, fewer than the step before has kept, so
that every block ends.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.errors import UserError, look_up

NONE, WINO, LOOP = "none", "wino", "remdm-loop"

# The loop of ReMDM, as shares of the steps of a block, and what is revealed before it.
LOOP_BEGINS, LOOP_ENDS, LOOP_REVEALED = 0.45, 0.95, 0.9
# WINO keeps at most this share of what is hidden, within these limits.
DRAFT_SHARE, LEAST_DRAFT, MOST_DRAFT = 0.7, 5, 20


class Reviser(NamedTuple):
    """A rule: its usual amount, and what it means in one line."""

    default: float
    meaning: str


REVISERS = {
    "remdm-cap": Reviser(0.008, "the greatest chance of a token to be masked again in a step"),
    "remdm-rescale": Reviser(0.015, "the share of the greatest chance that the schedule allows"),
    LOOP: Reviser(0.02, "the chance of a token to be masked again in a step of the loop"),
    WINO: Reviser(0.9, "the probability below which a masked token fails"),
}


class Revise(NamedTuple):
    """A rule with its amount, as it was asked for."""

    name: str
    amount: float


def parse_revise(text: str) -> Revise:
    """Returns the rule that NAME or NAME=AMOUNT names.

    Raises:
        UserError: there is no such rule, or its amount is not a probability.
    """
    name, equals, amount = text.partition("=")
    if text == NONE:
        return Revise(NONE, 0.0)
    reviser = look_up({**REVISERS, NONE: None}, name, "rule that revises")
    if reviser is None:
        raise UserError(f"revise={text!r}: {NONE!r} takes no amount; leave it out.")
    try:
        number = float(amount) if equals else reviser.default
    except ValueError:
        number = float("nan")
    if not 0 <= number <= 1:
        raise UserError(
            f"revise={text!r}: the amount of {name} is {reviser.meaning}, between 0 and 1; the "
            f"usual one is {name}={reviser.default:g}."
        )
    return Revise(name, number)


def loop_count(hidden_B: Array, total_B: Array, step: Array, steps: Array) -> Array:
    """Returns how many tokens of each row a step of ReMDM's loop reveals for good, int32 [B].

    Args:
        hidden_B, total_B: tokens of the block that are hidden, and that are generated at all.
        step, steps: of the block, counted from 0.
    """
    begin, end = (jnp.floor(share * steps).astype(jnp.int32) for share in (LOOP_BEGINS, LOOP_ENDS))
    held_B = jnp.round((1 - LOOP_REVEALED) * total_B).astype(jnp.int32)
    before_B = -(-jnp.maximum(hidden_B - held_B, 0) // jnp.maximum(begin - step, 1))
    after_B = -(-hidden_B // jnp.maximum(steps - step, 1))
    return jnp.where(step < begin, before_B, jnp.where(step < end, 0, after_B))


def is_in_loop(step: Array, steps: Array) -> Array:
    """Returns whether a step of a block is one in which ReMDM's loop takes tokens back."""
    return (step >= jnp.floor(LOOP_BEGINS * steps)) & (step < jnp.floor(LOOP_ENDS * steps))


def _lowest(score_BT: Array, where_BT: Array, most_B: Array) -> Array:
    """Returns the positions of `where_BT` with the lowest scores, no more than `most_B` a row; ties
    go to the left.
    """
    score_BT = jnp.where(where_BT, score_BT, jnp.inf)
    rank_BT = jnp.argsort(jnp.argsort(score_BT, axis=1, stable=True), axis=1)
    return where_BT & (rank_BT < most_B[:, None])


def taken_back_by_chance(
    name: str,
    amount: Array,
    is_kept_BT: Array,
    num_hidden_B: Array,
    keys_B: Array,
    *,
    step: Array,
    steps: Array,
) -> Array:
    """Returns the tokens that ReMDM masks again, bool [B, T].

    Args:
        name: a key of REVISERS that begins with "remdm".
        is_kept_BT: bool; the tokens of the block that were revealed before this step.
        num_hidden_B: int32; tokens that the schedule leaves hidden after this step. No more are
            taken back than it has places for.
        keys_B: one random key per row.
        step, steps: of the block, counted from 0.
    """
    chance_B = jnp.full(num_hidden_B.shape, amount)
    if name != LOOP:
        num_kept_B = jnp.maximum(jnp.sum(is_kept_BT, axis=1), 1)
        greatest_B = jnp.minimum(1.0, num_hidden_B / num_kept_B)
        is_cap = name == "remdm-cap"
        chance_B = jnp.minimum(amount, greatest_B) if is_cap else amount * greatest_B
    else:
        chance_B = jnp.where(is_in_loop(step, steps), chance_B, 0.0)
    draw_BT = jax.vmap(lambda key: jax.random.uniform(key, is_kept_BT.shape[1:]))(keys_B)
    return _lowest(draw_BT, is_kept_BT & (draw_BT < chance_B[:, None]), num_hidden_B)


def most_drafted(num_hidden_B: Array) -> Array:
    """Returns the most tokens that a step of WINO keeps, int32 [B]."""
    share_B = jnp.floor(DRAFT_SHARE * num_hidden_B).astype(jnp.int32)
    return jnp.clip(share_B, LEAST_DRAFT, MOST_DRAFT)


def taken_back_by_shadow(
    amount: Array,
    is_kept_BT: Array,
    probability_BT: Array,
    num_drafted_B: Array,
    num_drafted_before_B: Array,
    *,
    is_last: Array,
) -> Array:
    """Returns the tokens that WINO masks again, bool [B, T].

    Args:
        is_kept_BT: bool; the tokens of the block that were revealed before this step.
        probability_BT: float32; of these tokens, where the network sees a mask in their place.
        num_drafted_B, num_drafted_before_B: int32; tokens that this step and the one before it
            keep.
        is_last: whether the schedule has no further step.
    """
    most_B = jnp.where(num_drafted_B > 1, num_drafted_before_B - 1, 0)
    most_B = jnp.where(is_last, 0, most_B)
    return _lowest(probability_BT, is_kept_BT & (probability_BT < amount), most_B)
