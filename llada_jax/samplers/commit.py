"""How many of the proposed tokens are kept in a step: the fixed schedule, or a rule that looks at
the proposals.

A rule is written NAME or NAME=AMOUNT. All of them sort the hidden positions of the current block,
the surest first, and keep the first n. They look at one row at a time: what the other rows of a
batch propose changes nothing. The schedule is the least that they keep, and it is at least one
token, so that no row can get stuck and `steps` bounds the passes of every rule.

    NAME=X        keeps the largest n with                                   default  source
    threshold=X   c(n) > X                                                   0.9      2505.22618
    factor=X      (n + 1) (1 - c(n)) < X                                     1.0      2505.22618
    frechet=X     max(0, c(1) + ... + c(n) - (n - 1)) - (1 - c(n)) > X       0.25     2606.02955
    entropy=X     H(1) + ... + H(n) - max(H(1), ..., H(n)) <= X              0.1      2505.24857

c(1) >= c(2) >= ... are the probabilities of the proposed tokens, H(1) <= H(2) <= ... the entropies
in nats; the sources are arXiv numbers (Fast-dLLM, Fast-dLLM++, entropy-bounded unmasking).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from llada_jax.errors import UserError, look_up


def threshold(probability_BT: Array, entropy_BT: Array, amount: Array) -> Array:
    """Returns whether c(n) exceeds the amount; all arguments of a rule are sorted, [B, T]."""
    return probability_BT > amount


def factor(probability_BT: Array, entropy_BT: Array, amount: Array) -> Array:
    """Returns whether (n + 1)(1 - c(n)) < amount. Up to an amount of 1 the kept tokens are
    together the most likely ones under any joint distribution with these marginals (Fast-dLLM,
    theorem 1).
    """
    n_T = jnp.arange(1, probability_BT.shape[1] + 1)
    return (n_T + 1) * (1 - probability_BT) < amount


def frechet(probability_BT: Array, entropy_BT: Array, amount: Array) -> Array:
    """Returns whether the lower Frechet bound on the joint probability of the first n exceeds the
    upper bound 1 - c(n) on any other choice by more than the amount.
    """
    # The sum of doubts and not of probabilities: near certainty the doubts are small numbers, and
    # their float32 sum keeps what 1 - c + 1 - c + ... would round away.
    doubt_BT = 1 - probability_BT
    lower_BT = jnp.maximum(0, 1 - jnp.cumsum(doubt_BT, axis=1))
    return lower_BT - doubt_BT > amount


def entropy(probability_BT: Array, entropy_BT: Array, amount: Array) -> Array:
    """Returns whether the entropies of the first n, without the largest of them, sum to no more
    than the amount, which bounds what independent draws lose.
    """
    # Sorted, so the largest of the first n is the last: a sum of those before it. A maximum over
    # the batch, as one published implementation takes it, would let rows see each other.
    before_BT = jnp.cumsum(jnp.pad(entropy_BT[:, :-1], ((0, 0), (1, 0))), axis=1)
    return before_BT <= amount


class Criterion(NamedTuple):
    """An adaptive rule: what it asks, what sorts the positions, and the range of its amount."""

    holds: Callable[[Array, Array, Array], Array]
    default: float
    lowest: float
    highest: float
    is_by_entropy: bool = False


SCHEDULE = "schedule"
CRITERIA = {
    "threshold": Criterion(threshold, 0.9, 0.0, 1.0),
    "factor": Criterion(factor, 1.0, 0.0, 1e6),
    "frechet": Criterion(frechet, 0.25, 0.0, 1.0),
    "entropy": Criterion(entropy, 0.1, 0.0, 1e6, is_by_entropy=True),
}


class Commit(NamedTuple):
    """A rule with its amount, as it was asked for."""

    name: str
    amount: float


def parse_commit(text: str) -> Commit:
    """Returns the rule that NAME or NAME=AMOUNT names.

    Raises:
        UserError: there is no such rule, or its amount is out of range.
    """
    name, equals, amount = text.partition("=")
    if name == SCHEDULE:
        if equals:
            raise UserError(
                f"commit={text!r}: the schedule takes no amount; set the number of "
                "passes with steps."
            )
        return Commit(SCHEDULE, 0.0)
    criterion = look_up(CRITERIA | {SCHEDULE: None}, name, "commit criterion")
    try:
        number = float(amount) if equals else criterion.default
    except ValueError:
        number = float("nan")
    if not criterion.lowest <= number <= criterion.highest:
        raise UserError(
            f"commit={text!r}: the amount of {name} must be a number between "
            f"{criterion.lowest:g} and {criterion.highest:g}; the usual one is "
            f"{name}={criterion.default:g}."
        )
    return Commit(name, number)


def count_kept(
    name: str, probability_BT: Array, entropy_BT: Array, is_hidden_BT: Array, amount: Array
) -> Array:
    """Returns how many tokens a criterion keeps in each row, int32 [B]; 0 where none is sure.

    Args:
        name: a key of CRITERIA.
        probability_BT, entropy_BT: float32, of the proposals and of the distributions that they
            come from.
        is_hidden_BT: bool; only these positions count.
        amount: float32 scalar.
    """
    criterion = CRITERIA[name]
    probability_BT = jnp.where(is_hidden_BT, probability_BT, -jnp.inf)
    entropy_BT = jnp.where(is_hidden_BT, entropy_BT, jnp.inf)
    holds_BT = criterion.holds(
        -jnp.sort(-probability_BT, axis=1), jnp.sort(entropy_BT, axis=1), amount
    )
    n_T = jnp.arange(1, is_hidden_BT.shape[1] + 1)
    is_candidate_BT = n_T <= is_hidden_BT.sum(axis=1, keepdims=True)
    return jnp.max(jnp.where(holds_BT & is_candidate_BT, n_T, 0), axis=1)
