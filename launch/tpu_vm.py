"""Runs one command on every worker of Cloud TPU VMs, again whenever the TPUs are taken away.

    python launch/tpu_vm.py --name llada-8b --zone us-east5-a --topology v5p-128 \\
        --capacity spot --gcs-fuse my-bucket:/data:ro --logs logs/llada-8b -- \\
        llada-jax train --config configs/llada_8b.py --workdir gs://my-bucket/llada-8b \\
        --config.data.path=/data/corpus

It checks the command, creates the queued resource unless it exists, waits until it is active,
copies this checkout to every worker, installs it with the same versions of all packages everywhere
(LOGS/NAME.lock), mounts buckets, frees the chips from an earlier start, and runs the command on all
workers of all slices at once. LOGS gets one file per worker, and the output of the first worker is
also shown here. When a worker exits with 42, is killed or cannot be reached any more, or when a
slice is taken away, the launcher brings everything up again and repeats the command, up to
--max-restarts times. Any other failure ends the run with the worker's exit status. On Ctrl-C or
SIGTERM the workers save, and the launcher exits with 42.
"""

import argparse
import ast
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from cloud import (
    HOST_EXTRAS,
    RESTART_STATUSES,
    check_command,
    check_mount_points,
    check_name,
    command_of,
    make_parser,
    parse_buckets,
)
from gke_volumes import needed_by
from preflight import Place, config_of
from tpu_vm_commands import (
    ARCHIVE,
    CLEAN,
    STARTED,
    STOP,
    UNPACK,
    Target,
    install_script,
    is_lock_of,
    lock_script,
    mount_script,
    run_script,
    set_up_script,
)
from tpu_vm_workers import (
    GcloudError,
    Installation,
    Stop,
    Stopped,
    bring_up,
    files_of,
    gcloud,
    pack,
    say,
    set_up,
    state_of,
)

from llada_jax.cluster.compiler_flags import check_flags
from llada_jax.cluster.hardware import machines_named
from llada_jax.errors import UserError, look_up
from llada_jax.paths import path_of_flag
from llada_jax.ranges import Range, check_number
from llada_jax.storage.files import writing

REPOSITORY = Path(__file__).parent.parent
# Between two looks at the processes of the workers.
SECONDS_BETWEEN_LOOKS = 1.0
# From here on the launcher says that GKE is the better way: it holds one ssh connection per worker
# for the whole run, and the loss of any of them, or of this machine, stops all workers.
MANY_WORKERS = 32


@dataclass(frozen=True, kw_only=True)
class Running:
    """The ssh process of one worker, and where in its log this start begins."""

    log: Path
    offset: int
    process: subprocess.Popen

    def status(self) -> int | None:
        """Returns the worker's exit status, or None while it runs.

        If the command was never reached, or if ssh was killed on this machine, this is 255, the
        status with which ssh itself ends when it has lost the worker.
        """
        status = self.process.poll()
        if not status:
            return status
        is_lost = status < 0 or STARTED.encode() not in self.log.read_bytes()[self.offset :]
        return 255 if is_lost else status


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
    made: Installation,
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
            set_up(target, made, poll=poll, stop=stop)
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


def dry_run(target: Target, made: Installation, script: str, *, delete: bool) -> None:
    """Prints, in order, every command of a run in which nothing goes wrong."""
    commands = [target.describe(), target.create(), target.describe()]
    lock = made.lock.read_text() if made.lock.exists() else ""
    is_locked = is_lock_of(lock, made.extras)
    versions = lock if is_locked else "# what the first worker has printed\n"
    for node in target.nodes:
        commands += [
            target.ssh(node, 0, "true"),
            target.copy(made.archive, node),
            target.ssh(node, "all", UNPACK),
        ]
        if not is_locked:
            commands.append(target.ssh(node, 0, lock_script(made.extras, lock)))
            is_locked = True
        commands += [
            target.ssh(node, "all", each)
            for each in (install_script(versions, made.extras), *made.scripts)
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
        type=path_of_flag,
        default=Path("logs"),
        metavar="DIR",
        help="directory with one log per worker (default logs)",
    )
    parser.add_argument(
        "--code",
        type=path_of_flag,
        default=REPOSITORY,
        metavar="DIR",
        help="checkout to copy (default: this one)",
    )
    parser.add_argument(
        "--set-up",
        type=path_of_flag,
        metavar="FILE",
        help="bash script that every worker runs after each installation",
    )
    parser.add_argument(
        "--extra",
        action="append",
        default=[],
        metavar="NAME",
        help=f"extra of setup.py to install as well as {', '.join(HOST_EXTRAS)}; may be repeated",
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
    """Returns what a command line asks for; raises UserError when TPU VMs do not offer it, or when
    --poll is not a time to wait.
    """
    check_number("--poll ", args.poll, Range(0, 86_400, above=True))
    tpu = machines_named(args.topology)
    if tpu.accelerator.platform != "tpu":
        raise UserError(
            f"{args.topology} are GPUs; use launch/gke.py with --topology {args.topology}, or "
            "launch/slurm.py."
        )
    if not tpu.num_tpu_vm_hosts:
        raise UserError(f"{tpu.name} is not offered as TPU VMs; use launch/gke.py.")
    check_flags(args.flags, "tpu")
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


def installation_of(args: argparse.Namespace, archive: Path) -> Installation:
    """Returns what a command line installs; raises UserError for what is wrong in it."""
    buckets = parse_buckets(args.gcs_fuse)
    check_mount_points([bucket.path for bucket in buckets])
    scripts = [mount_script(buckets)] if buckets else []
    if args.set_up:
        if not args.set_up.is_file():
            raise UserError(f"--set-up {args.set_up} is not a file; pass a bash script.")
        scripts.append(set_up_script(args.set_up.read_text()))
    return Installation(
        archive=archive,
        extras=tuple(args.extra),
        lock=args.logs / f"{args.name}.lock",
        scripts=tuple(scripts),
    )


def place_of(args: argparse.Namespace, target: Target) -> Place:
    """Returns what the workers of a command line are, for the check of the command."""
    return Place(
        machines=target.slice,
        num_slices=target.num_slices,
        mounts={bucket.path: not bucket.is_read_only for bucket in parse_buckets(args.gcs_fuse)},
        # a script of the user's may mount anything
        has_own_disks=bool(args.set_up),
        extras=(*HOST_EXTRAS, *args.extra),
        how_to_install="pass --extra {extra}",
        root=args.code,
    )


def check_config_is_copied(command: list[str], code: Path) -> None:
    """Raises UserError when the config of a command, or a module next to it that it needs, is not
    among the files that are copied.
    """
    config = config_of(command)
    if not config or not (code / config).is_file():
        return
    copied = files_of(code)
    for path in needed_by(code / config):
        if Path(config).is_absolute() or os.path.relpath(path, code) not in copied:
            named = config if path == code / config else f"{config} needs {path.name}, which"
            raise UserError(
                f"--config {named} is not among the files of {code} that are copied to the "
                "workers, because git ignores it or it lies elsewhere; put it into the checkout "
                "and write its path from there."
            )


def check_extras(extras: list[str], code: Path) -> None:
    """Raises UserError for an extra that setup.py of a checkout does not have.

    The installation would fail, on workers that are paid for by then.
    """
    if extras and (code / "setup.py").is_file():
        tree = ast.parse((code / "setup.py").read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        known = {
            key.value: None
            for call in calls
            for keyword in call.keywords
            if keyword.arg == "extras_require" and isinstance(keyword.value, ast.Dict)
            for key in keyword.value.keys
            if isinstance(key, ast.Constant)
        }
        for extra in extras:
            look_up(known, extra, "extra")


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        command = command_of(args)
        target = target_of(args)
        script = run_script(command, args.flags | dict(args.env))
        made = installation_of(args, Path(ARCHIVE))
        check_command(args, command, place_of(args, target), launcher="launch")
        check_config_is_copied(command, args.code)
        check_extras(args.extra, args.code)
        if len(target.workers) >= MANY_WORKERS:
            say(
                f"{len(target.workers)} workers are as many ssh connections from this machine, and "
                f"the run stops with the first that is lost; from {MANY_WORKERS} on launch/gke.py "
                "is the better way"
            )
        if args.dry_run:
            dry_run(target, made, script, delete=args.delete)
            return 0
        stop = Stop()
        with writing(f"--logs {args.logs}", remedy="name another directory"):
            args.logs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            made = replace(made, archive=Path(directory) / ARCHIVE)
            num_files = pack(args.code, made.archive)
            megabytes = made.archive.stat().st_size / 1e6
            say(f"copying {num_files} files of {args.code}, {megabytes:.1f} MB")
            try:
                return babysit(
                    target,
                    made,
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
