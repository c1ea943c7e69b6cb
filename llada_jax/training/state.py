"""The state of a run: what it is made of, how it is sharded, and how it is created.

The state is a plain tree of arrays (what checkpoints, sharding rules and converters read); the NNX
module is put together inside `jax.jit` and never outlives it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.cluster.sharding import reduced
from llada_jax.errors import UserError
from llada_jax.models.model import Model, parameter_shardings
from llada_jax.objectives.contract import check_objective
from llada_jax.objectives.objective import Objective
from llada_jax.parts import blamed_on, check_takes
from llada_jax.rng import key_for

# What a train step logs next to what the objective returns.
STEP_METRICS = ("grad_norm", "param_norm", "learning_rate", "skipped")


class TrainState(NamedTuple):
    """What a train step takes and returns.

    step: int32 [], optimizer steps done.
    params: the parameters that are trained, as nested dicts. Gradients, the optimizer, the moving
        average and the logged norms see these alone.
    opt_state: of optax.
    ema: the moving average of params; {} when none is kept.
    metrics: {name: (sum, count)} over the steps since the last log line, part of the state so that
        a resumed run logs the same.
    frozen: parameters that the loss reads and nothing changes: a reference model, or the base
        under adapters. {} when there are none.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    ema: dict
    metrics: dict
    frozen: dict = {}  # never changed in place, like every other part of a state


def split_abstract(
    split: Callable | None, abstract_params: dict, *, name: str = ""
) -> tuple[dict, dict]:
    """Returns the shapes of (params, frozen) that an objective makes of the network's parameters.

    Args:
        split: Objective.split_parameters; None trains all parameters.
        name: of the objective, for messages.

    Raises:
        UserError: it does not take (parameters, key), fails, or does not return two dicts.
    """
    if split is None:
        return abstract_params, {}
    what = f"split_parameters of the objective {name!r}"
    check_takes(split, what, None, None)
    # Traced and not run: a mistake is reported in a second, and not after the network was made.
    with blamed_on(name, "objective"):
        returned = jax.eval_shape(lambda p: split(p, jax.random.key(0)), abstract_params)
    if (
        not isinstance(returned, tuple)
        or len(returned) != 2
        or not all(isinstance(part, dict) for part in returned)
        or not jax.tree.leaves(returned[0])
    ):
        raise UserError(
            f"{what} must return two dicts of arrays, (params, frozen), the first of which is not "
            "empty."
        )
    return returned


def abstract_metrics(
    objective: Objective,
    abstract_params: dict,
    *,
    num_rows: int,
    sequence_length: int,
    name: str = "",
) -> dict:
    """Returns the shapes of the sums and counts that a train step adds to TrainState.metrics.

    Args:
        abstract_params: of the network.
        name: of the objective, for messages.

    Raises:
        UserError: the objective does not keep its contract (llada_jax.objectives.contract).
    """
    params, frozen = split_abstract(objective.split_parameters, abstract_params, name=name)
    metrics = check_objective(
        objective,
        params,
        frozen=frozen,
        num_rows=num_rows,
        sequence_length=sequence_length,
        name=name,
        reserved=STEP_METRICS,
    )
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return {**metrics, **dict.fromkeys(STEP_METRICS, (scalar, scalar))}


def abstract_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    metrics: dict,
    keep_ema: bool,
    split: Callable | None = None,
) -> TrainState:
    """Returns the TrainState as ShapeDtypeStructs with shardings: what is created, restored and
    compiled against.

    A leaf that belongs to a parameter of the network (same trailing path, same shape, or 1 in some
    of its dims, as scales have) is sharded like it, whether it is trained, frozen, an average or a
    moment of the optimizer; everything else is a scalar or small, and replicated.

    Args:
        split: Objective.split_parameters.
    """
    sharding_of = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(model.abstract),
            jax.tree.leaves(parameter_shardings(model, mesh)),
        )
    }
    replicated = NamedSharding(mesh, P())

    def place(path: Any, leaf: Any) -> Any:
        # An optimizer keeps its moments in a tree of its own, whose paths end as those of the
        # parameters do: levels are dropped from the front until the rest is a parameter's path.
        # Matched by the whole path, the moments of Adam would be replicated, and every device would
        # hold twice the parameters.
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        while name:
            shape, sharding = sharding_of.get(name, (None, None))
            if shape == leaf.shape:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            # The scales of int8 matrices, or what an own optimizer keeps per row or column.
            if shape and _is_reduced(leaf.shape, shape):
                sharding = reduced(sharding, leaf.shape)
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            name = name.partition("/")[2]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    params, frozen = split_abstract(split, model.abstract)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type]
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
        ema=params if keep_ema else {},
        metrics=metrics,
        frozen=frozen,
    )
    return jax.tree_util.tree_map_with_path(place, state)


def _is_reduced(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether each dim is that of a whole array, or 1."""
    return len(shape) == len(whole) and all(n in (1, m) for n, m in zip(shape, whole))


def create_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    *,
    seed: int,
    split: Callable | None = None,
    params: dict | None = None,
) -> TrainState:
    """Returns the state of step 0; every array is created in its shards, none is ever whole on one
    device.

    Args:
        abstract: see abstract_state, which has been given the same `split`.
        params: the network's parameters to start from; they are donated. None: fresh ones.
    """

    def create(params: dict) -> TrainState:
        params = model.init(key_for("init", seed)) if params is None else params
        frozen = {}
        if split is not None:
            params, frozen = split(params, key_for("split", seed))
        # Copies, because a step takes over all buffers of the state: no two may be one. The metrics
        # are part of the state, and not of the loop, so that a step adds to them on the devices and
        # the loop waits for none of them between two log lines.
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if abstract.ema else {},
            metrics=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract.metrics),
            frozen=jax.tree.map(jnp.copy, frozen),
        )

    # One compiled program with sharded outputs. Created one by one, arrays would first be whole on
    # one device, where the largest matrices of a large model do not fit.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)
