"""What a test needs in addition to Python.

Where it is absent, the test is skipped with a reason; in CI it fails.

CI installs all of it and sets LLADA_JAX_REQUIRE_ALL=1, so that nothing goes unseen by being
skipped. Elsewhere a contributor without root, libtpu or a cluster still runs the rest.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

# in directories next to the other packages, where JAX does not take them for devices that are here
LIBTPU, CUDA = Path(sys.prefix) / "libtpu", Path(sys.prefix) / "cuda"
# what the extra plan-gpu brings
CUDA_PACKAGES = (
    "jax-cuda13-plugin==0.10.2",
    "jax-cuda13-pjrt==0.10.2",
    "nvidia-cudnn-cu13==9.12.*",
)


def must_be_there() -> bool:
    """Whether an absence is a failure, as in CI."""
    return os.environ.get("LLADA_JAX_REQUIRE_ALL", "") not in ("", "0")


def absent(reason: str) -> NoReturn:
    """Ends the test: as failed in CI, as skipped elsewhere."""
    (pytest.fail if must_be_there() else pytest.skip)(reason)


def library(name: str):
    """Returns an imported library of the dev extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        absent(f"{name} is not installed ({error}): pip install 'llada_jax[dev]'")


def python_with(library: str, *, environment: str) -> str:
    """Returns an interpreter that finds a library which brings many packages: this one, or that of
    an environment next to the other packages, which .ci/run makes.
    """
    if importlib.util.find_spec(library):
        return sys.executable
    python = Path(sys.prefix) / environment / "bin/python"
    return str(python) if python.exists() else absent(f"{library} is not installed; see .ci/run")


def program(name: str, *, package: str) -> str:
    """Returns the path of a program that a Python package installs, from the directory of the
    interpreter or from the PATH.
    """
    neighbour = Path(sys.executable).with_name(name)
    found = str(neighbour) if neighbour.exists() else shutil.which(name)
    return found or absent(f"{name} is not installed: pip install {package}")


def compiler_environment(platform: str) -> dict[str, str]:
    """Returns an environment in which the compiler for absent devices is importable.

    Args:
        platform: "tpu" or "gpu".
    """
    if platform == "tpu":
        directory, modules, packages = LIBTPU, "libtpu", ("libtpu==0.0.42.*",)
    else:
        directory, modules, packages = CUDA, "jax_cuda13_plugin, nvidia.cudnn", CUDA_PACKAGES
    environment = {**os.environ, "PYTHONPATH": f"{directory}:{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("XLA_FLAGS", None)  # tests/conftest.py sets some for the compiler of CPUs
    there = [sys.executable, "-c", f"import {modules}"]
    if subprocess.run(there, env=environment, capture_output=True, check=False).returncode:
        words = " ".join(f"'{package}'" for package in packages)
        absent(f"{modules} is not installed: pip install --no-deps --target {directory} {words}")
    return environment
