"""The processes of a sweep: starting them, watching them, and recording how they end."""

import contextlib
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from etils import epath

from llada_jax.errors import Preempted, UserError
from llada_jax.sweeps.results import (
    EXIT_FILE,
    INTERRUPTED,
    write_exit,
)
from llada_jax.sweeps.runs import Planned, Sweep, describe, unfinished, words_of, write_record
from llada_jax.units import format_seconds

POLL_SECONDS = 0.2
LAUNCHERS = Path(__file__).parents[2] / "launch"


class Attempt(NamedTuple):
    """One process of `llada-jax train`."""

    run: Planned
    process: subprocess.Popen
    began: float


class Attempts:
    """The processes under way. Within its `with` block SIGTERM and Ctrl-C are passed on to all of
    them.

    `must_stop` tells that one came. The processes are sessions of their own, so that the terminal's
    Ctrl-C reaches them once.
    """

    def __init__(self, sweep: Sweep):
        self._sweep, self._previous = sweep, {}
        self.under_way: list[Attempt] = []
        self.must_stop = False

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *exception):
        for attempt in self.under_way:  # only after an exception: nobody would look after them
            if attempt.process.poll() is None:
                attempt.process.terminate()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _pass_on(self, number, frame):
        self.must_stop = True
        for attempt in self.under_way:
            if attempt.process.poll() is None:
                attempt.process.send_signal(number)

    def start(self, run: Planned, *, to_log: bool) -> None:
        """Starts or continues a run; with to_log it writes to its train.log, otherwise to our own
        stderr.
        """
        path = epath.Path(run.workdir)
        path.mkdir(parents=True, exist_ok=True)
        (path / EXIT_FILE).unlink(missing_ok=True)
        to_log = to_log and "://" not in run.workdir  # a bucket has no files that grow
        with open(path / "train.log", "ab") if to_log else contextlib.nullcontext() as log:
            process = subprocess.Popen(
                train_command(self._sweep, run), stdout=log, stderr=log, start_new_session=True
            )
        self.under_way.append(Attempt(run, process, time.monotonic()))
        if self.must_stop:  # the signal came before the process was there to hear of it
            process.terminate()

    def take_ended(self) -> list[Attempt]:
        """Returns the attempts that are over since the last call."""
        over = [attempt for attempt in self.under_way if attempt.process.poll() is not None]
        for attempt in over:
            self.under_way.remove(attempt)
        return over


def train_command(sweep: Sweep, run: Planned) -> list[str]:
    words = [f"--config.{word}" for word in (*sweep.words, *words_of(run.changes))]
    return [
        sys.executable,
        "-m",
        "llada_jax",
        "train",
        "--config",
        sweep.file,
        "--workdir",
        run.workdir,
        *words,
    ]


def record_end(attempt: Attempt, *, pruned: bool = False) -> int:
    """Writes and returns the exit status of an attempt that is over, as shells count it."""
    code = attempt.process.returncode
    status = code if code >= 0 else 128 - code
    write_exit(attempt.run.workdir, status=status, pruned=pruned)
    return status


def run_index(sweep: Sweep, index: int) -> None:
    """Runs one run in the foreground; ends this process with the exit status of `train`."""
    if not 0 <= index < len(sweep.runs):
        raise UserError(f"--index {index}: {sweep.file} has the runs 0 to {len(sweep.runs) - 1}.")
    write_record(sweep)
    with Attempts(sweep) as attempts:
        attempts.start(sweep.runs[index], to_log=False)
        attempts.under_way[0].process.wait()
    if status := record_end(attempts.under_way[0]):
        sys.exit(status)


def run_local(sweep: Sweep, *, num_parallel: int, dry_run: bool) -> None:
    """Runs what is not finished, `num_parallel` at a time; a run that fails does not stop the
    others.
    """
    waiting = unfinished(sweep)
    if dry_run:
        for run in waiting:
            print(shlex.join(train_command(sweep, run)))
        return
    write_record(sweep)
    say(f"{len(waiting)} of {len(sweep.runs)} runs are to be done")
    statuses = {}
    with Attempts(sweep) as attempts:
        while attempts.under_way or (waiting and not attempts.must_stop):
            while waiting and len(attempts.under_way) < num_parallel and not attempts.must_stop:
                run = waiting.pop(0)
                say(f"{run.name} starts: {describe(run.changes)}")
                attempts.start(run, to_log=True)
            time.sleep(POLL_SECONDS)
            for attempt in attempts.take_ended():
                statuses[attempt.run.index] = record_end(attempt)
                say(outcome(attempt))
    failed = [index for index, status in statuses.items() if status not in (0, 3, *INTERRUPTED)]
    if failed:
        status = statuses[failed[0]]
        log = f"{sweep.runs[failed[0]].workdir}/train.log"
        say(f"{len(failed)} failed, the first with status {status}; {log} tells why")
        sys.exit(status)
    if attempts.must_stop or set(INTERRUPTED) & set(statuses.values()):
        left = len(unfinished(sweep))
        raise Preempted(
            f"asked to stop with {left} of {len(sweep.runs)} runs left; the same command continues."
        )


def say(message: str) -> None:
    print(f"sweep: {message}", file=sys.stderr, flush=True)


def outcome(attempt: Attempt) -> str:
    """Returns e.g. "003 complete: 2.104 bits/byte, step 500/500, 1m10s"."""
    result = attempt.run.result()
    bits = "" if math.isnan(result.bits_per_byte) else f" {result.bits_per_byte:.3f} bits/byte,"
    seconds = format_seconds(time.monotonic() - attempt.began)
    return (
        f"{attempt.run.name} {result.state}:{bits} step {result.step}/{result.num_steps}, {seconds}"
    )


def launch(
    sweep: Sweep, target: str, launcher_words: list[str], *, num_parallel: int | None, dry_run: bool
) -> None:
    """Hands what is not finished to launch/slurm.py as one array, or to launch/gke.py as one JobSet
    a run.
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
    if not dry_run:
        write_record(sweep)
    launcher = [sys.executable, str(script), *(["--dry-run"] if dry_run else []), *launcher_words]
    ours = ["llada-jax", "sweep", "--config", sweep.file, "--workdir", sweep.workdir]
    ours += [f"--config.{word}" for word in sweep.words]
    if target == "slurm":
        indices = ",".join(str(run.index) for run in waiting) + (
            f"%{num_parallel}" if num_parallel else ""
        )
        commands = [[*launcher, "--array", indices, "--", *ours, "--index", "$SLURM_ARRAY_TASK_ID"]]
    else:
        stem = re.sub(
            r"[^a-z0-9]+", "-", sweep.workdir.rstrip("/").rpartition("/")[2].lower()
        ).strip("-")
        commands = [
            [*launcher, "--name", f"{stem}-{run.name}", "--", *ours, "--index", str(run.index)]
            for run in waiting
        ]
    for command in commands:
        if status := subprocess.run(command, check=False).returncode:
            sys.exit(status)
