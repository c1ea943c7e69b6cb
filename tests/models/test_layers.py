"""Layers by themselves, against the loop over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.networks import perturbed, variant

from llada_jax.cluster.sharding import make_mesh, one_device_mesh
from llada_jax.masks import BIDIRECTIONAL, CAUSAL
from llada_jax.models.layers import by_layer
from llada_jax.models.model import make_model, parameter_shardings
from llada_jax.planning.sampler_program import kept_parameters
from llada_jax.pretrained import network_for_canvases

ROWS = (
    jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 24)), jnp.int32),
    jnp.asarray([[0] * 8 + [1] * 16, [1] * 24], jnp.int32),
    jnp.asarray([[0] * 8 + [*range(16)], [*range(24)]], jnp.int32),
)
IS_READ = np.asarray(ROWS[1]) > 0


def models(**settings):
    a = variant(num_layers=3, qk_norm="full", attention_bias="qkvo")
    looped, unrolled = (make_model(a, is_unrolled=is_un, **settings) for is_un in (False, True))
    return looped, unrolled, perturbed(looped)


def layered(params):
    return by_layer(jax.tree.map(jnp.copy, params))


@pytest.mark.parametrize("mask", [BIDIRECTIONAL, CAUSAL])
def test_a_network_takes_its_layers_one_by_one(mask):
    looped, unrolled, params = models(mask=mask)
    expected = looped.logits_fn(params, *ROWS)[IS_READ]
    for model in (looped, unrolled):
        logits = model.logits_fn(layered(params), *ROWS)[IS_READ]
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(unrolled.logits_fn(params, *ROWS)[IS_READ], expected, atol=1e-5)


def test_a_cache_of_single_layers_is_read_and_written_like_that_of_a_loop():
    looped, unrolled, params = models()
    where = {"start": 8, "length": 8}
    window = (ROWS[0][:, 8:16] + 1, ROWS[1], ROWS[2][:, 8:16])
    logits, cache = looped.cached_fn(params, *ROWS, None, **where)
    again, changed = looped.cached_fn(params, *window, cache, **where)
    for given in (params, layered(params)):
        ours, kept = unrolled.cached_fn(given, *ROWS, None, **where)
        np.testing.assert_allclose(ours, logits, atol=1e-5)
        ours, kept = unrolled.cached_fn(given, *window, kept, **where)
        np.testing.assert_allclose(ours, again, atol=1e-5)
        for parts, stacked in zip(kept, changed, strict=True):
            np.testing.assert_allclose(jnp.stack(parts), stacked, atol=1e-5)


def test_a_shadow_is_that_of_the_loop():
    looped, unrolled, params = models()
    where = {"start": 8, "length": 8}
    expected = looped.shadow_fn(params, *ROWS, 63, **where)
    for ours, theirs in zip(unrolled.shadow_fn(layered(params), *ROWS, 63, **where), expected):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_taking_the_layers_apart_drops_the_stacked_arrays():
    looped, _, params = models()
    params = jax.tree.map(jnp.copy, params)
    stacked = params["blocks"]
    layers = by_layer(params)["blocks"]
    assert stacked == {}
    assert len(layers) == 3
    assert layers[0]["q"].shape == looped.abstract["blocks"]["q"].shape[1:]


def test_a_gpu_has_no_loop_and_its_planned_parameters_are_in_layers(monkeypatch):
    monkeypatch.setattr("llada_jax.pretrained.sharding.platform", lambda mesh: "gpu")
    mesh = one_device_mesh()
    a = variant(num_layers=3)
    model = network_for_canvases(a, BIDIRECTIONAL, mesh, dtype="bfloat16")
    assert model.is_unrolled
    planned = kept_parameters(model, mesh, jnp.bfloat16)
    params = layered(model.init(jax.random.key(0)))
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert jax.tree.map(lambda leaf: leaf.shape, planned) == shapes
    assert planned["blocks"][0]["q"].dtype == jnp.bfloat16
    assert planned["blocks"][0]["attn_norm"].dtype == jnp.float32
    monkeypatch.setattr("llada_jax.pretrained.sharding.platform", lambda mesh: "cpu")
    assert not network_for_canvases(a, BIDIRECTIONAL, mesh, dtype="float32").is_unrolled


def test_layers_are_split_over_the_devices_as_the_stacks_were(monkeypatch):
    monkeypatch.setattr("llada_jax.pretrained.sharding.platform", lambda mesh: "gpu")
    a = variant(num_layers=3, vocab_size=96)
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    model = network_for_canvases(a, BIDIRECTIONAL, mesh, dtype="float32")
    assert model.is_unrolled
    params = jax.device_put(model.init(jax.random.key(0)), parameter_shardings(model, mesh))
    expected = jax.jit(model.logits_fn)(params, *ROWS)
    params = by_layer(params)
    planned = kept_parameters(model, mesh, jnp.float32)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(planned), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    assert not params["blocks"][0]["q"].sharding.is_fully_replicated
    logits = jax.jit(model.logits_fn)(params, *ROWS)
    np.testing.assert_allclose(logits[IS_READ], expected[IS_READ], atol=1e-5)


def test_weights_that_a_mesh_gathers_stay_in_a_loop(monkeypatch):
    """It bounds how many layers are whole at a time."""
    monkeypatch.setattr("llada_jax.pretrained.sharding.platform", lambda mesh: "gpu")
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    model = network_for_canvases(variant(), BIDIRECTIONAL, mesh, dtype="bfloat16")
    assert not model.is_unrolled
