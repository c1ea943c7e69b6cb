"""Attention one head at a time: where it runs and what it holds.

Its values and gradients are tested with those of the reference, in test_attention.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jaxprs import equations

from llada_jax.cluster.sharding import AXES, make_mesh
from llada_jax.masks import BIDIRECTIONAL, CAUSAL
from llada_jax.models.attention import attend, xla_attention
from llada_jax.models.by_head import attention_by_head
from llada_jax.models.recomputation import REMAT_POLICIES


def queries_keys_values():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, 64, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=True)]


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"data": 2, "sequence": 4}], ids=str)
def test_one_head_at_a_time_is_the_reference_on_any_mesh(sizes):
    q, k, v = queries_keys_values()
    segments = jnp.asarray([[1] * 25 + [2] * 39, [1] * 18 + [2] * 32 + [0] * 14])
    expected = xla_attention(q, k, v, segments, mask=BIDIRECTIONAL)
    one_by_one = functools.partial(attend, implementation="xla_by_head", mask=BIDIRECTIONAL)
    num_devices = np.prod(list(sizes.values()))
    mesh = make_mesh({**dict.fromkeys(AXES, 1), **sizes}, jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        out = jax.jit(one_by_one)(q, k, v, segments)
    is_read = np.asarray(segments) > 0
    np.testing.assert_allclose(np.asarray(out)[is_read], expected[is_read], atol=1e-5)


def test_the_scores_of_no_more_than_one_head_exist_and_recomputation_keeps_the_output():
    q, k, v = queries_keys_values()

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES["attention"])
    def layer(q, k, v):
        return attention_by_head(q, k, v, None, mask=CAUSAL)

    gradient = jax.grad(lambda q, k, v: layer(q, k, v).sum(), argnums=(0, 1, 2))
    traced = list(equations(jax.make_jaxpr(gradient)(q, k, v).jaxpr))
    shapes = {variable.aval.shape for equation in traced for variable in equation.outvars}
    assert {shape for shape in shapes if shape[-2:] == (64, 64)} <= {(1, 64, 64), (64, 64)}
    # once forward and once backward; without the kept output forward twice
    exponentials = [equation for equation in traced if equation.primitive.name == "exp"]
    assert [e.outvars[0].aval.shape for e in exponentials].count((1, 64, 64)) == 2
