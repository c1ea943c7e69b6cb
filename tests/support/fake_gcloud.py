"""A stand-in for gcloud that replays the states of a queued resource.

It runs the remote scripts for real, each worker in a home directory of its own, with stand-ins for
what only a TPU VM has (sudo, lsof, an installation from PyPI).
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tpu_vm_commands import STARTED

from support.paths import LAUNCH

FAKE_GCLOUD = """#!{python} -IS
import json, os, shlex, subprocess, sys
from pathlib import Path

here, words = Path({here!r}), sys.argv[1:]
with open(here / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
with_values = [word for word in words if word.startswith("--") and "=" in word]
flags = dict(word.removeprefix("--").split("=", 1) for word in with_values)
words = [word for word in words if not word.startswith("--") and word != "alpha"]


def next_of(name, default):
    # What the test has planned for this moment; the last state stays forever.
    path = here / name
    planned = json.loads(path.read_text()) if path.exists() else []
    if len(planned) > 1 or (planned and name != "states"):
        path.write_text(json.dumps(planned[1:]))
    return planned[0] if planned else default


def on_worker(node, worker, script):
    home = here / "workers" / node / worker
    home.mkdir(parents=True, exist_ok=True)
    path = f"{{here}}/remote:{{os.environ['PATH']}}"
    environment = {{**os.environ, "HOME": str(home), "PATH": path}}
    return subprocess.call(["bash", "-c", script], env=environment)


def workers(node):
    return [flags["worker"]] if flags["worker"] != "all" else [str(i) for i in range({num_workers})]


match words[2:4]:
    case ["queued-resources", "describe"]:
        state = next_of("states", "")
        if not state or state.startswith("!"):
            sys.exit("ERROR: " + (state[1:] or "NOT_FOUND: no such resource"))
        print(state)
    case ["queued-resources", "create" | "delete" as verb]:
        error = next_of(verb + "-errors", "")
        if error:
            sys.exit("ERROR: " + error)
    case ["tpu-vm", "scp"]:
        node, _, name = words[5].partition(":")
        for worker in workers(node):
            (here / "workers" / node / worker).mkdir(parents=True, exist_ok=True)
            (here / "workers" / node / worker / name).write_bytes(Path(words[4]).read_bytes())
    case ["tpu-vm", "ssh"]:
        status = next_of("ssh", 0) if {started!r} not in flags["command"] else 0
        unreachable = here / "workers" / words[4] / flags["worker"] / "unreachable"
        if unreachable.exists():
            unreachable.unlink()
            status = 1  # gcloud's own failure
        if status:
            print("kex_exchange_identification: Connection closed by remote host", file=sys.stderr)
            sys.exit(status)
        sys.exit(max(on_worker(words[4], worker, flags["command"]) for worker in workers(words[4])))
"""

# The command of the runs does what the first line of HOME/outcomes says, and removes the line.
JOB = """
read -r outcome < "$HOME/outcomes" && sed -i 1d "$HOME/outcomes"
echo "$@" >> "$HOME/started"
case $outcome in
  [0-9]*) exit "$outcome" ;;
  save) trap 'echo saved; exit 42' TERM; while true; do sleep 0.05; done ;;
  hang) trap '' TERM; while true; do sleep 0.05; done ;;
esac
"""


class Cloud:
    """A cloud for one test: the planned states, errors and outcomes, and the calls it received."""

    def __init__(self, directory: Path, *, num_workers: int):
        self.directory, self.num_workers = directory, num_workers
        self.code, self.logs = directory / "code", directory / "logs"
        for path in (directory / "bin", directory / "remote", self.code):
            path.mkdir()
        fake = FAKE_GCLOUD.format(
            python=sys.executable,
            here=str(directory),
            num_workers=num_workers,
            started=STARTED,
        )
        self.program("bin/gcloud", fake)
        self.program(
            "remote/sudo",
            '#!/bin/sh\necho "$@" >> "$HOME/sudo"\ncase $1 in lsof) exec "$@" ;; esac\n',
        )
        self.program("remote/lsof", '#!/bin/sh\ncat "$HOME/holders" && rm "$HOME/holders"\n')
        # The versions differ with every resolution, as they do when a package is released between.
        self.program(
            "remote/python3",
            '#!/bin/sh\necho "$@" >> "$HOME/installed"\n'
            'case "$*" in *"pip compile"*) echo "Warning: x"; echo "jax==0.$(date +%N)" ;; esac\n',
        )
        self.program("remote/gcsfuse", '#!/bin/sh\necho "$@" >> "$HOME/mounted"\n')
        (self.code / "job.sh").write_text(JOB)
        (self.code / ".gitignore").write_text(".venv\n")
        (self.code / ".venv").write_text("large")
        subprocess.run(["git", "init", "--quiet", str(self.code)], check=True)

    def program(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text)
        (self.directory / name).chmod(0o755)

    def plan(self, name: str, values: list) -> None:
        (self.directory / name).write_text(json.dumps(values))

    def home(self, node: str, worker: int) -> Path:
        path = self.directory / "workers" / node / str(worker)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def outcomes(self, *starts: list[str], node: str = "run") -> None:
        """Plans what the workers do: one list per start, with one word per worker."""
        for worker in range(self.num_workers):
            (self.home(node, worker) / "outcomes").write_text(
                "".join(f"{start[worker]}\n" for start in starts)
            )

    def start(
        self,
        *flags: str,
        topology: str = "v5litepod-16",
        command: str = "bash job.sh",
        start_new_session: bool = False,
    ) -> subprocess.Popen:
        words = [
            "--name",
            "run",
            "--zone",
            "us-west4-a",
            "--topology",
            topology,
            "--code",
            self.code,
            "--logs",
            self.logs,
        ]
        words += ["--poll", "0.02", "--grace", "20", *flags, "--", *shlex.split(command)]
        return subprocess.Popen(
            [sys.executable, str(LAUNCH / "tpu_vm.py"), *map(str, words)],
            env={**os.environ, "PATH": f"{self.directory}/bin:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=start_new_session,
        )

    def run(self, *flags: str, **kwargs) -> tuple[int, str]:
        """Launches, and returns the exit status and stderr."""
        process = self.start(*flags, **kwargs)
        _, err = process.communicate(timeout=120)
        return process.returncode, err

    def calls(self) -> list[str]:
        """Returns the verbs of all gcloud commands, in order."""
        path = self.directory / "calls"
        return (
            [" ".join(json.loads(line)).split("--")[0] for line in path.read_text().splitlines()]
            if path.exists()
            else []
        )

    def count(self, verb: str) -> int:
        return sum(f" {verb} " in call for call in self.calls())

    def starts(self, worker: int = 0, node: str = "run") -> int:
        path = self.home(node, worker) / "started"
        return len(path.read_text().splitlines()) if path.exists() else 0


def until(is_true, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
