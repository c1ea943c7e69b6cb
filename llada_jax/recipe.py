"""From a config to the parts of a run: what `train` runs and `plan` compiles is assembled here, once.

The one module below the verbs that reads a config.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from llada_jax import sharding
from llada_jax.errors import UserError, look_up
from llada_jax.models.attention import choose
from llada_jax.models.transformer import Architecture
from llada_jax.objectives.autoregressive import autoregressive
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.optim import by_path, make_optimizer, make_schedule
from llada_jax.state import (
    Model,
    TrainState,
    abstract_metrics,
    abstract_state,
    compute_dtype,
    make_model,
    make_train_step,
)


class Recipe(NamedTuple):
    """The parts of a run, none of them with numbers yet."""

    architecture: Architecture
    num_steps: int
    dtype: jnp.dtype  # of the matrix products
    attention: str  # a key of llada_jax.models.attention.IMPLEMENTATIONS
    model: Model
    optimizer: optax.GradientTransformation
    abstract: TrainState  # ShapeDtypeStructs with shardings
    train_step: object  # (state, batch) -> state, see llada_jax.state.make_train_step
    batch_sharding: NamedSharding


def make_recipe(config, tokenizer, mesh: Mesh) -> Recipe:
    """Assembles a run for a mesh, whose devices need not be present.

    Args:
        config: see llada_jax.config.default_config.
        tokenizer: vocab_size, mask_id and bos_id are read.
        mesh: see llada_jax.sharding.make_mesh.

    Raises:
        UserError: vocabulary, mesh, kernel or patterns do not fit together.
    """
    B, T = config.data.batch_size, config.data.sequence_length
    architecture = architecture_of(config.model, tokenizer)
    check_mesh(config, architecture, mesh)
    platform = sharding.platform(mesh)
    dtype = compute_dtype(config.model.dtype, platform)
    attention = choose(
        config.model.attention, platform=platform, packed=not config.data.attend_across_documents,
        sequence_length=T, head_dim=architecture.head_dim, dtype=dtype,
    )  # fmt: skip
    model = make_model(
        architecture, dtype=dtype, attention=attention, remat=config.model.remat, nll_chunk=config.model.nll_chunk,
        causal=config.objective.name == "autoregressive",
    )  # fmt: skip
    objective = make_objective(config.objective, tokenizer)
    num_steps = config.num_steps or max(1, config.num_tokens // (B * T))
    schedule = make_schedule(**config.schedule, num_steps=num_steps, tokens_per_step=B * T)
    optimizer = make_optimizer(schedule, **optimizer_knobs(config.optimizer))
    for group in ("weight_decay_multipliers", "learning_rate_multipliers"):
        by_path(model.abstract, config.optimizer[group], what=f"config.optimizer.{group}")
    with jax.set_mesh(mesh):
        metrics = abstract_metrics(objective, model.nll_fn, model.abstract, num_rows=B, sequence_length=T)
        abstract = abstract_state(model, optimizer, mesh, keep_ema=config.optimizer.ema_decay > 0, metrics=metrics)
    train_step = make_train_step(
        objective, model.nll_fn, optimizer, schedule, seed=config.seed, num_rows=B,
        num_microbatches=config.optimizer.gradient_accumulation, ema_decay=config.optimizer.ema_decay,
        skip_nonfinite=config.optimizer.max_skipped_updates > 0,
    )  # fmt: skip
    return Recipe(
        architecture, num_steps, dtype, attention, model, optimizer, abstract, train_step, sharding.batch_sharding(mesh)
    )


def architecture_of(knobs, tokenizer) -> Architecture:
    """Returns the Architecture of config.model; raises UserError when the vocabulary does not fit the tokenizer."""
    fields = {name: knobs[name] for name in Architecture.__dataclass_fields__}
    if not fields["vocab_size"]:
        fields["vocab_size"] = -(-tokenizer.vocab_size // 64) * 64  # so that the head splits evenly over devices
    if fields["vocab_size"] < tokenizer.vocab_size:
        raise UserError(
            f"config.model.vocab_size={fields['vocab_size']} is smaller than the tokenizer's {tokenizer.vocab_size} ids; "
            "set it to 0 to take the tokenizer's."
        )
    return Architecture(**fields)


def check_mesh(config, a: Architecture, mesh) -> None:
    """Raises UserError when batch, sequence or model cannot be split as the mesh asks."""
    microbatch = config.data.batch_size // config.optimizer.gradient_accumulation
    sharding.check_divisible(
        mesh,
        {
            "config.data.batch_size / config.optimizer.gradient_accumulation": ("act_batch", microbatch),
            "config.data.sequence_length": ("act_position", config.data.sequence_length),
            "config.model.d_model": ("embed", a.d_model),
            "config.model.num_heads": ("heads", a.num_heads),
            "config.model.num_kv_heads": ("kv_heads", a.num_kv_heads),
            "config.model.d_ff": ("mlp", a.d_ff),
            "config.model.vocab_size": ("vocab", a.vocab_size),
        },
    )


def make_objective(knobs, tokenizer):
    """Returns the objective of config.objective with its settings bound."""
    table = {
        "masked_diffusion": lambda: functools.partial(
            masked_diffusion, mask_id=tokenizer.mask_id, eps=knobs.eps, t_sampling=knobs.t_sampling,
            masking=knobs.masking, weight=knobs.weight,
        ),
        "autoregressive": lambda: functools.partial(autoregressive, bos_id=tokenizer.bos_id),
    }  # fmt: skip
    return look_up(table, knobs.name, "objective")()


def optimizer_knobs(knobs) -> dict:
    """Returns the arguments of make_optimizer from config.optimizer."""
    elsewhere = ("ema_decay", "gradient_accumulation", "max_skipped_updates")
    return {name: value for name, value in knobs.items() if name not in elsewhere}


def compile_step(recipe: Recipe, shape: tuple[int, int], compiler_options: dict | None = None):
    """Compiles (state, batch) -> (state, a small array that is ready when the step is) for batches of a shape [B, T].

    Call it within `jax.set_mesh`.
    """

    def step(state, batch):
        state = recipe.train_step(state, batch)
        return state, state.step + 0

    dtypes = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32, "is_maskable": jnp.bool_}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=recipe.batch_sharding) for name, dtype in dtypes.items()}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, recipe.abstract)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(recipe.abstract, batch).compile(compiler_options)
