"""Where the bound on held-out text comes from: which positions of a row, and which times."""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from llada_jax.cluster import sharding
from llada_jax.evaluation.splits import placed_batches
from llada_jax.objectives.objective import Objective
from llada_jax.rng import key_for

NUM_PARTS = 8


class Shares(NamedTuple):
    """One number per part of the row or of the time, with its standard error over independent
    batches and draws; nan where a part holds no token or there is a single batch and draw.
    """

    mean: list[float]
    standard_error: list[float]


class Breakdown(NamedTuple):
    """by_position: the bound in nats per token in NUM_PARTS equal parts of the row; a position is
    what the network counts, from the start of a document where documents are separated.
    by_time: nats per masked token, not weighted, in equal parts of the diffusion time from clean to
    masked; None for an objective that has no time.
    """

    by_position: Shares
    by_time: Shares | None


@functools.partial(jax.jit, static_argnames=("objective", "nll_fn", "num_rows"))
def _sums(
    params: dict,
    frozen: dict,
    batch: dict,
    key: Array,
    row_B: Array,
    *,
    objective: Objective,
    nll_fn: Any,
    num_rows: int,
) -> dict:
    """Returns {"position": (nats, tokens)} and, if the objective reports it, {"time": ...}.

    The bound is linear in the nll of each token, so its gradient with respect to a factor on the
    nll is the token's share, weight included, of any objective. The network is not differentiated.
    """

    def bound(factor_BT):
        def scaled_nll_fn(*args):
            scores = nll_fn(*args)
            return scores._replace(nll_BT=jax.lax.stop_gradient(scores.nll_BT) * factor_BT)

        metrics = objective.bound(
            scaled_nll_fn,
            params,
            batch,
            key,
            row_B,
            num_rows=num_rows,
            step=jnp.int32(0),
            frozen=frozen,
        )[2]
        return metrics[objective.bound_name][0], metrics

    ones_BT = jnp.ones(batch["tokens"].shape, jnp.float32)
    share_BT, metrics = jax.grad(bound, has_aux=True)(ones_BT)
    part_BT = batch["positions"] * NUM_PARTS // batch["tokens"].shape[1]
    at_part_BTP = jax.nn.one_hot(part_BT, NUM_PARTS) * batch["is_maskable"][..., None]
    sums = {"position": (jnp.einsum("btp,bt->p", at_part_BTP, share_BT), at_part_BTP.sum((0, 1)))}
    if "nll_by_t" in metrics:
        sums["time"] = metrics["nll_by_t"]
    return jax.tree.map(lambda leaf: sharding.constrain(leaf, None), sums)


def _shares(nats_NP: np.ndarray, tokens_NP: np.ndarray) -> Shares:
    """The ratio estimator of llada_jax.evaluation.likelihood.bound, for each part."""
    num, total_P = len(nats_NP), tokens_NP.sum(axis=0)
    correction = num / (num - 1) if num > 1 else math.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_P = nats_NP.sum(axis=0) / total_P
        residual_NP = nats_NP - mean_P * tokens_NP
        variance_P = (residual_NP**2).sum(axis=0) * correction / total_P**2
    return Shares(mean_P.tolist(), np.sqrt(variance_P).tolist())


def breakdown(
    objective: Objective,
    nll_fn: Any,
    params: dict,
    batches: Iterable[dict],
    *,
    num_rows: int,
    frozen: dict | None = None,
    seed: int = 0,
    num_draws: int = 1,
) -> Breakdown:
    """Returns the parts of llada_jax.evaluation.likelihood.bound with the same arguments, under the
    same draws.
    """
    rows, found = np.arange(num_rows, dtype=np.int32), []
    for number, batch in enumerate(batches):
        for draw in range(num_draws):
            sums = _sums(
                params,
                frozen or {},
                batch,
                key_for("likelihood", seed, number, draw),
                rows,
                objective=objective,
                nll_fn=nll_fn,
                num_rows=num_rows,
            )
            found.append(jax.device_get(sums))
    parts = {
        name: _shares(*(np.array(sums, np.float64) for sums in zip(*(f[name] for f in found))))
        for name in found[0]
    }
    return Breakdown(parts["position"], parts.get("time"))


def breakdown_of_split(
    model: Any,
    params: dict,
    directory: str,
    *,
    split: str,
    objective: Objective,
    batch_size: int,
    sequence_length: int,
    batch_sharding: NamedSharding,
    attend_across_documents: bool,
    seed: int = 0,
    num_draws: int = 1,
) -> Breakdown:
    """Returns the parts of llada_jax.evaluation.splits.bound_of_split with the same arguments."""
    batches = placed_batches(
        directory,
        split=split,
        batch_size=batch_size,
        sequence_length=sequence_length,
        batch_sharding=batch_sharding,
        attend_across_documents=attend_across_documents,
    )
    # see llada_jax.evaluation.splits.bound_of_split
    with jax.set_mesh(batch_sharding.mesh):  # type: ignore[arg-type]
        return breakdown(
            objective,
            model.nll_fn,
            params,
            batches,
            num_rows=batch_size,
            seed=seed,
            num_draws=num_draws,
        )
