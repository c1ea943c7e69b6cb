"""The same run on other meshes, on several processes and with gradient accumulation has the same
loss curve.
"""

import jax
import numpy as np
import pytest
from support.runs import losses

from llada_jax.cluster.sharding import make_mesh, replicated_by_accident
from llada_jax.models.model import make_model, parameter_shardings
from llada_jax.models.transformer import Architecture
from llada_jax.training.state import abstract_state, create_state

CURVE_ALONE = (
    "evaluation.every_steps=0",
    "evaluation.final_num_batches=1",
    "log.tensorboard=False",
)


# Each of these alone changes no number either, and all of them are one run.
OTHERWISE = (
    "optimizer.gradient_accumulation=4",
    "model.remat=full",
    "model.nll_chunk=32",
    "data.num_threads=1",
    "data.prefetch=1",
)


@pytest.fixture(scope="module")
def straight(runs):
    """The run on one device."""
    workdir = runs.directory / "one-device"
    runs.train(workdir, *CURVE_ALONE)
    curve = losses(workdir)
    assert len(curve) == 20
    assert (
        curve[-1] < curve[0] - 1
    )  # it learns: equal curves of a run that stands still would show nothing
    return curve


# Name -> devices of a process, processes, overrides.
LAYOUTS = {
    "data-fsdp-tensor": (8, 1, ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]),
    "sequence-expert": (8, 1, ["mesh.sequence=4", "mesh.fsdp=1", "mesh.expert=2"]),
    "two-processes": (4, 2, ["mesh.data=4", "mesh.fsdp=1", "mesh.tensor=2"]),
    "accumulation-fsdp": (8, 1, ["optimizer.gradient_accumulation=2"]),
    "one-device-otherwise": (1, 1, OTHERWISE),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_curve_does_not_depend_on_how_it_is_computed(runs, straight, name):
    workdir = runs.directory / name
    num_devices, num_processes, overrides = LAYOUTS[name]
    runs.train(
        workdir, *CURVE_ALONE, *overrides, num_devices=num_devices, num_processes=num_processes
    )
    np.testing.assert_allclose(losses(workdir), straight, rtol=1e-5)


SMALL = Architecture(
    vocab_size=128, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64
)


def mesh_of(**sizes):
    return make_mesh(sizes)


def state_on(mesh):
    import optax

    model, optimizer = make_model(SMALL), optax.adam(1e-3)
    abstract = abstract_state(model, optimizer, mesh, metrics={}, keep_ema=True)
    return abstract, create_state(model, optimizer, abstract, seed=0)


@pytest.mark.slow
def test_parameters_and_optimizer_state_are_created_in_shards():
    abstract, state = state_on(mesh_of(fsdp=4, tensor=2))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.size >= 1024:
            held = max(shard.data.size for shard in leaf.addressable_shards)
            assert held <= leaf.size // 4, jax.tree_util.keystr(path)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract)


@pytest.mark.slow
def test_initialisation_does_not_depend_on_the_mesh():
    _, one = state_on(mesh_of(data=8))
    _, other = state_on(mesh_of(data=2, fsdp=2, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_a_parameter_left_replicated_is_named():
    mesh = mesh_of(fsdp=8)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = parameter_shardings(make_model(SMALL), mesh)
    tree = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        make_model(SMALL).abstract,
        shardings,
    )
    assert replicated_by_accident(tree, mesh, num_elements=1000) == []
    q = tree["blocks"]["q"]
    tree["blocks"]["q"] = jax.ShapeDtypeStruct(q.shape, q.dtype, sharding=whole)
    assert replicated_by_accident(tree, mesh, num_elements=1000) == ["blocks/q (2, 32, 4, 8)"]
