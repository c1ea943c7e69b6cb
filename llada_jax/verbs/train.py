"""`llada-jax train`: from a config and a workdir to a trained model that can be resumed."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llada_jax.arguments import checked
from llada_jax.checkpoints.orbax_patches import drop_echoes
from llada_jax.checkpoints.record import FILE, read_run, run_record
from llada_jax.cluster import distributed, hardware, sharding
from llada_jax.cluster.agreement import check_same_everywhere, on_first_process, program_facts
from llada_jax.cluster.compilation_cache import directory_of
from llada_jax.cluster.stop_request import StopRequest
from llada_jax.cluster.watchdog import Watchdog
from llada_jax.config import (
    AUTO,
    completed,
    learning_rate_knob,
    load_config,
    own_parts,
    parse_sources,
)
from llada_jax.data.dialogue_rows import check_dialogues
from llada_jax.data.loader import train_batches
from llada_jax.errors import NumericsError, Preempted, UserError
from llada_jax.models.model import Model, make_model
from llada_jax.parts import provenance
from llada_jax.paths import user_path
from llada_jax.run.clock import Clock, speed_metrics
from llada_jax.run.goodput import Ledger
from llada_jax.run.heldout import AskedToStop, HeldoutEvaluations, bound_line
from llada_jax.run.metrics_file import is_over, means, read_lines
from llada_jax.run.numerics import check_finite, check_skipped
from llada_jax.run.profiler import ProfilerWindow
from llada_jax.run.progress import Progress
from llada_jax.run.results import TrainedRun, trained_run
from llada_jax.run.rollbacks import batch_of_step
from llada_jax.run.start import (
    OpenWorkdir,
    RunData,
    missing_folders,
    open_data,
    open_workdir,
    removed_if_refused,
)
from llada_jax.run.startup_lines import compilation_line, flops_of_token, startup_lines
from llada_jax.samplers.text import Completion, generate_text
from llada_jax.storage import remote
from llada_jax.training.state import TrainState
from llada_jax.training.step import SAMPLE_KNOBS, Recipe, compile_step, make_recipe
from llada_jax.units import bits_per_byte
from llada_jax.validation import knob, knobs, num_steps_of
from llada_jax.verbs.command_line import Parser

# Steps that are dispatched and not finished: two keep the devices busy while the host prepares the
# next batch. With more, a stop request would have to wait for all of them.
MAX_STEPS_IN_FLIGHT = 2

# What config.evaluation.weights and config.checkpoint.init_from_weights mean: whether to read the
# moving average; None where one is kept.
WEIGHTS = {AUTO: None, "raw": False, "ema": True}


def make_parser() -> Parser:
    parser = Parser(
        "train",
        "Trains a model from a config file, or continues the run that the workdir holds.",
        "llada-jax train --config configs/tiny.py --workdir runs/tiny/run --config.num_steps=200",
    )
    parser.add_config_flags(
        file="Python file with get_config()", knob="changes one knob, e.g. --config.seed=1"
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="where the run lives; local or a URL"
    )
    return parser


def main(argv: list[str]) -> None:
    args, overrides = make_parser().parse_with_overrides(argv)
    if not args.workdir:
        raise UserError("--workdir is empty; give the directory where the run is to live.")
    drop_echoes()
    config = load_config(args.config, overrides)
    run_config(config, args.workdir, config_text=Path(args.config).read_text())


@checked
def train(
    config: ConfigDict | str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    changes: Mapping[str, Any] | None = None,
) -> TrainedRun:
    """Trains a model, or continues the run that the workdir holds, as `llada-jax train` does.

    Args:
        config: a Python file with get_config(), or what llada_jax.config.default_config returns,
            changed.
        workdir: where the run lives; local or a URL.
        changes: knobs and their values, such as {"num_steps": 200, "optimizer.b2": 0.98}.

    Raises:
        UserError: config, data, mesh and checkpoint do not fit together, or the disk refuses.
        NumericsError: the loss or the gradient is not finite.
        Preempted: SIGTERM or Ctrl-C; the state has been saved.
    """
    workdir = user_path(workdir)
    if not workdir:
        raise UserError("workdir='' is empty; give the directory where the run is to live.")
    drop_echoes()
    text = ""
    if isinstance(config, ConfigDict):
        config = completed(config, values=changes or {})
    else:
        file = user_path(config)
        config = load_config(file, values=changes)
        text = Path(file).read_text()
    run_config(config, workdir, config_text=text)
    return trained_run(workdir, num_steps_of(config))


def run_config(config: ConfigDict, workdir: str, *, config_text: str = "") -> None:
    """Runs a config in a workdir until its last step, from the workdir's latest checkpoint on.

    Args:
        config_text: the file that the config came from; the workdir keeps a copy.

    Raises:
        UserError: config, data, mesh and checkpoint do not fit together, or the disk refuses.
        NumericsError: the loss or the gradient is not finite.
        Preempted: SIGTERM or Ctrl-C; the state has been saved.
        LostPeer: another process of the run is gone.
    """
    clock = Clock()
    # 1. Devices. The compilation cache comes first: it must be set before anything is compiled.
    jax.config.update("jax_compilation_cache_dir", directory_of(config.log.compilation_cache))
    distributed.initialize(
        initialization_timeout_s=config.distributed.initialization_timeout_s,
        heartbeat_timeout_s=config.distributed.heartbeat_timeout_s,
    )
    mesh = sharding.make_mesh(config.mesh)
    # Signals are caught from here on, before the first compilation: a preemption may come in the
    # minutes that it takes, and must not end in a traceback.
    with jax.set_mesh(mesh), StopRequest() as stop, contextlib.ExitStack() as until_end:
        try:
            train_on(mesh, config, workdir, config_text, clock, stop, until_end)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if lost := distributed.lost_peer(error, remedy="the same command continues"):
                raise lost from error
            raise


class OpenRun(NamedTuple):
    """What a run has read and opened before its first step."""

    data: RunData
    recipe: Recipe
    opened: OpenWorkdir


def open_run(
    mesh, config, workdir: str, config_text: str, until_end: contextlib.ExitStack
) -> tuple[OpenRun, TrainState]:
    """Reads and opens all that a run needs, and checks that it fits together.

    What a user can get wrong is found here, before the minutes of compilation; and nothing is
    written before data, model and mesh have been accepted.
    """
    # 2. Data and tokenizer.
    data = open_data(parse_sources(config.data.path), sequence_length=config.data.sequence_length)

    parts = provenance(own_parts(config))
    folders = missing_folders(workdir)
    check_same_everywhere(
        {
            **program_facts(),
            **{f"config.{name}": knob(config, name) for name in knobs(config)},
            **{f"the file of config.{name}": p["sha256"] for name, p in parts.items()},
            **data.facts(),
        }
    )

    # 3. Model, objective and optimizer, none of them with numbers yet.
    if config.model.remat == AUTO:
        config.model.remat = recorded_remat(workdir)
    recipe = make_recipe(config, data.tokenizer, mesh, provided=data.fields)
    infos = [summary.info for summary in data.summaries]
    check_dialogues(infos, **row_knobs(config))
    config.model.remat = recipe.remat  # run.json records the choice

    # 4. The state, from the first of four places that has one.
    with removed_if_refused(folders):
        opened, state = open_workdir(
            workdir,
            recipe,
            mesh,
            run_record(
                config,
                recipe.architecture,
                data.tokenizer,
                data=data.record(),
                recorded_mask=recipe.objective.mask,
                parts=parts,
                special_ids=data.tokenizer.special_ids,
                chat_template=data.tokenizer.chat_template,
                lengths=data.lengths() or None,
            ),
            config_text=config_text,
            tokenizer=data.tokenizer,
            until_end=until_end,
            seed=config.seed,
            keep=config.checkpoint.keep,
            keep_every_steps=config.checkpoint.keep_every_steps,
            local_directory=config.checkpoint.local_directory,
            restore=config.checkpoint.restore,
            init_from=config.checkpoint.init_from,
            init_from_ema=WEIGHTS[config.checkpoint.init_from_weights],
            tensorboard=config.log.tensorboard,
            tracker=config.log.tracker,
        )
    # apart from the record: the train step takes the state over, and what is kept of it would
    # only be a name for memory that has been given away
    return OpenRun(data, recipe, opened), state


def recorded_remat(workdir: str) -> str:
    """Returns what the run in a workdir keeps for its backward pass, AUTO where there is no run.

    A run goes on as it began, on other devices and under other defaults too.
    """
    if not (remote.path_of(workdir) / FILE).exists():
        return AUTO
    return read_run(workdir).knob("model.remat")


def train_on(
    mesh,
    config,
    workdir: str,
    config_text: str,
    clock: Clock,
    stop: StopRequest,
    until_end: contextlib.ExitStack,
) -> None:
    """The rest of `train`, within the mesh, in the order of time."""
    (data, recipe, opened), state = open_run(mesh, config, workdir, config_text, until_end)
    saved, local, writer = opened.saved, opened.local, opened.writer
    start_step, num_steps = opened.start_step, recipe.num_steps
    is_first = jax.process_index() == 0
    B, T = config.data.batch_size, config.data.sequence_length
    bound_name = recipe.objective.bound_name
    timeout_s = config.distributed.step_timeout_s
    rate_knob = learning_rate_knob(config)

    # 5. The compiled step.
    progress = Progress(num_steps=num_steps, start_step=start_step, enabled=is_first)
    ledger = Ledger(workdir, clock, start_step=start_step, enabled=is_first, say=progress.say)
    for line in startup_lines(
        recipe,
        mesh,
        data.summaries,
        origin=opened.origin,
        batch_size=B,
        sequence_length=T,
        num_microbatches=config.optimizer.gradient_accumulation,
    ):
        progress.say(line)
    for line in opened.what_changed():
        progress.say(line)
    if start_step >= num_steps:
        progress.say(f"the run is complete: step {start_step} of {num_steps}")
    else:
        compiled = {
            length: compile_together(recipe, (B, length), clock, progress, timeout_s)
            for length in (*config.data.length_buckets, T)
        }
        if stop.reached(start_step):
            saved.close()
            raise Preempted(
                f"asked to stop before step {start_step + 1}: nothing is lost; the same command "
                "continues."
            )

    # 6. The loop.
    rows = sharding.local_rows(recipe.batch_sharding, (B, T))
    batches = open_batches(config, data, opened, rows, recipe.objective.copies)
    lengths = (*config.data.length_buckets, T)
    flops_of = {length: flops_of_token(recipe, sequence_length=length) for length in lengths}
    peak_flops = hardware.peak_flops(mesh.devices.flat[0])
    zero_metrics = jax.jit(
        lambda sums: jax.tree.map(jnp.zeros_like, sums),
        out_shardings=jax.tree.map(lambda s: s.sharding, recipe.abstract.metrics),
    )
    # A canvas is padded on the left and of any length, which only the reference attention takes.
    # Made once, because what is compiled for it is found again under its functions.
    sampling_model = make_model(
        recipe.architecture, dtype=recipe.dtype, attention="xla", mask=recipe.objective.mask
    )
    profiler = ProfilerWindow(
        workdir,
        first_step=config.log.profile_at_step,
        num_steps=config.log.profile_num_steps,
        last_step=num_steps,
    )
    # the parameters where there is no average, which check_contradictions() refuses to be asked for
    weights_of = lambda state: (  # noqa: E731
        (WEIGHTS[config.evaluation.weights] is not False and state.ema) or state.params
    )
    in_flight, logged_step = deque(), start_step
    num_positions: list[int] = []  # of a row, of each step since the last log line
    is_due = lambda step, every: every > 0 and (step % every == 0 or step == num_steps)  # noqa: E731
    clock.start_training()
    with progress, profiler, Watchdog(timeout_s) as watchdog:
        evaluations = HeldoutEvaluations(
            workdir,
            recipe,
            data,
            start_step=start_step,
            # as large as a microbatch of training, which is known to fit
            batch_size=B // config.optimizer.gradient_accumulation,
            sequence_length=T,
            attend_across_documents=config.data.attend_across_documents,
            weights=config.evaluation.weights,
            beat=watchdog.beat,
            is_asked_to_stop=lambda: stop.reached(num_steps),
            timeout_s=timeout_s,
        )

        def checked_sums(step: int) -> dict:
            sums, limit = jax.device_get(state.metrics), config.optimizer.max_skipped_updates
            try:
                check_finite(sums, step=step, saved=saved, rate=rate_knob)
                check_skipped(sums, limit, step=step, saved=saved, rate=rate_knob)
            except NumericsError:
                # `rollback` leaves out the data up to the last line. A disk that refuses it must
                # not hide what is wrong with the numbers.
                with contextlib.suppress(UserError):
                    writer.write(step, {"not_finite": {"num_steps": sums["skipped"][1]}})
                    writer.flush()
                raise
            return sums

        def evaluate_during_training(step: int) -> None:
            with clock.span("evaluation"):
                bounds = evaluations.evaluate(
                    step, weights_of(state), state.frozen, config.evaluation.num_batches
                )
                for group, bound in bounds.items():
                    writer.write(step, {group: bound})
                    progress.say(f"step {step} {group} {bound_line(bound, bound_name)}")
            evaluations.forget()

        def sample_during_training(step: int) -> None:
            # or the training steps still in flight would be accounted to the samples
            jax.block_until_ready(state.step)
            with clock.span("samples"):
                network = recipe.objective.network(weights_of(state), state.frozen)
                texts = sample(config, sampling_model, data, network, watchdog.beat)
                writer.samples(step, texts)

        def stopped(how: str) -> Preempted:
            # saves are asynchronous: close() waits until the last one is whole
            saved.close()
            writer.close()
            return Preempted(f"asked to stop{how}; the same command continues.")

        # What the attempt before left out when it was asked to stop: a part of the evaluation after
        # this step, and its samples. A workdir may lack these for other reasons too.
        if 0 < start_step < num_steps and evaluations.is_unfinished(start_step):
            try:
                evaluate_during_training(start_step)
            except AskedToStop:
                how = f" during the evaluation of step {start_step}: nothing is lost"
                raise stopped(how) from None
        is_due_at_start = start_step and is_due(start_step, config.samples.every_steps)
        if is_due_at_start and on_first_process(lambda: writer.lacks_samples(start_step)):
            sample_during_training(start_step)
        for step in range(start_step + 1, num_steps + 1):
            profiler.before(step)
            with clock.span("data"):
                arrays = next(batches)
                # the step is compiled for the fields that the objective reads, and for no others
                arrays = {name: arrays[name] for name in recipe.objective.batch}
                batch = sharding.place_batch(arrays, rows, B, recipe.batch_sharding)
            # The state is donated: the old one is gone, also when the step fails.
            length = batch["tokens"].shape[1]
            state, finished = compiled[length](state, batch)
            num_positions.append(length)
            # The step has been dispatched, not done. Waiting for it here would leave the devices
            # idle while the host reads; never waiting would queue steps without end.
            in_flight.append(finished)
            if len(in_flight) > MAX_STEPS_IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
            watchdog.beat(f"step {step} was begun")
            progress.advance(step)
            # asked once per step, in every process: all of them must see the same answer
            must_stop = stop.reached(step)
            profiler.after(step, state.step, is_stopping=must_stop)
            must_save = must_stop or is_due(step, config.checkpoint.every_steps)
            must_copy = local and step % config.checkpoint.local_every_steps == 0

            # 6a. Metrics: written before the checkpoint of the same step, so that a resumed run can
            # rely on them. Sums are looked at before each save too: what is saved must be finite.
            if must_save or must_copy or is_due(step, config.log.every_steps):
                sums = checked_sums(step)
            # An interval in which every update was skipped has no means. Its sums are kept, so that
            # the skipped updates of the next interval are counted together with them.
            if is_due(step, config.log.every_steps) and sums["loss"][1] > 0:
                numbers = means(sums)
                if not config.optimizer.max_skipped_updates:
                    del numbers["skipped"]
                rate = data.bytes_per_token(config.objective.masked, config.data.eos_padding)
                if rate:
                    nats = numbers[bound_name]
                    numbers["bits_per_byte"] = bits_per_byte(nats, bytes_per_token=rate)
                speed = speed_metrics(
                    clock,
                    num_steps=step - logged_step,
                    tokens_per_step=B * mean(num_positions),
                    flops_per_token=mean(n * flops_of[n] for n in num_positions)
                    / mean(num_positions),
                    num_devices=mesh.size,
                    peak_flops=peak_flops,
                )
                groups = {
                    "train": {**numbers, "tokens": step * B * T},
                    "speed": speed | saved.measured | ledger.reach(step),
                }
                writer.write(step, groups)
                progress.report(step, numbers, speed)
                # zeros on the devices, in the shardings of the sums: the step is compiled for them
                state = state._replace(metrics=zero_metrics(state.metrics))
                logged_step = step
                num_positions.clear()

            # 6b. Held-out text and samples. Not after the last step: 7 does that on the whole text.
            every = config.evaluation.every_steps
            if every and step % every == 0 and step < num_steps:
                # or the training steps still in flight would be accounted to the evaluation
                jax.block_until_ready(state.step)
                try:
                    evaluate_during_training(step)
                except AskedToStop:
                    # Saved now; the next start does the rest of this evaluation first.
                    must_stop = must_save = True
                    checked_sums(step)
            # not when the run is to stop: the grace period is for the checkpoint
            if is_due(step, config.samples.every_steps) and not must_stop:
                sample_during_training(step)

            # 6c. Save; then, if asked to, stop.
            if must_save or must_copy:
                record = opened.record.at(step, step * B * T)
                with clock.span("checkpoint"):
                    # metrics first: a kill after the save must not lose lines that no start repeats
                    writer.flush()
                    ledger.mark(step)
                    if must_copy:
                        local.save(state, record)  # type: ignore[union-attr]
                    if must_save:
                        saved.save(state, record)
            if must_save:
                if must_stop and step < num_steps:
                    raise stopped(f": step {step} of {num_steps} is saved")
                watchdog.beat(f"step {step} was given to the disk")
                progress.say(f"saving step {step}")

        # 7. The whole held-out split, once: a run that was asked to stop during it continues where
        # it was, one that was killed does it again, and one that is complete does not.
        with clock.span("checkpoint"):
            saved.wait()
        if not on_first_process(lambda: is_over(read_lines(workdir), num_steps)):
            num_batches, weights = config.evaluation.final_num_batches, weights_of(state)
            try:
                with clock.span("evaluation"):
                    bounds = evaluations.evaluate(num_steps, weights, state.frozen, num_batches)
            except AskedToStop:
                how = f" during the final evaluation: step {num_steps} of {num_steps} is saved"
                raise stopped(how) from None
            for group, bound in bounds.items():
                progress.say(f"final {group} {bound_line(bound, bound_name)}")
            if bounds:
                final = {group.replace("heldout", "final"): bounds[group] for group in bounds}
                writer.write(num_steps, final)
            writer.flush()
            evaluations.forget()
        ledger.mark(num_steps)
        progress.say(ledger.line())
    saved.close()
    writer.close()


def open_batches(config, data: RunData, opened: OpenWorkdir, rows, copies: int) -> Iterator[dict]:
    """Returns this host's rows of the batch of each step that is left, in order.

    Args:
        copies: Objective.copies.
    """
    return train_batches(
        data.sources,
        sequence_length=config.data.sequence_length,
        seed=config.seed,
        rows=rows,
        start_step=opened.start_step,
        # step and batch differ after a rollback, which takes batches out of the order
        batch_number=lambda step: batch_of_step(step + 1, opened.rollbacks.skipped) - 1,
        copies=copies,
        **row_knobs(config),
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
    )


def row_knobs(config) -> dict:
    """Returns the knobs that decide what a batch holds, as arguments of train_batches."""
    elsewhere = ("path", "sequence_length", "num_threads", "prefetch")
    return {name: value for name, value in config.data.items() if name not in elsewhere}


def sample(config, model: Model, data: RunData, params: dict, beat) -> list[Completion]:
    """Returns what the model writes to config.samples.prompts.

    Args:
        model: with the reference attention, which takes a canvas of any length.
    """
    return generate_text(
        model.logits_fn,
        params,
        data.tokenizer,
        list(config.samples.prompts),
        on_step=lambda *_: beat("a denoising step"),
        **{name: config.samples[name] for name in SAMPLE_KNOBS},
    )


def compile_together(recipe: Recipe, shape: tuple[int, int], clock, progress, timeout_s: int):
    """Returns the compiled train step for batches of this shape, once every process has its own."""
    with clock.span("compile"):
        began = time.perf_counter()
        compiled = compile_step(recipe, shape)
        # Hosts compile for different lengths of time, and the first collective of a step gives
        # the others seconds to come to it; here they may wait for the slowest.
        distributed.meet("compiled", timeout_s=timeout_s)
        progress.say(compilation_line(compiled, time.perf_counter() - began))
    return compiled
