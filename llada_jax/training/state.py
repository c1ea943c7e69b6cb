"""The state of a run, created sharded, and the one function that advances it.

The state is a plain dict of arrays (what checkpoints, sharding rules and converters read); the NNX
module is put together inside `jax.jit` and never outlives it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.models.model import Model, parameter_shardings
from llada_jax.rng import key_for


class TrainState(NamedTuple):
    """step: int32 [], optimizer steps done. params, ema: parameter dicts (ema is {} when none is
    kept). opt_state: of optax. metrics: {name: (sum, count)} over the steps since the last log
    line, so that a resumed run logs the same.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    ema: dict
    metrics: dict


def abstract_state(
    model: Model, optimizer, mesh: Mesh, *, metrics: dict, keep_ema: bool
) -> TrainState:
    """Returns the TrainState as ShapeDtypeStructs with shardings: what is created, restored and
    compiled against.

    A leaf of the optimizer state that belongs to a parameter (same trailing path, same shape) is
    sharded like it; everything else is a scalar or small and replicated.
    """
    sharding_of = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(model.abstract),
            jax.tree.leaves(parameter_shardings(model, mesh)),
        )
    }
    replicated = NamedSharding(mesh, P())

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        while name:
            shape, sharding = sharding_of.get(name, (None, None))
            if shape == leaf.shape:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            name = name.partition("/")[2]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=model.abstract,
        opt_state=jax.eval_shape(optimizer.init, model.abstract),
        ema=model.abstract if keep_ema else {},
        metrics=metrics,
    )
    return jax.tree_util.tree_map_with_path(place, state)


def create_state(model: Model, optimizer, abstract: TrainState, *, seed: int) -> TrainState:
    """Returns the state of step 0; every array is created in its shards, none is ever whole on one
    device.
    """

    def create():
        params = model.init(key_for("init", seed))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if abstract.ema else {},
            metrics=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract.metrics),
        )

    return jax.jit(create, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
