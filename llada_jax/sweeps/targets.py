"""Where the runs of a sweep are run: in the foreground, on this machine, or by a launcher."""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from llada_jax.errors import Preempted, UserError
from llada_jax.sweeps.attempts import (
    POLL_SECONDS,
    Attempts,
    outcome,
    record_end,
    say,
    train_command,
)
from llada_jax.sweeps.devices import device_shares
from llada_jax.sweeps.results import INTERRUPTED
from llada_jax.sweeps.runs import Sweep, describe, only_sweep, unfinished, write_sweep_json

LAUNCHERS = Path(__file__).parents[2] / "launch"


def run_index(sweep: Sweep, index: int) -> None:
    """Runs one run in the foreground, for a task of an array or a pod.

    If `train` fails, this process ends with the same exit status.
    """
    if not 0 <= index < len(sweep.runs):
        raise UserError(f"--index {index}: {sweep.file} has the runs 0 to {len(sweep.runs) - 1}.")
    with only_sweep(sweep, shared=True) as held, Attempts(sweep, held=held) as attempts:
        write_sweep_json(sweep)
        attempts.start(sweep.runs[index], to_log=False)
        attempts.under_way[0].process.wait()
    if status := record_end(attempts.under_way[0]):
        sys.exit(status)


def run_local(sweep: Sweep, *, num_parallel: int, dry_run: bool) -> None:
    """Runs on this machine what is not finished, `num_parallel` at a time, each on its share of the
    devices.

    A run that fails does not stop the others.

    Args:
        dry_run: whether to print the commands instead.

    Raises:
        Preempted: this process or a run was asked to stop; the same command continues.
    """
    shares = device_shares(num_parallel, os.environ)
    if dry_run:
        for run in unfinished(sweep):
            print(shlex.join(train_command(sweep, run)))
        return
    statuses = {}
    with only_sweep(sweep) as held, Attempts(sweep, held=held) as attempts:
        write_sweep_json(sweep)
        waiting = unfinished(sweep)
        say(f"{len(waiting)} of {len(sweep.runs)} runs are to be done")
        while attempts.under_way or (waiting and not attempts.must_stop):
            while waiting and shares and not attempts.must_stop:
                run, share = waiting.pop(0), shares.pop(0)
                on = "".join(f" on {name}={value}" for name, value in share.items())
                say(f"{run.name} starts{on}: {describe(run.changes)}")
                attempts.start(run, to_log=True, share=share)
            time.sleep(POLL_SECONDS)
            for attempt in attempts.take_ended():
                shares.append(attempt.share)
                statuses[attempt.run.index] = record_end(attempt)
                say(outcome(attempt))
    # 3 is a loss that is not finite: a result, and not a failure.
    failed = [index for index, status in statuses.items() if status not in (0, 3, *INTERRUPTED)]
    if failed:
        status = statuses[failed[0]]
        log = f"{sweep.runs[failed[0]].workdir}/train.log"
        say(f"{len(failed)} failed, the first with status {status}; {log} says why")
        sys.exit(status)
    # It is asked whether something is left, because the signal may come while the last run ends.
    is_stopped = attempts.must_stop or set(INTERRUPTED) & set(statuses.values())
    if is_stopped and (left := len(unfinished(sweep))):
        raise Preempted(
            f"asked to stop with {left} of {len(sweep.runs)} runs left; the same command continues."
        )


def run_with_launcher(
    sweep: Sweep, target: str, launcher_words: list[str], *, num_parallel: int | None, dry_run: bool
) -> None:
    """Hands what is not finished to a launcher, whose tasks call `run_index`.

    launch/slurm.py gets one array of all runs, launch/gke.py one JobSet per run.

    Args:
        target: "slurm" or "gke".
        launcher_words: flags for the launcher.
    """
    script = LAUNCHERS / f"{target}.py"
    if not script.is_file():
        raise UserError(
            f"--run {target} needs {script}, which is part of the repository; run it from a clone."
        )
    waiting = unfinished(sweep)
    if not waiting:
        say(f"all {len(sweep.runs)} runs are finished")
        return
    launcher = [sys.executable, str(script), *(["--dry-run"] if dry_run else []), *launcher_words]
    ours = ["llada-jax", "sweep", "--config", sweep.file, "--workdir", sweep.workdir]
    ours += [f"--config.{word}" for word in sweep.overrides]
    stem = jobset_stem(sweep.workdir, launcher_words)
    if not dry_run:
        named = ["--name", f"{stem}-{waiting[0].name}"] if target == "gke" else []
        check_all_runs([*launcher, *named], ours)
        with only_sweep(sweep, shared=True):
            write_sweep_json(sweep)
    if target == "slurm":
        indices = ",".join(str(run.index) for run in waiting)
        # SLURM's notation for "at most so many at a time".
        indices += f"%{num_parallel}" if num_parallel else ""
        commands = [[*launcher, "--array", indices, "--", *ours, "--index", "$SLURM_ARRAY_TASK_ID"]]
    else:
        commands = [
            [*launcher, "--name", f"{stem}-{run.name}", "--", *ours, "--index", str(run.index)]
            for run in waiting
        ]
    for number, command in enumerate(commands):
        # what the launcher prints are whole YAML documents, without a separator around them
        if number and dry_run:
            print("---", flush=True)
        if status := subprocess.run(command, check=False).returncode:
            sys.exit(status)


def jobset_stem(workdir: str, launcher_words: list[str]) -> str:
    """Returns what the names of a sweep's JobSets begin with: --name of the launcher's flags, or
    else the name of DIR in the characters that Kubernetes allows, which begins with a letter.
    """
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--name")
    if name := flags.parse_known_args(launcher_words)[0].name:
        return name
    directory = workdir.rstrip("/").rpartition("/")[2]
    stem = re.sub(r"[^a-z0-9]+", "-", directory.lower()).strip("-")
    return stem if stem[:1].isalpha() else f"sweep-{stem}".rstrip("-")


def check_all_runs(launcher: list[str], ours: list[str]) -> None:
    """Ends this process as the launcher does, and with what it says, when it refuses a run.

    It is asked about all of them before the first is submitted, or a mistake in the last one would
    show when the machines of the others are paid for; and before sweep.json is written, which would
    hold the user to the mistake.
    """
    # a sweep of which a command names no single run
    command = [*launcher, "--dry-run", "--", *ours, "--run", "local"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        sys.exit(done.returncode)
