"""An objective over adapters is the objective of the network to which they are added."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.errors import error_of

from llada_jax.models.adapters import Lora, adapter_shapes, joined, merged
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.objectives.sft import sft
from llada_jax.objectives.vrpo import vrpo
from llada_jax.training.adapted import adapted

MODEL = make_model(
    Architecture(
        vocab_size=11, num_layers=2, d_model=8, num_heads=2, num_kv_heads=2, head_dim=4, d_ff=8
    )
)
# every matrix, with one and with two dims of inputs and of outputs
LORA = Lora(rank=2, targets="blocks/")


@pytest.mark.slow
def test_loss_bound_and_gradient_are_those_of_the_merged_network():
    key = jax.random.key(0)
    network = jax.jit(MODEL.init)(key)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        adapter_shapes(network, LORA),
    )
    batch = {
        "tokens": rng.integers(0, 8, (4, 8)).astype(np.int32),
        "segment_ids": np.ones((4, 8), np.int32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (4, 1)),
        "is_maskable": np.tile(np.arange(8) > 2, (4, 1)),
    }
    plain = sft(mask_id=9)
    over = adapted(plain, LORA)
    options = dict(num_rows=4, step=0)

    def loss(adapters, function):
        return function(
            MODEL.nll_fn, adapters, batch, key, jnp.arange(4), frozen=network, **options
        )[0]

    def expected(adapters, function):
        whole = merged(network, adapters, LORA)
        return function(MODEL.nll_fn, whole, batch, key, jnp.arange(4), frozen={}, **options)[0]

    for ours, theirs in ((over.loss, plain.loss), (over.bound, plain.bound)):
        results = [
            jax.jit(jax.value_and_grad(lambda a, f=f, of=of: of(a, f)))(adapters)
            for of, f in ((loss, ours), (expected, theirs))
        ]
        assert jax.tree.structure(results[0][1]) == jax.tree.structure(adapters)
        # a sum of products in another order
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)
    # and so are the samples of a run
    tokens, segments, positions = (batch[name] for name in ("tokens", "segment_ids", "positions"))
    ours, theirs = (
        jax.jit(MODEL.logits_fn)(params, tokens, segments, positions)
        for params in (over.network(adapters, network), merged(network, adapters, LORA))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_under_adapters_the_reference_is_the_network_without_them():
    key = jax.random.key(0)
    network = jax.jit(MODEL.init)(key)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32),
        adapter_shapes(network, LORA),
    )
    batch = {
        "tokens": rng.integers(0, 8, (2, 8)).astype(np.int32),
        "segment_ids": np.tile(np.repeat([1, 2], 4), (2, 1)),
        "positions": np.tile(np.arange(8, dtype=np.int32) % 4, (2, 1)),
        "is_maskable": np.tile(np.arange(8) % 4 > 1, (2, 1)),
        "is_chosen": np.tile(np.arange(8) < 4, (2, 1)),
    }
    plain = vrpo(mask_id=9, num_times=2)
    over = adapted(plain, LORA)
    options = dict(num_rows=2, step=0)
    rows = jnp.arange(2)
    ours = over.loss(MODEL.nll_fn, adapters, batch, key, rows, frozen=network, **options)
    whole = merged(network, adapters, LORA)
    theirs = plain.loss(MODEL.nll_fn, whole, batch, key, rows, frozen=network, **options)
    assert abs(float(theirs[2]["reward_margin"][0])) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)
    # and nothing but the adapters is trained
    params, frozen = over.split_parameters(network, key)
    assert jax.tree.structure(params) == jax.tree.structure(adapters)
    assert frozen is network


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_frozen_network_in_few_bits_is_that_of_its_rounded_matrices(dtype):
    key = jax.random.key(0)
    lora = LORA._replace(frozen_dtype=dtype)
    network = jax.jit(MODEL.init)(key)
    over = adapted(masked_diffusion(mask_id=9), lora)
    params, frozen = over.split_parameters(network, key)
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        in_full = "norm" in name or "bias" in name or "scales" in name
        is_int8 = dtype == "int8" and name.startswith("blocks/")
        assert leaf.dtype == ("float32" if in_full else "int8" if is_int8 else "bfloat16"), name
    # fresh adapters add nothing
    rounded = merged(frozen, params, lora)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (rounded, network))))
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype("float32")}
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 8, (4, 8)).astype(np.int32),
        "segment_ids": np.ones((4, 8), np.int32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (4, 1)),
        "is_maskable": np.ones((4, 8), bool),
    }

    def loss(params, frozen):
        return over.loss(
            MODEL.nll_fn, params, batch, key, jnp.arange(4), frozen=frozen, num_rows=4, step=0
        )[0]

    ours, theirs = (jax.jit(jax.value_and_grad(loss))(params, f) for f in (frozen, rounded))
    # an int8 matrix is scaled after its product and not before
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * np.abs(b).max()),
        ours,
        theirs,
    )


def test_an_objective_that_freezes_something_itself_is_refused():
    again = adapted(sft(mask_id=9), LORA)
    assert "config.lora.rank=2" in error_of(adapted, again, LORA)


def test_no_sum_of_a_matrix_and_its_adapter_is_in_the_step():
    """A merged matrix would be an array of the shape of all layers' or of one layer's."""
    network = jax.eval_shape(MODEL.init, jax.random.key(0))
    adapters = adapter_shapes(network, LORA)
    tokens = jax.ShapeDtypeStruct((4, 8), jnp.int32)
    where = jax.ShapeDtypeStruct((4, 8), jnp.bool_)

    def loss(combine, adapters, network, tokens, where):
        scores = MODEL.nll_fn(
            combine(network, adapters, LORA), tokens, tokens, where, tokens, tokens
        )
        return scores.nll_BT.sum()

    def additions_of_matrices(combine) -> int:
        """How many additions have the shape of q, [L, D, N, H] = [2, 8, 2, 4]."""
        gradient = jax.grad(lambda *arguments: loss(combine, *arguments))
        jaxpr = jax.make_jaxpr(gradient)(adapters, network, tokens, where)
        return len(re.findall(r"f32\[2,8,2,4\] = add", str(jaxpr)))

    assert additions_of_matrices(merged) > 0
    assert additions_of_matrices(joined) == 0
