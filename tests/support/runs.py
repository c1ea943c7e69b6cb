"""Real training runs in processes of their own, and what they leave in their workdirs."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from support.fork_server import SERVER, Process

SMALL_RUN = """
from llada_jax.config import default_config

def get_config():
    config = default_config()
    config.num_steps = 20
    config.data.batch_size = 16
    config.data.sequence_length = 32
    config.data.random_length_probability = 0.2
    config.model.num_layers = 2
    config.model.d_model = 32
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.head_dim = 8
    config.model.d_ff = 64
    config.model.nll_chunk = 8
    config.schedule.name = "constant"  # runs of any length are one program
    config.schedule.learning_rate = 1e-2
    config.schedule.warmup_steps = 5
    config.evaluation.every_steps = 10
    config.evaluation.num_batches = 2
    config.checkpoint.every_steps = 10
    config.log.every_steps = 1
    config.log.tensorboard = False  # importing its writer takes as long as these runs train
    return config
"""


def free_port() -> int:
    """Returns a TCP port that nothing listens on at this moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Runs:
    """Starts `llada-jax train` in processes of its own, as users do."""

    def __init__(self, directory: Path, dataset: Path):
        self.directory, self.dataset = directory, dataset
        (directory / "small.py").write_text(SMALL_RUN)

    def start(
        self,
        workdir,
        *overrides: str,
        num_devices: int = 1,
        environment: dict | None = None,
        config: Path | None = None,
    ) -> Process:
        """Starts one process with `num_devices` CPU devices."""
        words = [f"--config.{knob}" for knob in (f"data.path={self.dataset}", *overrides)]
        return SERVER.start(
            [
                "train",
                "--config",
                str(config or self.directory / "small.py"),
                "--workdir",
                str(workdir),
                *words,
            ],
            {**os.environ, "JAX_NUM_CPU_DEVICES": str(num_devices), **(environment or {})},
        )

    def train(
        self,
        workdir,
        *overrides: str,
        num_devices: int = 1,
        num_processes: int = 1,
        config: Path | None = None,
    ) -> str:
        """Runs to the end on `num_processes` processes and returns the stderr of the first."""
        if num_processes == 1:
            processes = [self.start(workdir, *overrides, num_devices=num_devices, config=config)]
        else:
            address = f"localhost:{free_port()}"
            team = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num_processes)}
            processes = [
                self.start(
                    workdir,
                    *overrides,
                    num_devices=num_devices,
                    environment={**team, "JAX_PROCESS_ID": str(i)},
                )
                for i in range(num_processes)
            ]
        outputs = [process.communicate(timeout=600) for process in processes]
        for process, (_, log) in zip(processes, outputs):
            assert process.returncode == 0, log
        return outputs[0][1]


def metric_lines(workdir: Path, *groups: str) -> list[dict]:
    """Returns the lines of metrics.jsonl without the measurements of the machine; only lines with
    `groups`, if given.
    """
    lines = [
        json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    ]
    for line in lines:
        line.pop("speed", None)
    return [line for line in lines if not groups or any(group in line for group in groups)]


def losses(workdir: Path) -> np.ndarray:
    """Returns the training loss of every logged step, float64."""
    return np.array([line["train"]["loss"] for line in metric_lines(workdir, "train")])


def saved_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint, read by Orbax alone onto one device."""
    checkpointer = ocp.training.Checkpointer(Path(workdir) / "checkpoints")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    described = checkpointer.checkpointables_metadata(step).metadata
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), dict(described)
    )
    leaves = jax.tree_util.tree_leaves_with_path(checkpointer.load_checkpointables(step, abstract))
    checkpointer.close()
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(workdir: Path, straight: Path, *, step: int) -> None:
    """Asserts that two runs have the same arrays after a step, bit for bit, and equal metrics."""
    actual, expected = saved_arrays(workdir, step), saved_arrays(straight, step)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
    assert metric_lines(workdir) == metric_lines(straight)


def last_logged_step(workdir: Path) -> int:
    file = Path(workdir) / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def is_committed(workdir: Path, step: int) -> bool:
    return (Path(workdir) / "checkpoints" / str(step) / "commit_success.txt").exists()


def kill_when(process, condition, how=signal.SIGKILL) -> None:
    """Sends a signal as soon as the condition holds; the process must not have ended before."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(how)
    process.wait()
