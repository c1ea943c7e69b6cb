"""Submits one command to SLURM as a job that saves, is requeued and continues without your help.

    python launch/slurm.py --nodes 16 --gpus-per-node 8 --partition gpu --time 24:00:00 \\
        --sbatch=--exclusive \\
        -- llada-jax train --config configs/llada_8b.py --workdir /shared/runs/8b \\
        --config.data.path=/shared/corpus
    python launch/slurm.py --array 0-11%4 --gpus-per-node 1 --time 4:00:00 \\
        -- llada-jax sweep --config configs/ladder.py --workdir /shared/sweep \\
        --config.data.path=/shared/corpus --index '$SLURM_ARRAY_TASK_ID'

It writes LOGS/NAME.sbatch, passes it to sbatch and prints the number of the job; --dry-run prints
the script instead. A job is requeued when its command exits with 42 (saved; start me again) or is
killed by a signal; 0, 2 and 3 end it, and so do three starts in a row that saved nothing new.
The command is checked before it is submitted.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import preflight

from llada_jax.cluster.compiler_flags import check_flags, flags_named
from llada_jax.errors import UserError
from llada_jax.paths import path_of_flag, user_path
from llada_jax.storage.files import writing

# A job that was started this often in a row without a new checkpoint is not requeued again.
MAX_STARTS_WITHOUT_GAIN = 3

# The only thing that the job's shell expands in the command.
INDEX = "$SLURM_ARRAY_TASK_ID"

# JAX recognizes SLURM, but each process is still told its place in the run: by itself JAX would
# give every task only the GPU with the task's local number, which loses seven of eight GPUs when
# one task drives a node. JAX_LOCAL_DEVICE_IDS prevents that.
COORDINATOR = """
# The first node coordinates. The port follows from the number of the job, and lies above the ports
# that systems hand out by themselves.
read -r coordinator < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 1
export JAX_COORDINATOR_ADDRESS=$coordinator:$((61440 + SLURM_JOB_ID % 4096))
"""

PLACE_IN_RUN = """
export JAX_NUM_PROCESSES=$SLURM_NTASKS JAX_PROCESS_ID=$SLURM_PROCID"""

GPUS_OF_TASK = """
first=$((SLURM_LOCALID * {per_task}))
export JAX_LOCAL_DEVICE_IDS=$(seq -s, $first $((first + {per_task} - 1)))"""

SCRIPT = """\
#!/usr/bin/env bash
{directives}
# Written by launch/slurm.py of llada_jax. The log directory must exist before you submit this.
# shellcheck disable=SC2016 # single quotes on purpose: a task's shell expands what is in them
{exports}
command=({command})
{coordinator}
# What every task runs. srun reports only the highest exit status of its tasks. So a failure that a
# restart cannot fix is raised above the statuses of the tasks that are ended because of it (42, and
# 128 or more for signals).
task='{place}
trap : TERM # the command gets the signal as well, and its exit status counts
"$@"
status=$?
((status == 0 || status == 42 || status > 128)) || status=$((200 + (status < 55 ? status : 55)))
exit "$status"'

# How far the run in the workdir of the command has come: its newest checkpoint, and the sums of an
# evaluation that it was in. A command without a workdir on this machine shows nothing.
workdir={workdir}
reached() {{
    find "$workdir/checkpoints" -maxdepth 1 -printf '%f\n' 2>/dev/null |
        grep -Ex '[0-9]+' | sort -n | tail -n 1
    stat -c %s "$workdir/evaluation.json" 2>/dev/null
    return 0
}}
before=$(reached)

echo "start ${{SLURM_RESTART_COUNT:-0}} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
status=0
srun --kill-on-bad-exit=1 --cpu-bind=none {srun} \\
    bash -c "$task" task "${{command[@]}}" || status=$?

if ((status == 42 || (status > 128 && status < 200))); then
    # A restart that does not help would use the nodes up to the last one allowed.
    file={logs}/.without-gain-$SLURM_JOB_ID without_gain=0
    if [[ -n $workdir && $(reached) == "$before" ]]; then
        read -r without_gain 2>/dev/null <"$file"
        without_gain=$((without_gain + 1))
    fi
    echo "$without_gain" >"$file"
    if ((without_gain >= {max_without_gain})); then
        echo "status $status: not requeued, because $without_gain starts in a row saved no new step"
        exit "$status"
    fi
    if ((${{SLURM_RESTART_COUNT:-0}} < {max_restarts})); then
        echo "status $status: requeued, to continue from the last checkpoint"
        # The number of an array's last job is that of the whole array, all of which would start
        # again.
        job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
        scontrol requeue "${{job:-$SLURM_JOB_ID}}" && exec sleep 600 # until SLURM ends it
    fi
    echo "status $status: not requeued again, after ${{SLURM_RESTART_COUNT:-0}} restarts"
    exit "$status"
fi
((status < 200)) || status=$((status - 200))
echo "ended with status $status"
exit "$status"
"""


def quote(word: str) -> str:
    """Returns a word of the command, quoted so that bash expands only the array's index in it."""
    return (
        f'"{INDEX}"'.join(shlex.quote(part) if part else "" for part in word.split(INDEX)) or "''"
    )


def value_of(flag: str, command: list[str]) -> str:
    """Returns the value of a flag of the command, "" without one: the last, as the command does."""
    value = ""
    for word, following in zip(command, [*command[1:], ""]):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def workdir_of(command: list[str]) -> str:
    """Returns the local workdir of the run that a command does, as a word of bash; '' without one.

    The runs of a sweep have workdirs of their own below that of the command. A sweep that does
    several has no single one, and '' as well.
    """
    workdir, index = value_of("--workdir", command), value_of("--index", command)
    is_sweep = "sweep" in command
    if not workdir or "://" in workdir or (is_sweep and not index):
        return quote("")
    # find takes what begins with a hyphen for an option
    place = quote(os.path.join(".", user_path(workdir)))
    return f"{place}/$(printf %03d {quote(index)})" if is_sweep else place


def indices_of(array: str) -> Sequence[int]:
    """Returns the indices of --array, such as "0-11%4" (4 at a time), "0,3,5-7" or "0-20:5".

    Raises:
        UserError: it is not of that form, or empty.
    """
    parts = array.partition("%")[0].split(",")
    found = [re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", part) for part in parts]
    numbers = [
        range(int(first), int(last or first) + 1, int(step or 1))
        for match in found
        if match
        for first, last, step in [match.groups()]
    ]
    if not all(found) or not all(numbers):
        raise UserError(
            f"--array {array} must list numbers and ranges, as in 0-11%4, 0,3,5-7 or 0-20:5."
        )
    return numbers[0] if len(numbers) == 1 else sorted(set().union(*numbers))


def check_words(args: argparse.Namespace) -> None:
    """Raises UserError for a value that would not stay on its line of the script.

    A line break ends the comment that #SBATCH begins, and bash would execute what follows.
    """
    values = {name: value for name, value in vars(args).items() if isinstance(value, str | Path)}
    values |= {f"sbatch[{number}]": option for number, option in enumerate(args.sbatch)}
    for name, value in values.items():
        if not str(value).isprintable():
            flag = name.partition("[")[0].replace("_", "-")
            raise UserError(
                f"--{flag} {str(value)!r} contains a line break or another character that cannot "
                "be printed; leave it out"
            )
    for option in args.sbatch:
        if not option.startswith("-"):
            raise UserError(f"--sbatch={option} must be an option of sbatch, as in --qos=high")
    if not re.fullmatch(r"\w[\w.-]{0,199}", args.name, flags=re.ASCII):
        raise UserError(
            f"--name {args.name!r} must consist of at most 200 letters, digits, dots, hyphens and "
            "underscores, and begin with a letter, a digit or an underscore: files are named after "
            "it"
        )


def render(args: argparse.Namespace, command: list[str]) -> str:
    """Returns the batch script."""
    # SLURM puts the number of the job for %j, and % for %%
    log = f"{str(args.logs).replace('%', '%%')}/%x-{'%A_%a' if args.array else '%j'}"
    directives = {
        "job-name": args.name,
        "nodes": args.nodes,
        "ntasks-per-node": args.tasks_per_node,
        "gpus-per-node": args.gpus_per_node,
        "cpus-per-task": args.cpus_per_task,
        "partition": args.partition,
        "account": args.account,
        "time": args.time,
        "array": args.array,
        # To the tasks. With "B:" the batch shell would get it instead, and srun cannot pass it on.
        "signal": f"TERM@{args.warn}",
        "output": f"{log}.log",
    }
    lines = [
        f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in directives.items() if value
    ]
    lines += [
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        *(f"#SBATCH {option}" for option in args.sbatch),
    ]
    srun = {
        "cpus-per-task": args.cpus_per_task,
        "container-image": args.container_image,
        "container-mounts": args.container_mounts,
        "open-mode": "append",
        "output": f"{log}-task%t.log",
    }
    # With the platform named, a task that does not find its GPUs ends, and does not train on its
    # CPUs.
    of_gpus = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9", "JAX_PLATFORMS": "cuda,cpu"}
    env = of_gpus if args.gpus_per_node else {}
    env |= args.flags | dict(pair.split("=", 1) for pair in args.env)
    is_distributed = args.nodes * args.tasks_per_node > 1
    place = PLACE_IN_RUN if is_distributed else ""
    if is_distributed and args.gpus_per_node:
        place += GPUS_OF_TASK.format(per_task=args.gpus_per_node // args.tasks_per_node)
    return SCRIPT.format(
        directives="\n".join(lines),
        exports="".join(f"\nexport {name}={shlex.quote(value)}" for name, value in env.items()),
        command=" ".join(quote(word) for word in command),
        coordinator=COORDINATOR if is_distributed else "",
        place=place,
        srun=" ".join(
            f"--{name}={shlex.quote(str(value))}" for name, value in srun.items() if value
        ),
        max_restarts=args.max_restarts,
        max_without_gain=MAX_STARTS_WITHOUT_GAIN,
        # a path in a container may be another one here
        workdir=quote("") if args.container_image else workdir_of(command),
        logs=shlex.quote(str(args.logs)),
    )


def place_of(args: argparse.Namespace) -> preflight.Place:
    """Returns what the nodes of a job are, for the check of the command."""
    is_contained = bool(args.container_image)
    return preflight.Place(
        # 0: on CPUs their number follows from the environment of the job
        num_devices=args.nodes * args.gpus_per_node,
        # an image has disks of its own, and what is mounted there may have another path
        shares_disks=not is_contained,
        has_own_disks=is_contained,
    )


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the command; a mistake ends the program with status 2 and a message."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, metavar="N", help="nodes of the job (default 1)")
    add(
        "--gpus-per-node",
        type=int,
        default=0,
        metavar="N",
        help="GPUs per node (default 0: train on CPUs)",
    )
    add(
        "--tasks-per-node",
        type=int,
        metavar="N",
        help="processes per node (default: one per GPU, or 1)",
    )
    add("--cpus-per-task", type=int, metavar="N", help="cores per process (default: SLURM's)")
    add("--partition", metavar="NAME", help="partition to submit to")
    add("--account", metavar="NAME", help="account to charge")
    add(
        "--time",
        metavar="LIMIT",
        help="time limit, e.g. 24:00:00; the run saves before it ends, and is requeued",
    )
    add(
        "--warn",
        type=int,
        default=120,
        metavar="S",
        help="seconds before the time limit at which to save (default 120)",
    )
    add(
        "--array",
        metavar="SPEC",
        help=f"one job per index, e.g. 0-11%%4 (4 at a time); the command uses {INDEX}",
    )
    add("--container-image", metavar="IMAGE", help="run in this image (needs pyxis)")
    add("--container-mounts", metavar="A:B,..", help="what the image can see (needs pyxis)")
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment variable; may be repeated",
    )
    add(
        "--flags",
        default="",
        metavar="PRESET",
        help="compiler flags for one kind of hardware, e.g. gpu",
    )
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="=OPTION",
        help="any other option of sbatch, e.g. --sbatch=--qos=high",
    )
    add(
        "--max-restarts",
        type=int,
        default=50,
        metavar="N",
        help="how often the job may requeue itself (default 50)",
    )
    add(
        "--name",
        default="llada-jax",
        metavar="NAME",
        help="name of the job and its logs (default llada-jax)",
    )
    add(
        "--logs",
        type=path_of_flag,
        default=Path("logs"),
        metavar="DIR",
        help="directory of the logs, on a shared file system (default logs)",
    )
    add(
        "--unchecked",
        action="store_true",
        help="submit a command that the check before it would refuse",
    )
    add("--dry-run", action="store_true", help="print the script, and submit nothing")
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what every process runs")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error(
            "there is no command; write it after --, for example: -- llada-jax train --config "
            "FILE --workdir DIR"
        )
    args.tasks_per_node = (
        args.gpus_per_node or 1 if args.tasks_per_node is None else args.tasks_per_node
    )
    least = {
        "nodes": 1,
        "gpus_per_node": 0,
        "tasks_per_node": 1,
        "cpus_per_task": 1,
        "warn": 1,
        "max_restarts": 0,
    }
    for name, number in least.items():
        if getattr(args, name) is not None and getattr(args, name) < number:
            parser.error(
                f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {number}"
            )
    if args.gpus_per_node % args.tasks_per_node:
        parser.error(
            f"--gpus-per-node {args.gpus_per_node} cannot be shared by --tasks-per-node "
            f"{args.tasks_per_node}, because every process needs the same number of GPUs; choose a "
            "divisor of --gpus-per-node"
        )
    try:
        args.flags = flags_named(args.flags)
        check_flags(args.flags, "gpu")
    except UserError as error:
        parser.error(f"--flags: {error}")
    try:
        check_words(args)
    except UserError as error:
        parser.error(str(error))
    for pair in args.env:
        if not re.match(r"[A-Za-z_]\w*=", pair, flags=re.ASCII):
            parser.error(f"--env {pair} must be NAME=VALUE")
    if bool(args.array) != any(INDEX in word for word in command):
        parser.error(
            f"--array and '{INDEX}' in the command (in single quotes) go together; pass both or "
            "neither"
        )
    return args, command


def main(argv: list[str]) -> int:
    args, command = parse(argv)
    try:
        script = render(args, command)
        if not args.unchecked:
            indices = indices_of(args.array) if args.array else range(1)
            # the runs of an array differ in this word alone
            first = [word.replace(INDEX, str(indices[0])) for word in command]
            # a sweep, whose runs may ask for more than the first
            is_numbered = value_of("--index", command) == INDEX
            found = preflight.check(
                first, place_of(args), indices=indices if is_numbered else range(0)
            )
            print(f"launch: {found}", file=sys.stderr, flush=True)
    except UserError as error:
        print(f"launch: {error}", file=sys.stderr)
        return error.exit_status
    if args.dry_run:
        print(script, end="")
        return 0
    if not shutil.which("sbatch"):
        print(
            "launch: there is no sbatch here; run this on a login node of the cluster, or add "
            "--dry-run.",
            file=sys.stderr,
        )
        return 2
    file = args.logs / f"{args.name}.sbatch"
    try:
        with writing(f"--logs {args.logs}", remedy="name another directory"):
            args.logs.mkdir(parents=True, exist_ok=True)
            file.write_text(script)
    except UserError as error:
        print(f"launch: {error}", file=sys.stderr)
        return error.exit_status
    submitted = subprocess.run(
        ["sbatch", "--parsable", str(file)], stdout=subprocess.PIPE, text=True, check=False
    )
    if submitted.returncode:
        return submitted.returncode
    # In a federation, sbatch adds ";CLUSTER" to the number.
    job = submitted.stdout.strip().split(";")[0]
    print(job)
    print(
        f"launch: watch it with squeue --jobs {job}; its logs are "
        f"{args.logs}/{args.name}-{job}*.log",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
