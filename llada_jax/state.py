"""The state of a run, created sharded, and the one function that advances it.

The state is a plain dict of arrays (what checkpoints, sharding rules and converters read); the NNX module is put
together inside `jax.jit` and never outlives it.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.models.transformer import Architecture, Transformer
from llada_jax.rng import key_for
from llada_jax.sharding import constrain, spec


class TrainState(NamedTuple):
    """step: int32 [], optimizer steps done. params, ema: parameter dicts (ema is {} when none is kept). opt_state: of
    optax. metrics: {name: (sum, count)} over the steps since the last log line, so that a resumed run logs the same.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    ema: dict
    metrics: dict


@dataclasses.dataclass(
    frozen=True, eq=False
)  # hashed by identity: its methods are static arguments of jitted functions
class Model:
    """A Transformer without its numbers: `abstract` is a dict of ShapeDtypeStructs, `names` of logical axes."""

    build: Callable[[jax.Array], Transformer]
    graphdef: nnx.GraphDef
    variables: nnx.State
    abstract: dict
    names: dict

    def bind(self, params: dict) -> Transformer:
        """Returns the module that computes with `params`; call it inside jax.jit."""
        variables = jax.tree.map(lambda leaf: leaf, self.variables)
        nnx.replace_by_pure_dict(variables, params)
        return nnx.merge(self.graphdef, variables)

    def nll_fn(self, params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
        """What objectives call; see Transformer.token_nll."""
        return self.bind(params).token_nll(noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT)

    def logits_fn(self, params, tokens_BT, segment_ids_BT, positions_BT):
        """What samplers call; see Transformer.__call__."""
        return self.bind(params)(tokens_BT, segment_ids_BT, positions_BT)

    def init(self, key: jax.Array) -> dict:
        """Returns freshly initialised parameters as a plain dict."""
        return nnx.to_pure_dict(nnx.split(self.build(key))[1])


def compute_dtype(name: str, platform: str):
    """Returns the dtype of config.model.dtype: "auto" is float32 on CPU and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def make_model(architecture: Architecture, **kwargs) -> Model:
    """Returns the model of an Architecture; kwargs go to Transformer (dtype, attention, remat, nll_chunk, causal)."""

    def build(key):
        return Transformer(architecture, key, **kwargs)

    graphdef, variables = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
    names = {}
    for path, variable in nnx.to_flat_state(variables):
        logical = variable.get_metadata()["logical"]
        names[path] = ("layers", *logical) if path[0] == "blocks" else logical
    return Model(build, graphdef, variables, nnx.to_pure_dict(variables), nnx.traversals.unflatten_mapping(names))


def parameter_shardings(model: Model, mesh: Mesh) -> dict:
    """Returns one NamedSharding a parameter, from its logical axes by the rule table."""
    return jax.tree.map(lambda names: NamedSharding(mesh, spec(names)), model.names, is_leaf=lambda x: type(x) is tuple)


def abstract_parameters(model: Model, mesh: Mesh) -> dict:
    """Returns the parameters as ShapeDtypeStructs with shardings: what is read from files."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        model.abstract, parameter_shardings(model, mesh),
    )  # fmt: skip


def abstract_state(model: Model, optimizer, mesh: Mesh, *, metrics: dict, keep_ema: bool) -> TrainState:
    """Returns the TrainState as ShapeDtypeStructs with shardings: what is created, restored and compiled against.

    A leaf of the optimizer state that belongs to a parameter (same trailing path, same shape) is sharded like it;
    everything else is a scalar or small and replicated.
    """
    sharding_of = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(model.abstract), jax.tree.leaves(parameter_shardings(model, mesh))
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
    """Returns the state of step 0; every array is created in its shards, none is ever whole on one device."""

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


def split_microbatches(batch: dict, num_microbatches: int) -> dict:
    """Returns the batch with a leading dim of microbatches: microbatch i takes the rows r with r mod A == i.

    Strided, so that every device keeps the rows it has.
    """

    def split(array):
        strided = array.reshape(array.shape[0] // num_microbatches, num_microbatches, *array.shape[1:])
        return jnp.moveaxis(strided, 1, 0)

    return jax.tree.map(split, batch)


def make_train_step(
    objective, nll_fn, optimizer, schedule, *, seed: int, num_rows: int, num_microbatches: int, ema_decay: float,
    skip_nonfinite: bool = False,
):  # fmt: skip
    """Returns train_step(state, batch) -> state, a pure function to be jitted.

    Args:
        objective: (nll_fn, params, batch, key, row_B, num_rows=) -> loss_sum, count, metrics (llada_jax.objectives).
        num_rows: of the global batch.
        num_microbatches: gradients of this many parts are summed; the update is that of the whole batch, because sums
            and counts are added up first and divided once.
        skip_nonfinite: a step whose loss or gradient is not finite changes nothing but the step number and the metric
            "skipped", the share of such steps.
    """

    def train_step(state: TrainState, batch: dict) -> TrainState:
        # 1. everything random about this step follows from (seed, step, row)
        key = key_for("corruption", seed, state.step)

        def loss_of(params, part):
            rows = part.pop("row")
            loss_sum, count, metrics = objective(nll_fn, params, part, key, rows, num_rows=num_rows)
            return loss_sum, (count, metrics)

        # 2. sums of loss, gradient and metrics, microbatch by microbatch
        parts = split_microbatches({**batch, "row": jnp.arange(num_rows)}, num_microbatches)
        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)

        def add_part(sums, part):
            part = {
                name: constrain(array, "act_batch", *["act_position"] * (array.ndim - 1))
                for name, array in part.items()
            }
            (_, (count, metrics)), grads = value_and_grad(state.params, part)
            return jax.tree.map(jnp.add, sums, (grads, count, metrics)), None

        if num_microbatches == 1:
            (_, (count, metrics)), grads = value_and_grad(state.params, jax.tree.map(lambda array: array[0], parts))
        else:
            first = jax.tree.map(lambda array: array[0], parts)
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                jax.eval_shape(lambda: (state.params, *jax.eval_shape(loss_of, state.params, dict(first))[1])),
            )
            (grads, count, metrics), _ = jax.lax.scan(add_part, zeros, parts)
        # 3. the one division: by the count of the global batch
        grads = jax.tree.map(lambda grad: grad / jnp.maximum(count, 1.0), grads)
        # 4. the update
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = jax.tree.map(lambda e, p: ema_decay * e + (1.0 - ema_decay) * p, state.ema, params) if state.ema else {}
        # 5. what is logged
        grad_norm = optax.tree.norm(grads)
        metrics |= {
            "grad_norm": (grad_norm, jnp.float32(1)),
            "param_norm": (optax.tree.norm(params), jnp.float32(1)),  # after the update: of what a checkpoint holds
            "learning_rate": (jnp.float32(schedule(state.step)), jnp.float32(1)),
        }
        is_skipped = jnp.bool_(False)
        if skip_nonfinite:
            is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"][0])
            is_skipped = ~is_finite
            old = (state.params, state.opt_state, state.ema, jax.tree.map(jnp.zeros_like, metrics))
            kept = jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), (params, opt_state, ema, metrics), old)
            params, opt_state, ema, metrics = kept
        metrics["skipped"] = (jnp.float32(is_skipped), jnp.float32(1))  # always there: the knob may change in a run
        metrics = jax.tree.map(jnp.add, state.metrics, metrics)
        return TrainState(state.step + 1, params, opt_state, ema, metrics)

    return train_step


def abstract_metrics(objective, nll_fn, abstract_params, *, num_rows: int, sequence_length: int) -> dict:
    """Returns the shapes of the sums and counts that a train step adds to TrainState.metrics."""
    shape = (num_rows, sequence_length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["is_maskable"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
    rows = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    metrics = jax.eval_shape(
        lambda params, batch, rows: objective(nll_fn, params, batch, jax.random.key(0), rows, num_rows=num_rows)[2],
        abstract_params, batch, rows,
    )  # fmt: skip
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return {**metrics, **dict.fromkeys(("grad_norm", "param_norm", "learning_rate", "skipped"), (scalar, scalar))}
