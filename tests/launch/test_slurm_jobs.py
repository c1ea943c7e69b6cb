"""What a real SLURM of two nodes (.ci/slurm) does with the jobs of launch/slurm.py.

All of these tests need both nodes, so they stay in one file: one worker runs a whole file.
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
from support.required import absent
from support.runs import last_logged_step, metric_lines
from support.slurm import Job, idle_nodes, scontrol


@pytest.fixture(scope="module")
def slurm():
    """Two idle nodes, or a reason why not."""
    if not shutil.which("sbatch") or idle_nodes() < 2:
        absent(
            "there is no SLURM here with two idle nodes in a partition 'main'; .ci/slurm starts "
            "one, as root"
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
    # The next test needs both nodes.
    while idle_nodes() < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, pathlib, signal, sys, time\n{code}"]


SAVES_WHEN_ASKED = (
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42)); "
    "print('up', flush=True); time.sleep(600)"
)


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
    found = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False).stdout
    return [int(number) for number in found.split()]


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
def test_a_run_that_is_cancelled_preempted_and_loses_a_process_equals_the_undisturbed_run(
    runs, straight, submit, tmp_path
):
    workdir = tmp_path / "run"
    words = ("--nodes", 2, "--env", "JAX_NUM_CPU_DEVICES=1")
    job = submit(*words, command=training(runs, workdir, *SHORT_RUN))
    # 1. Its user cancels it, and later submits the same again.
    job.wait(lambda: last_logged_step(workdir) >= 10)
    subprocess.run(["scancel", job.number], check=True)
    # The job is "COMPLETING" while it saves.
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), job.output()
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
    # 3. One process dies.
    job.wait(lambda: last_logged_step(workdir) >= saved + 10)
    os.kill(processes(workdir)[-1], signal.SIGKILL)
    job.wait_for_start(2)

    ended = job.wait_for_end()
    output = job.output()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), output
    assert "2 process" in output
    assert len(set(re.findall(r"asked to stop: step (\d+) of 120 is saved", output))) == 2, output
    assert "start 2 of job" in output
    assert metric_lines(workdir) == metric_lines(straight)


@pytest.mark.slow
def test_srun_alone_is_enough_for_the_processes_to_find_each_other(slurm):
    code = (
        "from llada_jax.cluster import distributed; distributed.initialize(); "
        "import jax; print(jax.process_index(), 'is there')"
    )
    words = ["srun", "--partition=main", "--nodes=2", "--ntasks=2", sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert sorted(done.stdout.splitlines()) == ["0 is there", "1 is there"], done.stderr
    assert re.search(r"joining     llada-node1:\d+ as process 1 of 2", done.stderr), done.stderr


@pytest.mark.slow
def test_before_its_time_limit_a_run_saves_and_is_requeued(runs, submit, tmp_path):
    """After ten steps the test moves the limit close; SLURM checks limits twice a minute."""
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
    # The limit is now 60 to 120 seconds away.
    scontrol("update", f"jobid={job.number}", f"timelimit={int(minutes) + 2}")
    # Until SLURM sends SIGCONT with SIGTERM, the process stands still and spares the processor.
    os.kill(processes(workdir)[-1], signal.SIGSTOP)
    job.wait(lambda: job.fields()["Restarts"] == "1")
    output = job.output()
    step = re.findall(r"asked to stop: step (\d+) of 1000000 is saved", output)[0]
    assert (workdir / "checkpoints" / step / "commit_success.txt").exists()
    assert "status 42: requeued" in output
    assert 10 <= last_logged_step(workdir) <= int(step)


@pytest.mark.slow
def test_a_run_that_fails_with_a_mistake_of_the_user_is_not_restarted(runs, submit, tmp_path):
    job = submit(
        "--nodes", 2, "--unchecked", command=training(runs, tmp_path / "run", "num_stepz=3")
    )
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "num_stepz" in job.output()
    assert "ended with status 2" in job.output()


def test_one_failing_task_ends_the_others_and_the_job_has_its_status(submit):
    job = submit(
        "--nodes",
        2,
        command=python(
            f"sys.exit(3) if os.environ['JAX_PROCESS_ID'] == '1' else None; {SAVES_WHEN_ASKED}"
        ),
    )
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "0"), (
        job.output()
    )


def test_a_cancelled_job_stays_cancelled_although_it_saved(submit):
    job = submit("--nodes", 2, command=python(SAVES_WHEN_ASKED))
    job.wait(lambda: job.output().count("up\n") == 2)
    subprocess.run(["scancel", job.number], check=True)
    job.wait(lambda: idle_nodes() == 2)
    time.sleep(1)
    ended = job.fields()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


def test_a_job_that_loses_a_node_is_restarted(submit, tmp_path):
    code = f"{SAVES_WHEN_ASKED} if not os.environ.get('SLURM_RESTART_COUNT') else print('again')"
    job = submit("--nodes", 2, command=python(code))
    job.wait(lambda: job.output().count("up\n") == 2)
    scontrol("update", "nodename=llada-node2", "state=down", "reason=test")
    job.wait(lambda: job.fields()["Restarts"] == "1")
    job.wait(lambda: "NOT_RESPONDING" not in scontrol("show", "node", "llada-node2"))
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.output()
    assert job.output().count("again\n") == 2


def test_each_index_of_an_array_is_requeued_by_itself(submit, tmp_path):
    code = (
        "print(sys.argv[2:]); index = sys.argv[2]\n"
        "again = pathlib.Path(sys.argv[1] + 'was here' + index)\n"
    )
    # the last one has the number of the whole array
    code += "if index in '12' and not again.exists(): again.touch(); sys.exit(42)"
    job = submit("--array", "0-2", command=[*python(code), str(tmp_path), "$SLURM_ARRAY_TASK_ID"])
    for index in range(3):
        job.wait_for_end(index=index)
    # read at the end: an index that had ended may have been started again by another one
    ended = [job.fields(index) for index in range(3)]
    assert [(fields["JobState"], fields["Restarts"]) for fields in ended] == [
        ("COMPLETED", "0"),
        ("COMPLETED", "1"),
        ("COMPLETED", "1"),
    ]
    for index in range(3):
        log = job.logs / f"llada-jax-{job.number}_{index}-task0.log"
        assert log.read_text().startswith(f"['{index}']")


def test_the_number_of_restarts_is_limited(submit):
    job = submit("--max-restarts", 0, command=python("sys.exit(42)"))
    ended = job.wait_for_end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "42:0", "0")
    assert "not requeued again, after 0 restarts" in job.output()


@pytest.mark.slow
def test_a_sweep_is_one_array_and_the_same_command_runs_only_unfinished_runs(
    slurm, runs, tmp_path, monkeypatch
):
    # llada-jax is next to the interpreter.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    config = tmp_path / "rates.py"
    points = (
        "def sweep(add):\n"
        "    for rate in (1e-3, 1e-2):\n"
        "        add({'schedule.learning_rate': rate})\n"
    )
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

    def llada_jax_sweep(*words) -> str:
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
    logs = end_of(llada_jax_sweep(*array))
    assert [re.findall(r"_(\d)-task0", log) for log in logs] == [["0"], ["1"]]
    assert llada_jax_sweep("--list").count("complete") == 2
    # A run is finished when its metrics and its exit status say so.
    (tmp_path / "runs" / "001" / "metrics.jsonl").unlink()
    (tmp_path / "runs" / "001" / "exit.json").unlink()
    logs = end_of(llada_jax_sweep(*array))
    assert [re.findall(r"_(\d)-task0", log) for log in logs] == [["1"]]
    assert "all 2 runs are finished" in llada_jax_sweep(*array)
