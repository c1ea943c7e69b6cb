"""The device mesh, the one table from logical to mesh axes, and the placement of global arrays.

Every mesh axis always exists, at size 1 when it is not used. The partitioner propagates shardings
(`AxisType.Auto`); they are stated only for the parameters, the batch and in the few calls of
`constrain` in the model.
"""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.errors import UserError, did_you_mean

AXES = ("data", "fsdp", "sequence", "tensor", "expert")

# {logical axis: mesh axis or axes}. Parameters name the side of the model that they are on; the
# axes of activations begin with act_.
RULES = {
    "layers": None,
    # The devices that share a row share the parameters too, or each of them would hold them all.
    "embed": ("fsdp", "sequence"),
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "mlp": "tensor",
    "norm": None,
    "act_batch": ("data", "fsdp", "expert"),
    "act_position": "sequence",
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
    "act_head_position": ("sequence", "tensor"),
    # the two together: one place for each device
    "act_device": ("data", "fsdp", "expert", "sequence", "tensor"),
    # of rows that are looked up in the embedding, half way from its sharding to that of activations
    "act_whole_batch": ("data", "expert"),
    "act_part_of_embed": "fsdp",
    # of matrices of all layers, where each device takes whole ones; no opinion on their other dims
    "act_layer": ("fsdp", "sequence"),
    "act_as_is": P.UNCONSTRAINED,
}

# {setting of JAX that changes its draws: what it must be}
SETTINGS_OF_JAX = {
    "jax_enable_x64": False,
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
}


def mesh_shape(sizes: dict[str, int], num_devices: int, *, num_slices: int = 1) -> tuple[int, ...]:
    """Returns the size of each of AXES on `num_devices` devices.

    Args:
        sizes: {mesh axis: size}; an axis that is not named has size 1, and one size may be -1,
            which stands for what the others leave.
        num_slices: TPU slices that the devices come from; they are joined along data.

    Raises:
        UserError: an axis is unknown, the sizes do not multiply to the number of devices, or data
            is not a multiple of the slices.
    """
    for axis in sizes:
        if axis not in AXES:
            raise UserError(f"The mesh has no axis {axis!r}.{did_you_mean(axis, AXES)}")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    stated = math.prod(n for n in shape if n != -1)
    written = " x ".join(f"{axis}={n}" for axis, n in zip(AXES, shape))
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise UserError(
            f"The mesh {written} is not possible: sizes are at least 1, and at most one of them is "
            "-1 (the rest)."
        )
    if -1 in shape:
        if num_devices % stated:
            raise UserError(
                f"The mesh {written} needs a multiple of {stated} devices, and there are "
                f"{num_devices}; change config.mesh or --mesh so that the stated sizes divide the "
                "devices."
            )
        shape[shape.index(-1)] = num_devices // stated
    if math.prod(shape) != num_devices:
        raise UserError(
            f"The mesh {written} needs {math.prod(shape)} devices, and there are {num_devices}; "
            "change config.mesh or --mesh, or leave one axis at -1."
        )
    data = shape[AXES.index("data")]
    if data % num_slices:
        raise UserError(
            f"config.mesh.data={data} is not a multiple of the {num_slices} slices, which are "
            f"joined along data; set --config.mesh.data={num_slices}, or data={num_slices} in "
            "--mesh."
        )
    return tuple(shape)


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the size of every mesh axis from the text of --mesh, such as "fsdp=8,tensor=2";
    axes that are not named have size 1.

    Raises:
        UserError: an axis is unknown, or a size is not a number.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, equals, size = part.strip().partition("=")
        if axis not in sizes:
            raise UserError(
                f"--mesh {text!r}: there is no axis {axis!r}.{did_you_mean(axis, sizes)}"
            )
        if not re.fullmatch(r"-?\d+", size):
            raise UserError(
                f"--mesh {text!r}: {size!r} is not a size; write {axis}=8, or {axis}=-1 for all "
                "devices left."
            )
        sizes[axis] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int], devices=None) -> Mesh:
    """Returns a mesh over all devices; see mesh_shape for the sizes.

    Several TPU slices lie along the data axis, so that gradients are all that crosses the data
    centre network, which is 30 to 100 times slower than the links within a slice.

    Args:
        devices: default: all devices of this run.

    Raises:
        UserError: see `mesh_shape`, `check_gpus` and `check_settings_of_jax`.
    """
    devices = jax.devices() if devices is None else devices
    check_gpus(devices)
    check_settings_of_jax()
    is_tpu = devices[0].platform == "tpu"
    # Elsewhere slice_index does not name a TPU slice: the GPUs of one host share one.
    num_slices = len({getattr(d, "slice_index", 0) for d in devices}) if is_tpu else 1
    shape = mesh_shape(sizes, len(devices), num_slices=num_slices)
    types = (AxisType.Auto,) * len(AXES)
    data, *others = shape
    within, across = (data // num_slices, *others), (num_slices, *[1] * len(others))
    # An axis of 8 devices takes one and a half of the axes of a torus of 4 x 4 x 4. jax.make_mesh
    # refuses that, so it is not used.
    if num_slices == 1:
        grid = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=types)


def check_gpus(devices) -> None:
    """Raises UserError when the environment asks for GPUs first, and JAX has found CPUs alone.

    JAX passes over cuda without a word where it sees no device file of NVIDIA: the run would train
    on the CPUs of a machine that was rented for its GPUs.
    """
    asked = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    if asked.partition(",")[0] in ("cuda", "gpu") and devices[0].platform == "cpu":
        raise UserError(
            f"JAX_PLATFORMS={asked!r} names GPUs first, and JAX sees none of them on this machine; "
            "install NVIDIA's driver, or give the container its GPUs. JAX_PLATFORMS=cpu trains on "
            "the CPUs."
        )


def check_settings_of_jax() -> None:
    """Raises UserError when JAX draws other numbers than this package counts on, as it does where
    the environment says so: one seed would have other curves, bounds and samples.
    """
    for name, needed in SETTINGS_OF_JAX.items():
        # a later JAX may have removed one
        value = getattr(jax.config, name, needed)
        if value != needed:
            raise UserError(
                f"{name.upper()} is {value} and llada_jax needs {needed}, because draws, and with "
                "them curves, bounds and samples, would be others; unset it, or leave "
                f"jax.config.update({name!r}, {value}) out."
            )


def abstract_mesh(sizes: dict[str, int], num_devices: int) -> AbstractMesh:
    """Returns a mesh over devices of which only the number is known; see mesh_shape."""
    return AbstractMesh(mesh_shape(sizes, num_devices), AXES)


def one_device_mesh() -> Mesh:
    """Returns a mesh of the first device of this process, on which every axis has size 1.

    A local device, so that each process of a run can load a checkpoint on its own.
    """
    return make_mesh({}, devices=jax.local_devices()[:1])


def spec(names: tuple[str | None, ...]) -> P:
    """Returns the PartitionSpec of logical axis names, by RULES."""
    return P(*(None if name is None else RULES[name] for name in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """States the sharding of an activation by logical names, one per dim.

    Does nothing where no mesh is set (jax.set_mesh), so that the model runs on one device without
    knowing about meshes.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def axis_size(mesh: Mesh | AbstractMesh, logical: str) -> int:
    """Returns the number of ways in which a mesh splits a logical axis."""
    rule = RULES[logical]
    axes = rule if isinstance(rule, tuple) else (rule,) if rule else ()
    return int(np.prod([mesh.shape[axis] for axis in axes], initial=1))


def check_divisible(mesh: Mesh | AbstractMesh, sizes: dict[str, tuple[str, int]]) -> None:
    """Raises UserError when a size is not divisible by the mesh axes it is split over.

    Args:
        sizes: {what the user calls it: (logical axis, size)}, for example
            {"config.model.d_ff": ("mlp", 2048)}.
    """
    for what, (logical, size) in sizes.items():
        ways = axis_size(mesh, logical)
        if size % ways:
            raise UserError(
                f"{what}={size} cannot be split {ways} ways over the mesh axes {RULES[logical]} of "
                f"{dict(mesh.shape)}; make it a multiple of {ways} or shrink the axes."
            )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a [B, T] batch array."""
    return NamedSharding(mesh, spec(("act_batch", "act_position")))


def leading_dims(sharding: NamedSharding, num_dims: int) -> NamedSharding:
    """Returns the sharding of an array that has only the first dims of another one."""
    return NamedSharding(sharding.mesh, P(*sharding.spec[:num_dims]))


def reduced(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of an array of this shape, some of whose dims are those of another
    array reduced to 1.
    """
    axes = (None if size == 1 else axis for size, axis in zip(shape, sharding.spec))
    return NamedSharding(sharding.mesh, P(*axes))


def local_rows(sharding: NamedSharding, shape: tuple[int, int]) -> list[int]:
    """Returns the global rows of a [B, T] array that the devices of this process hold, in order."""
    rows = set()
    for row_slice, _ in sharding.addressable_devices_indices_map(shape).values():  # type: ignore[misc]
        rows.update(range(*row_slice.indices(shape[0])))
    return sorted(rows)


def place_batch(
    batch: dict[str, np.ndarray], rows: list[int], num_rows: int, sharding: NamedSharding
) -> dict:
    """Returns the global batch as sharded arrays, from the rows that this process has read.

    Args:
        batch: arrays [len(rows), T] or [len(rows)], whose i-th row is global row rows[i].
        num_rows: B of the global batch.
        sharding: of a [B, T] array.
    """
    place_of = {row: i for i, row in enumerate(rows)}

    def place(host: np.ndarray) -> jax.Array:
        shape = (num_rows, *host.shape[1:])

        def piece(index):
            first, last, _ = index[0].indices(num_rows)
            # A device's rows are contiguous, here as in the global batch.
            start = place_of[first]
            return host[(slice(start, start + last - first), *index[1:])]

        return jax.make_array_from_callback(shape, leading_dims(sharding, host.ndim), piece)

    return {name: place(host) for name, host in batch.items()}


def replicated_by_accident(tree, mesh: Mesh, *, num_elements: int = 1 << 20) -> list[str]:
    """Returns the paths of large arrays that every device holds whole although the mesh shards.

    The partitioner says nothing about an array that no rule splits; it only costs memory.

    Args:
        tree: arrays or jax.ShapeDtypeStructs with shardings.
        num_elements: the size from which an array is large.
    """
    if axis_size(mesh, "embed") * axis_size(mesh, "vocab") == 1:
        return []
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.shape}"
        for path, leaf in leaves
        if leaf.size >= num_elements and leaf.sharding.is_fully_replicated
    ]


def platform(mesh: Mesh) -> str:
    """Returns "cpu", "gpu" or "tpu": that of the mesh's devices, which need not be present."""
    return mesh.devices.flat[0].platform


def kernel_platform(mesh: Mesh) -> str:
    """Returns `platform`, but "other gpu" where neither cuDNN's nor Triton's attention runs: on
    GPUs of NVIDIA before Ampere (compute capability 8.0), and on those of others.
    """
    name = platform(mesh)
    generation = str(getattr(mesh.devices.flat[0], "compute_capability", "8.0")).partition(".")[0]
    is_known = generation.isdigit() and int(generation) >= 8
    return name if is_known or name not in ("gpu", "cuda") else "other gpu"
