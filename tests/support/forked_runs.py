"""Training runs in forked processes, which have imported everything and start in no time.

Importing JAX, Orbax and grain takes 6 CPU seconds, several times as long as the training of a tiny
model. A process that has imported them and has not asked JAX for a device has no threads, so that
it may fork; its children are processes like any other, which are killed for real.
"""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

from support import fast_compilation

# Read when JAX and numpy are imported. A thread of OpenBLAS would not live on in the children.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "OPENBLAS_NUM_THREADS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": fast_compilation.XLA_FLAGS,
}

import grain  # noqa: F401  (imported once, for all children)
import jax
import tensorboardX  # noqa: F401
import tensorstore  # noqa: F401
from orbax.checkpoint import v1  # noqa: F401

import llada_jax.verbs.train  # noqa: F401
from llada_jax.__main__ import main


@dataclasses.dataclass
class Child:
    """A forked process, with all that it writes in one file."""

    pid: int
    log: Path
    status: int | None = None

    def poll(self) -> int | None:
        """Returns the exit status, of a signal its negative number; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def send(self, number: int) -> None:
        """Sends a signal; a child that has not been waited for keeps its number, dead or alive."""
        if self.status is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Returns the exit status; raises TimeoutError when it still runs after so long."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} still runs after {seconds:.0f} s")
            time.sleep(0.005)
        return self.status  # type: ignore[return-value]


def fork(work, log: Path) -> Child:
    """Returns a child that calls work() and ends with its status, as a program of its own would.

    The child leaves by SystemExit, so that Python runs its exit handlers; nothing between here and
    the top of the program may catch that.
    """
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return Child(pid, log)
    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(work())


def start_train(
    words: list[str],
    logs: Path,
    *,
    num_processes: int,
    num_devices: int,
    address: str,
) -> list[Child]:
    """Starts `llada-jax train` with these words as processes of one run.

    Args:
        logs: a directory, which gets one file per process.
        num_devices: CPU devices of each process.
        address: "HOST:PORT" at which the processes meet.
    """
    logs.mkdir(parents=True)

    def work(number: int) -> int:
        jax.config.update("jax_num_cpu_devices", num_devices)
        if num_processes > 1:
            os.environ |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(num_processes),
                "JAX_PROCESS_ID": str(number),
            }
        return main(["train", *words])

    return [
        fork(lambda number=number: work(number), logs / f"process-{number}.log")
        for number in range(num_processes)
    ]
