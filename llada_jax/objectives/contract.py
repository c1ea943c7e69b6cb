"""Whether an objective keeps its contract: seen from shapes alone, before anything is compiled."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.errors import UserError
from llada_jax.objectives.objective import Objective
from llada_jax.parts import blamed_on, check_takes


class Scores(NamedTuple):
    """What the stand-in for the network returns; see TokenScores in models/transformer.py."""

    nll_BT: Array
    is_correct_BT: Array


def stand_in_nll_fn(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT) -> Scores:
    """Answers as the network does, without one; says what the network would not accept."""
    arrays = {
        "noisy_BT": (noisy_BT, jnp.integer),
        "targets_BT": (targets_BT, jnp.integer),
        "where_BT": (where_BT, jnp.bool_),
        "segment_ids_BT": (segment_ids_BT, jnp.integer),
        "positions_BT": (positions_BT, jnp.integer),
    }
    for name, (array, kind) in arrays.items():
        if (
            array.shape != noisy_BT.shape
            or array.ndim != 2
            or not jnp.issubdtype(array.dtype, kind)
        ):
            raise TypeError(
                f"nll_fn is called with {name} {described(array)}; its arrays are "
                "[rows, positions] of one shape, where_BT is bool, and the others are integers"
            )
    return Scores(jnp.where(where_BT, 1.0, 0.0), where_BT)


def check_objective(
    objective: Objective,
    params: dict,
    *,
    frozen: dict,
    num_rows: int,
    sequence_length: int,
    name: str = "",
    reserved: tuple[str, ...] = (),
) -> dict:
    """Returns the shapes of the loss's metrics; loss and bound are traced, and nothing is computed.

    A stand-in takes the place of the network, because an objective knows nothing of it: tracing a
    large network twice would take seconds.

    Args:
        params, frozen: jax.ShapeDtypeStructs.
        name: what config.objective.name says, for messages.
        reserved: names of metrics that the train step adds itself.

    Raises:
        UserError: loss or bound do not take the documented arguments, fail, or return something
            other than documented.
    """
    batch = {
        field: jax.ShapeDtypeStruct(spec.shape(num_rows, sequence_length), spec.dtype)
        for field, spec in objective.batch.items()
    }
    rows = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    step = jax.ShapeDtypeStruct((), jnp.int32)

    def metrics_of(function, what: str, needed: tuple[str, ...]) -> dict:
        what = f"The {what} of the objective {name!r}" if name else f"The objective's {what}"
        options = {"num_rows": num_rows, "step": 0, "frozen": {}}
        check_takes(function, what, *(None,) * 5, **options)

        def traced(params, frozen, batch, rows, step):
            key = jax.random.key(0)
            returned = function(
                stand_in_nll_fn,
                params,
                batch,
                key,
                rows,
                num_rows=num_rows,
                step=step,
                frozen=frozen,
            )
            check_returned(returned, what, needed=needed)
            return returned[2]

        with blamed_on(name, "objective"):
            return jax.eval_shape(traced, params, frozen, batch, rows, step)

    metrics = metrics_of(objective.loss, "loss", ("loss", objective.bound_name))
    if objective.bound is not objective.loss:
        metrics_of(objective.bound, "bound", (objective.bound_name,))
    if taken := sorted(set(metrics) & set(reserved)):
        raise UserError(
            f"The loss of the objective {name!r} returns the metric {taken[0]!r}, which the train "
            "step logs itself; choose another name."
        )
    return metrics


def check_returned(returned, what: str, *, needed: tuple[str, ...]) -> None:
    """Raises UserError unless `returned` is loss_sum, count, {metric: (sum, count)}, float32."""
    if not isinstance(returned, tuple) or len(returned) != 3:
        found = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else type(returned)
        raise UserError(
            f"{what} returns {found}; it must return loss_sum, count, {{metric: (sum, count)}}."
        )
    loss_sum, count, metrics = returned
    for part, array in (("loss_sum", loss_sum), ("count", count)):
        if described(array) != "float32[]":
            raise UserError(
                f"{what} returns {part} as {described(array)}; it must be a float32 scalar, as in "
                "x.sum().astype(jax.numpy.float32)."
            )
    if not isinstance(metrics, dict):
        raise UserError(
            f"{what} returns its metrics as a {type(metrics).__name__}; they must be a dict "
            "{metric: (sum, count)}."
        )
    for metric in needed:
        if metric not in metrics:
            raise UserError(
                f"{what} returns no metric {metric!r}, only {', '.join(metrics) or 'none'}; add "
                f"{metric!r}: (sum, count)."
            )
    for metric, pair in metrics.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise UserError(
                f"{what} returns the metric {metric!r} as something other than a pair "
                "(sum, count); return both, and leave the division to the train step."
            )
        total, number = described(pair[0]), described(pair[1])
        if total != number or not total.startswith("float32[") or "," in total:
            raise UserError(
                f"{what} returns the metric {metric!r} as ({total}, {number}); both must be "
                "float32 scalars, or float32 vectors of one length."
            )


def described(array) -> str:
    """Returns "float32[8,2]" for an array, and the name of the type for anything else."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        return type(array).__name__
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"
