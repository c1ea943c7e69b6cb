"""Mistakes and mishaps as a user meets them: a small home with a run, ways to damage it, and what a
refusal must look like.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

CONFIG = """
from llada_jax.config import default_config


def get_config():
    config = default_config()
    config.num_steps = 4
    config.data.path = {data!r}
    config.data.batch_size = 8
    config.data.sequence_length = 16
    config.data.num_threads = 1
    config.data.prefetch = 1
    config.model.num_layers = 1
    config.model.d_model = 16
    config.model.num_heads = config.model.num_kv_heads = 1
    config.model.head_dim = 16
    config.model.d_ff = 16
    config.model.nll_chunk = 16
    config.schedule.name = "constant"
    config.schedule.learning_rate = 1e-3
    config.schedule.warmup_steps = 0
    config.evaluation.every_steps = 0
    config.evaluation.final_num_batches = 1
    config.checkpoint.every_steps = 2
    config.log.every_steps = 2
    config.log.tensorboard = False
    {change}
    return config
"""

WORDS = [
    "truth",
    "universally",
    "acknowledged",
    "single",
    "man",
    "possession",
    "of",
    "a",
    "good",
    "fortune",
]

# What train and prepare say on stderr before a mishap in the middle of their work; everything else
# must be the one sentence.
STARTUP_LINE = re.compile(
    r"(start|model|step|run|FLOPs|mesh|memory|compute|data|compiled|saving|final) .*|the run is "
    r"complete.*|prepare: .*"
)


def prepare_argv(source, output, *more: str) -> list[str]:
    """Returns the words after `llada-jax` that prepare rows of 16 bytes."""
    words = ["prepare", "--input", str(source), "--output", str(output), "--sequence-length", "16"]
    return [*words, "--tokenizer", "bytes", "--workers", "1", *more]


def write_config(home: Path, change: str = "", name: str = "tiny.py") -> Path:
    """Writes a config for the data of a home, with one more line, `change`, before its return."""
    path = home / name
    path.write_text(CONFIG.format(data=str(home / "data"), change=change))
    return path


def train_argv(home: Path, workdir, *overrides: str, config: str = "tiny.py") -> list[str]:
    """Returns the words after `llada-jax` that train a config of a home; overrides: "seed=1"."""
    flags = [f"--config.{override}" for override in overrides]
    return ["train", "--config", str(home / config), "--workdir", str(workdir), *flags]


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def tree(path: Path) -> dict[str, bytes]:
    """Returns every file below a path with its bytes; nothing for a path that does not exist."""
    return {
        str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()
    }


def check_sentence(sentence: str, says) -> None:
    """Asserts that this is one sentence, short enough to be read, that holds all of `says`.

    Only "Did you mean ...?" or the list of known names may follow it.
    """
    assert sentence.startswith("llada-jax: ")
    assert sentence.endswith((".", "?"))
    assert len(sentence) < 700, len(sentence)
    assert not re.search(r"[.?!] (?!Did you mean|Known:)[A-Z]", sentence), sentence
    assert "object at 0x" not in sentence
    assert "<class" not in sentence
    missing = [words for words in says if words not in sentence]
    assert not missing, (missing, sentence)


def flip(path: Path, *, every: int | None = None) -> None:
    """Inverts one bit in the middle of a file, or one in every so many bytes."""
    content = bytearray(path.read_bytes())
    for i in range(every // 2, len(content), every) if every else [len(content) // 2]:
        content[i] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def deleted(path: Path):
    path.unlink()


def emptied(path: Path):
    path.write_bytes(b"")


# The kinds of file in a saved step, by pattern; {} is "params" or "train". The numbers themselves
# are in ocdbt.process_0/d/*.
STEP_FILES = {
    "metadata": "_CHECKPOINT_METADATA",
    "tree": "{}/_METADATA",
    "manifest": "{}/manifest.ocdbt",
    "index": "{}/d/*",
    "numbers": "{}/ocdbt.process_0/d/*",
}


def damaged_step(run: Path, file: str, item: str, damage) -> None:
    """Damages one file of step 4; file: a key of STEP_FILES, item: "params" or "train"."""
    (path,) = (run / "checkpoints" / "4").glob(STEP_FILES[file].format(item))
    damage(path)


class TrainProcess:
    """A command in a process of its own, with the lines of its stderr as they come."""

    def __init__(self, argv: list[str]):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llada_jax", *argv],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, beginning: str) -> None:
        """Returns once a line has begun like this."""
        deadline = time.monotonic() + 120
        while not any(line.startswith(beginning) for line in list(self.lines)):
            assert time.monotonic() < deadline, self.lines
            assert self.process.poll() is None, self.lines
            time.sleep(0.01)

    def end(self) -> int:
        """Waits for the end; returns the exit status."""
        status = self.process.wait(120)
        self._reader.join()
        assert self.process.stdout.read() == ""
        self.process.stdout.close()
        self.process.stderr.close()
        assert "Traceback" not in "\n".join(self.lines), self.lines
        return status
