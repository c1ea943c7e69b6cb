"""Compiling a run for TPU slices that are not there, with libtpu on a CPU, and reading what came
out.

Everything libtpu needs to know stands in the environment before it is loaded, so that one process
compiles for one set of compiler flags.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from llada_jax.cluster import sharding
from llada_jax.cluster.hardware import Slice
from llada_jax.errors import UserError
from llada_jax.planning import compiled_program
from llada_jax.training.step import Recipe, compile_step

_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class AbsentDevice:
    """Stands for one device of a mesh on which shapes are worked out and nothing is compiled."""

    id: int
    platform: str
    device_kind: str
    process_index: int = 0


def stand_in_mesh(sizes: dict[str, int], machines: Slice, num_slices: int) -> Mesh:
    """Returns a mesh of AbsentDevices: enough for shardings and shapes, needs no libtpu."""
    chip, num_devices = machines.accelerator, machines.num_devices * num_slices
    devices = [AbsentDevice(i, chip.platform, chip.device_kinds[0]) for i in range(num_devices)]
    shape = sharding.mesh_shape(sizes, num_devices)
    grid = np.array(devices, dtype=object).reshape(shape)
    return Mesh(grid, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def mask_token_stand_in(vocab_size: int) -> SimpleNamespace:
    """Returns what a recipe reads of a tokenizer; which ids are special changes nothing about the
    compiled program.
    """
    return SimpleNamespace(vocab_size=vocab_size, mask_id=vocab_size - 1, bos_id=0)


def load_libtpu(flags: dict[str, str]) -> None:
    """Prepares this process for compiling with libtpu; call it before anything else touches a TPU.

    Args:
        flags: environment variables, see llada_jax.cluster.compiler_flags.FLAGS.

    Raises:
        UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "Compiling for TPUs that are not there needs libtpu, which is not installed: pip "
            "install 'llada_jax[tpu]'."
        )
    os.environ.update(
        flags,
        TPU_SKIP_MDS_QUERY="1",  # do not ask a metadata server which machine this is
        TPU_ACCELERATOR_TYPE="v5litepod-16",  # any: the topology is given with each compilation
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no chip is used, so nothing has to be locked
    )


def absent_mesh(sizes: dict[str, int], machines: Slice, num_slices: int) -> Mesh:
    """Returns a mesh over the devices of absent slices, in their topology; `load_libtpu` comes
    first.
    """
    arguments = machines.aot_arguments | ({"num_slices": num_slices} if num_slices > 1 else {})
    return sharding.make_mesh(sizes, list(topologies.get_topology_desc(**arguments).devices))


def compile_report(recipe: Recipe, mesh: Mesh, machines: Slice, *, shape: tuple[int, int]) -> dict:
    """Compiles the train step for a mesh of absent devices and returns what the compiler says, as
    JSON values.

    fits: whether the program fits the memory of a device. needed_bytes, usable_bytes: where it does
    not. peak_bytes: the most that is in use at one time. collectives, kernels: see
    llada_jax.planning.compiled_program.
    """
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        try:
            compiled = compile_step(recipe, shape)
        except jax.errors.JaxRuntimeError as error:
            needed, usable = out_of_memory(str(error))
            if not needed:
                raise
            return {"fits": False, "needed_bytes": needed, "usable_bytes": usable}
    text = compiled.as_text()
    chip = machines.accelerator
    return {
        "fits": True,
        "seconds": time.perf_counter() - began,
        "peak_bytes": compiled.memory_analysis().peak_memory_in_bytes,
        "usable_bytes": chip.usable_hbm_bytes // chip.devices_per_chip,
        "collectives": [
            {**c._asdict(), "total_bytes": c.total_bytes}
            for c in compiled_program.collectives(text, devices_per_slice=machines.num_devices)
        ],
        "kernels": compiled_program.kernels(text),
    }


def out_of_memory(message: str) -> tuple[int, int]:
    """Returns the bytes that a program needs and those there are, from the compiler's words; (0, 0)
    for another error.
    """
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message)
    if not found:
        return 0, 0
    return tuple(int(float(found.group(i)) * _UNIT[found.group(i + 1)]) for i in (1, 3))


def sharded_bytes(tree, shape: dict[str, int]) -> int:
    """Returns the bytes that one device holds of a tree of arrays with shardings, on a mesh of
    another shape.

    Args:
        shape: {mesh axis: size}.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        sizes = list(leaf.shape)
        for dim, axes in enumerate(leaf.sharding.spec):
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                sizes[dim] = -(-sizes[dim] // shape[axis])
        total += math.prod(sizes) * jnp.dtype(leaf.dtype).itemsize
    return total
