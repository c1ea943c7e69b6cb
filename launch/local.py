"""Starts one command as several processes on this machine, each with its own devices, as one run.

    python launch/local.py --processes 2 --devices 4 --logs runs/two/logs -- \\
        llada-jax train --config configs/debug.py --workdir runs/two/run

Every process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which
`llada-jax train` reads, and appends its output to LOGS/process-N.log; the output of the first
process is also shown on the terminal. When one process fails, the others are ended. SIGTERM and
Ctrl-C are passed on to all processes, so that they save the same step; a second Ctrl-C kills them.
The exit status is that of the first process that failed.
"""

import argparse
import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from llada_jax.errors import reason
from llada_jax.paths import path_of_flag
from llada_jax.streams import open_missing

POLL_SECONDS = 0.1


def free_port() -> int:
    """Returns a TCP port on which nothing listens at this moment."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def environments(num_processes: int, num_devices: int | None, address: str) -> list[dict[str, str]]:
    """Returns what each process finds in its environment in addition to the launcher's own."""
    team = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num_processes)}
    if num_devices is not None:
        team |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)}
    each = [{**team, "JAX_PROCESS_ID": str(number)} for number in range(num_processes)]
    # One GPU per process, out of those in CUDA_VISIBLE_DEVICES.
    if num_devices is None:
        each = [{**env, "JAX_LOCAL_DEVICE_IDS": str(number)} for number, env in enumerate(each)]
    return each


def copy(stream, log: Path, terminal) -> None:
    """Copies the output of a process to its log and the terminal, line by line, until it ends."""
    with open(log, "ab", buffering=0) as file:
        for line in stream:
            # Neither a full disk nor a closed terminal may stop the reading: the run would wait.
            for place in (file, terminal):
                with contextlib.suppress(OSError, ValueError):
                    place.write(line)
                    place.flush()


def tied_to(launcher: int):
    """Returns what a process does before it becomes the command: it ends when the launcher is gone.

    The kernel sends SIGTERM however the launcher ends, SIGKILL included, so that the run saves and
    no process is left that holds the devices. Only Linux has this.
    """
    if not sys.platform.startswith("linux"):
        return None
    # looked up here, because little is safe between fork and exec
    prctl, set_signal_at_death = ctypes.CDLL(None).prctl, 1

    def tie() -> None:
        prctl(set_signal_at_death, signal.SIGTERM)
        if os.getppid() != launcher:  # it ended before that call
            os._exit(1)

    return tie


def start(
    command: list[str], env: dict[str, str], log: Path, *, is_shown: bool
) -> subprocess.Popen:
    """Starts one process in its own session, so that Ctrl-C reaches only the launcher."""
    with open(log, "ab") as file:
        out = subprocess.PIPE if is_shown else file
        process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=tied_to(os.getpid()),
        )
    if is_shown:
        for pair in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
            threading.Thread(target=copy, args=(pair[0], log, pair[1]), daemon=True).start()
    return process


def wait(processes: list[subprocess.Popen], grace_seconds: float) -> int:
    """Waits until all processes have ended, and returns the status of the first that failed, or 0.

    After a failure the others have `grace_seconds` to end; then they are killed.
    """
    status, deadline = 0, None
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed and deadline is None:
            # Of processes that failed together, 42 and signals count least: they follow from the
            # others.
            status = min(failed, key=lambda code: code == 42 or code < 0)
            deadline = time.monotonic() + grace_seconds
        if None not in codes:
            # Killed by a signal: shells report 128 plus its number.
            return status if status >= 0 else 128 - status
        if deadline is not None and time.monotonic() > deadline:
            kill(processes)
        time.sleep(POLL_SECONDS)


def kill(processes: list[subprocess.Popen]) -> None:
    """Kills the processes that still run, together with the processes that they have started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the command; a mistake ends the program with status 2 and a message."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--processes", type=int, required=True, metavar="N", help="number of processes")
    add(
        "--devices",
        type=int,
        metavar="M",
        help="CPU devices per process; without this flag, process i gets GPU i",
    )
    add(
        "--logs",
        type=path_of_flag,
        default=Path("logs"),
        metavar="DIR",
        help="directory with one log per process (default logs)",
    )
    add(
        "--grace",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that the others have to end after a failure (default 30)",
    )
    add("--dry-run", action="store_true", help="print what would be started, and start nothing")
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what each process runs")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error(
            "there is no command; write it after --, for example: -- llada-jax train --config "
            "FILE --workdir DIR"
        )
    for flag in ("processes", "devices"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)} must be at least 1")
    # also false for nan, at which no process would ever be killed
    if not args.grace >= 0:
        parser.error(f"--grace {args.grace:g} must be at least 0")
    if not args.dry_run and not shutil.which(command[0]):
        parser.error(f"there is no program {command[0]!r} on this machine; check its name and PATH")
    return args, command


def main(argv: list[str]) -> int:
    open_missing()
    args, command = parse(argv)
    # not "localhost": the address of the loopback device alone is also where the first process
    # listens, out of reach of other machines
    envs = environments(args.processes, args.devices, f"127.0.0.1:{free_port()}")
    if args.dry_run:
        for env in envs:
            print(
                *(f"{name}={shlex.quote(value)}" for name, value in env.items()),
                shlex.join(command),
            )
        return 0
    try:
        args.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"launch: --logs {args.logs} cannot be written ({reason(error)}); name another "
            "directory.",
            file=sys.stderr,
        )
        return 2
    processes, num_interrupts = [], 0

    def pass_on(number, frame):
        nonlocal num_interrupts
        num_interrupts += number == signal.SIGINT
        if num_interrupts > 1:
            return kill(processes)
        for process in processes:
            if process.poll() is None:
                process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # nohup makes a program ignore SIGHUP, and then it must stay ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    for rank, env in enumerate(envs):
        processes.append(start(command, env, args.logs / f"process-{rank}.log", is_shown=rank == 0))
    status = wait(processes, args.grace)
    for thread in set(threading.enumerate()) - {threading.main_thread()}:
        # Wait for the last lines, but not forever: a program that a process left running may still
        # hold the pipe open.
        thread.join(timeout=5)
    if status:
        failed = ", ".join(
            str(number) for number, process in enumerate(processes) if process.returncode
        )
        # A closed terminal must not change the status.
        with contextlib.suppress(OSError, ValueError):
            print(
                f"launch: ended with status {status}; failed: process {failed}; logs: {args.logs}",
                file=sys.stderr,
                flush=True,
            )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
