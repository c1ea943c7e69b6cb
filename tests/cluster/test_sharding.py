"""Meshes, the table of logical axes, and the placement of batches on eight CPU devices."""

import dataclasses
import re
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.cluster import sharding
from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL
from llada_jax.models.attention import choose

ALL_ONE = dict.fromkeys(sharding.AXES, 1)


def test_axes_that_are_not_named_have_size_1_and_a_mesh_of_one_device_has_no_other():
    mesh = sharding.make_mesh({"data": 2, "tensor": 4})
    assert dict(mesh.shape) == ALL_ONE | {"data": 2, "tensor": 4}
    alone = sharding.one_device_mesh()
    assert dict(alone.shape) == ALL_ONE
    assert alone.devices.flat[0] == jax.local_devices()[0]


def test_one_axis_takes_the_devices_that_the_others_leave():
    assert sharding.mesh_shape({"data": 2, "fsdp": -1}, 8) == (2, 4, 1, 1, 1)
    assert sharding.mesh_shape({"fsdp": 8}, 8) == (1, 8, 1, 1, 1)
    assert sharding.mesh_shape({"data": -1, "fsdp": 4}, 8, num_slices=2) == (2, 4, 1, 1, 1)


@pytest.mark.parametrize(
    ("stated", "num_slices", "says"),
    [
        ({"fsdp": 3}, 1, "needs 3 devices, and there are 8"),
        ({"fsdp": -1, "tensor": 3}, 1, "needs a multiple of 3 devices, and there are 8"),
        ({"data": -1, "fsdp": -1}, 1, "at most one of them is -1"),
        ({"data": 0, "fsdp": -1}, 1, "sizes are at least 1"),
        ({"fdsp": 8}, 1, "no axis 'fdsp'. Did you mean 'fsdp'"),
        ({"fsdp": 8}, 2, "config.mesh.data=1 is not a multiple of the 2 slices"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(stated, num_slices, says):
    with pytest.raises(UserError, match=re.escape(says)):
        sharding.mesh_shape(stated, 8, num_slices=num_slices)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX reads of a TPU to lay out a mesh."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


def test_slices_are_joined_along_data():
    """Two slices of four chips: no row of the mesh along another axis leaves its slice."""
    devices = [Chip(i, i // 4, i // 4, (i % 2, i % 4 // 2, 0)) for i in range(8)]
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4}, devices)
    assert dict(mesh.shape) == ALL_ONE | {"data": 2, "fsdp": 4}
    slices = [{device.slice_index for device in row.flat} for row in mesh.devices]
    assert slices == [{0}, {1}]


@pytest.mark.parametrize("sizes", [{"fsdp": 8, "sequence": 8}, {"fsdp": 32, "tensor": 2}])
def test_an_axis_may_take_a_part_of_an_axis_of_the_torus(sizes):
    """4 x 4 x 4 chips, as in v5p-128."""
    devices = [Chip(i, 0, i // 4, (i % 4, i // 4 % 4, i // 16)) for i in range(64)]
    mesh = sharding.make_mesh(sizes, devices)
    assert dict(mesh.shape) == ALL_ONE | sizes
    assert len(set(mesh.devices.flat)) == 64


@pytest.mark.parametrize("asked", ["cuda,cpu", "gpu,cpu"])
def test_cpus_are_not_taken_for_the_gpus_that_the_environment_asks_for(asked):
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", asked)
        for make in (lambda: sharding.make_mesh({"fsdp": -1}), sharding.one_device_mesh):
            with pytest.raises(UserError, match="names GPUs first, and JAX sees none"):
                make()
    finally:
        jax.config.update("jax_platforms", before)
    sharding.make_mesh({"fsdp": -1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_enable_x64", True),
        ("jax_random_seed_offset", 7),
        ("jax_threefry_partitionable", False),
    ],
)
def test_settings_of_jax_that_change_its_draws_are_refused(name, value):
    usual = getattr(jax.config, name)
    try:
        jax.config.update(name, value)
        for make in (lambda: sharding.make_mesh({"fsdp": -1}), sharding.one_device_mesh):
            with pytest.raises(UserError, match=f"{name.upper()} is {value} .* unset it"):
                make()
    finally:
        jax.config.update(name, usual)


def test_a_size_that_cannot_be_split_names_the_knob_and_the_multiple():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    sharding.check_divisible(mesh, {"config.model.d_ff": ("mlp", 6)})
    with pytest.raises(UserError, match=r"config.model.d_model=6 cannot be split 4 ways"):
        sharding.check_divisible(mesh, {"config.model.d_model": ("embed", 6)})


def test_a_batch_is_placed_row_by_row_where_its_sharding_says():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "sequence": 2})
    placement = sharding.batch_sharding(mesh)
    tokens = np.arange(8 * 6).reshape(8, 6)
    rows = sharding.local_rows(placement, tokens.shape)
    assert rows == list(range(8))
    placed = sharding.place_batch({"tokens": tokens[rows]}, rows, 8, placement)["tokens"]
    assert placed.sharding == placement
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed, tokens)


def test_a_large_array_that_every_device_holds_whole_is_named():
    mesh = sharding.make_mesh({"fsdp": 8})

    def array(spec: P, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))

    tree = {"whole": array(P(), 16, 16), "split": array(P("fsdp"), 16, 16), "small": array(P(), 16)}
    assert sharding.replicated_by_accident(tree, mesh, num_elements=256) == ["whole (16, 16)"]
    replicas = sharding.make_mesh({"data": 8})
    assert sharding.replicated_by_accident(tree, replicas, num_elements=256) == []


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("gpu", "9.0", "gpu"),
        ("gpu", "12.0", "gpu"),
        ("cuda", "8.6", "cuda"),
        ("gpu", "7.5", "other gpu"),
        ("gpu", "gfx90a", "other gpu"),
        ("tpu", None, "tpu"),
        ("gpu", None, "gpu"),  # a stand-in for a device that is not there
    ],
)
def test_old_gpus_have_no_kernels_of_attention(platform, capability, expected):
    given = {"compute_capability": capability} if capability else {}
    device = types.SimpleNamespace(platform=platform, **given)
    mesh = types.SimpleNamespace(devices=np.array([device], object))
    assert sharding.kernel_platform(mesh) == expected
    rows = {"packed": False, "mask": BIDIRECTIONAL, "sequence_length": 256, "head_dim": 64}
    kernel = choose("auto", platform=expected, dtype="bfloat16", **rows)
    assert (kernel == "xla") == (expected == "other gpu")
    if expected == "other gpu":
        with pytest.raises(UserError, match="the mesh is of other gpu devices"):
            choose("cudnn", platform=expected, dtype="bfloat16", **rows)
