"""A search with Optuna instead of a list of runs."""

import math
import sys
import time

from llada_jax.errors import Preempted, UserError, require
from llada_jax.sweeps.attempts import POLL_SECONDS, Attempts, outcome, record_end, say
from llada_jax.sweeps.grid import Knobs, added_by
from llada_jax.sweeps.results import INTERRUPTED
from llada_jax.sweeps.runs import Sweep, as_json, blaming, describe, planned, write_record


def run_optuna(sweep: Sweep, num_trials: int) -> None:
    """Runs trials of suggest(trial) one after another until `num_trials` are over; continues where
    it was stopped.

    A trial's value is the held-out bits per byte. After each held-out evaluation Optuna's pruner
    may end the run.
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
    write_record(sweep)
    study, states = open_study(optuna, sweep), optuna.trial.TrialState
    for stopped in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        if "run" in stopped.user_attrs:
            run_trial(optuna, study, optuna.trial.Trial(study, stopped._trial_id), sweep)
        else:  # stopped before its run had a number
            study.tell(stopped.number, state=states.FAIL)
    over = (states.COMPLETE, states.PRUNED)
    while len(study.get_trials(deepcopy=False, states=over)) < num_trials:
        trial = study.ask()
        with blaming(f"suggest(trial) of {sweep.file}"):
            changes = suggested(sweep, trial)
        same = [run for run in sweep.runs if run.changes == changes]
        if not same:
            sweep.runs.append(planned(sweep, changes))
            write_record(sweep)
        trial.set_user_attr("run", same[0].index if same else sweep.runs[-1].index)
        run_trial(optuna, study, trial, sweep)
    best = study.best_trial
    run = sweep.runs[best.user_attrs["run"]]
    say(
        f"best of {num_trials} trials: {run.name}, {best.value:.3f} bits/byte: "
        f"{describe(run.changes)}"
    )


def suggested(sweep: Sweep, trial) -> Knobs:
    """Returns what suggest(trial) wants changed, as sweep.json will give it back."""
    (changes,) = added_by(lambda add: add(sweep.suggest(trial)))
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
    # a sampler starts anew with every process: with the same seed it would suggest the first trials
    # once more
    study.sampler = optuna.samplers.TPESampler(
        seed=sweep.base.seed + len(study.get_trials(deepcopy=False))
    )
    return study


def run_trial(optuna, study, trial, sweep: Sweep) -> None:
    """Runs one trial to its end, or until it is pruned, and tells the study."""
    states, run = optuna.trial.TrialState, sweep.runs[trial.user_attrs["run"]]
    reported, is_pruned = (
        set(study.get_trials(deepcopy=False)[trial.number].intermediate_values),
        False,
    )
    say(f"{run.name} starts: {describe(run.changes)}")
    with Attempts(sweep) as attempts:
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
            pause = max(
                POLL_SECONDS, 20 * (time.monotonic() - began)
            )  # long files are read less often
            for step, bits in news:
                reported.add(step)
                trial.report(bits, step)
            if news and not is_pruned and trial.should_prune():
                is_pruned = True
                attempt.process.terminate()
    is_pruned = (
        is_pruned and attempt.process.returncode != 0
    )  # it may have been over before it was told
    status = record_end(attempt, pruned=is_pruned)
    say(outcome(attempt))
    if attempts.must_stop or (status in INTERRUPTED and not is_pruned):
        raise Preempted(f"asked to stop in trial {trial.number}; the same command continues it.")
    result = run.result()
    if is_pruned:
        study.tell(trial, state=states.PRUNED)
    elif status == 0 and not math.isnan(result.bits_per_byte):
        study.tell(trial, result.bits_per_byte)
    else:
        study.tell(trial, state=states.FAIL)
        if status == 0:
            raise UserError(
                f"{run.workdir} has no held-out bits per byte to tell Optuna; prepare data with "
                "--heldout."
            )
        if status != 3:  # a loss that is not finite only says: not here
            say(
                f"trial {trial.number} failed with status {status}; {run.workdir}/train.log tells "
                "why"
            )
            sys.exit(status)
