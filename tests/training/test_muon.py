"""Muon against optax's own, and what devices exchange when its matrices are split over them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax.cluster.sharding import make_mesh, spec
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
