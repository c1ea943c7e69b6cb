"""Estimates of LLaDA-8B on machines that are not there, as `llada-jax plan` makes them."""

import json
import subprocess
import sys

from llada_jax.cluster import hardware
from llada_jax.config import load_config
from llada_jax.verbs import plan
from support.paths import ROOT
from support.required import compiler_environment

LLADA_8B = str(ROOT / "configs/llada_8b.py")
VOCAB_SIZE = 126_464
PARAMETERS = 8_015_581_184
# without the embedding and the norms
MATRICES = PARAMETERS - VOCAB_SIZE * 4096 - 4096 * 65
GIB = 2**30


def estimated(topology: str = "v5p-128", *overrides: str, slices: int = 1) -> dict:
    """Returns the estimate of LLaDA-8B with some knobs changed."""
    config = load_config(LLADA_8B, list(overrides))
    machines = hardware.machines_named(topology)
    return plan.estimate(plan.Asked(config, machines, slices, VOCAB_SIZE))


def compile_in_a_process(
    directory, *words: str, level: str = "UNKNOWN", platform: str = "tpu"
) -> subprocess.CompletedProcess:
    """Returns the finished `llada-jax plan --compile --json`, in a process that loads the compiler.

    Args:
        platform: "tpu" or "gpu".
        level: of XLA's effort (JAX_OPTIMIZATION_LEVEL); "UNKNOWN" is that of a run.
    """
    environment = {
        **compiler_environment(platform),
        "JAX_PLATFORMS": "cpu",
        "JAX_OPTIMIZATION_LEVEL": level,
    }
    return subprocess.run(
        [sys.executable, "-m", "llada_jax", "plan", "--compile", "--json", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
    )


def memory_in_a_process(directory, *words: str, platform: str) -> dict:
    """Returns what benchmarks/inference_memory.py prints of LLaDA-8B, from a process that loads the
    compiler and does not optimise.

    Args:
        platform: "tpu" or "gpu".
    """
    script = str(ROOT / "benchmarks/inference_memory.py")
    done = subprocess.run(
        [sys.executable, script, "--config", LLADA_8B, *words],
        env={
            **compiler_environment(platform),
            "JAX_PLATFORMS": "cpu",
            "JAX_OPTIMIZATION_LEVEL": "O0",
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
