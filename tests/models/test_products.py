"""The form of the matrix products on each kind of device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.cluster import hardware
from llada_jax.cluster.sharding import one_device_mesh
from llada_jax.models.products import project
from llada_jax.planning.absent_devices import stand_in_mesh

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)), jnp.float32)
KERNEL = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5, 6)), jnp.float32)


def products(mesh) -> list[tuple[int, ...]]:
    """Returns the shape of each matrix product's left side in attention's last projection."""
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(lambda x, kernel: project(x, kernel, 2))(X, KERNEL)
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                found.append(eqn.invars[0].aval.shape)
            for value in eqn.params.values():
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    walk(getattr(value, "jaxpr", value))

    walk(jaxpr.jaxpr)
    return found


def test_a_cpu_multiplies_all_rows_at_once():
    assert products(one_device_mesh()) == [(2 * 3, 4 * 5)]


@pytest.mark.parametrize("topology", ["v5p-8", "8xh100"])
def test_tpus_and_gpus_merge_no_dims(topology):
    """Merged heads have another layout there: 13 copies a layer, and a third gather of weights."""
    mesh = stand_in_mesh({"fsdp": -1}, hardware.machines_named(topology), 1)
    ((rows, positions, *heads),) = products(mesh)
    assert (rows, positions) == (2, 3)
    assert int(np.prod(heads)) == 4 * 5


def test_both_forms_compute_the_same():
    expected = np.einsum("btnh,nhd->btd", np.float64(X), np.float64(KERNEL))
    np.testing.assert_allclose(project(X, KERNEL, 2), expected, rtol=1e-5)
    split = project(X, KERNEL, 2, is_split=True)
    np.testing.assert_allclose(split, expected, rtol=1e-5)
