"""`llada-jax train`: from a config and a workdir to a trained, resumable model."""

import contextlib
import dataclasses
import functools
import tempfile
import time
from collections import deque
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from llada_jax.checkpoints.host_copies import LocalCheckpoints
from llada_jax.checkpoints.orbax_patches import drop_echoes
from llada_jax.checkpoints.record import run_record, write_run
from llada_jax.checkpoints.workdir import Checkpoints
from llada_jax.cluster import distributed, hardware, sharding
from llada_jax.cluster.stop_request import StopRequest
from llada_jax.config import AUTO, load_config, own_parts, parse_sources
from llada_jax.data.loader import describe, train_batches
from llada_jax.data.records import read_dataset
from llada_jax.data.tokenizer import SPECIAL_IDS, load_same
from llada_jax.errors import LostPeer, NumericsError, Preempted, UserError
from llada_jax.models.flops import flops_per_token
from llada_jax.models.model import abstract_parameters, make_model
from llada_jax.models.transformer import num_matmul_parameters
from llada_jax.parts import provenance
from llada_jax.run.clock import Clock, speed_metrics
from llada_jax.run.goodput import Ledger
from llada_jax.run.heldout import bound_line, evaluate_heldout
from llada_jax.run.metrics_file import MetricsWriter, is_over, means, read_lines
from llada_jax.run.progress import Progress
from llada_jax.run.rollbacks import as_rollbacks, batch_of_step, read_rollbacks
from llada_jax.run.start import (
    check_same_everywhere,
    first_state,
    make_workdir,
    on_first_process,
    writing,
)
from llada_jax.run.startup_lines import compilation_line, startup_lines
from llada_jax.samplers.denoise import check_schedule
from llada_jax.samplers.text import generate_text
from llada_jax.storage import remote
from llada_jax.storage.locks import only_run_in
from llada_jax.training.state import create_state
from llada_jax.training.step import compile_step, make_recipe
from llada_jax.units import bits_per_byte
from llada_jax.verbs.command_line import Parser

MAX_STEPS_IN_FLIGHT = (
    2  # dispatched but not finished: enough to hide the host, few enough to stop promptly
)


def main(argv: list[str]) -> None:
    parser = Parser(
        "train",
        "Trains a model from a config file, or continues the run that the workdir holds.",
        "llada-jax train --config configs/tiny.py --workdir runs/tiny --config.num_steps=200",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="Python file with get_config()"
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="where the run lives; local or a URL"
    )
    parser.add_argument(
        "--config.KEY", metavar="VALUE", dest="_", help="changes one knob, e.g. --config.seed=1"
    )
    drop_echoes()
    overrides = [word.removeprefix("--config.") for word in argv if word.startswith("--config.")]
    for override in overrides:
        if "=" not in override:
            raise UserError(f"--config.{override} has no value; write --config.{override}=VALUE.")
    args = parser.parse_args([word for word in argv if not word.startswith("--config.")])
    if not args.workdir:
        raise UserError("--workdir is empty; give the directory where the run is to live.")
    config = load_config(args.config, overrides)
    train(config, args.workdir, config_text=Path(args.config).read_text())


def train(config, workdir: str, *, config_text: str = "") -> None:
    """Runs a config in a workdir until its last step; continues where the workdir's latest
    checkpoint stands.

    Raises:
        UserError: config, data, mesh and checkpoint do not fit together, or the disk refuses.
        NumericsError: the loss or the gradient is not finite.
        Preempted: SIGTERM or Ctrl-C; the state has been saved.
        LostPeer: another process of the run is gone.
    """
    clock = Clock()
    # 1. Devices. The compilation cache comes first: it must be set before anything is compiled.
    jax.config.update("jax_compilation_cache_dir", compilation_cache(config.log.compilation_cache))
    distributed.initialize(
        initialization_timeout_s=config.distributed.initialization_timeout_s,
        heartbeat_timeout_s=config.distributed.heartbeat_timeout_s,
    )
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh), StopRequest() as stop, contextlib.ExitStack() as until_end:
        try:
            train_on(mesh, config, workdir, clock, stop, until_end, config_text)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if not distributed.is_lost_peer(error):
                raise
            raise LostPeer(
                f"Another process of this run is gone ({str(error).splitlines()[0]}); the same "
                "command continues."
            ) from error


def train_on(
    mesh,
    config,
    workdir: str,
    clock: Clock,
    stop: StopRequest,
    until_end: contextlib.ExitStack,
    config_text: str = "",
) -> None:
    """The rest of `train`: within the mesh, and with its signals caught from before the first
    compilation.
    """
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
    objective = recipe.objective
    if config.samples.every_steps:  # now, and not after hours of training
        knobs = {
            name: config.samples[name]
            for name in ("gen_length", "block_length", "steps", "temperature")
        }
        check_schedule(**knobs, cfg_scale=0.0)
    # a canvas is padded on the left and of any length, which only the reference attention takes
    sampling_model = make_model(architecture, dtype=recipe.dtype, attention="xla")

    # 4. The state, from the first of four places that has one.
    make_workdir(workdir)
    if is_first:
        until_end.enter_context(only_run_in(workdir))
    saved = Checkpoints(
        workdir, keep=config.checkpoint.keep, keep_every_steps=config.checkpoint.keep_every_steps
    )
    data = [
        {"directory": s.directory, "fingerprint": s.fingerprint, "share": s.share}
        for s in summaries
    ]
    run = run_record(
        config,
        architecture,
        tokenizer,
        data=data,
        recorded_mask=objective.mask,
        parts=provenance(own_parts(config)),
    )
    local = None
    if config.checkpoint.local_directory:
        local = LocalCheckpoints(config.checkpoint.local_directory, saved.directory.parent)
        until_end.callback(local.close)
    rollbacks = read_rollbacks(workdir)
    create = functools.partial(
        create_state, model, recipe.optimizer, abstract, split=objective.split_parameters
    )
    state, origin, theirs = first_state(
        config,
        saved,
        local,
        run,
        rollbacks.count,
        abstract,
        abstract_parameters(model, mesh),
        create,
    )
    start_step = int(state.step)
    if not rollbacks.count and theirs and theirs.rollbacks:  # of the run that was restored here
        rollbacks = as_rollbacks(theirs.rollbacks)
    run = dataclasses.replace(run, rollbacks=rollbacks._asdict())
    if local:
        local.drop_after(start_step)
    if start_step > num_steps:
        raise UserError(
            f"The run in {workdir} is at step {start_step} and the config ends at {num_steps}; "
            "raise config.num_steps, or "
            "start a new --workdir from a checkpoint with config.checkpoint.restore=WORKDIR@STEP."
        )
    if (epath.Path(workdir) / "tokenizer" / SPECIAL_IDS).exists():
        load_same(epath.Path(workdir) / "tokenizer", tokenizer.fingerprint, of="the records")
    writer = MetricsWriter(
        workdir,
        enabled=is_first,
        resume_step=start_step if start_step else None,
        tensorboard=config.log.tensorboard,
    )
    if is_first:
        with writing(workdir):
            write_run(workdir, tokenizer, run, config_text=config_text)
    ledger = Ledger(workdir, clock, start_step=start_step, enabled=is_first)

    # 5. The compiled step.
    progress = Progress(num_steps=num_steps, start_step=start_step, enabled=is_first)
    for line in startup_lines(config, recipe, mesh, summaries, origin):
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
            raise Preempted(
                f"asked to stop before step {start_step + 1}: nothing is lost; the same command "
                "continues."
            )

    # 6. The loop.
    rows = sharding.local_rows(batch_sharding, (B, T))
    batches = train_batches(
        sources,
        batch_size=B,
        sequence_length=T,
        seed=config.seed,
        rows=rows,
        start_step=batch_of_step(start_step + 1, rollbacks.skipped) - 1,
        random_length_probability=config.data.random_length_probability,
        attend_across_documents=config.data.attend_across_documents,
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
    )
    evaluate = functools.partial(
        evaluate_heldout,
        config,
        model,
        objective,
        sources,
        summaries,
        batch_sharding=batch_sharding,
    )
    flops = flops_per_token(
        num_matmul_parameters(architecture),
        architecture.num_layers,
        architecture.num_heads * architecture.head_dim,
        T,
        causal=objective.mask.causal,
    )
    zero_metrics = jax.jit(
        lambda sums: jax.tree.map(jnp.zeros_like, sums),
        out_shardings=jax.tree.map(lambda s: s.sharding, abstract.metrics),
    )
    in_flight, logged_step, is_profiling = deque(), start_step, False
    profile_start = config.log.profile_at_step
    # the profiler writes to a disk, from where it is copied to a remote workdir
    profile, is_remote = epath.Path(workdir) / "profile", remote.is_remote(workdir)
    trace = until_end.enter_context(tempfile.TemporaryDirectory()) if is_remote else str(profile)
    profile_end = (
        min(profile_start + config.log.profile_num_steps - 1, num_steps) if profile_start else 0
    )
    is_due = lambda step, every: every > 0 and (step % every == 0 or step == num_steps)  # noqa: E731
    clock.start_training()
    with progress, distributed.Watchdog(timeout_s) as watchdog:
        evaluate = functools.partial(
            evaluate,
            on_batch=lambda: watchdog.beat("a held-out batch"),
            on_compiled=functools.cache(
                functools.partial(distributed.meet, "evaluation", timeout_s=timeout_s)
            ),
        )
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

            # 6a. Metrics: written before the checkpoint of the same step, so that a resumed run can
            # rely on them.
            if must_save or must_copy or is_due(step, config.log.every_steps):
                sums = jax.device_get(state.metrics)
                check_finite(sums, interval=(logged_step + 1, step), saved=saved)
                check_skipped(
                    sums, config.optimizer.max_skipped_updates, interval=(logged_step + 1, step)
                )
            # an interval in which every update was skipped has no means, and goes on
            if is_due(step, config.log.every_steps) and sums["loss"][1] > 0:
                numbers = means(sums)
                if not config.optimizer.max_skipped_updates:
                    del numbers["skipped"]
                numbers["bits_per_byte"] = bits_per_byte(
                    numbers[objective.bound_name], bytes_per_token=bytes_per_token
                )
                speed = speed_metrics(
                    clock,
                    num_steps=step - logged_step,
                    tokens_per_step=B * T,
                    flops_per_token=flops,
                    num_devices=mesh.size,
                    peak_flops=hardware.peak_flops(mesh.devices.flat[0]),
                )
                writer.write(
                    step,
                    {
                        "train": {**numbers, "tokens": step * B * T},
                        "speed": speed | saved.measured | ledger.report(),
                    },
                )
                progress.report(step, numbers, speed)
                state = state._replace(metrics=zero_metrics(state.metrics))
                logged_step = step

            # 6b. Held-out text and samples.
            if (
                config.evaluation.every_steps
                and step % config.evaluation.every_steps == 0
                and step < num_steps
            ):
                jax.block_until_ready(state.step)
                with clock.span("evaluation"):
                    for group, bound in evaluate(
                        state.ema or state.params, state.frozen, config.evaluation.num_batches
                    ).items():
                        writer.write(step, {group: bound})
                        progress.say(
                            f"step {step} {group} {bound_line(bound, objective.bound_name)}"
                        )
            if is_due(step, config.samples.every_steps):
                with clock.span("samples"):
                    text = sample_markdown(
                        config.samples,
                        sampling_model,
                        state.ema or state.params,
                        tokenizer,
                        on_step=lambda *_: watchdog.beat("a denoising step"),
                    )
                    writer.text(step, "samples", text)

            # 6c. Save; then, if asked to, stop.
            if must_save or must_copy:
                record = run.at(step, step * B * T)
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
                    raise Preempted(
                        f"asked to stop: step {step} of {num_steps} is saved; the same command "
                        "continues."
                    )
                watchdog.beat(f"step {step} was given to the disk")
                progress.say(f"saving step {step}")

        # 7. The whole held-out split, once.
        with clock.span("checkpoint"):
            saved.wait()
        if not on_first_process(lambda: is_over(read_lines(workdir), num_steps)):
            bounds = evaluate(
                state.ema or state.params, state.frozen, config.evaluation.final_num_batches
            )
            for group, bound in bounds.items():
                progress.say(f"final {group} {bound_line(bound, objective.bound_name)}")
            if bounds:
                writer.write(
                    num_steps,
                    {group.replace("heldout", "final"): bound for group, bound in bounds.items()},
                )
        ledger.mark(num_steps)
        progress.say(ledger.line())
    saved.close()
    writer.close()


# ---- what main calls


def compilation_cache(setting: str) -> str | None:
    """Returns the directory that config.log.compilation_cache means; None: nothing is kept."""
    if setting == AUTO:
        return jax.config.jax_compilation_cache_dir or str(Path.home() / ".cache/llada_jax")
    return setting or None


def check_finite(sums: dict, *, interval: tuple[int, int], saved) -> None:
    """Raises NumericsError that names the steps in which loss or gradient stopped being finite."""
    for name in ("loss", "grad_norm", "param_norm"):
        if not np.isfinite(sums[name][0]):
            saved.wait()
            good = (
                f"the last good checkpoint is step {saved.steps[-1]}"
                if saved.steps
                else "no checkpoint was saved yet"
            )
            raise NumericsError(
                f"{name} is {sums[name][0]} somewhere in steps {interval[0]} to {interval[1]}; "
                f"{good}: lower config.schedule.learning_rate and start the same command again."
            )


def check_skipped(sums: dict, limit: int, *, interval: tuple[int, int]) -> None:
    """Raises NumericsError when more updates of an interval were skipped than
    config.optimizer.max_skipped_updates.
    """
    num_skipped = int(sums["skipped"][0])
    if num_skipped > limit:
        raise NumericsError(
            f"{num_skipped} updates in steps {interval[0]} to {interval[1]} were not finite and "
            "were skipped, and "
            f"config.optimizer.max_skipped_updates allows {limit}; lower "
            "config.schedule.learning_rate, or leave these data "
            "out with `llada-jax rollback`."
        )


def sample_markdown(knobs, model, params, tokenizer, *, on_step) -> str:
    """Returns generated texts as Markdown for TensorBoard."""
    completions = generate_text(
        model.logits_fn,
        params,
        tokenizer,
        list(knobs.prompts),
        gen_length=knobs.gen_length,
        steps=knobs.steps,
        block_length=knobs.block_length,
        temperature=knobs.temperature,
        on_step=on_step,
    )
    return "\n\n---\n\n".join(f"**{c.prompt}**{c.text}" for c in completions)
