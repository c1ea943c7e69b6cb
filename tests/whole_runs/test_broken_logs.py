"""A log that is gone, closed or full does not end a run, and hides nothing that it has to say."""

import os
import signal
import subprocess
import sys

import pytest
from support.mishaps import train_argv
from support.runs import free_port

from llada_jax.checkpoints.workdir import Checkpoints


def command(home, run, *knobs: str) -> list[str]:
    return [sys.executable, "-m", "llada_jax", *train_argv(home, run, *knobs)]


@pytest.mark.slow
def test_a_run_whose_log_is_gone_saves_and_asks_to_be_started_again(home, tmp_path):
    # what a terminal does to `train 2>&1 | tee log` on Ctrl-C: both processes get it, tee is gone
    knobs = ("num_steps=100000", "checkpoint.every_steps=100000", "log.every_steps=10")
    process = subprocess.Popen(
        command(home, tmp_path / "run", *knobs),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if "step 20/100000" in line:
            break
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 42
    (step,) = Checkpoints(tmp_path / "run").steps
    assert 20 <= step < 100000


@pytest.mark.slow
def test_two_processes_whose_logs_are_gone_save_one_step_together(runs, tmp_path):
    team = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    knobs = ("num_steps=1000000", "checkpoint.every_steps=1000000", "evaluation.every_steps=0")
    processes = [
        runs.start(tmp_path / "run", *knobs, environment={**team, "JAX_PROCESS_ID": str(number)})
        for number in range(2)
    ]
    try:
        for line in processes[0].stderr:
            if line.startswith("step 20/"):
                break
        for process in processes:
            process.stdout.close()
            process.stderr.close()
        # one is asked to stop, and the other hears of it
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=300) for process in processes] == [42, 42]
    finally:
        for process in processes:
            process.kill()
    (step,) = Checkpoints(tmp_path / "run").steps
    assert 20 <= step < 1000000


@pytest.mark.slow
@pytest.mark.parametrize("how", ["2>/dev/full", "2>&-", "0<&- 1>&- 2>&-", "2>&1 | head -n 1"])
def test_a_run_ends_as_usual_whatever_its_log_leads_to(how, home, tmp_path):
    shell = f'"$@" {how}; exit "${{PIPESTATUS[0]}}"'
    words = ["bash", "-c", shell, "bash", *command(home, tmp_path / "run")]
    assert subprocess.run(words, timeout=300, check=False).returncode == 0
    assert Checkpoints(tmp_path / "run").steps == [2, 4]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(("how", "status"), [("> /dev/full", 2), ("| true", 0)])
def test_a_result_that_cannot_be_written_is_said_and_a_reader_may_leave(how, status):
    # enough text that it is written although the reader has gone
    shell = f'"$@" {how}; exit "${{PIPESTATUS[0]}}"'
    script = (
        "import sys, llada_jax.__main__ as m, llada_jax.verbs.plan as p, time;"
        "p.main = lambda argv: (time.sleep(1), print('x' * 100));"
        "sys.exit(m.main(['plan']))"
    )
    done = subprocess.run(
        ["bash", "-c", shell, "bash", sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == status
    assert ("cannot be written to stdout" in done.stderr) == (status == 2)
    assert "Traceback" not in done.stderr
