"""Starts one command as several processes on this machine, each with its own devices, joined into one run.

    python launch/local.py --processes 2 --devices 4 --logs runs/two/logs -- \
        llada-jax train --config configs/debug.py --workdir runs/two/run

Every process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which `llada-jax train` reads. The first
process writes to the terminal, the others to LOGS/process-N.log. When one fails the others are ended; SIGTERM and
Ctrl-C are passed on to all, so that they save the same step. The exit status is that of the first process that failed.
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

POLL_SECONDS = 0.1


def free_port() -> int:
    """Returns a TCP port that nothing listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def environments(num_processes: int, num_devices: int | None, address: str) -> list[dict[str, str]]:
    """Returns what each process finds in its environment beside the launcher's own."""
    team = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num_processes)}
    if num_devices is not None:
        team |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)}
    each = [{**team, "JAX_PROCESS_ID": str(number)} for number in range(num_processes)]
    if num_devices is None:  # one GPU a process
        each = [{**env, "CUDA_VISIBLE_DEVICES": str(number)} for number, env in enumerate(each)]
    return each


def start(command: list[str], envs: list[dict[str, str]], logs: Path) -> list[subprocess.Popen]:
    """Starts the processes, each in a session of its own so that the terminal's Ctrl-C reaches only the launcher."""
    processes = []
    for number, env in enumerate(envs):
        log = contextlib.nullcontext() if number == 0 else open(logs / f"process-{number}.log", "wb")  # noqa: SIM115
        with log as file:
            processes.append(
                subprocess.Popen(
                    command, env={**os.environ, **env}, stdout=file, stderr=file and subprocess.STDOUT,
                    start_new_session=True,
                )
            )  # fmt: skip
    return processes


def wait(processes: list[subprocess.Popen], grace_seconds: float) -> int:
    """Returns the exit status of the first process that fails, after the others have ended or been ended; 0 if none."""
    status, deadline = 0, None
    while any(process.poll() is None for process in processes):
        failed = [process for process in processes if process.poll() not in (None, 0)]
        if failed and deadline is None:
            status, deadline = failed[0].returncode, time.monotonic() + grace_seconds
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(POLL_SECONDS)
    status = status or next((process.returncode for process in processes if process.returncode), 0)
    return status if status >= 0 else 128 - status  # killed by a signal: as shells count it


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="how many to start")
    parser.add_argument(
        "--devices", type=int, metavar="M", help="CPU devices of each; without it, process i gets GPU i"
    )
    parser.add_argument("--logs", type=Path, default=Path("logs"), metavar="DIR", help="of all processes but the first")
    parser.add_argument("--grace", type=float, default=30.0, metavar="S", help="seconds for the others to end (30)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what each process runs")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("there is no command; write it after --, as in: -- llada-jax train --config FILE --workdir DIR")
    for flag in ("processes", "devices"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)} must be at least 1")
    envs = environments(args.processes, args.devices, f"localhost:{free_port()}")
    if args.dry_run:
        for env in envs:
            print(*(f"{name}={shlex.quote(value)}" for name, value in env.items()), shlex.join(command))
        return 0
    args.logs.mkdir(parents=True, exist_ok=True)
    processes = start(command, envs, args.logs)

    def pass_on(number, frame):
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    status = wait(processes, args.grace)
    if status:
        print(f"launch: ended with status {status}; the other processes wrote to {args.logs}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
