"""Where the traced network states how its activations are split over the devices.

Without enough hints, a compiler often finds the same layout for a small network on eight devices,
and another one for a large network on hundreds, so this reads the program that it is given.
"""

import jax
import jax.numpy as jnp
import pytest
from support.jaxprs import programs
from support.networks import variant

from llada_jax.cluster.sharding import AXES, make_mesh
from llada_jax.models.model import make_model

B, T, D, F = 8, 12, 48, 80
BATCH = ("data", "fsdp", "expert")


@pytest.fixture(scope="module")
def traced():
    """The programs of a loss, traced on a mesh of which every axis that splits something has 2."""
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "data": 2, "fsdp": 2, "tensor": 2})
    model = make_model(variant(d_model=D, d_ff=F, vocab_size=64))
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    loss = lambda p, t: model.nll_fn(p, t, t, t > 0, t, t).nll_BT.sum()  # noqa: E731
    with jax.set_mesh(mesh):
        return list(programs(jax.make_jaxpr(loss)(model.abstract, tokens).jaxpr))


def stated(traced, primitive: str, shape: tuple[int, ...]) -> list[tuple]:
    """Returns what is stated of each result of `primitive` with this shape: the axes that split its
    dims; () where something reads the result before anything is stated.
    """
    found = []
    for program in traced:
        for equation in program.eqns:
            if equation.primitive.name == primitive and equation.outvars[0].aval.shape == shape:
                readers = [e for e in program.eqns if equation.outvars[0] in e.invars]
                is_stated = readers and readers[0].primitive.name == "sharding_constraint"
                found.append(tuple(readers[0].params["sharding"].spec) if is_stated else ())
    return found


def test_both_sums_of_the_residual_stream_are_split_by_rows(traced):
    """After attention and after the feed-forward part."""
    sums = stated(traced, "add", (B, T, D))
    assert len(sums) == 2
    assert {spec[:1] for spec in sums} == {(BATCH,)}


def test_what_norms_make_is_split_by_rows_alone(traced):
    """The norms of attention, of the feed-forward part and of the head, which splits its positions
    further: without the last, all layers are split as the head is.
    """
    scaled = [spec for spec in stated(traced, "mul", (B, T, D)) if spec]
    assert scaled == 3 * [(BATCH, "sequence", None)]


def test_the_feed_forward_part_is_split_by_rows_and_by_its_width(traced):
    # one product makes a silu of the sigmoid, and one joins it with the other half
    assert sorted(stated(traced, "mul", (B, T, F))) == [(), (BATCH, "sequence", "tensor")]
