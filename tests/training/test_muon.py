"""Muon against optax's own, and what devices exchange when its matrices are split over them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax.cluster.sharding import make_mesh, spec
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture
from llada_jax.planning.collectives import collectives
from llada_jax.training.optim import muon, muon_dimensions

# {name: (dims without those of the layers, their logical axes)}
MATRICES = {
    "q": ((16, 2, 4), ("embed", "heads", "head")),
    "attn_out": ((2, 4, 16), ("heads", "head", "embed")),
    "ff_up": ((16, 40), ("embed", "mlp")),
    "ff_out": ((40, 16), ("mlp", "embed")),
}
KNOBS = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "first_moment_dtype": jnp.float32}


def normal(seed: int, num_layers: int) -> dict:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.float32(rng.normal(size=shape))  # noqa: E731
    blocks = {name: draw(num_layers, *dims) for name, (dims, _) in MATRICES.items()}
    return {"blocks": {**blocks, "attn_norm": draw(num_layers, 16)}, "embed": draw(9, 16)}


def moved(optimizer, params: dict, num_steps: int = 3) -> tuple:
    """Returns the last update and the state after it."""
    state, updates = optimizer.init(params), {}
    for step in range(num_steps):
        gradients = normal(1 + step, len(params["blocks"]["q"]))
        updates, state = optimizer.update(gradients, state, params)
    return updates, state


def test_every_matrix_of_the_network_and_nothing_else_becomes_orthogonal():
    """Against the singular vectors of the gradient, in float64."""
    architecture = Architecture(
        vocab_size=12,
        num_layers=2,
        d_model=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        d_ff=20,
        qk_norm="full",
        attention_bias="qkvo",
    )
    # how many numbers each of them reads
    inputs = dict.fromkeys(("q", "k", "v", "ff_gate", "ff_up"), 16) | {"attn_out": 24, "ff_out": 20}
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(
        lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), make_model(architecture).abstract
    )
    optimizer = muon(**KNOBS)
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    for name, size in inputs.items():
        update, gradient = (
            np.float64(tree["blocks"].pop(name)).reshape(2, size, -1)
            for tree in (updates, gradients)
        )
        left, _, right = np.linalg.svd(gradient, full_matrices=False)
        found = left.mT @ update @ right.mT / (0.2 * np.sqrt(max(update.shape[1:])))
        values = np.diagonal(found, axis1=1, axis2=2)
        # published: the iteration brings them near 1, and not to 1
        assert (abs(values - 1) < 0.35).all(), name
        np.testing.assert_allclose(found, values[:, None] * np.eye(values.shape[1]), atol=1e-3)
    # the first step of Adam is the sign of the gradient, and that of Nesterov's goes further
    for update, gradient in zip(jax.tree.leaves(updates), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(update, (1 + 0.9 / 1.9) * np.sign(gradient), rtol=1e-4)


def test_updates_and_state_are_those_of_optax():
    published = optax.contrib.muon(
        learning_rate=1.0,
        adam_b1=0.9,
        adam_b2=0.95,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=muon_dimensions,
    )
    params = normal(0, 3)
    found = moved(muon(**KNOBS), params)
    # a checkpoint that optax's wrote is continued
    expected = moved(optax.chain(published, optax.scale(-1.0)), params)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("num_layers", [8, 3])
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "sequence": 4}], ids=str)
def test_devices_exchange_layers_and_gather_no_matrix(num_layers, sizes):
    """Gathered, the matrices of all layers would be whole on every device at the same time."""
    params, mesh = normal(0, num_layers), make_mesh(sizes)
    gradients, optimizer = normal(1, num_layers), muon(**KNOBS)
    places = jax.tree.map(lambda _: jax.NamedSharding(mesh, spec(())), params)
    for name, (_, axes) in MATRICES.items():
        places["blocks"][name] = jax.NamedSharding(mesh, spec(("layers", *axes)))
    place = lambda tree: jax.device_put(tree, places)  # noqa: E731
    with jax.set_mesh(mesh):
        state = jax.jit(optimizer.init)(place(params))
        update = jax.jit(lambda *given: optimizer.update(*given)[0], out_shardings=places)
        compiled = update.lower(place(gradients), state, place(params)).compile()
        found = compiled(place(gradients), state, place(params))
    expected, _ = moved(optimizer, params, num_steps=1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
    exchanged = collectives(compiled.as_text())
    smallest = 4 * num_layers * 16 * 8
    assert any(one.kind == "all-to-all" for one in exchanged)
    assert not [one for one in exchanged if one.kind != "all-to-all" and one.num_bytes >= smallest]
