"""Devices that are not there: stand-ins that have shapes, and TPUs as libtpu describes them.

libtpu compiles for a TPU slice on any CPU. It reads its settings from the environment when it is
loaded, and only then, so one process compiles with one set of compiler flags.
"""

import dataclasses
import importlib.util
import os
from types import SimpleNamespace

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from llada_jax.cluster import sharding
from llada_jax.cluster.hardware import Slice
from llada_jax.errors import UserError

# More than the largest machines have; a mesh holds an object for each.
MAX_DEVICES = 2**18


@dataclasses.dataclass(frozen=True)
class StandInDevice:
    """One device of a mesh on which shapes are traced and nothing is compiled."""

    id: int
    platform: str
    device_kind: str
    process_index: int = 0


def stand_in_mesh(sizes: dict[str, int], machines: Slice, num_slices: int) -> Mesh:
    """Returns a mesh of StandInDevices, which is enough for shardings and shapes and needs no
    libtpu.

    Args:
        sizes: {mesh axis: size}, one of them may be -1; see llada_jax.cluster.sharding.mesh_shape.

    Raises:
        UserError: the sizes do not fit the devices or the slices, or there are too many of them.
    """
    chip, num_devices = machines.accelerator, machines.num_devices * num_slices
    if num_devices > MAX_DEVICES:
        raise UserError(
            f"--slices {num_slices} of {machines.name} are {num_devices} devices, and a plan is "
            f"for at most {MAX_DEVICES}; lower --slices or choose a smaller --topology."
        )
    devices = [StandInDevice(i, chip.platform, chip.device_kinds[0]) for i in range(num_devices)]
    shape = sharding.mesh_shape(sizes, num_devices, num_slices=num_slices)
    grid = np.array(devices, dtype=object).reshape(shape)
    return Mesh(grid, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def stand_in_tokenizer(vocab_size: int) -> SimpleNamespace:
    """Returns what a recipe reads of a tokenizer.

    Which ids are special changes constants of the compiled program but neither its shapes nor its
    cost, so that no data has to be read for a plan.
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
            "Compiling for TPUs that are not there needs libtpu, which is not installed: "
            "pip install 'llada_jax[tpu]'."
        )
    os.environ.update(
        flags,
        # Otherwise libtpu asks a metadata server which machine this is.
        TPU_SKIP_MDS_QUERY="1",
        # Any type will do: the topology is given with each compilation.
        TPU_ACCELERATOR_TYPE="v5litepod-16",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        # libtpu locks the chips of a host for one process. No chip is used here, so several plans
        # may run at the same time.
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


def libtpu_mesh(sizes: dict[str, int], machines: Slice, num_slices: int) -> Mesh:
    """Returns a mesh over the devices of absent TPU slices, in their topology, for which XLA
    compiles.

    Call `load_libtpu` first. Takes the same arguments as `stand_in_mesh`.
    """
    arguments = machines.aot_arguments | ({"num_slices": num_slices} if num_slices > 1 else {})
    return sharding.make_mesh(sizes, list(topologies.get_topology_desc(**arguments).devices))
