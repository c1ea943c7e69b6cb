"""The train step, and the parts of a run that it is made of: what `train` runs and `plan` compiles.

The one module below the verbs that reads a config. Read it from the top: make_recipe assembles the
parts, make_train_step is the step itself, compile_step makes a program of it.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from llada_jax.cluster import hardware, sharding
from llada_jax.cluster.sharding import constrain
from llada_jax.data.batch import PAIR_FIELDS, check_copies, check_fields
from llada_jax.errors import UserError
from llada_jax.masks import Mask
from llada_jax.models.adapters import Lora
from llada_jax.models.attention import check_shape, choose
from llada_jax.models.model import Model, compute_dtype, make_model
from llada_jax.models.split_rows import check_exchange, exchange_for
from llada_jax.models.transformer import Architecture
from llada_jax.objectives.named import make_objective
from llada_jax.objectives.objective import Objective
from llada_jax.rng import key_for
from llada_jax.samplers.settings import check_schedule
from llada_jax.training.adapted import adapted
from llada_jax.training.memory import Workload, choose_remat
from llada_jax.training.optim import by_path, make_optimizer, make_schedule
from llada_jax.training.state import STEP_METRICS, TrainState, abstract_metrics, abstract_state
from llada_jax.validation import AUTO, num_steps_of

# See runs_without_loop.
MOST_LAYERS_WITHOUT_LOOP = 16


# names the operations of the update in the compiled program, for those who read it
OPTIMIZER = "optimizer"

# the knobs of config.samples that the sampler takes as they are
SAMPLE_KNOBS = ("gen_length", "block_length", "steps", "temperature")


class Recipe(NamedTuple):
    """The parts of a run, none of them with numbers yet."""

    architecture: Architecture
    num_steps: int
    dtype: jnp.dtype  # of the matrix products
    gradient_dtype: jnp.dtype  # in which gradients of matrices are added up over devices
    attention: str  # a key of llada_jax.models.attention.IMPLEMENTATIONS
    remat: str  # what the backward pass keeps of a layer: "none" or a key of REMAT_POLICIES
    model: Model
    objective: Objective
    optimizer: optax.GradientTransformation
    abstract: TrainState  # ShapeDtypeStructs with shardings
    train_step: Callable  # (state, batch) -> state, see make_train_step
    batch_sharding: NamedSharding  # of a [B, T] array


def make_recipe(config: Any, tokenizer: Any, mesh: Mesh, *, provided: Any = None) -> Recipe:
    """Assembles a run for a mesh, whose devices need not be present.

    Args:
        config: see llada_jax.config.default_config.
        tokenizer: vocab_size, mask_id and bos_id are read.
        mesh: see llada_jax.cluster.sharding.make_mesh.
        provided: the fields of the batches that the run will be given (llada_jax.data.batch); None
            where there are no data yet, as in a plan.

    Raises:
        UserError: vocabulary, mesh, kernel, patterns or own parts do not fit together.
    """
    B, T = config.data.batch_size, config.data.sequence_length
    # 1. The network. What its attention may see is for the objective to say.
    objective = make_objective(tokenizer, **config.objective)
    if config.lora.rank:
        objective = adapted(objective, Lora(**config.lora))
    check_objective_fits(config, objective, provided)
    architecture = architecture_of(config.model, tokenizer)
    check_mesh(config, architecture, mesh)
    platform = sharding.platform(mesh)
    dtype = compute_dtype(config.model.dtype, platform)
    is_compute = config.optimizer.gradient_dtype == "compute"
    gradient_dtype = dtype if is_compute else jnp.dtype(config.optimizer.gradient_dtype)
    attention = attention_for(config, architecture, objective.mask, mesh, dtype=dtype)
    num_parts = sharding.axis_size(mesh, "act_position")
    # XLA aborts with "Invalid binary instruction opcode copy" (jax 0.10.2 and 0.12.0)
    if platform == "cpu" and num_parts > 1 and dtype == jnp.bfloat16:
        raise UserError(
            f"config.model.dtype='bfloat16' with config.mesh.sequence={num_parts}: XLA cannot "
            "compile 16-bit gradients of rows that several CPUs share, and ends the process; set "
            "model.dtype to float32."
        )
    make = functools.partial(
        make_model,
        architecture,
        dtype=dtype,
        gradient_dtype=gradient_dtype,
        attention=attention,
        nll_chunk=config.model.nll_chunk,
        mask=objective.mask,
        capacity=objective.capacity,
        is_unrolled=runs_without_loop(objective, mesh, num_layers=architecture.num_layers),
    )
    # The state is the same whatever is kept, and what fits next to it depends on its size.
    model = make(remat="full" if config.model.remat == AUTO else config.model.remat)
    # 2. The optimizer, and the state that it advances.
    num_steps = num_steps_of(config)
    schedule = make_schedule(**config.schedule, num_steps=num_steps, tokens_per_step=B * T)
    optimizer = make_optimizer(schedule, **optimizer_knobs(config.optimizer))
    with jax.set_mesh(mesh):
        metrics = abstract_metrics(
            objective, model.abstract, num_rows=B, sequence_length=T, name=config.objective.name
        )
        abstract = abstract_state(
            model,
            optimizer,
            mesh,
            metrics=metrics,
            keep_ema=config.optimizer.ema_decay > 0,
            split=objective.split_parameters,
        )
    for group in ("weight_decay_multipliers", "learning_rate_multipliers"):
        by_path(abstract.params, config.optimizer[group], what=f"config.optimizer.{group}")
    known = SimpleNamespace(
        architecture=architecture,
        abstract=abstract,
        objective=objective,
        attention=attention,
        model=model,
        dtype=dtype,
        gradient_dtype=gradient_dtype,
    )
    remat = resolved_remat(config, known, mesh)
    if config.model.remat == AUTO:
        model = make(remat=remat)
    # 3. The step.
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
        gradient_dtype,
        attention,
        remat,
        model,
        objective,
        optimizer,
        abstract,
        train_step,
        sharding.batch_sharding(mesh),
    )


def check_objective_fits(config: Any, objective: Objective, provided: Any) -> None:
    """Raises UserError when the objective cannot work with these data, or with other knobs."""
    provided = objective.batch if provided is None else provided
    check_fields(objective.batch, provided, by=f"config.objective.name={config.objective.name!r}")
    if provided == PAIR_FIELDS and "is_chosen" not in objective.batch:
        raise UserError(
            f"{config.data.path} holds pairs of a chosen and a rejected answer, and the objective "
            f"{config.objective.name!r} would train on both; choose vrpo, or prepare dialogues."
        )
    check_copies(config.data.batch_size, objective.copies)
    is_causal = objective.mask.causal
    if is_causal and config.model.output_shift:
        raise UserError(
            "config.model.output_shift=True is for masked diffusion, and the objective "
            f"{config.objective.name!r} shifts by itself; set it to False."
        )
    if not config.samples.every_steps:
        return
    if is_causal:
        raise UserError(
            f"config.samples.every_steps={config.samples.every_steps}: the objective "
            f"{config.objective.name!r} trains a network that sees only what is to its left, which "
            "cannot be sampled as that of masked_diffusion can; set it to 0."
        )
    # Now, and not after the first samples.every_steps steps of training.
    check_schedule(**{name: config.samples[name] for name in SAMPLE_KNOBS}, cfg_scale=0.0)


def architecture_of(knobs: Any, tokenizer: Any) -> Architecture:
    """Returns the Architecture of config.model; raises UserError when the vocabulary does not fit
    the tokenizer.
    """
    fields = {name: knobs[name] for name in Architecture.__dataclass_fields__}
    if not fields["vocab_size"]:
        # a multiple of 64, so that the head splits evenly over devices
        fields["vocab_size"] = -(-tokenizer.vocab_size // 64) * 64
    if fields["vocab_size"] < tokenizer.vocab_size:
        raise UserError(
            f"config.model.vocab_size={fields['vocab_size']} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size} ids; set it to 0 to take the tokenizer's."
        )
    return Architecture(**fields)


def check_mesh(config: Any, a: Architecture, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError when batch, sequence or model cannot be split as the mesh asks."""
    rows = config.data.batch_size // config.optimizer.gradient_accumulation
    sharding.check_divisible(
        mesh,
        {
            "config.data.batch_size / config.optimizer.gradient_accumulation": ("act_batch", rows),
            "config.data.sequence_length": ("act_position", config.data.sequence_length),
            **{
                f"config.data.length_buckets ({length})": ("act_position", length)
                for length in config.data.length_buckets
            },
            "config.model.d_model": ("embed", a.d_model),
            "config.model.num_heads": ("heads", a.num_heads),
            "config.model.num_kv_heads": ("kv_heads", a.num_kv_heads),
            "config.model.d_ff": ("mlp", a.d_ff),
            "config.model.vocab_size": ("vocab", a.vocab_size),
        },
    )


def runs_without_loop(objective: Objective, mesh: Mesh, *, num_layers: int) -> bool:
    """Whether the layers are better compiled one by one than as a loop.

    On one GPU a loop over 12 layers costs 7% of the time, for copies of each layer's part of the
    stacked arrays; but 22 layers took 12% longer without one, for a reason that no profile has
    shown yet. Several devices need it, because the gathers of one turn overlap with the turn
    before. So do frozen weights, of which XLA would otherwise keep a second copy in another layout:
    the peak of LLaDA-8B with adapters rises from 37 to 64 GiB.
    """
    is_gpu = sharding.platform(mesh) in ("gpu", "cuda")
    is_short = num_layers <= MOST_LAYERS_WITHOUT_LOOP
    return is_gpu and is_short and mesh.size == 1 and objective.split_parameters is None


def attention_for(config: Any, a: Architecture, mask: Mask, mesh: Mesh, *, dtype: Any) -> str:
    """Returns the attention kernel of a run, see llada_jax.models.attention.choose.

    Raises:
        UserError: the kernel cannot attend to the rows of the config, or to rows that the mesh
            splits.
    """
    T, buckets = config.data.sequence_length, config.data.length_buckets
    num_parts = sharding.axis_size(mesh, "act_position")
    choose_for = functools.partial(
        choose,
        config.model.attention,
        platform=sharding.kernel_platform(mesh),
        # the two parts of a split row are segments too
        packed=not config.data.attend_across_documents or config.data.split_probability > 0,
        mask=mask,
        head_dim=a.head_dim,
        dtype=dtype,
    )
    attention = choose_for(sequence_length=T // num_parts)
    # what XLA compiles takes any length
    for length in () if attention.startswith("xla") else buckets:
        if choose_for(sequence_length=length // num_parts) != attention:
            raise UserError(
                f"config.data.length_buckets: the attention kernel {attention!r}, which suits "
                f"{T} tokens, does not take {length}; choose multiples of {128 * num_parts}."
            )
    heads = {
        "num_heads": a.num_heads // sharding.axis_size(mesh, "heads"),
        "num_kv_heads": a.num_kv_heads // sharding.axis_size(mesh, "kv_heads"),
    }
    is_whole = num_parts == 1
    if not is_whole:
        check_exchange(attention, mask, **heads, num_parts=num_parts)
        is_whole = exchange_for(attention, mask, **heads, num_parts=num_parts) == "heads"
    for length in (*buckets, T):
        columns = length if is_whole else length // num_parts
        check_shape(attention, sequence_length=columns, head_dim=a.head_dim, dtype=dtype)
    return attention


def resolved_remat(config: Any, parts: Any, mesh: Mesh) -> str:
    """Returns config.model.remat, or what "auto" stands for on the devices of the mesh.

    Args:
        parts: a Recipe, or what llada_jax.training.memory.memory_of reads of one.
    """
    if config.model.remat != AUTO:
        return config.model.remat
    chip = hardware.accelerator_of(mesh.devices.flat[0])
    usable = chip.usable_bytes_per_device if chip else None
    return choose_remat(parts, workload_of(config), dict(mesh.shape), usable)


def workload_of(config: Any) -> Workload:
    """Returns what the estimates of memory and time read of a config."""
    return Workload(
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        num_microbatches=config.optimizer.gradient_accumulation,
        remat=config.model.remat,
        nll_chunk=config.model.nll_chunk,
    )


def optimizer_knobs(knobs: Any) -> dict:
    """Returns the arguments of make_optimizer from config.optimizer."""
    elsewhere = ("ema_decay", "gradient_accumulation", "gradient_dtype", "max_skipped_updates")
    return {name: value for name, value in knobs.items() if name not in elsewhere}


def make_train_step(
    objective: Objective,
    nll_fn: Callable,
    optimizer: optax.GradientTransformation,
    schedule: Callable,
    *,
    seed: int,
    num_rows: int,
    num_microbatches: int,
    ema_decay: float,
    skip_nonfinite: bool = False,
) -> Callable:
    """Returns train_step(state, batch) -> state, a pure function to be jitted.

    Args:
        num_rows: of the global batch.
        num_microbatches: gradients of this many parts are summed; the update is that of the whole
            batch, because sums and counts are added up first and divided once.
        skip_nonfinite: a step whose loss or gradient is not finite changes nothing but the step
            number and the metric "skipped", the share of such steps.
    """

    # a bare optax optimizer, as in tests, takes no step
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(state: TrainState, batch: dict) -> TrainState:
        # 1. Everything random about this step follows from (seed, step, row). The key is folded
        # from the step and never carried along: there is no random state that a checkpoint could
        # forget, and a resumed run draws what the straight run draws.
        key = key_for("corruption", seed, state.step)

        def loss_of(params: dict, part: dict) -> tuple[Array, tuple[Array, dict]]:
            part = dict(part)
            rows = part.pop("row")
            # frozen is closed over, not an argument: gradients see params alone
            loss_sum, count, metrics = objective.loss(
                nll_fn,
                params,
                part,
                key,
                rows,
                num_rows=num_rows,
                step=state.step,
                frozen=state.frozen,
            )
            return loss_sum, (count, metrics)

        # 2. Sums of loss, gradient and metrics, microbatch by microbatch. Each row carries its
        # number in the global batch, so that it draws the same noise in whichever part it lands.
        parts = split_microbatches({**batch, "row": jnp.arange(num_rows)}, num_microbatches)
        first = jax.tree.map(lambda array: array[0], parts)
        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)

        def add_part(sums: Any, part: dict) -> tuple[Any, None]:
            # inside the scan the partitioner no longer sees how the batch was placed
            part = {
                name: constrain(array, "act_batch", *["act_position"] * (array.ndim - 1))
                for name, array in part.items()
            }
            (_, (count, metrics)), grads = value_and_grad(state.params, part)
            return jax.tree.map(jnp.add, sums, (grads, count, metrics)), None

        # One microbatch does without a scan, which would keep a second copy of the gradient.
        if num_microbatches == 1:
            (_, (count, metrics)), grads = value_and_grad(state.params, first)
        else:
            own = {name: sums for name, sums in state.metrics.items() if name not in STEP_METRICS}
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (state.params, jnp.float32(0), own)
            )
            (grads, count, metrics), _ = jax.lax.scan(add_part, zeros, parts)
        # 3. The one division: by the count of the global batch. Means of microbatches or of devices
        # would weigh a token by how full the part is that it came in; and as the whole batch is one
        # array to this function, the sums above are global ones already.
        grads = jax.tree.map(lambda grad: grad / jnp.maximum(count, 1.0), grads)
        # 4. The update.
        with jax.named_scope(OPTIMIZER):
            updates, opt_state = optimizer.update(
                grads, state.opt_state, state.params, step=state.step
            )
            params = optax.apply_updates(state.params, updates)
        ema = {}
        if state.ema:
            decay = warmed_up_decay(ema_decay, state.step)
            average = lambda old, new: decay * old + (1.0 - decay) * new  # noqa: E731
            ema = jax.tree.map(average, state.ema, params)
        # 5. What is logged: sums and counts over the steps since the last log line.
        grad_norm, one = optax.tree.norm(grads), jnp.float32(1)
        metrics |= {
            "grad_norm": (grad_norm, one),
            # after the update: the norm of what a checkpoint holds
            "param_norm": (optax.tree.norm(params), one),
            "learning_rate": (jnp.float32(schedule(state.step)), one),
        }
        # 6. A step that is not finite is undone. Its metrics become zeros with a count of zero, so
        # that the means of the log line are those of the other steps: one NaN in the sums would
        # make NaN of all of them. The choice is made on the device; asking the host would cost a
        # round trip at every step.
        is_skipped = jnp.bool_(False)
        if skip_nonfinite:
            is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"][0])
            is_skipped = ~is_finite
            old = (state.params, state.opt_state, state.ema, jax.tree.map(jnp.zeros_like, metrics))
            params, opt_state, ema, metrics = jax.tree.map(
                lambda n, o: jnp.where(is_finite, n, o), (params, opt_state, ema, metrics), old
            )
        # always there, because the knob may change within a run and the state's shape must not
        metrics["skipped"] = (jnp.float32(is_skipped), one)
        metrics = jax.tree.map(jnp.add, state.metrics, metrics)
        return TrainState(state.step + 1, params, opt_state, ema, metrics, state.frozen)

    return train_step


def warmed_up_decay(ema_decay: float, step: Array) -> Array:
    """Returns the decay of the moving average in the update number `step`, counted from 0:
    min(ema_decay, (1 + step) / (10 + step)).

    The average starts at the initialisation, which with a constant decay of 0.9999 would still be
    96% of it after 400 steps. So it looks back over a tenth of the steps until that is as long as
    the constant decay does, and the initialisation's share falls as step**-9.
    """
    return jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))


def split_microbatches(batch: dict, num_microbatches: int) -> dict:
    """Returns the batch with a leading dim of microbatches: microbatch i takes the rows 2 p and 2 p
    + 1 with p mod A == i, or, where a device has an odd number of rows in a microbatch, the rows r
    with r mod A == i.

    Strided, so that every device keeps the rows that it has. Contiguous parts would lie on a few
    devices each, and all rows would have to move before each part. By twos, because the times of
    two such rows mirror each other (llada_jax.objectives.corruption.mirrored_strata).
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else sharding.axis_size(mesh, "act_batch")

    def split(array: Array) -> Array:
        num_rows = array.shape[0] // num_microbatches
        width = 2 if num_rows % (2 * ways) == 0 else 1
        strided = array.reshape(num_rows // width, num_microbatches, width, *array.shape[1:])
        return jnp.moveaxis(strided, 1, 0).reshape(num_microbatches, num_rows, *array.shape[1:])

    return jax.tree.map(split, batch)


def compile_step(
    recipe: Recipe, shape: tuple[int, int], compiler_options: dict | None = None
) -> Any:
    """Compiles (state, batch) -> (state, a small array that is ready when the step is) for batches
    of a shape [B, T].

    Call it within `jax.set_mesh`.
    """

    def step(state: TrainState, batch: dict) -> Any:
        state = recipe.train_step(state, batch)
        # the state itself is donated to the next step, and cannot be waited for after that
        return state, state.step + 0

    batch = {
        name: jax.ShapeDtypeStruct(
            field.shape(*shape),
            field.dtype,
            sharding=sharding.leading_dims(recipe.batch_sharding, len(field.dims)),
        )
        for name, field in recipe.objective.batch.items()
    }
    shardings = jax.tree.map(lambda leaf: leaf.sharding, recipe.abstract)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(recipe.abstract, batch).compile(compiler_options)
