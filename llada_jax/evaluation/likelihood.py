"""Bounds on the likelihood of held-out text, with their standard errors."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.cluster.sharding import constrain
from llada_jax.objectives.objective import Objective
from llada_jax.rng import key_for


class Bound(NamedTuple):
    """A bound on -log p(x), in nats.

    nats_per_token: its mean over the scored tokens. standard_error: of that mean, over independent
    draws; nan for a single one. num_tokens: scored, each counted once however often its row was
    corrupted. means: of Objective.heldout, those that the bound returned.
    """

    nats_per_token: float
    standard_error: float
    num_tokens: int
    means: dict[str, float] = {}  # never changed in place


@functools.partial(jax.jit, static_argnames=("objective", "nll_fn", "num_rows"))
def batch_sums(params, frozen, batch, key, row_B, *, objective, nll_fn, num_rows):
    """Returns the sums and counts of one batch under one draw of the corruption.

    They are whole on every device, so that each process can read them without another collective.
    """
    sums = objective.bound(
        nll_fn,
        params,
        batch,
        key,
        row_B,
        num_rows=num_rows,
        # a bound does not depend on it
        step=jnp.int32(0),
        frozen=frozen,
    )[2]
    return jax.tree.map(lambda leaf: constrain(leaf, *[None] * leaf.ndim), sums)


def bound(
    objective: Objective,
    nll_fn,
    params,
    batches,
    *,
    num_rows: int,
    frozen: dict | None = None,
    seed: int = 0,
    num_draws: int = 1,
    scored: list[tuple[float, ...]] | None = None,
    on_compiled=lambda: None,
) -> Bound:
    """Returns the bound over all batches: the sum of nats over the number of tokens.

    Args:
        objective: its `bound` is computed; the same object in every call, so that the compiled
            program is found again.
        batches: global batches, placed on the mesh.
        frozen: the frozen parameters of the state, if the bound reads any.
        seed: of the draws, which depend on nothing else, so that two models are compared under the
            same corruption.
        num_draws: how often each row is corrupted.
        scored: (nats, tokens) of each pair of batch and draw, and sum and count of each metric of
            Objective.heldout. They are appended as they are scored, so that the caller has them
            when `batches` raises; batches whose sums it holds are not scored again.
        on_compiled: called without arguments once the program is compiled and before it runs.

    The standard error treats pairs of batch and draw as independent, and weights them by their
    tokens (the ratio estimator). It is an estimate itself, from as many numbers as there are pairs:
    do not trust it below ten of them.
    """
    pairs, compiled, frozen = [] if scored is None else scored, None, frozen or {}
    # of a batch that was interrupted between two draws, all draws are scored again
    num_before = len(pairs) // num_draws
    del pairs[num_before * num_draws :]
    rows, name = np.arange(num_rows, dtype=np.int32), objective.bound_name
    for number, batch in enumerate(batches):
        if number < num_before:
            continue
        for draw in range(num_draws):
            key = key_for("likelihood", seed, number, draw)
            if compiled is None:
                lowered = batch_sums.lower(
                    params,
                    frozen,
                    batch,
                    key,
                    rows,
                    objective=objective,
                    nll_fn=nll_fn,
                    num_rows=num_rows,
                )
                # The next call finds it again.
                compiled = lowered.compile()
                on_compiled()
            sums = jax.device_get(compiled(params, frozen, batch, key, rows))
            wanted = [sums[n] for n in (name, *objective.heldout) if n in sums]
            pairs.append(tuple(float(number) for pair in wanted for number in pair))
    nats, tokens, *others = np.array(pairs, np.float64).T
    means = {
        other: float(total.sum() / max(count.sum(), 1.0))
        for other, total, count in zip(objective.heldout, others[::2], others[1::2])
    }
    # not the mean of the pairs' means: the last batch is padded and holds fewer tokens
    mean = nats.sum() / tokens.sum()
    residual = nats - mean * tokens
    variance = np.sum(residual**2) / max(len(pairs) - 1, 1) * len(pairs) / tokens.sum() ** 2
    error = math.sqrt(variance) if len(pairs) > 1 else math.nan
    return Bound(float(mean), error, int(tokens.sum() / num_draws), means)
