"""The local launcher: what it starts, how it ends, and that a run under it is the run without it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import losses

LAUNCHER = Path(__file__).parent.parent / "launch" / "local.py"


def launch(*words, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(LAUNCHER), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_a_dry_run_prints_one_line_a_process_and_starts_nothing(tmp_path):
    process = launch("--processes", 3, "--devices", 2, "--dry-run", "--", "touch", tmp_path / "started")
    out, _ = process.communicate(timeout=60)
    lines = out.splitlines()
    assert process.returncode == 0
    assert len(lines) == 3
    assert len({line.split("JAX_COORDINATOR_ADDRESS=")[1].split()[0] for line in lines}) == 1
    for number, line in enumerate(lines):
        assert f"JAX_PROCESS_ID={number} " in line
        assert "JAX_NUM_PROCESSES=3" in line
        assert "JAX_NUM_CPU_DEVICES=2" in line
        assert line.endswith(f"touch {tmp_path / 'started'}")
    assert not (tmp_path / "started").exists()


def test_one_failure_ends_all_with_its_status(tmp_path):
    code = "import os, sys, time; time.sleep(600) if os.environ['JAX_PROCESS_ID'] != '1' else sys.exit(3)"
    process = launch("--processes", 3, "--logs", tmp_path, "--grace", 1, "--", sys.executable, "-c", code)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "ended with status 3" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process(tmp_path, number):
    code = (
        "import os, signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'up-' + os.environ['JAX_PROCESS_ID']).touch()\n"
        "time.sleep(600)"
    )
    process = launch("--processes", 2, "--logs", tmp_path, "--", sys.executable, "-c", code)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("up-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 42


def test_the_others_write_to_their_own_logs(tmp_path):
    code = "import os; print('I am', os.environ['JAX_PROCESS_ID'], os.environ.get('CUDA_VISIBLE_DEVICES'))"
    process = launch("--processes", 2, "--logs", tmp_path, "--", sys.executable, "-c", code)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == "I am 0 0\n"
    assert (tmp_path / "process-1.log").read_text() == "I am 1 1\n"


def test_a_missing_command_is_told():
    process = launch("--processes", 2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "there is no command" in err


@pytest.mark.slow
def test_a_run_under_the_launcher_has_the_loss_curve_of_one_process(runs, tmp_path):
    alone, together = runs.directory / "launched-alone", runs.directory / "launched"
    runs.train(alone, "num_steps=6")
    words = [f"--config.{knob}" for knob in ("num_steps=6", f"data.path={runs.dataset}", "log.compilation_cache=")]
    process = launch(
        "--processes", 2, "--devices", 2, "--logs", tmp_path, "--",
        sys.executable, "-m", "llada_jax", "train", "--config", runs.directory / "small.py", "--workdir", together, *words,
    )  # fmt: skip
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "2 process" in err
    np.testing.assert_allclose(losses(together), losses(alone), rtol=1e-5)
