"""Runs one command on every worker of Cloud TPU VMs, again whenever the TPUs are taken away.

    python launch/tpu_vm.py --name llada-8b --zone us-east5-a --topology v5p-128 \\
        --capacity spot --logs logs/llada-8b -- \\
        llada-jax train --config configs/llada_8b.py --workdir gs://BUCKET/llada-8b

It creates the queued resource unless it exists, waits until it is active, copies this checkout to
every worker and installs it, frees the chips from an earlier start, and runs the command on all
workers of all slices at once. LOGS gets one file per worker, and the output of the first worker is
also shown here. When a worker exits with 42, is killed or cannot be reached any more, or when a
slice is taken away, the launcher brings everything up again and repeats the command, up to
--max-restarts times. Any other failure ends the run with the worker's exit status. On Ctrl-C or
SIGTERM the workers save, and the launcher exits with 42.
"""

import argparse
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cloud import RESTART_STATUSES, check_name, command_of, make_parser
from tpu_vm_commands import ARCHIVE, CLEAN, INSTALL, STARTED, STOP, Target, run_script

from llada_jax.cluster.hardware import slice_named
from llada_jax.errors import UserError

REPOSITORY = Path(__file__).parent.parent
# A queued resource never leaves these states; its slices are gone.
DEAD = ("FAILED", "SUSPENDED")
TRANSIENT = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|HTTPError 5\d\d"
    r"|[Cc]onnection (reset|refused|aborted)|timed out"
)
# How often one gcloud command is tried that fails for a reason that may pass.
MAX_TRIES = 5
# Between two looks at the processes of the workers.
SECONDS_BETWEEN_LOOKS = 1.0


class GcloudError(UserError):
    """gcloud refused. The message is gcloud's, because it names the permission, quota or flag."""


def pack(code: Path, archive: Path) -> int:
    """Writes the files of a checkout that git does not ignore, and returns how many there are.

    Files that were changed or added since the last commit are included.
    """
    listed = subprocess.run(
        ["git", "-C", str(code), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        raise UserError(
            f"--code {code} is not a git checkout, so there is no list of files to copy; pass the "
            "root of a checkout."
        )
    files = [name for name in listed.stdout.split("\0") if name and (code / name).is_file()]
    with tarfile.open(archive, "w:gz") as tar:
        for name in files:
            tar.add(code / name, arcname=name)
    return len(files)


class Stop:
    """Whether Ctrl-C or SIGTERM has arrived.

    A second Ctrl-C ends the launcher at once and leaves the workers running.
    """

    def __init__(self):
        self.is_requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number, frame):
        self.is_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Stopped(Exception):
    """The launcher was asked to stop while no worker was running."""


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def pause(seconds: float, stop: Stop) -> None:
    """Sleeps; raises Stopped as soon as the launcher is asked to stop."""
    deadline = time.monotonic() + seconds
    while not stop.is_requested and time.monotonic() < deadline:
        time.sleep(min(0.2, seconds))
    if stop.is_requested:
        raise Stopped


def gcloud(command: list[str], *, poll: float, stop: Stop, accept: str = "") -> str:
    """Runs a gcloud command and returns its stdout; failures that may pass are tried again.

    Args:
        accept: an error that contains this word counts as success, with "" as the result.

    Raises:
        GcloudError: the command failed for another reason, or MAX_TRIES times.
    """
    for attempt in range(1, MAX_TRIES + 1):
        if stop.is_requested:
            raise Stopped
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, start_new_session=True
            )
        except FileNotFoundError as error:
            raise UserError(
                "gcloud is not installed here; install the Google Cloud CLI and log in."
            ) from error
        if done.returncode == 0:
            return done.stdout.strip()
        if accept and accept in done.stderr:
            return ""
        # ssh exits with 255 while a new worker does not know the key yet.
        if attempt == MAX_TRIES or not (TRANSIENT.search(done.stderr) or done.returncode == 255):
            break
        failed = f"{shlex.join(command[:6])} failed, try {attempt} of {MAX_TRIES}"
        say(f"{failed}: {done.stderr.strip()[-200:]}")
        pause(poll, stop)
    raise GcloudError(
        f"{shlex.join(command)[:400]} failed ({done.returncode}): {done.stderr.strip()[-1000:]}"
    )


def state_of(target: Target, *, poll: float, stop: Stop) -> str:
    """Returns the state of the queued resource, or "" if it does not exist."""
    return gcloud(target.describe(), poll=poll, stop=stop, accept="NOT_FOUND")


def bring_up(target: Target, *, poll: float, stop: Stop) -> bool:
    """Waits until the queued resource is active; returns False if one created here has failed.

    A resource that an earlier start left FAILED or SUSPENDED is deleted and created again.
    """
    said, is_new = None, False
    while True:
        state = state_of(target, poll=poll, stop=stop)
        if state != said:
            say(f"{target.name} is {state or 'not there yet'}")
            said = state
        if state == "ACTIVE":
            return True
        if state in DEAD:
            gcloud(target.delete(), poll=poll, stop=stop, accept="NOT_FOUND")
            if is_new:
                return False
        if not state or state in DEAD:
            say(f"creating {target.name}")
            gcloud(target.create(), poll=poll, stop=stop, accept="ALREADY_EXISTS")
            is_new = True
        pause(poll, stop)


def set_up(target: Target, archive: Path, *, poll: float, stop: Stop) -> None:
    """Makes every worker reachable by ssh, copies the code to it and installs it."""
    for node in target.nodes:
        say(f"{node}: copying and installing on {target.slice.num_tpu_vm_hosts} worker(s)")
        # Alone, because the first contact may have to distribute a new key.
        gcloud(target.ssh(node, 0, "true"), poll=poll, stop=stop)
        gcloud(target.copy(archive, node), poll=poll, stop=stop)
        gcloud(target.ssh(node, "all", INSTALL), poll=poll, stop=stop)


@dataclass(frozen=True, kw_only=True)
class Running:
    """The ssh process of one worker, and where in its log this start begins."""

    log: Path
    offset: int
    process: subprocess.Popen

    def status(self) -> int | None:
        """Returns the worker's exit status, or None while it runs.

        If the command was never reached, this is 255, the status of ssh itself.
        """
        status = self.process.poll()
        return (
            255
            if status and STARTED.encode() not in self.log.read_bytes()[self.offset :]
            else status
        )


def start_workers(target: Target, script: str, logs: Path) -> list[Running]:
    """Starts the script on all workers; each has its own log, to which later starts append."""
    workers = []
    for node, number in target.workers:
        path = logs / f"slice-{target.nodes.index(node)}-worker-{number}.log"
        with open(path, "ab") as log:
            process = subprocess.Popen(
                target.ssh(node, number, script),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C must reach only the launcher.
                start_new_session=True,
            )
            workers.append(Running(log=path, offset=log.tell(), process=process))
    return workers


def run_on_all(target: Target, script: str) -> None:
    """Runs a script on every worker that can be reached."""
    for node in target.nodes:
        subprocess.run(
            target.ssh(node, "all", script),
            capture_output=True,
            check=False,
            start_new_session=True,
        )


def run_everywhere(
    target: Target, script: str, logs: Path, *, grace: float, poll: float, stop: Stop
) -> list[int]:
    """Runs the script on all workers; returns the exit statuses of those that ended by themselves.

    The statuses are in the order in which the workers ended. When a worker fails, or when the
    launcher is asked to stop, the others have `grace` seconds; after that they are given up.
    """
    running = start_workers(target, script, logs)
    statuses, deadline, is_stopping = [], None, False
    with open(running[0].log, "rb") as shown:
        shown.seek(running[0].offset)
        while running and (deadline is None or time.monotonic() < deadline):
            time.sleep(min(SECONDS_BETWEEN_LOOKS, poll))
            sys.stderr.write(shown.read().decode(errors="replace"))
            if stop.is_requested and not is_stopping:
                say(f"asking the workers to save and stop, for at most {grace:.0f} s")
                run_on_all(target, STOP)
                is_stopping = True
            for worker in list(running):
                status = worker.status()
                if status is not None:
                    running.remove(worker)
                    statuses.append(status)
                    say(f"{worker.log.name}: exit status {status}")
            if deadline is None and (is_stopping or any(statuses)):
                deadline = time.monotonic() + grace
        sys.stderr.write(shown.read().decode(errors="replace"))
    for worker in running:
        worker.process.kill()
        worker.process.wait()
    # They have had their time. After a failure, it is the next start that clears them away.
    if running and is_stopping:
        run_on_all(target, CLEAN)
    return statuses


def babysit(
    target: Target,
    archive: Path,
    script: str,
    logs: Path,
    *,
    max_restarts: int,
    grace: float,
    poll: float,
    stop: Stop,
) -> int:
    """Brings the slices up and runs the script until it is done; returns the exit status."""
    for attempt in range(max_restarts + 1):
        if attempt:
            say(f"restart {attempt} of {max_restarts}")
        if not bring_up(target, poll=poll, stop=stop):
            continue
        try:
            set_up(target, archive, poll=poll, stop=stop)
            for node in target.nodes:
                gcloud(target.ssh(node, "all", CLEAN), poll=poll, stop=stop)
        except GcloudError:
            if state_of(target, poll=poll, stop=stop) == "ACTIVE":
                raise
            say(f"{target.name} was taken away while it was set up")
            continue
        statuses = run_everywhere(target, script, logs, grace=grace, poll=poll, stop=stop)
        if statuses == [0] * len(target.workers):
            return 0
        if stop.is_requested:
            say("stopped; the same command continues the run")
            return 42
        final = [status for status in statuses if status and status not in RESTART_STATUSES]
        if not final:
            continue
        # 2 is a mistake and 3 means NaN. Anything else may come from a slice that went away under
        # the process.
        if final[0] in (2, 3) or state_of(target, poll=poll, stop=stop) == "ACTIVE":
            say(f"exit status {final[0]} would only recur; the logs are in {logs}")
            return final[0]
    say(f"gave up after {max_restarts} restarts; the logs are in {logs}")
    return 42


def dry_run(target: Target, script: str, *, delete: bool) -> None:
    """Prints, in order, every command of a run in which nothing goes wrong."""
    commands = [target.describe(), target.create(), target.describe()]
    for node in target.nodes:
        commands += [
            target.ssh(node, 0, "true"),
            target.copy(Path(ARCHIVE), node),
            target.ssh(node, "all", INSTALL),
        ]
    commands += [target.ssh(node, "all", CLEAN) for node in target.nodes]
    commands += [target.ssh(node, worker, script) for node, worker in target.workers]
    commands += [target.delete()] if delete else []
    for command in commands:
        print(shlex.join(command))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--zone", required=True, metavar="ZONE", help="zone of the TPUs")
    parser.add_argument("--project", default="", metavar="ID", help="default: gcloud's current one")
    parser.add_argument(
        "--logs",
        type=Path,
        default=Path("logs"),
        metavar="DIR",
        help="directory with one log per worker (default logs)",
    )
    parser.add_argument(
        "--code",
        type=Path,
        default=REPOSITORY,
        metavar="DIR",
        help="checkout to copy (default: this one)",
    )
    parser.add_argument(
        "--internal-ip", action="store_true", help="give the workers no external address"
    )
    parser.add_argument(
        "--create-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="passed to gcloud's create, e.g. --create-flag=--network=N; may be repeated",
    )
    parser.add_argument(
        "--poll",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds between looks at the state (default 30)",
    )
    parser.add_argument(
        "--delete",
        action="store_true",
        help="delete the queued resource at the end, however the run ends",
    )
    return parser.parse_args(argv)


def target_of(args: argparse.Namespace) -> Target:
    """Returns what a command line asks for; raises UserError when TPU VMs do not offer it."""
    tpu = slice_named(args.topology)
    if not tpu.num_tpu_vm_hosts:
        raise UserError(f"{tpu.name} is not offered as TPU VMs; use launch/gke.py.")
    if args.capacity.kind == "flex" and not args.capacity.detail:
        raise UserError("--capacity flex needs a duration; write for example --capacity flex:8h.")
    target = Target(
        name=args.name,
        zone=args.zone,
        project=args.project,
        slice=tpu,
        num_slices=args.slices,
        capacity=args.capacity,
        internal_ip=args.internal_ip,
        create_flags=args.create_flag,
    )
    check_name(args.name, longest=target.nodes[-1])
    return target


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        command = command_of(args)
        target = target_of(args)
        script = run_script(command, args.flags | dict(args.env))
        if args.dry_run:
            dry_run(target, script, delete=args.delete)
            return 0
        stop = Stop()
        args.logs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            archive = Path(directory) / ARCHIVE
            num_files = pack(args.code, archive)
            megabytes = archive.stat().st_size / 1e6
            say(f"copying {num_files} files of {args.code}, {megabytes:.1f} MB")
            try:
                return babysit(
                    target,
                    archive,
                    script,
                    args.logs,
                    max_restarts=args.max_restarts,
                    grace=args.grace,
                    poll=args.poll,
                    stop=stop,
                )
            except Stopped:
                then = "deleting it" if args.delete else "it stays queued"
                say(f"stopped while {target.name} was brought up; {then}")
                return 42
            finally:
                if args.delete:
                    stop.is_requested = False
                    gcloud(target.delete(), poll=args.poll, stop=stop, accept="NOT_FOUND")
                    say(f"{target.name} is deleted")
    except UserError as error:
        print(f"tpu_vm: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("tpu_vm: interrupted; the workers may still be running.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
