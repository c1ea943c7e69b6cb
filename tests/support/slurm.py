"""Calls launch/slurm.py, runs its script without SLURM, and follows jobs in a real SLURM."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from support.paths import LAUNCH

LAUNCHER = LAUNCH / "slurm.py"


def launch(*words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(LAUNCHER), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )


def dry_run(*words) -> str:
    done = launch("--dry-run", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_a_fake_job(script: str, path: Path) -> str:
    """Runs the script with stand-ins for srun (one task, as number 3 of its node) and scontrol;
    returns its output.
    """
    stand_ins = {
        "srun": (
            "while [[ $1 == --* ]]; do shift; done\n"
            'SLURM_NTASKS=16 SLURM_PROCID=11 SLURM_LOCALID=3 exec "$@"'
        ),
        "scontrol": (
            'if [[ $1 == show ]]; then printf "%s\\n" node7 node8; '
            'else echo "scontrol $*"; exit 1; fi'
        ),
    }
    for name, stand_in in stand_ins.items():
        (path / name).write_text(f"#!/usr/bin/env bash\n{stand_in}\n")
        (path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4100", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_ARRAY_TASK_ID": "5"}
    # Other tests may have set variables of JAX.
    around = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env = {**around, "PATH": f"{path}:{os.environ['PATH']}", **job}
    done = subprocess.run(
        ["bash"], input=script, capture_output=True, text=True, env=env, check=False
    )
    return done.stdout + done.stderr + f"exit {done.returncode}"


def scontrol(*words) -> str:
    return subprocess.run(
        ["scontrol", *map(str, words)], capture_output=True, text=True, check=True
    ).stdout


def idle_nodes() -> int:
    nodes = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition", "main", "--states", "idle"],
        capture_output=True,
        text=True,
        check=False,
    )
    return len(nodes.stdout.splitlines())


class Job:
    """A job submitted by the launcher; cancelled at the end of its test."""

    def __init__(self, directory: Path, words, command):
        self.logs = directory / "logs"
        done = launch("--logs", self.logs, "--partition", "main", *words, "--", *command)
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    def fields(self, index: int | None = None) -> dict[str, str]:
        number = self.number if index is None else f"{self.number}_{index}"
        return dict(re.findall(r"(\w+)=(\S*)", scontrol("show", "job", "--oneliner", number)))

    def output(self) -> str:
        return "\n".join(
            f"== {path.name}\n{path.read_text()}" for path in sorted(self.logs.glob("*.log"))
        )

    def wait(self, condition, *, seconds: float = 300) -> None:
        """Waits until `condition` holds, asking often."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.fields()}\n{self.output()}"
            time.sleep(0.05)

    def wait_for_end(self, *, index: int | None = None) -> dict[str, str]:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait(lambda: self.fields(index)["JobState"] in ended)
        return self.fields(index)

    def wait_for_start(self, number: int) -> None:
        """Waits until the job runs for the number-th time after its first."""
        self.wait(
            lambda: (
                (self.fields()["Restarts"], self.fields()["JobState"]) == (str(number), "RUNNING")
            )
        )
