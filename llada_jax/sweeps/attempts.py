"""Processes of `llada-jax train`: starting them, passing signals on, and recording how they end.

Every run has a process of its own. JAX keeps its devices, its compiler flags and its compiled
programs for the life of a process, so that runs in one process would disturb each other; and a run
that is killed must not take the sweep with it.
"""

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from llada_jax.errors import reason
from llada_jax.run.tensorboard import EventsFile
from llada_jax.storage import remote
from llada_jax.streams import write_line
from llada_jax.sweeps.results import EXIT_FILE, write_exit
from llada_jax.sweeps.runs import Run, Sweep, as_overrides
from llada_jax.units import format_seconds

POLL_SECONDS = 0.2


class Attempt(NamedTuple):
    """One process of `llada-jax train`, which runs a run for the first time or continues it.

    began: time.monotonic() of its start. share: the environment that gives it its devices.
    """

    run: Run
    process: subprocess.Popen
    began: float
    share: dict[str, str]


class Attempts:
    """The processes under way. Its `with` block passes SIGTERM and Ctrl-C on to all of them.

    `must_stop` says whether one came. Each process is a session of its own: the terminal sends
    Ctrl-C to all processes of its session, and would reach them a second time, which stops at once
    and without saving. When this process is killed, the kernel stops them.

    Args:
        held: descriptors of the lock on DIR, which the processes hold too (only_sweep).
    """

    def __init__(self, sweep: Sweep, *, held: Sequence[int] = ()):
        self._sweep, self._held, self._previous = sweep, held, {}
        self.under_way: list[Attempt] = []
        self.must_stop = False

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *exception):
        # Some are left only after an exception, and then nothing else would end them.
        for attempt in self.under_way:
            if attempt.process.poll() is None:
                attempt.process.terminate()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _pass_on(self, number, frame):
        self.must_stop = True
        for attempt in self.under_way:
            if attempt.process.poll() is None:
                attempt.process.send_signal(number)

    def start(self, run: Run, *, to_log: bool, share: dict[str, str] | None = None) -> None:
        """Starts or continues a run.

        Args:
            share: variables of the environment that name the devices of this run; None: all.
            to_log: whether it writes to its train.log, and not to the stderr of this process.
        """
        path = epath.Path(run.workdir)
        path.mkdir(parents=True, exist_ok=True)
        # Otherwise a machine that goes down would leave the run as the attempt before had ended.
        (path / EXIT_FILE).unlink(missing_ok=True)
        # A bucket has no files that grow.
        to_log = to_log and "://" not in run.workdir
        with open(path / "train.log", "ab") if to_log else contextlib.nullcontext() as log:
            process = subprocess.Popen(
                train_command(self._sweep, run),
                env={**os.environ, **(share or {})},
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=self._held,
                preexec_fn=tied_to(os.getpid()),
            )
        self.under_way.append(Attempt(run, process, time.monotonic(), share or {}))
        # The signal came before this process was in the list.
        if self.must_stop:
            process.terminate()

    def take_ended(self) -> list[Attempt]:
        """Returns the attempts that have ended since the last call, and forgets them."""
        over = [attempt for attempt in self.under_way if attempt.process.poll() is not None]
        for attempt in over:
            self.under_way.remove(attempt)
        return over


def tied_to(sweep: int):
    """Returns what a process does before it becomes `train`: it ends when the sweep is gone.

    The kernel sends SIGTERM however the sweep ends, SIGKILL included, so that the run saves and no
    process is left that holds the devices. Only Linux has this.

    Args:
        sweep: the process id of the sweep.
    """
    if not sys.platform.startswith("linux"):
        return None
    # looked up here, because little is safe between fork and exec
    prctl, set_signal_at_death = ctypes.CDLL(None).prctl, 1

    def tie() -> None:
        prctl(set_signal_at_death, signal.SIGTERM)
        # The sweep may have ended before that call.
        if os.getppid() != sweep:
            os._exit(1)

    return tie


def train_command(sweep: Sweep, run: Run) -> list[str]:
    command = [sys.executable, "-m", "llada_jax", "train", "--config", sweep.file]
    command += ["--workdir", run.workdir]
    return command + [f"--config.{word}" for word in (*sweep.overrides, *as_overrides(run.changes))]


def record_end(attempt: Attempt, *, pruned: bool = False) -> int:
    """Records and returns the exit status of an attempt that is over.

    A process that a signal has killed gets 128 plus its number, as shells count it.
    """
    code = attempt.process.returncode
    status = code if code >= 0 else 128 - code
    try:
        write_exit(attempt.run.workdir, status=status, pruned=pruned)
    except OSError as error:
        # Accounting stops nothing: a run that is not complete counts as interrupted.
        say(
            f"{attempt.run.workdir}/{EXIT_FILE} cannot be written ({reason(error)}), so the exit "
            f"status {status} of this run is not recorded"
        )
    if status == 0 and attempt.run.config.log.tensorboard:
        write_hparams(attempt.run)
    return status


def write_hparams(run: Run) -> None:
    """Adds to a run's TensorBoard events what it changes and its results, for the table of them.

    `sweep` writes it and not `train`, which does not know what the other runs change.
    """
    result = run.result()
    metrics = {"bits_per_byte": result.bits_per_byte, "nats_per_token": result.nats_per_token}
    events = EventsFile(remote.path_of(run.workdir), first_step=None)
    events.hparams(run.changes, {k: v for k, v in metrics.items() if math.isfinite(v)})
    events.flush()
    events.close()


def say(message: str) -> None:
    write_line(f"sweep: {message}")


def outcome(attempt: Attempt) -> str:
    """Returns e.g. "003 complete: 2.104 bits/byte, step 500/500, 1m10s"."""
    result = attempt.run.result()
    bits = "" if math.isnan(result.bits_per_byte) else f" {result.bits_per_byte:.3f} bits/byte,"
    seconds = format_seconds(time.monotonic() - attempt.began)
    return (
        f"{attempt.run.name} {result.state}:{bits} step {result.step}/{result.num_steps}, {seconds}"
    )
