"""What stays float32 in a bfloat16 network: positions above 256 against float64, and the dtypes of
the traced program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jaxprs import equations
from support.networks import variant
from support.rotary import reference_frequencies

from llada_jax.models.model import make_model
from llada_jax.models.transformer import rotary_angles, rotate

V = 120  # no other dim has a third of it


def test_bfloat16_vectors_are_rotated_by_exact_angles_at_positions_above_256():
    H, theta = 8, 500_000.0
    positions = np.array([[255, 256, 257, 258, 1001, 4095]])
    x = np.random.default_rng(0).normal(size=(1, positions.size, 2, H))
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)  # what bfloat16 can hold
    angle = positions[..., None] * reference_frequencies(H, theta)
    cos, sin = np.cos(angle)[:, :, None], np.sin(angle)[:, :, None]
    first, second = np.split(x, 2, axis=-1)
    expected = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = rotate(jnp.asarray(x, jnp.bfloat16), *rotary_angles(jnp.asarray(positions), H, theta))
    assert rotated.dtype == jnp.bfloat16
    # one rounding of the result, of relative size 2**-9; a position off by one would give 0.8
    np.testing.assert_allclose(np.asarray(rotated, np.float64), expected, rtol=2**-8, atol=1e-3)


@pytest.fixture(scope="module")
def traced():
    """The equations of loss and gradient of a bfloat16 network with every kind of parameter."""
    a = variant(qk_norm="per_head", attention_bias="qkvo", vocab_size=V)
    model = make_model(a, dtype=jnp.bfloat16, nll_chunk=8)
    tokens = jax.ShapeDtypeStruct((2, 22), jnp.int32)
    loss = lambda p, t: model.nll_fn(p, t, t, t > 0, t, t).nll_BT.sum()  # noqa: E731
    return list(equations(jax.make_jaxpr(jax.value_and_grad(loss))(model.abstract, tokens).jaxpr))


def dtypes(traced, *names: str) -> set:
    found = {v.aval.dtype for e in traced if e.primitive.name in names for v in e.invars[:1]}
    assert found, names
    return found


@pytest.mark.parametrize("names", [("cos", "sin"), ("rsqrt",), ("exp",), ("log",)])
def test_angles_norms_softmax_and_loss_are_computed_in_float32(traced, names):
    assert dtypes(traced, *names) == {jnp.dtype("float32")}


def test_matrix_products_of_weights_are_bfloat16_and_the_logits_float32(traced):
    products = [e for e in traced if e.primitive.name == "dot_general"]
    forward = [e for e in products if {v.aval.dtype for v in e.invars} == {jnp.dtype("bfloat16")}]
    assert len(forward) > 7  # q, k, v, out, gate, up and down at least
    # rows times columns of a piece of the head, of which there are three
    heads = [e for e in forward if e.outvars[0].aval.shape == (2 * 22, V // 3)]
    assert heads
    assert {e.outvars[0].aval.dtype for e in heads} == {jnp.dtype("float32")}


def test_the_backward_pass_of_the_head_multiplies_in_bfloat16(traced):
    """A gradient of the logits in float32 would be multiplied in TF32 on GPUs, at a third of the
    speed.
    """
    of_head = [
        {v.aval.dtype for v in e.invars}
        for e in traced
        if e.primitive.name == "dot_general"
        and any(V // 3 in v.aval.shape for v in (*e.invars, *e.outvars))
    ]
    assert len(of_head) >= 4  # once forwards, once again, and one for each gradient
    assert of_head == [{jnp.dtype("bfloat16")}] * len(of_head)


def test_gradients_that_sum_over_tokens_are_summed_in_float32(traced):
    """The scatter-add of the embedding, and the sums over [B, T] for norms and biases."""
    scatters = [e for e in traced if e.primitive.name == "scatter-add"]
    assert {e.outvars[0].aval.dtype for e in scatters if e.outvars[0].aval.shape[0] == V} == {
        jnp.dtype("float32")
    }
    sums = [
        e for e in traced if e.primitive.name == "reduce_sum" and {0, 1} <= set(e.params["axes"])
    ]
    assert len(sums) >= 9  # two norms, two of queries and keys, the last one, four biases
    assert {e.invars[0].aval.dtype for e in sums} == {jnp.dtype("float32")}


def test_logits_for_samplers_are_float32_products_of_bfloat16():
    """float32 logits that were bfloat16 first look alike, and have 8 bits."""
    model = make_model(variant(vocab_size=V), dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((2, 24), jnp.int32)
    logits = lambda p, t: model.logits_fn(p, t, t, t)  # noqa: E731
    traced = equations(jax.make_jaxpr(logits)(model.abstract, tokens).jaxpr)
    (head,) = [
        e for e in traced if e.primitive.name == "dot_general" and e.outvars[0].aval.shape[-1] == V
    ]
    assert {v.aval.dtype for v in head.invars} == {jnp.dtype("bfloat16")}
    assert head.outvars[0].aval.dtype == jnp.float32
