"""`llada-jax train`: from a config and a workdir to a trained, resumable model."""

import contextlib
import functools
import hashlib
import math
import tempfile
import time
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from llada_jax import checkpoint as checkpoints
from llada_jax import distributed, hardware, likelihood, pretrained, remote, sharding
from llada_jax import metrics as measure
from llada_jax.command_line import Parser
from llada_jax.config import AUTO, load_config, parse_sources
from llada_jax.data.loader import describe, heldout_batches, train_batches
from llada_jax.data.records import read_dataset
from llada_jax.data.skipped import as_rollbacks, batch_of_step, read_rollbacks
from llada_jax.errors import LostPeer, NumericsError, Preempted, UserError, reason
from llada_jax.file_lock import only_run_in
from llada_jax.goodput import Ledger
from llada_jax.local_checkpoint import LocalCheckpoints
from llada_jax.metrics import format_bytes, format_count
from llada_jax.models.transformer import num_matmul_parameters, num_parameters
from llada_jax.preemption import StopRequest
from llada_jax.recipe import Recipe, compile_step, make_recipe
from llada_jax.run_record import check_continues, check_fits, run_record, write_run
from llada_jax.samplers.denoise import check_schedule
from llada_jax.samplers.text import generate_text
from llada_jax.state import create_state, make_model
from llada_jax.tokenizer import SPECIAL_IDS, Tokenizer, load_same

MAX_STEPS_IN_FLIGHT = 2  # dispatched but not finished: enough to hide the host, few enough to stop promptly


def main(argv: list[str]) -> None:
    parser = Parser(
        "train",
        "Trains a model from a config file, or continues the run that the workdir holds.",
        "llada-jax train --config configs/tiny.py --workdir runs/tiny --config.num_steps=200",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="Python file with get_config()")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run lives; local or a URL")
    parser.add_argument("--config.KEY", metavar="VALUE", dest="_", help="changes one knob, e.g. --config.seed=1")
    checkpoints.drop_echoes()
    overrides = [word.removeprefix("--config.") for word in argv if word.startswith("--config.")]
    for override in overrides:
        if "=" not in override:
            raise UserError(f"--config.{override} has no value; write --config.{override}=VALUE.")
    args = parser.parse_args([word for word in argv if not word.startswith("--config.")])
    if not args.workdir:
        raise UserError("--workdir is empty; give the directory where the run is to live.")
    train(load_config(args.config, overrides), args.workdir)


def train(config, workdir: str) -> None:
    """Runs a config in a workdir until its last step; continues where the workdir's latest checkpoint stands.

    Raises:
        UserError: config, data, mesh and checkpoint do not fit together, or the disk refuses.
        NumericsError: the loss or the gradient is not finite.
        Preempted: SIGTERM or Ctrl-C; the state has been saved.
        LostPeer: another process of the run is gone.
    """
    clock = measure.Clock()
    # 1. Devices. The compilation cache comes first: it must be set before anything is compiled.
    jax.config.update("jax_compilation_cache_dir", compilation_cache(config.log.compilation_cache))
    distributed.initialize(
        initialization_timeout_s=config.distributed.initialization_timeout_s,
        heartbeat_timeout_s=config.distributed.heartbeat_timeout_s,
    )
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh), StopRequest() as stop, contextlib.ExitStack() as until_end:
        try:
            train_on(mesh, config, workdir, clock, stop, until_end)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if not distributed.is_lost_peer(error):
                raise
            raise LostPeer(
                f"Another process of this run is gone ({str(error).splitlines()[0]}); the same command continues."
            ) from error


def train_on(
    mesh, config, workdir: str, clock: measure.Clock, stop: StopRequest, until_end: contextlib.ExitStack
) -> None:
    """The rest of `train`: within the mesh, and with its signals caught from before the first compilation."""
    is_first, timeout_s = jax.process_index() == 0, config.distributed.step_timeout_s
    # 2. Data and tokenizer.
    sources = parse_sources(config.data.path)
    B, T = config.data.batch_size, config.data.sequence_length
    summaries = describe(sources, sequence_length=T)
    written_with = read_dataset(sources[0][0]).tokenizer["fingerprint"]
    tokenizer = load_same(epath.Path(sources[0][0]) / "tokenizer", written_with, of="the records")
    bytes_per_token = sum(s.share * s.bytes_per_token["train"] for s in summaries)

    # 3. Model, objective and optimizer, none of them with numbers yet.
    recipe = make_recipe(config, tokenizer, mesh)
    model, abstract, num_steps = recipe.model, recipe.abstract, recipe.num_steps
    architecture, batch_sharding = recipe.architecture, recipe.batch_sharding
    is_causal = config.objective.name == "autoregressive"
    if config.samples.every_steps:  # now, and not after hours of training
        knobs = {name: config.samples[name] for name in ("gen_length", "block_length", "steps", "temperature")}
        check_schedule(**knobs, cfg_scale=0.0)
    # a canvas is padded on the left and of any length, which only the reference attention takes
    sampling_model = make_model(architecture, dtype=recipe.dtype, attention="xla")

    # 4. The state, from the first of four places that has one.
    make_workdir(workdir)
    if is_first:
        until_end.enter_context(only_run_in(workdir))
    saved = checkpoints.Checkpoints(
        workdir, keep=config.checkpoint.keep, keep_every_steps=config.checkpoint.keep_every_steps
    )
    data = [{"directory": s.directory, "fingerprint": s.fingerprint, "share": s.share} for s in summaries]
    run = run_record(config, architecture, tokenizer, data=data)
    local = None
    if config.checkpoint.local_directory:
        local = LocalCheckpoints(config.checkpoint.local_directory, saved.directory.parent)
        until_end.callback(local.close)
    rollbacks = read_rollbacks(workdir)
    create = functools.partial(create_state, model, recipe.optimizer, abstract)
    state, origin, theirs = first_state(config, saved, local, run, rollbacks.count, abstract, create)
    start_step = int(state.step)
    if not rollbacks.count and "rollbacks" in theirs:  # of the run that was restored here
        rollbacks = as_rollbacks(theirs["rollbacks"])
    run["rollbacks"] = rollbacks._asdict()
    if local:
        local.drop_after(start_step)
    if start_step > num_steps:
        raise UserError(
            f"The run in {workdir} is at step {start_step} and the config ends at {num_steps}; raise config.num_steps, or "
            "start a new --workdir from a checkpoint with config.checkpoint.restore=WORKDIR@STEP."
        )
    if (epath.Path(workdir) / "tokenizer" / SPECIAL_IDS).exists():
        load_same(epath.Path(workdir) / "tokenizer", tokenizer.fingerprint, of="the records")
    writer = measure.MetricsWriter(
        workdir, enabled=is_first, resume_step=start_step if start_step else None, tensorboard=config.log.tensorboard
    )
    if is_first:
        with writing(workdir):
            write_run(workdir, tokenizer, run)
    ledger = Ledger(workdir, clock, start_step=start_step, enabled=is_first)

    # 5. The compiled step.
    progress = measure.Progress(num_steps=num_steps, start_step=start_step, enabled=is_first)
    for line in plan(config, recipe, mesh, summaries, origin):
        progress.say(line)
    if start_step >= num_steps:
        progress.say(f"the run is complete: step {start_step} of {num_steps}")
    else:
        check_same_everywhere(config)
        with clock.span("compile"):
            began = time.perf_counter()
            compiled = compile_step(recipe, (B, T))
            distributed.meet("compiled", timeout_s=timeout_s)
            progress.say(compilation_line(compiled, time.perf_counter() - began))
        if stop.reached(start_step):
            raise Preempted(f"asked to stop before step {start_step + 1}: nothing is lost; the same command continues.")

    # 6. The loop.
    rows = sharding.local_rows(batch_sharding, (B, T))
    batches = train_batches(
        sources, batch_size=B, sequence_length=T, seed=config.seed, rows=rows,
        start_step=batch_of_step(start_step + 1, rollbacks.skipped) - 1,
        random_length_probability=config.data.random_length_probability,
        attend_across_documents=config.data.attend_across_documents,
        num_threads=config.data.num_threads, prefetch=config.data.prefetch,
    )  # fmt: skip
    evaluate = functools.partial(
        evaluate_heldout, config, model, tokenizer, sources, summaries, batch_sharding=batch_sharding
    )
    flops_per_token = measure.flops_per_token(
        num_matmul_parameters(architecture), architecture.num_layers, architecture.num_heads * architecture.head_dim, T,
        causal=is_causal,
    )  # fmt: skip
    zero_metrics = jax.jit(
        lambda sums: jax.tree.map(jnp.zeros_like, sums),
        out_shardings=jax.tree.map(lambda s: s.sharding, abstract.metrics),
    )
    in_flight, logged_step, is_profiling = deque(), start_step, False
    profile_start = config.log.profile_at_step
    # the profiler writes to a disk, from where it is copied to a remote workdir
    profile, is_remote = epath.Path(workdir) / "profile", remote.is_remote(workdir)
    trace = until_end.enter_context(tempfile.TemporaryDirectory()) if is_remote else str(profile)
    profile_end = min(profile_start + config.log.profile_num_steps - 1, num_steps) if profile_start else 0
    is_due = lambda step, every: every > 0 and (step % every == 0 or step == num_steps)  # noqa: E731
    clock.start_training()
    with progress, distributed.Watchdog(timeout_s) as watchdog:
        evaluate = functools.partial(
            evaluate, on_batch=lambda: watchdog.beat("a held-out batch"),
            on_compiled=functools.cache(functools.partial(distributed.meet, "evaluation", timeout_s=timeout_s)),
        )  # fmt: skip
        for step in range(start_step + 1, num_steps + 1):
            if step == profile_start:
                options = jax.profiler.ProfileOptions()
                # that tracer hooks into all threads, and crashes when one of them ends just then
                options.python_tracer_level = 0
                jax.profiler.start_trace(trace, profiler_options=options)
                is_profiling = True
            with clock.span("data"):
                batch = sharding.place_batch(next(batches), rows, B, batch_sharding)
            state, finished = compiled(state, batch)
            in_flight.append(finished)
            if len(in_flight) > MAX_STEPS_IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
            watchdog.beat(f"step {step} was begun")
            progress.advance(step)
            must_stop = stop.reached(step)
            if is_profiling and (step == profile_end or must_stop):
                jax.block_until_ready(state.step)
                jax.profiler.stop_trace()
                if is_remote:
                    remote.upload(trace, profile)
                is_profiling = False
            must_save = must_stop or is_due(step, config.checkpoint.every_steps)
            must_copy = local and step % config.checkpoint.local_every_steps == 0

            # 6a. Metrics: written before the checkpoint of the same step, so that a resumed run can rely on them.
            if must_save or must_copy or is_due(step, config.log.every_steps):
                sums = jax.device_get(state.metrics)
                check_finite(sums, interval=(logged_step + 1, step), saved=saved)
                check_skipped(sums, config.optimizer.max_skipped_updates, interval=(logged_step + 1, step))
            # an interval in which every update was skipped has no means, and goes on
            if is_due(step, config.log.every_steps) and sums["loss"][1] > 0:
                numbers = measure.means(sums)
                if not config.optimizer.max_skipped_updates:
                    del numbers["skipped"]
                numbers["bits_per_byte"] = measure.bits_per_byte(
                    numbers["nll" if is_causal else "nelbo"], bytes_per_token=bytes_per_token
                )
                speed = measure.speed(
                    clock, num_steps=step - logged_step, tokens_per_step=B * T, flops_per_token=flops_per_token,
                    num_devices=mesh.size, peak_flops=hardware.peak_flops(mesh.devices.flat[0]),
                )  # fmt: skip
                writer.write(
                    step,
                    {"train": {**numbers, "tokens": step * B * T}, "speed": speed | saved.measured | ledger.report()},
                )
                progress.report(step, numbers, speed)
                state = state._replace(metrics=zero_metrics(state.metrics))
                logged_step = step

            # 6b. Held-out text and samples.
            if config.evaluation.every_steps and step % config.evaluation.every_steps == 0 and step < num_steps:
                jax.block_until_ready(state.step)
                with clock.span("evaluation"):
                    for group, bound in evaluate(state.ema or state.params, config.evaluation.num_batches).items():
                        writer.write(step, {group: bound})
                        progress.say(f"step {step} {group} {bound_line(bound)}")
            if is_due(step, config.samples.every_steps):
                with clock.span("samples"):
                    text = sample_markdown(
                        config.samples, sampling_model, state.ema or state.params, tokenizer,
                        on_step=lambda *_: watchdog.beat("a denoising step"),
                    )  # fmt: skip
                    writer.text(step, "samples", text)

            # 6c. Save; then, if asked to, stop.
            if must_save or must_copy:
                record = {**run, "step": step, "tokens": step * B * T}
                with clock.span("checkpoint"):
                    writer.flush()
                    ledger.mark(step)
                    if must_copy:
                        local.save(state, record)
                    if must_save:
                        saved.save(state, record)
            if must_save:
                if must_stop and step < num_steps:
                    saved.close()
                    writer.close()
                    raise Preempted(f"asked to stop: step {step} of {num_steps} is saved; the same command continues.")
                watchdog.beat(f"step {step} was given to the disk")
                progress.say(f"saving step {step}")

        # 7. The whole held-out split, once.
        with clock.span("checkpoint"):
            saved.wait()
        if not on_first_process(lambda: measure.is_over(measure.read_lines(workdir), num_steps)):
            bounds = evaluate(state.ema or state.params, config.evaluation.final_num_batches)
            for group, bound in bounds.items():
                progress.say(f"final {group} {bound_line(bound)}")
            if bounds:
                writer.write(num_steps, {group.replace("heldout", "final"): bound for group, bound in bounds.items()})
        ledger.mark(num_steps)
        progress.say(ledger.line())
    saved.close()
    writer.close()


# ---------------------------------------------------------------------------------------------------- what main calls


def compilation_cache(setting: str) -> str | None:
    """Returns the directory that config.log.compilation_cache means; None: nothing is kept."""
    if setting == AUTO:
        return jax.config.jax_compilation_cache_dir or str(Path.home() / ".cache/llada_jax")
    return setting or None


def make_workdir(workdir: str) -> None:
    """Creates the workdir; raises UserError when it cannot be written."""
    path = remote.path_of(workdir)
    with writing(workdir):
        path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            probe = path / ".writable"
            probe.write_text("")
            probe.unlink()


@contextlib.contextmanager
def writing(workdir: str):
    """Turns what the file system refuses into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The workdir {workdir} cannot be written ({reason(error)}); choose another --workdir, free space, or "
            "change its permissions."
        ) from error


def first_state(config, saved, local, run: dict, num_rollbacks: int, abstract, create):
    """Returns the state to start from, where it comes from, and the record of the run that it continues ({} if none).

    The order: 1. the latest step of this workdir or, where they are newer, of the local copies;
    2. config.checkpoint.restore, the full state of another run; 3. config.checkpoint.init_from, the weights of another
    run or of a Hugging Face directory; 4. the seed.
    """
    note = ""
    if local:
        state, theirs, note = local.restore(abstract, newer_than=saved.steps[-1] if saved.steps else 0)
        note = note and f" ({note})"
        if state is not None and theirs.get("rollbacks", {}).get("count", 0) < num_rollbacks:
            state, note = None, " (the local copies are from before the rollback)"
        if state is not None:
            check_continues(theirs, run, local.directory)
            return state, f"step {int(state.step)} of {local.directory}{note}", theirs
    if saved.steps:
        step = saved.steps[-1]
        theirs = saved.run(step)
        check_continues(theirs, run, saved.directory)
        return saved.restore(step, abstract), f"step {step} of {saved.directory.parent}{note}", theirs
    if config.checkpoint.restore:
        other, step = checkpoints.find(config.checkpoint.restore)
        theirs = other.run(step)
        check_continues(theirs, run, other.directory)
        origin = f"step {step} of {other.directory.parent} (config.checkpoint.restore)"
        return other.restore(step, abstract), origin, theirs
    if config.checkpoint.init_from:
        other, step = pretrained.find(config.checkpoint.init_from, causal=config.objective.name == "autoregressive")
        theirs = other.run(step)
        check_fits(theirs, run, other.directory)
        has_ema = theirs["config"]["optimizer"]["ema_decay"] > 0
        params = other.restore_params(step, abstract.params, ema=has_ema)
        state = create(seed=config.seed)._replace(params=params)
        if state.ema:
            state = state._replace(ema=jax.tree.map(jnp.copy, params))
        # one pass through jit makes buffers that the train step may take over (see Checkpoints.restore)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = jax.jit(lambda s: s, out_shardings=shardings, donate_argnums=0)(state)
        return state, f"weights of step {step} of {config.checkpoint.init_from} (config.checkpoint.init_from)", {}
    return create(seed=config.seed), f"initialisation from seed {config.seed}{note}", {}


def on_first_process(question) -> bool:
    """Returns the first process' answer in every process: files that it writes may not be seen by the others yet."""
    answer = question() if jax.process_index() == 0 else False
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def check_same_everywhere(config) -> None:
    """Raises UserError when the processes of a run were started with different configs, which would hang later."""
    if jax.process_count() > 1:
        digest = np.frombuffer(hashlib.sha256(repr(config).encode()).digest(), np.uint8)
        try:
            multihost_utils.assert_equal(digest, "config")
        except AssertionError as error:
            raise UserError(
                f"Process {jax.process_index()} of {jax.process_count()} was started with another config than the first; "
                "start all of them with the same command."
            ) from error


def plan(config, recipe: Recipe, mesh, summaries, origin) -> list[str]:
    """Returns the lines printed before the first step: the run in numbers, with their arithmetic."""
    a, abstract, num_steps = recipe.architecture, recipe.abstract, recipe.num_steps
    B, T = config.data.batch_size, config.data.sequence_length
    num_matmul = num_matmul_parameters(a)
    d_attention = a.num_heads * a.head_dim
    is_causal = config.objective.name == "autoregressive"
    flops = measure.flops_per_token(num_matmul, a.num_layers, d_attention, T, causal=is_causal)
    device = mesh.devices.flat[0]
    peak = hardware.peak_flops(device)
    state_bytes = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)
    )
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    accumulation = config.optimizer.gradient_accumulation
    attention_term = f"{6 if is_causal else 12} * {a.num_layers} layers * {d_attention} * {T}"
    lines = [
        f"start       {origin}",
        f"model       {format_count(num_parameters(a))} parameters, {format_count(num_matmul)} in matrix products",
        f"step        {B} rows * {T} = {B * T:,} tokens"
        + (f" in {accumulation} microbatches" if accumulation > 1 else ""),
        f"run         {num_steps:,} steps = {format_count(num_steps * B * T)} tokens, "
        f"{format_count(flops * num_steps * B * T)} FLOPs",
        f"FLOPs       6 * {format_count(num_matmul)} + {attention_term} = {format_count(flops)} a token",
        f"mesh        {axes} ({mesh.size} x {device.device_kind}, {jax.process_count()} process)",
        f"memory      {format_bytes(state_bytes)} a device for parameters and optimizer state",
        f"compute     {jnp.dtype(recipe.dtype).name}, attention {recipe.attention}, remat {config.model.remat}, "
        + (
            f"peak {peak / 1e12:.0f} TFLOP/s a device"
            if peak
            else f"no MFU: the peak of {device.device_kind!r} is unknown"
        ),
    ]
    for s in summaries:
        lines.append(
            f"data        {s.directory}: {format_count(s.num_tokens)} tokens in {s.num_records:,} rows, "
            f"{s.bytes_per_token['train']:.2f} bytes a token, {s.num_epochs(num_steps * B):.2f} epochs"
        )
    replicated = sharding.replicated_by_accident(abstract.params, mesh)
    if replicated:
        lines.append(f"warning     whole on every device although the mesh shards: {', '.join(replicated)}")
    return lines


def compilation_line(compiled, seconds: float) -> str:
    memory = compiled.memory_analysis()
    if memory is None:
        return f"compiled    in {measure.format_seconds(seconds)}"
    temporary = format_bytes(memory.temp_size_in_bytes)
    return f"compiled    in {measure.format_seconds(seconds)}; {temporary} a device for activations and gradients"


def check_finite(sums: dict, *, interval: tuple[int, int], saved) -> None:
    """Raises NumericsError that names the steps in which loss or gradient stopped being finite."""
    for name in ("loss", "grad_norm", "param_norm"):
        if not np.isfinite(sums[name][0]):
            saved.wait()
            good = (
                f"the last good checkpoint is step {saved.steps[-1]}" if saved.steps else "no checkpoint was saved yet"
            )
            raise NumericsError(
                f"{name} is {sums[name][0]} somewhere in steps {interval[0]} to {interval[1]}; "
                f"{good}: lower config.schedule.learning_rate and start the same command again."
            )


def check_skipped(sums: dict, limit: int, *, interval: tuple[int, int]) -> None:
    """Raises NumericsError when more updates of an interval were skipped than config.optimizer.max_skipped_updates."""
    num_skipped = int(sums["skipped"][0])
    if num_skipped > limit:
        raise NumericsError(
            f"{num_skipped} updates in steps {interval[0]} to {interval[1]} were not finite and were skipped, and "
            f"config.optimizer.max_skipped_updates allows {limit}; lower config.schedule.learning_rate, or leave these data "
            "out with `llada-jax rollback`."
        )


def evaluate_heldout(
    config, model, tokenizer, sources, summaries, params, num_batches, *, batch_sharding, on_batch, on_compiled
) -> dict:
    """Returns {group: {nelbo or nll, standard_error, bits_per_byte, ...}} for the held-out split of each dataset.

    In batches as large as a microbatch of training, which is known to fit.
    """
    B, T = config.data.batch_size // config.optimizer.gradient_accumulation, config.data.sequence_length
    rows = sharding.local_rows(batch_sharding, (B, T))
    objective, name = heldout_objective(config.objective.name, tokenizer)
    results = {}
    for number, ((directory, _), summary) in enumerate(zip(sources, summaries)):
        if "heldout" not in summary.bytes_per_token:
            continue
        batches = heldout_batches(
            directory, batch_size=B, sequence_length=T, rows=rows, max_batches=num_batches or None,
            attend_across_documents=config.data.attend_across_documents,
        )  # fmt: skip

        def placed(batches=batches):
            for batch in batches:
                on_batch()
                yield sharding.place_batch(batch, rows, B, batch_sharding)

        bound = likelihood.bound(
            objective, model.nll_fn, params, placed(), name=name, num_rows=B, on_compiled=on_compiled
        )
        group = "heldout" if len(sources) == 1 else f"heldout_{number}_{Path(directory).name}"
        error = {} if math.isnan(bound.standard_error) else {"standard_error": bound.standard_error}
        results[group] = {
            name: bound.nats_per_token,
            **error,
            "bits_per_byte": measure.bits_per_byte(
                bound.nats_per_token, bytes_per_token=summary.bytes_per_token["heldout"]
            ),
        }
    return results


@functools.cache
def heldout_objective(name: str, tokenizer: Tokenizer):
    """Returns the same objective in every call, so that its compiled form is found again."""
    return likelihood.bound_objective(name, mask_id=tokenizer.mask_id, bos_id=tokenizer.bos_id)


def bound_line(bound: dict) -> str:
    nats = bound.get("nelbo", bound.get("nll"))
    error = f" +- {bound['standard_error']:.3f}" if "standard_error" in bound else ""
    return f"{bound['bits_per_byte']:.3f} bits/byte ({nats:.3f} nats/token{error})"


def sample_markdown(knobs, model, params, tokenizer, *, on_step) -> str:
    """Returns generated texts as Markdown for TensorBoard."""
    completions = generate_text(
        model.logits_fn, params, tokenizer, list(knobs.prompts), gen_length=knobs.gen_length, steps=knobs.steps,
        block_length=knobs.block_length, temperature=knobs.temperature, on_step=on_step,
    )  # fmt: skip
    return "\n\n---\n\n".join(f"**{c.prompt}**{c.text}" for c in completions)
