"""The devices of this machine, divided among the runs that a sweep runs at a time.

By itself each run takes every device that it finds, and most of the memory of every GPU.
"""

import glob
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping

from llada_jax.errors import UserError


def device_shares(num_runs: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Returns for each of `num_runs` runs at a time the variables that give it its devices.

    Every run gets the same number of GPUs, out of those in CUDA_VISIBLE_DEVICES; GPUs that are left
    over stay idle, because runs of different numbers of devices are not what a table compares. A
    single run gets all devices, and so do runs on CPUs, which share the cores.

    Raises:
        UserError: there are fewer GPUs than runs, or the devices are TPU chips.
    """
    if num_runs == 1 or environment.get("JAX_PLATFORMS", "").startswith("cpu"):
        return [{}] * num_runs
    gpus = visible_gpus(environment) if "cuda" in plugins() else []
    if not gpus:
        if "tpu" in plugins() and (glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")):
            raise UserError(
                f"--parallel {num_runs}: the TPU chips of a host compute together, for one process "
                "at a time; leave out --parallel, or use --run gke with one slice per run."
            )
        return [{}] * num_runs
    if len(gpus) < num_runs:
        raise UserError(
            f"--parallel {num_runs} is more than the {len(gpus)} GPUs that these runs may use "
            f"(CUDA_VISIBLE_DEVICES); give at most --parallel {len(gpus)}."
        )
    size = len(gpus) // num_runs
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * size : (i + 1) * size])} for i in range(num_runs)
    ]


def plugins() -> set[str]:
    """Returns which kinds of devices the JAX that is installed can use, apart from CPUs."""
    entries = importlib.metadata.entry_points(group="jax_plugins")
    found = {"cuda" for entry in entries if "cuda" in entry.name}
    return found | ({"tpu"} if importlib.util.find_spec("libtpu") else set())


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the NVIDIA GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name]
    # Not asked of JAX, which would take the memory of all of them for this process.
    numbers = [re.fullmatch(r"/dev/nvidia(\d+)", path) for path in glob.glob("/dev/nvidia[0-9]*")]
    return [str(n) for n in sorted(int(found[1]) for found in numbers if found)]
