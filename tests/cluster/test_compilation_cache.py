"""Where compiled programs are kept, and that every process of a run finds them when it starts
again.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from support.buckets import emulated
from support.runs import free_port

from llada_jax.cluster.compilation_cache import directory_of
from llada_jax.errors import UserError

PROGRAM = """
import json
import jax
from jax.sharding import NamedSharding, PartitionSpec
from llada_jax.cluster import distributed

found = {"hits": 0, "misses": 0}
def count(event, **more):
    name = event.rpartition("cache_")[2]
    found[name] = found.get(name, 0) + 1
jax.monitoring.register_event_listener(count)
distributed.initialize()
halves = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
jax.block_until_ready(jax.jit(lambda: jax.numpy.arange(8.0), out_shardings=halves)())
print(json.dumps(found))
"""


def start(directory, *, num_processes: int) -> list[dict]:
    """Returns the number of programs that each process found, and that it wrote."""
    team = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(directory),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, **team, "JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(num_processes)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["disk", "gs"])
def test_every_process_writes_its_programs_and_finds_them_at_the_next_start(place, tmp_path):
    with contextlib.ExitStack() as until_end:
        bucket = place != "disk" and until_end.enter_context(emulated(place, tmp_path / "log"))
        check_two_starts(f"{bucket}/cache" if bucket else tmp_path)


def check_two_starts(directory) -> None:
    first = start(directory, num_processes=2)
    assert [found["hits"] for found in first] == [0, 0]
    assert [found["misses"] for found in first] == [1, 1]
    second = start(directory, num_processes=2)
    assert [found["hits"] for found in second] == [1, 1]
    assert [found["misses"] for found in second] == [0, 0]


def test_the_compilation_cache_is_where_config_or_environment_say_and_else_in_the_home():
    known = jax.config.jax_compilation_cache_dir
    try:
        for said, setting, expected in (
            ("/there", "auto", "/there"),
            ("/there", "/here", "/here"),
            ("/there", "", None),
            (None, "auto", str(Path.home() / ".cache/llada_jax")),
            (None, "", None),
        ):
            jax.config.update("jax_compilation_cache_dir", said)
            assert directory_of(setting) == expected
        with pytest.raises(UserError, match="ftp"):
            directory_of("ftp://bucket/cache")
    finally:
        jax.config.update("jax_compilation_cache_dir", known)


def test_nothing_is_kept_for_a_user_without_a_home_directory(monkeypatch):
    """As in a container that is started with the number of a user who has no name there."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert directory_of("auto") is None
        jax.config.update("jax_compilation_cache_dir", "/mnt/cache")
        assert directory_of("auto") == "/mnt/cache"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
