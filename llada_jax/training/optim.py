"""Schedules x clipping x optimizer x weight decay x parameter groups -> one optax chain.

Anything that differs from parameter to parameter is an ordered list of (regex, value): the first
pattern that matches the whole path ("blocks/q", "embed", ...) counts, and a path that none matches
is an error.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from llada_jax.cluster.sharding import constrain
from llada_jax.errors import UserError
from llada_jax.parts import (
    blamed_on,
    call_part,
    check_takes,
    is_own,
    load_part,
    with_arguments,
)

# ---- schedules
# Each returns a function from the 0-based step to a learning rate. make_schedule multiplies all of
# them with the warm-up, so that none of them needs to know about it.


def warmed_up(schedule: Callable, *, warmup_steps: int) -> Callable:
    """Returns the schedule times min(1, (step + 1) / warmup_steps).

    step + 1, because a first step with a rate of 0 would change nothing.
    """
    return lambda step: schedule(step) * jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))


def staged(stages: Any, *, tokens_per_step: int) -> Callable:
    """LLaDA's published schedule: stages (until_tokens, learning rate at the start, at the end),
    linear within each.

    The boundaries are numbers of tokens, so that the curve does not move when the batch size
    changes. After the last stage the last rate holds. (arXiv 2502.09992, section 2.2: 4e-4 until
    1.2T tokens, 1e-4 until 2.0T, then linear to 1e-5 at 2.3T.)
    """

    def schedule(step: Array) -> Array:
        # float, because jax takes whole numbers as int32, which trillions of tokens exceed
        tokens = jnp.asarray(step, jnp.float32) * float(tokens_per_step)
        rate, begin = jnp.float32(stages[0][1]), 0.0
        for until, first, last in stages:
            done = jnp.clip((tokens - begin) / (until - begin), 0.0, 1.0)
            rate = jnp.where(tokens >= begin, first + (last - first) * done, rate)
            begin = float(until)
        return rate

    return schedule


def wsd(
    *,
    learning_rate: float,
    final_learning_rate: float,
    num_steps: int,
    decay_fraction: float,
    decay_shape: str,
) -> Callable:
    """Warm-up, stable, decay: constant, then down to `final_learning_rate` over the last
    `decay_fraction` of the steps.

    decay_shape is "linear", or "1-sqrt" (Haegele et al., arXiv 2405.18392, eq. 2).
    """
    decay_steps = max(1, round(num_steps * decay_fraction))

    def schedule(step: Array) -> Array:
        done = jnp.clip((step + 1 - (num_steps - decay_steps)) / decay_steps, 0.0, 1.0)
        left = 1.0 - done if decay_shape == "linear" else 1.0 - jnp.sqrt(done)
        return final_learning_rate + (learning_rate - final_learning_rate) * left

    return schedule


def cosine(*, learning_rate: float, final_learning_rate: float, num_steps: int) -> Callable:
    """Half a cosine from `learning_rate` to `final_learning_rate` at the last step."""

    def schedule(step: Array) -> Array:
        done = jnp.clip((step + 1) / num_steps, 0.0, 1.0)
        return final_learning_rate + (learning_rate - final_learning_rate) * 0.5 * (
            1.0 + jnp.cos(jnp.pi * done)
        )

    return schedule


SCHEDULES = {
    "llada": lambda knobs: staged(knobs["stages"], tokens_per_step=knobs["tokens_per_step"]),
    "wsd": lambda knobs: wsd(
        learning_rate=knobs["learning_rate"],
        final_learning_rate=knobs["final_learning_rate"],
        num_steps=knobs["num_steps"],
        decay_fraction=knobs["decay_fraction"],
        decay_shape=knobs["decay_shape"],
    ),
    "cosine": lambda knobs: cosine(
        learning_rate=knobs["learning_rate"],
        final_learning_rate=knobs["final_learning_rate"],
        num_steps=knobs["num_steps"],
    ),
    "constant": lambda knobs: lambda step: jnp.float32(knobs["learning_rate"]),
}


def make_schedule(*, name: str, warmup_steps: int, arguments: Any = (), **knobs: Any) -> Callable:
    """Returns the named schedule, step -> learning rate, from all the knobs of config.schedule.

    Args:
        name: a key of SCHEDULES, or module:attribute of a function (*, learning_rate,
            final_learning_rate, num_steps, tokens_per_step, **arguments) -> schedule.
        warmup_steps: every schedule is multiplied by min(1, (step + 1) / warmup_steps).
        arguments: ((name, value), ...), for a schedule of your own.
        knobs: the other knobs of config.schedule, num_steps and tokens_per_step.

    Raises:
        UserError: there is no such schedule, or it does not return a scalar.
    """
    make = load_part(name, "schedule", SCHEDULES)
    if not is_own(name):
        return warmed_up(make(knobs), warmup_steps=warmup_steps)
    given = ("learning_rate", "final_learning_rate", "num_steps", "tokens_per_step")
    own = with_arguments({knob: knobs[knob] for knob in given}, arguments, name, "schedule")
    schedule = call_part(make, name, "schedule", **own)
    check_schedule(schedule, name)
    return warmed_up(schedule, warmup_steps=warmup_steps)


def check_schedule(schedule: Callable, name: str) -> None:
    """Raises UserError unless schedule(int32 scalar) is a scalar number."""
    if not callable(schedule):
        raise UserError(
            f"The schedule {name!r} returns a {type(schedule).__name__}; it must return a function "
            "from the step to the learning rate."
        )
    check_takes(schedule, f"What the schedule {name!r} returns", None)
    with blamed_on(name, "schedule"):
        rate = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
        is_scalar = getattr(rate, "shape", None) == () and jnp.issubdtype(rate.dtype, jnp.floating)
    if not is_scalar:
        found = f"{rate.dtype}{list(rate.shape)}" if hasattr(rate, "shape") else type(rate).__name__
        raise UserError(
            f"The schedule {name!r} gives {found} for a step; the learning rate must be one "
            "floating-point number."
        )


# ---- parameter groups


def by_path(tree: Any, rules: tuple[tuple[str, float], ...], *, what: str) -> Any:
    """Returns a tree of floats: for each leaf, the value of the first (regex, value) whose regex
    matches its whole path.

    Raises:
        UserError: no pattern covers a path, or a pattern is not a regular expression.
    """
    try:
        patterns = [(re.compile(pattern), float(value)) for pattern, value in rules]
    except re.error as error:
        raise UserError(
            f"{what}: {error.pattern!r} is not a regular expression: {error}."
        ) from error

    def value_of(path: Any, _: Any) -> float:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, value in patterns:
            if pattern.fullmatch(name):
                return value
        raise UserError(
            f"{what}: no pattern of {[pattern for pattern, _ in rules]} covers the parameter "
            f"{name!r}; end the list with ('.*', value)."
        )

    return jax.tree_util.tree_map_with_path(value_of, tree)


def decoupled_weight_decay(rate: float, rules: Any) -> optax.GradientTransformation:
    """Adds rate * factor(path) * parameter to the update, before the learning rate (AdamW, arXiv
    1711.05101).
    """

    def update(updates: Any, params: dict) -> Any:
        factors = by_path(params, rules, what="config.optimizer.weight_decay_multipliers")
        return jax.tree.map(
            lambda u, p, factor: u + rate * factor * p if factor else u, updates, params, factors
        )

    return optax.stateless(update)


def scaled_by_rate(schedule: Callable) -> optax.GradientTransformationExtraArgs:
    """Multiplies each update by -schedule(step), with the step that `update` is given.

    optax.scale_by_learning_rate counts its own calls, a count that lags behind the steps once an
    update was skipped and undone. It is kept, for callers that give no step and because checkpoints
    hold it.
    """

    def init(params: dict) -> Any:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: Any, params: Any = None, *, step: Array | None = None, **_: Any
    ) -> Any:
        del params
        count = state.count if step is None else step
        rate = schedule(count)
        updates = jax.tree.map(lambda u: jnp.array(-rate, u.dtype) * u, updates)
        return updates, optax.ScaleByScheduleState(count=count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def scaled_by_path(rules: Any) -> optax.GradientTransformation:
    """Multiplies each update by its factor."""

    def update(updates: Any, params: dict) -> Any:
        factors = by_path(updates, rules, what="config.optimizer.learning_rate_multipliers")
        return jax.tree.map(lambda u, factor: u * factor if factor != 1.0 else u, updates, factors)

    return optax.stateless(update)


# ---- optimizers


def muon_dimensions(params: dict) -> Any:
    """Returns which dims of which parameters form a matrix for Muon: those of the blocks. None
    stands for all others, which Adam takes.
    """
    dims = optax.contrib.MuonDimensionNumbers
    # dims of the input and of the output; dim 0 counts the layers, each a matrix of its own
    matrices = {
        "q": dims(1, (2, 3)),
        "k": dims(1, (2, 3)),
        "v": dims(1, (2, 3)),
        "attn_out": dims((1, 2), 3),
        "ff_gate": dims(1, 2),
        "ff_up": dims(1, 2),
        "ff_out": dims(1, 2),
    }
    return jax.tree_util.tree_map_with_path(lambda path, _: matrices.get(path[-1].key), params)


def muon(
    *, b1: float, b2: float, eps: float, first_moment_dtype: Any
) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, Nesterov Adam for embedding, head and norms, at one
    common learning rate.

    optax keeps the momenta, and hands on the matrices as they are (ns_steps=0).
    """
    direction = optax.contrib.muon(
        learning_rate=1.0,
        adam_b1=b1,
        adam_b2=b2,
        eps=eps,
        ns_steps=0,
        mu_dtype=first_moment_dtype,
        muon_weight_dimension_numbers=muon_dimensions,
    )

    def uphill(updates: dict, params: dict) -> dict:
        # optax's muon already points downhill, and make_optimizer turns every direction around
        dims = muon_dimensions(params)
        return jax.tree.map(lambda u, d: -u if d is None else orthogonalized(-u, d), updates, dims)

    return optax.chain(direction, optax.stateless(uphill))


def orthogonalized(x: Array, dims: optax.contrib.MuonDimensionNumbers) -> Array:
    """Returns the nearly orthogonal matrices that are closest to those of the layers, with a root
    mean square of 0.2 so that AdamW's learning rate fits (Liu et al., arXiv 2502.16982).

    A device computes them for its share of the layers. Split as the parameters are, they would be
    gathered for each of 15 products, all layers at the same time and in float32.
    """
    # without momentum it is the iteration of Newton and Schulz alone
    iteration = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=dims)
    names = ("act_layer", *("act_as_is",) * (x.ndim - 1))
    x = constrain(x, *names)
    x = constrain(iteration.update(x, iteration.init(x))[0], *names)
    sizes = [math.prod(x.shape[i] for i in np.atleast_1d(dim)) for dim in dims]
    return 0.2 * math.sqrt(max(sizes)) * x


OPTIMIZERS = {
    "adamw": lambda *, b1, b2, eps, first_moment_dtype: optax.scale_by_adam(
        b1=b1, b2=b2, eps=eps, mu_dtype=first_moment_dtype
    ),
    "lion": lambda *, b1, b2, eps, first_moment_dtype: optax.scale_by_lion(
        b1=b1, b2=b2, mu_dtype=first_moment_dtype
    ),
    "muon": muon,
}


def make_optimizer(
    schedule: Callable,
    *,
    name: str,
    b1: float,
    b2: float,
    eps: float,
    first_moment_dtype: str,
    weight_decay: float,
    weight_decay_multipliers: Any,
    learning_rate_multipliers: Any,
    clip_norm: float,
    arguments: Any = (),
) -> optax.GradientTransformation:
    """Returns clip -> optimizer -> weight decay -> learning rate -> per-group factor.

    Args:
        name: a key of OPTIMIZERS, or module:attribute of a function (*, b1, b2, eps, **arguments)
            -> optax.GradientTransformation. It gives the direction alone, as optax.scale_by_adam
            does, and points uphill: the chain turns it around with the learning rate.
        first_moment_dtype: in which the first moment is kept from step to step. The second is
            float32: where b2 is above 0.998 it changes by less per step than bfloat16 can hold.
        arguments: ((name, value), ...), for an optimizer of your own.
        The other arguments are the knobs of config.optimizer.

    Its `update` takes the number of the step as step=, from which the learning rate follows.
    """
    make = load_part(name, "optimizer", OPTIMIZERS)
    if is_own(name):
        own = with_arguments({"b1": b1, "b2": b2, "eps": eps}, arguments, name, "optimizer")
        direction = call_part(make, name, "optimizer", **own)
        direction = checked_direction(direction, name)
    else:
        direction = make(b1=b1, b2=b2, eps=eps, first_moment_dtype=jnp.dtype(first_moment_dtype))
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        direction,
        decoupled_weight_decay(weight_decay, weight_decay_multipliers)
        if weight_decay
        else optax.identity(),
        scaled_by_rate(schedule),
        scaled_by_path(learning_rate_multipliers),
    )


def checked_direction(direction: Any, name: str) -> optax.GradientTransformation:
    """Returns an own optimizer that is checked when its state is laid out, before compilation.

    Raises:
        UserError: it is not a GradientTransformation; and from `init`: its updates do not have the
            shapes of the parameters, or its state changes its shapes from step to step.
    """
    if not isinstance(direction, optax.GradientTransformation):
        raise UserError(
            f"The optimizer {name!r} returns a {type(direction).__name__}; it must return an "
            "optax.GradientTransformation, as optax.scale_by_adam does."
        )
    described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)  # noqa: E731

    def init(params: dict) -> Any:
        with blamed_on(name, "optimizer"):
            state = direction.init(params)
            updates, after = jax.eval_shape(direction.update, params, state, params)
        if described(updates) != described(params):
            raise UserError(
                f"The optimizer {name!r} gives updates that differ from the parameters in "
                "structure, shape or dtype; it must return one float32 update per parameter."
            )
        if described(after) != described(state):
            raise UserError(
                f"The optimizer {name!r} returns a state with another structure, shape or dtype "
                "than its init; a train step is compiled for one kind of state."
            )
        return state

    return optax.GradientTransformation(init, direction.update)
