"""What several test files share: eight CPU devices, the published fixture, a small dataset, and
real training runs.
"""

import functools
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import fast_compilation

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Half of the time of the tests would be compilation of what another test, process or run of them
# has compiled before.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# `XLA_FLAGS= make test` compiles as users do.
os.environ.setdefault("XLA_FLAGS", fast_compilation.XLA_FLAGS)

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)

# Python would look for garbage after every 700 objects, and JAX cleans up each time, which takes a
# fifth of the time of the tests.
gc.set_threshold(50_000, 10, 10)

# A test passes or fails by what is computed and never by how long a busy machine takes for it.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

from support.datasets import circle_dataset, dialogue_dataset, pair_dataset  # noqa: E402
from support.paths import PUBLISHED  # noqa: E402
from support.required import absent  # noqa: E402
from support.runs import Runs  # noqa: E402

# The files that take longest come first, so that what is left for the end is short: one worker runs
# a whole file.
LONGEST = (
    "planning/test_check",
    "launch/test_slurm_jobs",
    "verbs/test_train",
    "whole_runs/test_resume",
    "whole_runs/test_meshes",
    "storage/test_remote",
    "checkpoints/test_tiers",
    "whole_runs/test_errors_of_checkpoints",
    "whole_runs/test_stops_by_signals",
    "whole_runs/test_errors_of_configs",
    "whole_runs/test_errors_of_numbers",
    "verbs/test_export",
    "whole_runs/test_netns",
    "verbs/test_sweep",
    "samplers/test_published_samples",
    "verbs/test_import_hf",
    "hf/test_shipped",
)


def pytest_collection_modifyitems(items) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(
        key=lambda item: rank.get(f"{item.path.parent.name}/{item.path.stem}", len(LONGEST))
    )  # stable: the order within a file stays


@pytest.fixture(scope="module", autouse=True)
def no_programs_of_other_files():
    """JAX keeps all programs and traces of a process: 6 GB per worker over all tests, through which
    Python looks for garbage again and again.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def published() -> Path:
    """A tiny LLaDA checkpoint in the published layout, with what the published PyTorch code
    computes from it.
    """
    return PUBLISHED


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory) -> Path:
    return circle_dataset(tmp_path_factory.mktemp("small") / "data")


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory):
    """Returns dialogues(rows) -> a small data set of dialogues, "packed" or "padded"."""
    return functools.cache(
        lambda rows: dialogue_dataset(tmp_path_factory.mktemp("dialogues") / "of", rows=rows)
    )


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Returns pairs(rows) -> a small data set of preferences, "packed" or "padded"."""
    return functools.cache(
        lambda rows: pair_dataset(tmp_path_factory.mktemp("pairs") / "of", rows=rows)
    )


@pytest.fixture(scope="session")
def runs(tmp_path_factory, small_dataset) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), small_dataset)


@pytest.fixture
def mount(tmp_path):
    """Returns mount(options, source=None) -> an empty disk in memory, or `source` in another place,
    until the test ends.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        absent("a full or read-only disk is mounted, which takes root on Linux")
    mounted = []

    def mount(options: str, source: Path | None = None) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        what = ["-t", "tmpfs", "tmpfs"] if source is None else [str(source)]
        done = subprocess.run(
            ["mount", "-o", options, *what, str(path)], capture_output=True, text=True, check=False
        )
        if done.returncode:  # root within a container, say, without the right to mount
            absent(f"nothing can be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(path)], check=True)
