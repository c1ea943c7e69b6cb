"""What several test files share: eight CPU devices, the published fixture, a small dataset, and real training runs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from required import absent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Half of the time of the tests would be compilation of what another test, process or run of them has compiled before.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Compiled in half of the time: XLA's own passes all run, only LLVM's do not. `XLA_FLAGS= make test` tests with them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

jax.config.update("jax_num_cpu_devices", 8)

from llada_jax.data.records import encode_record, write_dataset_json, write_shard  # noqa: E402
from llada_jax.errors import UserError  # noqa: E402
from llada_jax.tokenizer import load_tokenizer  # noqa: E402

SEQUENCE_LENGTH = 32

# The files that take longest come first, so that what is left for the end is short: one worker runs a whole file.
LONGEST = (
    "test_plan", "test_slurm", "test_train", "test_resume", "test_meshes", "test_remote", "test_checkpoint", "test_errors",
    "test_export", "test_netns", "test_sweep", "test_samplers", "test_import", "test_hf_modeling",
)  # fmt: skip


def pytest_collection_modifyitems(items) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))  # stable: the order within a file stays


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
    return config
"""


@pytest.fixture(scope="session")
def published() -> Path:
    """A tiny LLaDA checkpoint in the published layout, with what the published PyTorch code computes from it."""
    return Path(__file__).parent / "fixtures" / "llada_official_tiny"


def write_dataset(directory: Path, tokens: dict[str, np.ndarray], *, sequence_length: int = SEQUENCE_LENGTH) -> Path:
    """Writes a dataset of byte tokens, {split: tokens}, each split one document in one shard."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(directory / "tokenizer")
    splits = {}
    for name, stream in tokens.items():
        rows = [stream[i : i + sequence_length] for i in range(0, len(stream), sequence_length)]
        starts = [np.arange(len(row)) == 0 for row in rows]
        file = f"{name}-00000.arrayrecord"
        write_shard(
            directory / file,
            (
                encode_record(row, start, sequence_length=sequence_length, vocab_size=tokenizer.vocab_size)
                for row, start in zip(rows, starts)
            ),
        )
        size = os.path.getsize(directory / file)
        splits[name] = {
            "num_records": len(rows),
            "num_tokens": len(stream),
            "num_bytes": len(stream),
            "num_documents": 1,
            "num_padding": len(rows) * sequence_length - len(stream),
            "shards": [{"file": file, "num_records": len(rows), "num_bytes_on_disk": size}],
        }
    ids = {name: getattr(tokenizer, name) for name in ("mask_id", "eos_id", "bos_id", "pad_id")}
    described = {"kind": "bytes", "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, **ids}
    content = {"format": 1, "sequence_length": sequence_length, "fingerprint": "0" * 32, "tokenizer": described}
    write_dataset_json(directory, {**content, "splits": splits, "source": {}})
    return directory


def circle_dataset(directory: Path) -> Path:
    """Letters that mostly go round in a circle, so that there is something to learn."""
    rng = np.random.default_rng(0)
    moves = rng.choice([1, 2, 5], p=[0.7, 0.2, 0.1], size=40_000)
    letters = (97 + np.cumsum(moves) % 26).astype(np.int32)
    directory.mkdir()
    return write_dataset(directory, {"train": letters[:36_000], "heldout": letters[36_000:]})


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory) -> Path:
    return circle_dataset(tmp_path_factory.mktemp("small") / "data")


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
    ) -> subprocess.Popen:
        """Starts one process with `num_devices` CPU devices."""
        words = [f"--config.{knob}" for knob in (f"data.path={self.dataset}", *overrides)]
        command = [sys.executable, "-m", "llada_jax", "train", "--config", str(config or self.directory / "small.py")]
        return subprocess.Popen(
            [*command, "--workdir", str(workdir), *words],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": str(num_devices), **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(
        self, workdir, *overrides: str, num_devices: int = 1, num_processes: int = 1, config: Path | None = None
    ) -> str:
        """Runs to the end on `num_processes` processes and returns the stderr of the first."""
        if num_processes == 1:
            processes = [self.start(workdir, *overrides, num_devices=num_devices, config=config)]
        else:
            address = f"localhost:{free_port()}"
            team = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num_processes)}
            processes = [
                self.start(workdir, *overrides, num_devices=num_devices, environment={**team, "JAX_PROCESS_ID": str(i)})
                for i in range(num_processes)
            ]
        outputs = [process.communicate(timeout=600) for process in processes]
        for process, (_, log) in zip(processes, outputs):
            assert process.returncode == 0, log
        return outputs[0][1]


@pytest.fixture(scope="session")
def runs(tmp_path_factory, small_dataset) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), small_dataset)


def metric_lines(workdir: Path, *groups: str) -> list[dict]:
    """Returns the lines of metrics.jsonl without the measurements of the machine; only lines with `groups`, if given."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("speed", None)
    return [line for line in lines if not groups or any(group in line for group in groups)]


def losses(workdir: Path) -> np.ndarray:
    """Returns the training loss of every logged step, float64."""
    return np.array([line["train"]["loss"] for line in metric_lines(workdir, "train")])


def error_of(function, *args, **kwargs) -> str:
    """Returns the message of the UserError that the call raises: one line, one sentence."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def mount(tmp_path):
    """Returns mount(options, source=None) -> an empty disk in memory, or `source` in another place, until the test ends."""
    if sys.platform != "linux" or os.geteuid() != 0:
        absent("a full or read-only disk is mounted, which takes root on Linux")
    mounted = []

    def mount(options: str, source: Path | None = None) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        what = ["-t", "tmpfs", "tmpfs"] if source is None else [str(source)]
        done = subprocess.run(["mount", "-o", options, *what, str(path)], capture_output=True, text=True, check=False)
        if done.returncode:  # root within a container, say, without the right to mount
            absent(f"nothing can be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(path)], check=True)
