"""States that are functions of their step alone, and scripts that save them in other processes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.checkpoints.host_copies import LocalCheckpoints
from llada_jax.checkpoints.workdir import Checkpoints
from llada_jax.cluster.sharding import make_mesh
from llada_jax.training.state import TrainState
from support.paths import ROOT
from support.records import small_record

SPECS = {"whole": P(), "rows": P("fsdp"), "both": P("fsdp", "tensor"), "half": P(None, "tensor")}


def mesh_of(**sizes):
    return make_mesh(
        sizes,
        devices=jax.devices()[: int(np.prod(list(sizes.values())))],
    )


def state_at(step: int, mesh) -> TrainState:
    """A state that is a function of the step alone: each array in another sharding, one in
    bfloat16, some scalars.
    """
    key = jax.random.fold_in(jax.random.key(0), step)

    def place(array, spec):
        return jax.make_array_from_callback(
            array.shape, NamedSharding(mesh, spec), lambda index: array[index]
        )

    params = {name: place(jax.random.normal(key, (8, 4)), spec) for name, spec in SPECS.items()}
    params["bf16"] = place(jax.random.normal(key, (8, 8), jnp.bfloat16), P("fsdp"))
    scalars = {"loss": (place(jnp.float32(step / 3), P()), place(jnp.float32(step), P()))}
    return TrainState(
        place(jnp.int32(step), P()), params, (place(jnp.int32(step), P()),), {}, scalars
    )


def small_state(step: int) -> TrainState:
    """A state that is a function of the step alone, on one device."""
    return TrainState(
        jnp.int32(step), {"w": jnp.full((64, 64), step / 7)}, (jnp.int32(step),), {}, {}
    )


def abstract_of(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def assert_same(actual: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def saved_steps(workdir, *steps: int, keep: int = 2, record=None) -> Checkpoints:
    """Saves small states in a workdir; record: of the run, small_record() without one."""
    checkpoints = Checkpoints(workdir, keep=keep)
    for step in steps:
        checkpoints.save(small_state(step), record or small_record())
    checkpoints.wait()
    return checkpoints


def saved_copies(directory, mesh, *steps: int, workdir="runs/a") -> LocalCheckpoints:
    copies = LocalCheckpoints(directory, workdir)
    for step in steps:
        copies.save(state_at(step, mesh), small_record(step=step))
    copies.wait()
    return copies


def steps_in(disk: Path) -> list[int]:
    """Returns the steps of the whole copies of every run on a disk."""
    return [
        int(path.name.partition(".")[0]) for path in disk.glob("*/*") if path.suffix != ".partial"
    ]


def start_script(code: str, *words, **environment: str) -> subprocess.Popen:
    """Starts Python code that may import what stands next to this file; it finds `words` in
    sys.argv, and `environment` in addition to that of the tests.
    """
    head = f"import json, sys, time\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport jax\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, words)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
