"""Two sweeps in one DIR, and what is left of one that was killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.required import library
from support.sweeps import RATES, listed, states

# A sweep whose `train` takes its time: asked to stop, it says so, and ends when it may.
SLOW = """
import sys
from llada_jax.__main__ import main
from llada_jax.sweeps import attempts

TRAIN = '''
import os, pathlib, signal, sys, time
workdir, asked = pathlib.Path(sys.argv[1]), []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
(workdir / "pid").write_text(str(os.getpid()))
while not (asked and (workdir / "may end").exists()):
    if asked:
        (workdir / "asked").touch()
    time.sleep(0.01)
'''
attempts.train_command = lambda sweep, run: [sys.executable, "-c", TRAIN, run.workdir]
main(sys.argv[1:])
"""


@pytest.fixture
def slow_sweep(tmp_path):
    """Returns slow_sweep(*flags) -> a started SLOW whose run 000 is under way."""
    started = []

    def start(*flags: str) -> subprocess.Popen:
        words = ["--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "runs")]
        started.append(subprocess.Popen([sys.executable, "-c", SLOW, "sweep", *words, *flags]))
        wait_for(lambda: (tmp_path / "runs" / "000" / "pid").exists())
        return started[-1]

    yield start
    (tmp_path / "runs" / "000" / "may end").touch()
    for process in started:
        process.terminate()
        process.wait(60)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but is still in the table does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux alone does this")
def test_runs_of_a_killed_sweep_are_asked_to_stop_and_keep_the_next_one_out(
    slow_sweep, write_config, call_sweep, tmp_path, fake_train
):
    write_config(RATES)
    sweep, run = slow_sweep("--run", "local"), tmp_path / "runs" / "000"
    pid = int((run / "pid").read_text())
    sweep.kill()
    assert sweep.wait() == -9
    wait_for((run / "asked").exists)
    # it still saves: another process in its workdir would only be refused
    assert is_alive(pid)
    for action in (["--run", "local"], ["--index", "1"]):
        _, err = call_sweep(*action, status=2)
        # the lines before are those of the sweep that was killed
        sentence = err.splitlines()[-1]
        assert "Another sweep, or a run that it left behind, is writing into" in sentence
        assert [line for line in err.splitlines() if line.startswith("llada-jax:")] == [sentence]
    (run / "may end").touch()
    wait_for(lambda: not is_alive(pid))
    call_sweep("--run", "local")
    assert states(call_sweep) == ["complete"] * 3


@pytest.mark.slow
def test_tasks_of_an_array_run_next_to_each_other_and_keep_a_local_sweep_out(
    slow_sweep, write_config, call_sweep, tmp_path, fake_train
):
    write_config(RATES)
    slow_sweep("--index", "0")
    call_sweep("--index", "1")
    assert states(call_sweep) == ["missing", "complete", "missing"]
    assert "Another sweep" in call_sweep("--run", "local", status=2)[1]
    assert states(call_sweep) == ["missing", "complete", "missing"]


@pytest.mark.slow
def test_a_second_optuna_process_does_not_adopt_the_trial_of_the_first(
    slow_sweep, write_config, call_sweep, tmp_path, fake_train
):
    library("optuna")
    write_config("return {'seed': trial.number}", head="def suggest(trial):")
    first = slow_sweep("--optuna", "2")
    assert "Another sweep" in call_sweep("--optuna", "2", status=2)[1]
    assert [run["knobs"] for run in listed(call_sweep)] == [{"seed": 0}]
    assert not (tmp_path / "runs" / "000" / "asked").exists()
    first.terminate()
    (tmp_path / "runs" / "000" / "may end").touch()
    first.wait(60)
    os.unlink(tmp_path / "runs" / "000" / "exit.json")  # as if it had been killed
    assert "best of 2 trials" in call_sweep("--optuna", "2")[1]
    assert [run["knobs"] for run in listed(call_sweep)] == [{"seed": 0}, {"seed": 1}]
