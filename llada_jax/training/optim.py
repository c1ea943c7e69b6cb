"""Schedules x clipping x optimizer x weight decay x parameter groups -> one optax chain.

Anything that differs from parameter to parameter is an ordered list of (regex, value): the first
pattern that matches the whole path ("blocks/q", "embed", ...) counts, and a path that none matches
is an error.
"""

import re

import jax
import jax.numpy as jnp
import optax

from llada_jax.errors import UserError, look_up

# ---- schedules
# Each returns a function from the 0-based step to a learning rate; all begin with a linear warm-up
# from 0.


def warmed_up(schedule, *, warmup_steps: int):
    """Returns the schedule times min(1, (step + 1) / warmup_steps)."""
    return lambda step: schedule(step) * jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))


def staged(stages, *, tokens_per_step: int):
    """LLaDA's published schedule: stages (until_tokens, learning rate at the start, at the end),
    linear inside each.

    The boundaries are token counts, so the curve does not move when the batch size does. After the
    last stage the last rate holds. (arXiv 2502.09992, section 2.2: 4e-4 to 1.2T tokens, 1e-4 to
    2.0T, linear to 1e-5 at 2.3T.)
    """

    def schedule(step):
        tokens = jnp.asarray(step, jnp.float32) * tokens_per_step
        rate, begin = jnp.float32(stages[0][1]), 0.0
        for until, first, last in stages:
            done = jnp.clip((tokens - begin) / (until - begin), 0.0, 1.0)
            rate = jnp.where(tokens >= begin, first + (last - first) * done, rate)
            begin = until
        return rate

    return schedule


def wsd(*, learning_rate, final_learning_rate, num_steps, decay_fraction, decay_shape):
    """Warm-up, stable, decay: constant, then to `final_learning_rate` over the last
    `decay_fraction` of the steps.

    decay_shape "linear", or "1-sqrt" (Haegele et al., arXiv 2405.18392, eq. 2).
    """
    decay_steps = max(1, round(num_steps * decay_fraction))

    def schedule(step):
        done = jnp.clip((step + 1 - (num_steps - decay_steps)) / decay_steps, 0.0, 1.0)
        left = 1.0 - done if decay_shape == "linear" else 1.0 - jnp.sqrt(done)
        return final_learning_rate + (learning_rate - final_learning_rate) * left

    return schedule


def cosine(*, learning_rate, final_learning_rate, num_steps):
    """Half a cosine from `learning_rate` to `final_learning_rate` at the last step."""

    def schedule(step):
        done = jnp.clip((step + 1) / num_steps, 0.0, 1.0)
        return final_learning_rate + (learning_rate - final_learning_rate) * 0.5 * (
            1.0 + jnp.cos(jnp.pi * done)
        )

    return schedule


def make_schedule(
    *,
    name,
    learning_rate,
    warmup_steps,
    final_learning_rate,
    decay_fraction,
    decay_shape,
    stages,
    num_steps,
    tokens_per_step,
):
    """Returns the named schedule, step -> learning rate, from all the knobs of config.schedule."""
    table = {
        "llada": lambda: staged(stages, tokens_per_step=tokens_per_step),
        "wsd": lambda: wsd(
            learning_rate=learning_rate,
            final_learning_rate=final_learning_rate,
            num_steps=num_steps,
            decay_fraction=decay_fraction,
            decay_shape=decay_shape,
        ),
        "cosine": lambda: cosine(
            learning_rate=learning_rate,
            final_learning_rate=final_learning_rate,
            num_steps=num_steps,
        ),
        "constant": lambda: lambda step: jnp.float32(learning_rate),
    }
    return warmed_up(look_up(table, name, "schedule")(), warmup_steps=warmup_steps)


# ---- parameter groups


def by_path(tree, rules: tuple[tuple[str, float], ...], *, what: str):
    """Returns a tree of floats: for each leaf the value of the first (regex, value) that matches
    its whole path.

    Raises:
        UserError: a path that no pattern covers, or a pattern that is no regular expression.
    """
    try:
        patterns = [(re.compile(pattern), float(value)) for pattern, value in rules]
    except re.error as error:
        raise UserError(f"{what}: {error.pattern!r} is no regular expression: {error}.") from error

    def value_of(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, value in patterns:
            if pattern.fullmatch(name):
                return value
        raise UserError(
            f"{what}: no pattern of {[pattern for pattern, _ in rules]} covers the parameter "
            f"{name!r}; "
            "end the list with ('.*', value)."
        )

    return jax.tree_util.tree_map_with_path(value_of, tree)


def decoupled_weight_decay(rate: float, rules) -> optax.GradientTransformation:
    """Adds rate * factor(path) * parameter to the update, before the learning rate (AdamW, arXiv
    1711.05101).
    """

    def update(updates, params):
        factors = by_path(params, rules, what="config.optimizer.weight_decay_multipliers")
        return jax.tree.map(
            lambda u, p, factor: u + rate * factor * p if factor else u, updates, params, factors
        )

    return optax.stateless(update)


def scaled_by_path(rules) -> optax.GradientTransformation:
    """Multiplies each update by its factor."""

    def update(updates, params):
        factors = by_path(updates, rules, what="config.optimizer.learning_rate_multipliers")
        return jax.tree.map(lambda u, factor: u * factor if factor != 1.0 else u, updates, factors)

    return optax.stateless(update)


# ---- optimizers


def muon_dimensions(params):
    """Says which dims of which parameters are a matrix for Muon: those of the blocks; the rest goes
    to Adam.
    """
    dims = optax.contrib.MuonDimensionNumbers
    inputs = {"q": 1, "k": 1, "v": 1, "attn_out": (1, 2), "ff_gate": 1, "ff_up": 1, "ff_out": 1}
    outputs = {
        "q": (2, 3),
        "k": (2, 3),
        "v": (2, 3),
        "attn_out": 3,
        "ff_gate": 2,
        "ff_up": 2,
        "ff_out": 2,
    }

    def one(path, leaf):
        name = path[-1].key
        return dims(inputs[name], outputs[name]) if name in inputs else None

    return jax.tree_util.tree_map_with_path(one, params)


def muon(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, Nesterov Adam for embedding, head and norms, at one
    common learning rate.

    The update's root mean square is scaled to 0.2 so that AdamW's learning rate fits (Liu et al.,
    arXiv 2502.16982).
    """
    direction = optax.contrib.muon(
        learning_rate=1.0,
        adam_b1=b1,
        adam_b2=b2,
        eps=eps,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=muon_dimensions,
    )
    return optax.chain(
        direction, optax.scale(-1.0)
    )  # optax's muon already descends; the chain below does it again


OPTIMIZERS = {
    "adamw": lambda *, b1, b2, eps: optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    "lion": lambda *, b1, b2, eps: optax.scale_by_lion(b1=b1, b2=b2),
    "muon": muon,
}


def make_optimizer(
    schedule,
    *,
    name: str,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    weight_decay_multipliers,
    learning_rate_multipliers,
    clip_norm: float,
) -> optax.GradientTransformation:
    """Returns clip -> optimizer -> weight decay -> learning rate -> per-group factor."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        look_up(OPTIMIZERS, name, "optimizer")(b1=b1, b2=b2, eps=eps),
        decoupled_weight_decay(weight_decay, weight_decay_multipliers)
        if weight_decay
        else optax.identity(),
        optax.scale_by_learning_rate(schedule),
        scaled_by_path(learning_rate_multipliers),
    )
