"""From a config to the parts of a run: what `train` runs and `plan` compiles is assembled here,
once.

The one module below the verbs that reads a config.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from llada_jax.cluster import sharding
from llada_jax.cluster.sharding import constrain
from llada_jax.errors import UserError, look_up
from llada_jax.masks import BIDIRECTIONAL, CAUSAL, Mask
from llada_jax.models.attention import choose
from llada_jax.models.model import Model, compute_dtype, make_model
from llada_jax.models.transformer import Architecture
from llada_jax.objectives.autoregressive import autoregressive
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.rng import key_for
from llada_jax.training.optim import by_path, make_optimizer, make_schedule
from llada_jax.training.state import TrainState, abstract_state


class Recipe(NamedTuple):
    """The parts of a run, none of them with numbers yet."""

    architecture: Architecture
    num_steps: int
    dtype: jnp.dtype  # of the matrix products
    attention: str  # a key of llada_jax.models.attention.IMPLEMENTATIONS
    mask: Mask  # what attention may see
    model: Model
    optimizer: optax.GradientTransformation
    abstract: TrainState  # ShapeDtypeStructs with shardings
    train_step: object  # (state, batch) -> state, see llada_jax.training.step.make_train_step
    batch_sharding: NamedSharding


def make_recipe(config, tokenizer, mesh: Mesh) -> Recipe:
    """Assembles a run for a mesh, whose devices need not be present.

    Args:
        config: see llada_jax.config.default_config.
        tokenizer: vocab_size, mask_id and bos_id are read.
        mesh: see llada_jax.cluster.sharding.make_mesh.

    Raises:
        UserError: vocabulary, mesh, kernel or patterns do not fit together.
    """
    B, T = config.data.batch_size, config.data.sequence_length
    architecture = architecture_of(config.model, tokenizer)
    check_mesh(config, architecture, mesh)
    platform = sharding.platform(mesh)
    dtype = compute_dtype(config.model.dtype, platform)
    mask = CAUSAL if config.objective.name == "autoregressive" else BIDIRECTIONAL
    attention = choose(
        config.model.attention,
        platform=platform,
        packed=not config.data.attend_across_documents,
        mask=mask,
        sequence_length=T,
        head_dim=architecture.head_dim,
        dtype=dtype,
    )
    model = make_model(
        architecture,
        dtype=dtype,
        attention=attention,
        remat=config.model.remat,
        nll_chunk=config.model.nll_chunk,
        mask=mask,
    )
    objective = make_objective(config.objective, tokenizer)
    num_steps = config.num_steps or max(1, config.num_tokens // (B * T))
    schedule = make_schedule(**config.schedule, num_steps=num_steps, tokens_per_step=B * T)
    optimizer = make_optimizer(schedule, **optimizer_knobs(config.optimizer))
    for group in ("weight_decay_multipliers", "learning_rate_multipliers"):
        by_path(model.abstract, config.optimizer[group], what=f"config.optimizer.{group}")
    with jax.set_mesh(mesh):
        metrics = abstract_metrics(
            objective, model.nll_fn, model.abstract, num_rows=B, sequence_length=T
        )
        abstract = abstract_state(
            model, optimizer, mesh, keep_ema=config.optimizer.ema_decay > 0, metrics=metrics
        )
    train_step = make_train_step(
        objective,
        model.nll_fn,
        optimizer,
        schedule,
        seed=config.seed,
        num_rows=B,
        num_microbatches=config.optimizer.gradient_accumulation,
        ema_decay=config.optimizer.ema_decay,
        skip_nonfinite=config.optimizer.max_skipped_updates > 0,
    )
    return Recipe(
        architecture,
        num_steps,
        dtype,
        attention,
        mask,
        model,
        optimizer,
        abstract,
        train_step,
        sharding.batch_sharding(mesh),
    )


def architecture_of(knobs, tokenizer) -> Architecture:
    """Returns the Architecture of config.model; raises UserError when the vocabulary does not fit
    the tokenizer.
    """
    fields = {name: knobs[name] for name in Architecture.__dataclass_fields__}
    if not fields["vocab_size"]:
        fields["vocab_size"] = (
            -(-tokenizer.vocab_size // 64) * 64
        )  # so that the head splits evenly over devices
    if fields["vocab_size"] < tokenizer.vocab_size:
        raise UserError(
            f"config.model.vocab_size={fields['vocab_size']} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size} ids; "
            "set it to 0 to take the tokenizer's."
        )
    return Architecture(**fields)


def check_mesh(config, a: Architecture, mesh) -> None:
    """Raises UserError when batch, sequence or model cannot be split as the mesh asks."""
    microbatch = config.data.batch_size // config.optimizer.gradient_accumulation
    sharding.check_divisible(
        mesh,
        {
            "config.data.batch_size / config.optimizer.gradient_accumulation": (
                "act_batch",
                microbatch,
            ),
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
            masked_diffusion,
            mask_id=tokenizer.mask_id,
            eps=knobs.eps,
            t_sampling=knobs.t_sampling,
            masking=knobs.masking,
            weight=knobs.weight,
        ),
        "autoregressive": lambda: functools.partial(autoregressive, bos_id=tokenizer.bos_id),
    }
    return look_up(table, knobs.name, "objective")()


def optimizer_knobs(knobs) -> dict:
    """Returns the arguments of make_optimizer from config.optimizer."""
    elsewhere = ("ema_decay", "gradient_accumulation", "max_skipped_updates")
    return {name: value for name, value in knobs.items() if name not in elsewhere}


def compile_step(recipe: Recipe, shape: tuple[int, int], compiler_options: dict | None = None):
    """Compiles (state, batch) -> (state, a small array that is ready when the step is) for batches
    of a shape [B, T].

    Call it within `jax.set_mesh`.
    """

    def step(state, batch):
        state = recipe.train_step(state, batch)
        return state, state.step + 0

    dtypes = {
        "tokens": jnp.int32,
        "segment_ids": jnp.int32,
        "positions": jnp.int32,
        "is_maskable": jnp.bool_,
    }
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=recipe.batch_sharding)
        for name, dtype in dtypes.items()
    }
    shardings = jax.tree.map(lambda leaf: leaf.sharding, recipe.abstract)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(recipe.abstract, batch).compile(compiler_options)


def split_microbatches(batch: dict, num_microbatches: int) -> dict:
    """Returns the batch with a leading dim of microbatches: microbatch i takes the rows r with r
    mod A == i.

    Strided, so that every device keeps the rows it has.
    """

    def split(array):
        strided = array.reshape(
            array.shape[0] // num_microbatches, num_microbatches, *array.shape[1:]
        )
        return jnp.moveaxis(strided, 1, 0)

    return jax.tree.map(split, batch)


def make_train_step(
    objective,
    nll_fn,
    optimizer,
    schedule,
    *,
    seed: int,
    num_rows: int,
    num_microbatches: int,
    ema_decay: float,
    skip_nonfinite: bool = False,
):
    """Returns train_step(state, batch) -> state, a pure function to be jitted.

    Args:
        objective: (nll_fn, params, batch, key, row_B, num_rows=) -> loss_sum, count, metrics
            (llada_jax.objectives).
        num_rows: of the global batch.
        num_microbatches: gradients of this many parts are summed; the update is that of the whole
            batch, because sums and counts are added up first and divided once.
        skip_nonfinite: a step whose loss or gradient is not finite changes nothing but the step
            number and the metric "skipped", the share of such steps.
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
            (_, (count, metrics)), grads = value_and_grad(
                state.params, jax.tree.map(lambda array: array[0], parts)
            )
        else:
            first = jax.tree.map(lambda array: array[0], parts)
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                jax.eval_shape(
                    lambda: (state.params, *jax.eval_shape(loss_of, state.params, dict(first))[1])
                ),
            )
            (grads, count, metrics), _ = jax.lax.scan(add_part, zeros, parts)
        # 3. the one division: by the count of the global batch
        grads = jax.tree.map(lambda grad: grad / jnp.maximum(count, 1.0), grads)
        # 4. the update
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = (
            jax.tree.map(lambda e, p: ema_decay * e + (1.0 - ema_decay) * p, state.ema, params)
            if state.ema
            else {}
        )
        # 5. what is logged
        grad_norm = optax.tree.norm(grads)
        metrics |= {
            "grad_norm": (grad_norm, jnp.float32(1)),
            "param_norm": (
                optax.tree.norm(params),
                jnp.float32(1),
            ),  # after the update: of what a checkpoint holds
            "learning_rate": (jnp.float32(schedule(state.step)), jnp.float32(1)),
        }
        is_skipped = jnp.bool_(False)
        if skip_nonfinite:
            is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"][0])
            is_skipped = ~is_finite
            old = (state.params, state.opt_state, state.ema, jax.tree.map(jnp.zeros_like, metrics))
            kept = jax.tree.map(
                lambda n, o: jnp.where(is_finite, n, o), (params, opt_state, ema, metrics), old
            )
            params, opt_state, ema, metrics = kept
        metrics["skipped"] = (
            jnp.float32(is_skipped),
            jnp.float32(1),
        )  # always there: the knob may change in a run
        metrics = jax.tree.map(jnp.add, state.metrics, metrics)
        return TrainState(state.step + 1, params, opt_state, ema, metrics)

    return train_step


def abstract_metrics(
    objective, nll_fn, abstract_params, *, num_rows: int, sequence_length: int
) -> dict:
    """Returns the shapes of the sums and counts that a train step adds to TrainState.metrics."""
    shape = (num_rows, sequence_length)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32)
        for name in ("tokens", "segment_ids", "positions")
    }
    batch["is_maskable"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
    rows = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    metrics = jax.eval_shape(
        lambda params, batch, rows: objective(
            nll_fn, params, batch, jax.random.key(0), rows, num_rows=num_rows
        )[2],
        abstract_params,
        batch,
        rows,
    )
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return {
        **metrics,
        **dict.fromkeys(("grad_norm", "param_norm", "learning_rate", "skipped"), (scalar, scalar)),
    }
