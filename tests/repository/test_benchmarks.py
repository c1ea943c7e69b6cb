"""The benchmarks measure what they say they measure."""

import importlib.util
import os
import subprocess
import sys

import pytest
from support.paths import ROOT

from llada_jax.config import load_config


@pytest.mark.parametrize(
    ("size", "config", "not_alike"),
    [
        ("tiny", "tiny", {"vocab_size"}),
        ("llada_160m", "llada_160m", {"vocab_size"}),
        ("llada_1b", "llada_1b", set()),
        ("llada_8b_wide", "llada_8b", {"num_layers"}),
    ],
)
def test_the_networks_of_the_train_step_benchmark_are_those_of_the_configs(size, config, not_alike):
    spec = importlib.util.spec_from_file_location("train_step", ROOT / "benchmarks/train_step.py")
    train_step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_step)
    shipped = load_config(str(ROOT / f"configs/{config}.py"))
    sizes = {k: v for k, v in train_step.SIZES[size].items() if k not in {"batch_size", *not_alike}}
    assert sizes.pop("sequence_length") == shipped.data.sequence_length
    assert sizes == {name: shipped.model[name] for name in sizes}


@pytest.mark.slow
def test_the_sampling_benchmark_compares_loops_that_sample_the_same():
    words = "--size 2m --gen-length 8 --block-length 4 --prompt-length 8 --batch-size 2 --repeats 1"
    modes = ["PyTorch, published loop", "plain loop", "one loop per block"]
    done = subprocess.run(
        [sys.executable, "benchmarks/sampling.py", *words.split(), "--modes", *modes],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    agreement = {row[0].removeprefix("| "): row[-1].removesuffix(" |") for row in rows}
    assert agreement == {"mode": "agreement", **dict.fromkeys(modes, "100%")}
