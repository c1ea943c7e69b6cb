"""The fixtures of the tests of verbs: sweeps, a checkpoint to export, and imported ones."""

from pathlib import Path

import pytest
from support.exports import LLADA, write_checkpoint
from support.hf_directories import SMALL, random_params, write_huggingface
from support.imports import QWEN
from support.sweeps import call_sweep, fake_train, start_sweep, write_config

from llada_jax.__main__ import main

__all__ = ["call_sweep", "fake_train", "start_sweep", "write_config"]


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of LLADA with random weights and another moving average."""
    home = tmp_path_factory.mktemp("export")
    return write_checkpoint(
        home / "run", LLADA, random_params(LLADA), ema=random_params(LLADA, seed=1)
    )


@pytest.fixture
def refused_export(capfd):
    """Runs an export that must fail; returns its one sentence. Nothing of it is left behind."""

    def refused(*words, output: Path, status: int = 2) -> str:
        before = sorted(output.parent.iterdir()) if output.parent.is_dir() else []
        capfd.readouterr()
        assert main(["export", *map(str, words), "--output", str(output)]) == status
        out, err = capfd.readouterr()
        assert out == ""
        *said, sentence = err.splitlines()
        assert all(
            line.startswith("llada-jax: layout") for line in said if "moving average" not in line
        ), said
        assert sentence.startswith("llada-jax: ")
        assert sentence.endswith((".", "?"))
        assert (sorted(output.parent.iterdir()) if output.parent.is_dir() else []) == before
        return sentence

    return refused


@pytest.fixture(scope="session")
def huggingface_directories(tmp_path_factory) -> dict[str, Path]:
    """A LLaDA directory in two shards and a Qwen2 directory whose tokenizer fills its embedding."""
    home = tmp_path_factory.mktemp("huggingface")
    write_huggingface(home / "llada", "llada", SMALL, num_shards=2)
    write_huggingface(home / "qwen", "qwen2", QWEN)
    return {"llada": home / "llada", "qwen": home / "qwen"}


@pytest.fixture(scope="session")
def imported_workdirs(huggingface_directories, tmp_path_factory) -> dict[str, Path]:
    """The workdirs of both, and of the Qwen2 directory with --causal."""
    home = tmp_path_factory.mktemp("imported")
    flags = {"llada": [], "qwen": ["--mesh", "fsdp=4,tensor=2"], "causal": ["--causal"]}
    for name, more in flags.items():
        source = huggingface_directories["llada" if name == "llada" else "qwen"]
        assert main(["import", "--from", str(source), "--output", str(home / name), *more]) == 0
    return {name: home / name for name in flags}
