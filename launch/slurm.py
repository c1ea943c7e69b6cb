"""Submits one command to SLURM as a job of one or many nodes that saves, is requeued and continues
by itself.

    python launch/slurm.py --nodes 16 --gpus-per-node 8 --partition gpu --time 24:00:00
    --sbatch=--exclusive \\
        -- llada-jax train --config configs/llada_8b.py --workdir /shared/runs/8b
    python launch/slurm.py --array 0-11%4 --gpus-per-node 1 --time 4:00:00 \\
        -- llada-jax sweep --config configs/ladder.py --workdir /shared/sweep --index
        '$SLURM_ARRAY_TASK_ID'

It writes LOGS/NAME.sbatch, hands it to sbatch and prints the number of the job; --dry-run prints
the script instead. A job whose command exits 42 (saved; start me again) or is killed by a signal is
requeued; 0, 2 and 3 end it.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from llada_jax.cluster.compiler_flags import flags_named
from llada_jax.errors import UserError

INDEX = "$SLURM_ARRAY_TASK_ID"  # the one thing that the shell of the job expands in the command

# Why the place in the run is told explicitly, although JAX recognizes SLURM: JAX would give every
# task only the GPU of its local number, which loses seven of eight when one task drives a node.
# JAX_LOCAL_DEVICE_IDS ends that guess.
COORDINATOR = """
# The first node coordinates. The port follows from the job, above the ports that systems hand out by themselves.
read -r coordinator < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 1
export JAX_COORDINATOR_ADDRESS=$coordinator:$((61440 + SLURM_JOB_ID % 4096))
"""

PLACE_IN_RUN = """
export JAX_NUM_PROCESSES=$SLURM_NTASKS JAX_PROCESS_ID=$SLURM_PROCID"""

GPUS_OF_TASK = """
export JAX_LOCAL_DEVICE_IDS=$(seq -s, $((SLURM_LOCALID * {per_task})) $((SLURM_LOCALID * {per_task} + {per_task} - 1)))"""

SCRIPT = """\
#!/usr/bin/env bash
{directives}
# Written by launch/slurm.py of llada_jax. The directory of the logs must exist before this is submitted.
# shellcheck disable=SC2016 # single quotes are meant: a word of the command, or what the shell of a task expands
{exports}
command=({command})
{coordinator}
# What every task runs. srun tells the highest exit status of its tasks only, so a failure that another start cannot mend
# goes above those of the tasks that are ended for its sake (42; 128 and more for signals).
task='{place}
trap : TERM # the command is told as well, and its answer counts
"$@"
status=$?
((status == 0 || status == 42 || status > 128)) || status=$((200 + (status < 55 ? status : 55)))
exit "$status"'

echo "start ${{SLURM_RESTART_COUNT:-0}} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
status=0
srun --kill-on-bad-exit=1 --cpu-bind=none {srun} \\
    bash -c "$task" task "${{command[@]}}" || status=$?

if ((status == 42 || (status > 128 && status < 200))); then
    if ((${{SLURM_RESTART_COUNT:-0}} < {max_restarts})); then
        echo "status $status: requeued, to continue from the last checkpoint"
        scontrol requeue "$SLURM_JOB_ID" && exec sleep 600 # until SLURM ends it
    fi
    echo "status $status: not requeued again after ${{SLURM_RESTART_COUNT:-0}} restarts"
    exit "$status"
fi
((status < 200)) || status=$((status - 200))
echo "ended with status $status"
exit "$status"
"""


def quote(word: str) -> str:
    """Returns a word of the command for bash, which expands nothing in it but the array's index."""
    return (
        f'"{INDEX}"'.join(shlex.quote(part) if part else "" for part in word.split(INDEX)) or "''"
    )


def render(args: argparse.Namespace, command: list[str]) -> str:
    """Returns the batch script."""
    log = f"{args.logs}/%x-{'%A_%a' if args.array else '%j'}"
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
        # to the tasks; with B: the batch shell would get it, and srun cannot pass it on
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
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"} if args.gpus_per_node else {}
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
    )


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the command; a mistake ends the program with status 2 and a sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, metavar="N", help="nodes of the job (1)")
    add(
        "--gpus-per-node",
        type=int,
        default=0,
        metavar="N",
        help="GPUs of each node (0: train on its CPUs)",
    )
    add(
        "--tasks-per-node", type=int, metavar="N", help="processes of each node (one per GPU, or 1)"
    )
    add(
        "--cpus-per-task", type=int, metavar="N", help="cores of each process (what the node gives)"
    )
    add("--partition", metavar="NAME")
    add("--account", metavar="NAME")
    add(
        "--time",
        metavar="LIMIT",
        help="time limit, e.g. 24:00:00; the run saves before it and is requeued",
    )
    add(
        "--warn",
        type=int,
        default=120,
        metavar="S",
        help="seconds before the limit at which to save (120)",
    )
    add(
        "--array",
        metavar="SPEC",
        help=f"one job an index, e.g. 0-11%%4 (4 at a time); the command uses {INDEX}",
    )
    add("--container-image", metavar="IMAGE", help="run in this image (needs pyxis)")
    add("--container-mounts", metavar="A:B,..", help="what the image sees (needs pyxis)")
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment of the command; may be repeated",
    )
    add(
        "--flags",
        default="",
        metavar="PRESET",
        help="compiler flags of llada_jax.cluster.hardware, e.g. gpu",
    )
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="=OPTION",
        help="any other option, e.g. --sbatch=--qos=high",
    )
    add(
        "--max-restarts",
        type=int,
        default=50,
        metavar="N",
        help="requeues that the job may ask for (50)",
    )
    add("--name", default="llada-jax", metavar="NAME", help="of the job and its logs (llada-jax)")
    add(
        "--logs",
        type=Path,
        default=Path("logs"),
        metavar="DIR",
        help="on a shared file system (logs)",
    )
    add("--dry-run", action="store_true", help="print the script")
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what every process runs")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error(
            "there is no command; write it after --, as in: -- llada-jax train --config FILE "
            "--workdir DIR"
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
            f"{args.tasks_per_node}; "
            "every process needs the same number of GPUs"
        )
    try:
        args.flags = flags_named(args.flags)
    except UserError as error:
        parser.error(f"--flags: {error}")
    for pair in args.env:
        if not re.match(r"[A-Za-z_]\w*=", pair):
            parser.error(f"--env {pair} must be NAME=VALUE")
    if bool(args.array) != any(INDEX in word for word in command):
        parser.error(
            f"--array and '{INDEX}' in the command (in single quotes) go together; give both or "
            "neither"
        )
    return args, command


def main(argv: list[str]) -> int:
    args, command = parse(argv)
    script = render(args, command)
    if args.dry_run:
        print(script, end="")
        return 0
    if not shutil.which("sbatch"):
        print(
            "launch: there is no sbatch here; run this on a login node of the cluster, or add "
            "--dry-run",
            file=sys.stderr,
        )
        return 2
    args.logs.mkdir(parents=True, exist_ok=True)
    file = args.logs / f"{args.name}.sbatch"
    file.write_text(script)
    submitted = subprocess.run(
        ["sbatch", "--parsable", str(file)], stdout=subprocess.PIPE, text=True, check=False
    )
    if submitted.returncode:
        return submitted.returncode
    job = submitted.stdout.strip().split(";")[0]  # a federation adds ;CLUSTER
    print(job)
    print(
        f"launch: watch it with squeue --jobs {job}; it writes to "
        f"{args.logs}/{args.name}-{job}*.log",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
