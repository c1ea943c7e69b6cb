"""Sweeps under test: a small program instead of `llada-jax train`, and fixtures around it.

The conftest.py of the folders that test sweeps imports the fixtures.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llada_jax.__main__ import main
from llada_jax.sweeps import attempts, targets
from llada_jax.sweeps.runs import as_overrides

RATES = 'for rate in (1e-3, 3e-3, 1e-2): add({"schedule.learning_rate": rate})'

BASE = """
from llada_jax.config import default_config
from llada_jax import sweeps

def get_config():
    config = default_config()
    config.num_steps = 10
    config.data.path = "nowhere"
    config.schedule.name = "constant"
    return config
"""

# Stands for `llada-jax train`: argv is WORKDIR WORD... It continues where metrics.jsonl stands, a
# step in 10 ms, and its loss depends on the learning rate. Seed 13 is a bug, 14 diverges; SIGTERM
# saves, as train does.
FAKE_TRAIN = """
import json, os, pathlib, signal, sys, time
workdir, words = pathlib.Path(sys.argv[1]), dict(word.split("=", 1) for word in sys.argv[2:])
workdir.mkdir(parents=True, exist_ok=True)
rate, steps = float(words.get("schedule.learning_rate", 4e-4)), int(words.get("num_steps", 10))
(workdir / "devices").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
print("fake training", *sys.argv[2:], flush=True)
if words.get("seed") == "13":
    sys.exit(1)
path = workdir / "metrics.jsonl"
done = len([1 for line in path.read_text().splitlines() if "train" in line]) if path.exists() else 0
with open(path, "a") as file:
    bound = lambda bits: {"nelbo": 0.7 * bits, "standard_error": 0.007, "bits_per_byte": bits}
    write = lambda entry: (file.write(json.dumps(entry) + "\\n"), file.flush())
    for step in range(done + 1, steps + 1):
        bits = 2 + 100 * rate + 4 / step
        write({"step": step, "train": {"bits_per_byte": bits, "tokens": 64 * step}, "speed": {}})
        if step % 5 == 0 and step < steps:
            write({"step": step, "heldout": bound(bits)})
        if words.get("seed") == "14" and step == 5:
            sys.exit(3)
        time.sleep(0.01)
    write({"step": steps, "final": bound(2 + 100 * rate)})
"""


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    """Replaces `llada-jax train` by FAKE_TRAIN."""
    assert targets.train_command is attempts.train_command, "a fake of an earlier test is left"
    program = tmp_path / "fake_train.py"
    program.write_text(FAKE_TRAIN)

    def command(sweep, run):
        return [
            sys.executable,
            str(program),
            run.workdir,
            *sweep.overrides,
            *as_overrides(run.changes),
        ]

    # `targets` is imported at the top: imported for the first time under this patch, it would keep
    # the fake for the tests that follow.
    monkeypatch.setattr(attempts, "train_command", command)


@pytest.fixture
def write_config(tmp_path):
    """Returns write_config(body of sweep or suggest) -> path of a config file with it."""

    def write(*lines: str, head: str = "def sweep(add):", base: str = BASE) -> str:
        path = tmp_path / "config.py"
        path.write_text(base + "\n" + head + "\n" + "".join(f"    {line}\n" for line in lines))
        return str(path)

    return write


@pytest.fixture
def call_sweep(tmp_path, capfd):
    """Returns call_sweep(*flags, status=0) -> (stdout, stderr) of `llada-jax sweep` on the config
    file and DIR of this test.
    """

    def call(*flags: str, status: int = 0) -> tuple[str, str]:
        words = ["sweep", "--config", str(tmp_path / "config.py")]
        words += ["--workdir", str(tmp_path / "runs"), *flags]
        try:
            ended = main(words)
        except SystemExit as exit_:
            ended = exit_.code
        out, err = capfd.readouterr()
        assert ended == status, err
        return out, err

    return call


@contextlib.contextmanager
def stopped_under_way(run: Path):
    """Sends this process SIGTERM when the run has logged 20 lines."""

    def stop():
        path = run / "metrics.jsonl"
        while not path.exists() or len(path.read_text().splitlines()) < 20:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    yield
    thread.join()


def listed(call_sweep) -> list[dict]:
    return json.loads(call_sweep("--list", "--json")[0])["runs"]


def states(call_sweep) -> list[str]:
    return [run["state"] for run in listed(call_sweep)]


@pytest.fixture
def start_sweep(runs, tmp_path):
    """Returns start_sweep(*flags) -> a started `llada-jax sweep` that trains on the small dataset
    with one CPU device.
    """
    words = [f"--config.data.path={runs.dataset}"]

    def start(*flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "llada_jax", "sweep"]
        command += ["--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "runs")]
        return subprocess.Popen(
            [*command, *words, *flags],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.words = words
    return start


def error_of(process: subprocess.Popen, *, status: int) -> str:
    _, err = process.communicate(timeout=500)
    assert process.returncode == status, err
    return err
