"""A search with Optuna instead of a list of runs: suggest(trial) of a config file says what to try.

Optuna keeps its trials in DIR/optuna.journal, and every trial is also a run of the sweep with a
number of its own, so that the list, the table and the curves need not know about Optuna.
"""

import math
import sys
import time
from collections.abc import Sequence

from llada_jax.errors import Preempted, UserError, require
from llada_jax.sweeps.attempts import POLL_SECONDS, Attempts, outcome, record_end, say
from llada_jax.sweeps.grid import Knobs, added_by
from llada_jax.sweeps.results import INTERRUPTED
from llada_jax.sweeps.runs import (
    Sweep,
    add_recorded,
    as_json,
    describe,
    next_run,
    only_sweep,
    user_code,
    write_sweep_json,
)


def run_optuna(sweep: Sweep, num_trials: int) -> None:
    """Runs trials of suggest(trial) one after another until `num_trials` are over.

    Continues where it was stopped. A trial's value is the held-out bits per byte. After each
    held-out evaluation Optuna's pruner may end the run. A run that diverges counts as pruned.

    Raises:
        UserError: the file has no suggest(trial), Optuna is missing, a suggestion is impossible, or
            no trial has a value.
        Preempted: asked to stop; the same command continues.
    """
    if not sweep.suggest:
        raise UserError(
            f"--optuna needs suggest(trial) in {sweep.file}, which has sweep(add); use --run local."
        )
    if "://" in sweep.workdir:
        raise UserError(
            f"--optuna keeps a journal in --workdir {sweep.workdir}, which must be a local "
            "directory."
        )
    optuna = require("optuna", extra="optuna")
    with only_sweep(sweep) as held:
        # what another process has tried since this one has read sweep.json
        add_recorded(sweep)
        write_sweep_json(sweep)
        search(optuna, sweep, num_trials, held)


def search(optuna, sweep: Sweep, num_trials: int, held: Sequence[int]) -> None:
    """The rest of `run_optuna`, while it holds the lock on DIR.

    Without the lock a second process would take the running trials of this one for trials that were
    stopped, and both would train the same run.
    """
    study, states = open_study(optuna, sweep), optuna.trial.TrialState
    for stopped in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        if "run" in stopped.user_attrs:
            run_trial(optuna, study, optuna.trial.Trial(study, stopped._trial_id), sweep, held)
        # It was stopped between its suggestion and the number of its run.
        else:
            study.tell(stopped.number, state=states.FAIL)
    over = (states.COMPLETE, states.PRUNED)
    while len(study.get_trials(deepcopy=False, states=over)) < num_trials:
        trial = study.ask()
        with user_code(f"suggest(trial) of {sweep.file}"):
            changes = suggested(sweep, trial)
        # Optuna may suggest the same values twice; the run is then not trained again.
        same = [run for run in sweep.runs if run.changes == changes]
        if not same:
            sweep.runs.append(next_run(sweep, changes))
            write_sweep_json(sweep)
        trial.set_user_attr("run", same[0].index if same else sweep.runs[-1].index)
        run_trial(optuna, study, trial, sweep, held)
    if not study.get_trials(deepcopy=False, states=(states.COMPLETE,)):
        raise UserError(
            f"None of {num_trials} trials has a result, because the loss of each became NaN; let "
            f"suggest(trial) of {sweep.file} choose other values, such as lower learning rates."
        )
    best = study.best_trial
    run = sweep.runs[best.user_attrs["run"]]
    say(
        f"best of {num_trials} trials: {run.name}, {best.value:.3f} bits/byte: "
        f"{describe(run.changes)}"
    )


def suggested(sweep: Sweep, trial) -> Knobs:
    """Returns what suggest(trial) changes, as sweep.json will give it back."""
    (changes,) = added_by(lambda add: add(sweep.suggest(trial)))  # type: ignore[operator]
    return as_json(changes)


def open_study(optuna, sweep: Sweep):
    """Returns the study in DIR/optuna.journal, made if there is none."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = optuna.storages.journal.JournalFileBackend(
        f"{sweep.workdir.rstrip('/')}/optuna.journal"
    )
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="sweep",
        direction="minimize",
        load_if_exists=True,
    )
    # A sampler starts again with every process. With the same seed it would suggest the first
    # trials a second time.
    study.sampler = optuna.samplers.TPESampler(
        seed=sweep.base.seed + len(study.get_trials(deepcopy=False))
    )
    return study


def run_trial(optuna, study, trial, sweep: Sweep, held: Sequence[int]) -> None:
    """Runs one trial to its end, or until it is pruned, and reports its value to the study.

    A run that an earlier attempt has ended without a value is not started again.
    """
    states, run = optuna.trial.TrialState, sweep.runs[trial.user_attrs["run"]]
    if (state := run.result().state) in ("diverged", "pruned"):
        say(f"trial {trial.number} is not run: {run.name}, of the same values, ended as {state}")
        study.tell(trial, state=states.PRUNED)
        return
    # Not empty for a trial that is continued: Optuna warns about a step reported twice.
    reported = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    is_pruned = False
    say(f"{run.name} starts: {describe(run.changes)}")
    with Attempts(sweep, held=held) as attempts:
        attempts.start(run, to_log=True)
        attempt, pause = attempts.under_way[0], POLL_SECONDS
        while attempt.process.poll() is None:
            time.sleep(pause)
            began = time.monotonic()
            news = [
                (step, bits)
                for step, bits in run.result().curve
                if step < run.num_steps and step not in reported
            ]
            # The whole file is read each time, so long files are read less often: at most 5% of the
            # time goes into it.
            pause = max(POLL_SECONDS, 20 * (time.monotonic() - began))
            for step, bits in news:
                reported.add(step)
                trial.report(bits, step)
            if news and not is_pruned and trial.should_prune():
                is_pruned = True
                attempt.process.terminate()
    # The run may have been over before the signal reached it.
    is_over = attempt.process.returncode == 0 or run.result().state == "complete"
    is_pruned = is_pruned and not is_over
    status = record_end(attempt, pruned=is_pruned)
    say(outcome(attempt))
    if attempts.must_stop or (status in INTERRUPTED and not is_pruned and not is_over):
        raise Preempted(f"asked to stop in trial {trial.number}; the same command continues it.")
    result = run.result()
    # 3 is a loss that is not finite. Optuna's sampler avoids what was pruned, and would suggest
    # again what has failed.
    if is_pruned or (status == 3 and not is_over):
        study.tell(trial, state=states.PRUNED)
    elif is_over and not math.isnan(result.bits_per_byte):
        study.tell(trial, result.bits_per_byte)
    else:
        study.tell(trial, state=states.FAIL)
        if is_over:
            raise UserError(
                f"{run.workdir} has no held-out bits per byte to report to Optuna; prepare the "
                "data with --heldout."
            )
        # It would meet the next trial too.
        say(f"trial {trial.number} failed with status {status}; see {run.workdir}/train.log")
        sys.exit(status)
