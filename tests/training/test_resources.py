"""What the compiled step holds: the state once, and activations in shards, as far as a program for
eight CPU devices shows it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax.cluster import hardware
from llada_jax.cluster.sharding import AXES, batch_sharding, make_mesh, one_device_mesh
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.planning.absent_devices import stand_in_mesh
from llada_jax.training.state import abstract_metrics, abstract_state
from llada_jax.training.step import Recipe, compile_step, make_train_step, runs_without_loop

MASK, B, T = 63, 8, 32
# every width is different, so that the last dim of an activation says which one it is
ARCHITECTURE = Architecture(
    vocab_size=64, num_layers=2, d_model=48, num_heads=4, num_kv_heads=4, head_dim=12, d_ff=80
)


def recipe_on(mesh) -> Recipe:
    model = make_model(ARCHITECTURE)
    objective, optimizer = masked_diffusion(mask_id=MASK), optax.adam(1e-3)
    metrics = abstract_metrics(objective, model.abstract, num_rows=B, sequence_length=T)
    options = {"seed": 0, "num_rows": B, "num_microbatches": 1, "ema_decay": 0.5}
    step = make_train_step(objective, model.nll_fn, optimizer, lambda step: 1e-3, **options)
    abstract = abstract_state(model, optimizer, mesh, metrics=metrics, keep_ema=True)
    placed = batch_sharding(mesh)
    f32 = jnp.dtype(jnp.float32)
    kept = "none"
    return Recipe(
        ARCHITECTURE, 1, f32, f32, "xla", kept, model, objective, optimizer, abstract, step, placed
    )


@pytest.fixture(scope="module")
def compiled():
    """(recipe, the step compiled for data 2 x fsdp 2 x tensor 2)."""
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        recipe = recipe_on(mesh)
        return recipe, compile_step(recipe, (B, T))


@pytest.mark.slow
def test_every_array_of_the_state_is_updated_in_place(compiled):
    """Or the state would be held twice, which is what decides whether a model fits."""
    recipe, step = compiled
    leaves = jax.tree.leaves(recipe.abstract)
    held = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves
    )
    assert step.memory_analysis().alias_size_in_bytes == held
    header = step.as_text().splitlines()[0]
    assert header.count("may-alias") + header.count("must-alias") == len(leaves)


def test_no_activation_of_the_layers_is_whole_on_a_device(compiled):
    """Batch and width are split: 8 rows over 4 devices, the 80 of the feed-forward part and the 4
    heads over 2. A lost rule would leave all of the batch, or all of the width, on each.
    """
    _, step = compiled
    text = step.as_text()
    assert f"f32[{B // 4},{T},{ARCHITECTURE.d_ff // 2}]" in text
    for shape in (
        f"[{B},{T},{ARCHITECTURE.d_model}]",
        f"[{B // 2},{T},{ARCHITECTURE.d_model}]",
        f"[{B // 4},{T},{ARCHITECTURE.d_ff}]",
        f"[{B},{T},{ARCHITECTURE.d_ff // 2}]",
        f"[{B // 4},{T},{ARCHITECTURE.num_heads},{ARCHITECTURE.head_dim}]",
    ):
        assert f"f32{shape}" not in text, shape


def test_one_gpu_that_trains_everything_has_no_loop_over_the_layers():
    def on(topology: str):
        return stand_in_mesh({"fsdp": -1}, hardware.machines_named(topology), 1)

    objective = masked_diffusion(mask_id=MASK)
    assert runs_without_loop(objective, on("1xh100"), num_layers=12)
    assert not runs_without_loop(objective, on("1xh100"), num_layers=22)
    assert not runs_without_loop(objective, on("8xh100"), num_layers=12)
    assert not runs_without_loop(objective, on("v5p-8"), num_layers=12)
    assert not runs_without_loop(objective, one_device_mesh(), num_layers=12)
    partly_frozen = dataclasses.replace(
        objective, split_parameters=lambda params, key: (params, {})
    )
    assert not runs_without_loop(partly_frozen, on("1xh100"), num_layers=12)
