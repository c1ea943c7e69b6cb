"""Devices that are not there: stand-ins that have shapes, and TPUs and GPUs as their compilers
describe them.

libtpu compiles for a TPU slice on any CPU, and JAX's CUDA plugin for any GPU. Both read their
settings from the environment when they are loaded, and only then, so one process compiles with one
set of compiler flags.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
from types import SimpleNamespace

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from llada_jax.cluster import sharding
from llada_jax.cluster.hardware import Slice
from llada_jax.errors import UserError
from llada_jax.planning.gpu_targets import target_config

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


def load_compiler(machines: Slice, flags: dict[str, str]) -> None:
    """Prepares this process for compiling for absent devices; call it before anything else touches
    a device.

    Args:
        flags: environment variables, see llada_jax.cluster.compiler_flags.FLAGS.

    Raises:
        UserError: the compiler is not installed.
    """
    (_load_libtpu if machines.accelerator.platform == "tpu" else _load_cuda)(flags)


def absent_mesh(sizes: dict[str, int], machines: Slice, num_slices: int) -> Mesh:
    """Returns a mesh over the devices of absent machines, in their topology, for which XLA
    compiles.

    Call `load_compiler` first. Takes the same arguments as `stand_in_mesh`.
    """
    if machines.accelerator.platform == "tpu":
        arguments = machines.aot_arguments | ({"num_slices": num_slices} if num_slices > 1 else {})
        found = topologies.get_topology_desc(**arguments)
    else:
        # slices x hosts x devices of a host. A slice is what NVLink joins; nothing here needs it.
        found = topologies.get_topology_desc(
            machines.name,
            "cuda",
            target_config=target_config(machines.accelerator),
            topology=f"1x{machines.num_hosts}x{machines.chips_per_host}",
        )
    return sharding.make_mesh(sizes, list(found.devices))


def _load_libtpu(flags: dict[str, str]) -> None:
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


def _load_cuda(flags: dict[str, str]) -> None:
    # cuDNN is never run, but JAX asks for its version where it traces the attention kernel.
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"Compiling for GPUs that are not there needs {package}, which is not installed: "
                "pip install 'llada_jax[plan-gpu]'."
            ) from None
    os.environ.update(flags)
