"""Matrices in int8 against float64, and what the backward pass keeps of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jaxprs import equations
from support.paths import PUBLISHED

from llada_jax.checkpoints.huggingface import HuggingFace
from llada_jax.cluster import hardware
from llada_jax.cluster.sharding import one_device_mesh
from llada_jax.models.adapters import NUM_INPUT_DIMS, Lora, adapter_shapes, joined, stored
from llada_jax.models.int8 import dequantised, quantised, scale_shape
from llada_jax.models.model import abstract_parameters, make_model
from llada_jax.models.products import project_int8
from llada_jax.models.transformer import Architecture
from llada_jax.planning.absent_devices import stand_in_mesh

SMALL = Architecture(
    vocab_size=11, num_layers=2, d_model=8, num_heads=2, num_kv_heads=2, head_dim=4, d_ff=8
)
# {dims of inputs: two stacked matrices}
MATRICES = {
    1: np.random.default_rng(0).normal(size=(2, 6, 3, 4)).astype(np.float32),
    2: np.random.default_rng(1).normal(size=(2, 3, 4, 6)).astype(np.float32),
}


@pytest.mark.parametrize("num_in", [1, 2])
def test_no_weight_moves_by_more_than_half_of_its_scale(num_in):
    matrix = MATRICES[num_in].copy()
    matrix[0, ..., 1] = 0.0
    numbers, scale = map(np.asarray, quantised(jnp.asarray(matrix), num_in))
    assert (numbers.dtype, scale.dtype) == (np.int8, np.float32)
    assert scale.shape == scale_shape(matrix.shape, num_in)
    # rounded in float32: the halves may be missed by a unit in the last place of the quotient
    moved = np.abs(np.float64(numbers) * np.float64(scale) - matrix)
    assert (moved <= scale / 2 * (1 + 127 * 2.0**-22)).all()
    # each output uses the whole range, and one without weights stays so
    inputs = tuple(range(1, 1 + num_in))
    largest = np.abs(numbers).max(axis=inputs)
    assert (largest[0, ..., 1] == 0).all()
    assert (np.delete(largest[0], 1, axis=-1) == 127).all()
    assert (largest[1] == 127).all()
    assert np.isfinite(scale).all()
    # both signs alike
    np.testing.assert_array_equal(quantised(jnp.asarray(-matrix), num_in)[0], -numbers)


@pytest.mark.parametrize("num_in", [1, 2])
@pytest.mark.parametrize("merges_rows", [True, False])
def test_a_product_and_its_gradient_are_within_the_error_of_the_weights(num_in, merges_rows):
    matrix = MATRICES[num_in][:1]
    numbers, scale = quantised(jnp.asarray(matrix), num_in)
    x = np.random.default_rng(2).normal(size=(2, 5, *matrix.shape[1 : 1 + num_in]))
    x = jnp.asarray(x, jnp.float32)
    mesh = stand_in_mesh({"fsdp": -1}, hardware.machines_named("1xh100"), 1)

    def product(x):
        return project_int8(x, numbers[0], scale[0], num_in)

    if not merges_rows:  # the form of GPUs, computed here
        with jax.set_mesh(mesh):
            jaxpr = jax.make_jaxpr(product)(x)
        (y,) = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, x)
    else:
        y = product(x)
    x64, matrix64 = np.float64(x), np.float64(matrix[0])
    y64 = np.tensordot(x64, matrix64, num_in)
    half = np.float64(scale[0]) / 2 * np.ones_like(matrix64)
    bound = np.tensordot(np.abs(x64), half, num_in)
    error = np.abs(y - y64)
    assert (error <= bound * 1.001).all()
    assert error.max() > bound.max() / 100  # it is not the float32 matrix that is multiplied
    multiplied = np.float64(dequantised(numbers, scale)[0])
    np.testing.assert_allclose(y, np.tensordot(x64, multiplied, num_in), rtol=1e-4, atol=1e-5)
    # the gradient goes through the matrix that was multiplied
    grad = np.random.default_rng(3).normal(size=y.shape).astype(np.float32)
    outs = tuple(range(num_in, matrix64.ndim))
    expected = np.tensordot(np.float64(grad), multiplied, (tuple(range(-len(outs), 0)), outs))
    (found,) = jax.vjp(product, x)[1](jnp.asarray(grad))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_multiplies_the_whole_numbers_exactly():
    """x is one unit vector after the other, so that the products are the matrix itself."""
    numbers, scale = quantised(jnp.asarray(MATRICES[1][:1]), 1)
    units = jnp.eye(6, dtype=jnp.bfloat16)[None]
    found = project_int8(units, numbers[0], scale[0])
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[0], dequantised(numbers, scale)[0].astype(jnp.bfloat16))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_no_step_holds_the_layers_in_another_dtype(remat):
    """A copy of one matrix of all layers would be an array of 2 * 8 * 8 numbers that is stacked by
    a scan, or made before it.
    """
    lora = Lora(rank=2, targets="blocks/")
    model = make_model(SMALL, dtype=jnp.bfloat16, remat=remat, nll_chunk=8)
    network = jax.eval_shape(model.init, jax.random.key(0))
    adapters = adapter_shapes(network, lora)
    tokens = jax.ShapeDtypeStruct((3, 8), jnp.int32)
    where = jax.ShapeDtypeStruct((3, 8), jnp.bool_)

    def copies(lora) -> int:
        kept = jax.eval_shape(lambda network: stored(network, lora), network)

        def loss(adapters, network, tokens, where):
            scores = model.nll_fn(
                joined(network, adapters, lora), tokens, tokens, where, tokens, tokens
            )
            return scores.nll_BT.sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))(adapters, kept, tokens, where)
        made = [out.aval for eqn in equations(jaxpr.jaxpr) for out in eqn.outvars]
        return sum(
            jnp.issubdtype(aval.dtype, jnp.floating) and aval.shape[:1] == (2,) and aval.size == 128
            for aval in made
            if hasattr(aval, "shape")
        )

    assert copies(lora._replace(frozen_dtype="int8")) == 0
    # as a float32 network has them where nothing is computed again
    assert (copies(lora) > 0) == (remat == "none")


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_weights_that_are_rounded_as_they_are_read_are_those_of_the_whole_network(dtype):
    lora = Lora(rank=2, frozen_dtype=dtype)
    found = HuggingFace(PUBLISHED, causal=False)
    abstract = abstract_parameters(make_model(found.architecture), one_device_mesh())
    whole, rounded = (found.restore_params(0, abstract, lora=given) for given in (None, lora))
    assert {rounded["blocks"][path.split("/")[1]].dtype.name for path in NUM_INPUT_DIMS} == {dtype}
    expected, kept = (jax.jit(stored, static_argnums=1)(net, lora) for net in (whole, rounded))
    jax.tree.map(np.testing.assert_array_equal, kept, expected)


def test_all_matrices_of_the_layers_are_int8_and_no_others():
    lora = Lora(rank=2, frozen_dtype="int8")
    network = jax.eval_shape(make_model(SMALL).init, jax.random.key(0))
    kept = jax.eval_shape(lambda network: stored(network, lora), network)
    dtypes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype.name
        for path, leaf in jax.tree_util.tree_leaves_with_path(kept)
    }
    names = {path: lora.dtype_of(path).name for path in dtypes}
    assert names == dtypes
    assert {path for path, dtype in dtypes.items() if dtype == "int8"} == set(NUM_INPUT_DIMS)
    assert {path for path, dtype in dtypes.items() if dtype == "bfloat16"} == {"embed", "lm_head"}
    scales = {path for path in dtypes if path.startswith("scales/")}
    assert scales == {f"scales/{path}" for path in NUM_INPUT_DIMS}
