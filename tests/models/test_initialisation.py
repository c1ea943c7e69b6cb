"""Fresh parameters: their spread, their number, and the loss that they give."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.networks import random_inputs, variant

from llada_jax.config import default_config
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture, num_matmul_parameters, num_parameters
from llada_jax.training.optim import by_path


@pytest.mark.slow
def test_initialisation_has_the_published_standard_deviations():
    a = variant(
        d_model=256,
        num_heads=8,
        num_kv_heads=8,
        head_dim=32,
        d_ff=512,
        vocab_size=2000,
        num_layers=4,
    )
    params = jax.jit(make_model(a).init)(jax.random.key(0))
    cut = 0.98658  # standard deviation of a standard normal truncated at 3
    residual = (2.0 * np.arange(1, 5)) ** -0.5
    expected = {
        "q": np.full(4, 256**-0.5),
        "k": np.full(4, 256**-0.5),
        "v": np.full(4, 256**-0.5),
        "attn_out": 256**-0.5 * residual,
        "ff_gate": np.full(4, 256**-0.5),
        "ff_up": np.full(4, 256**-0.5),
        "ff_out": 512**-0.5 * residual,
    }
    for name, std in expected.items():
        weights = np.asarray(params["blocks"][name]).reshape(4, -1)
        np.testing.assert_allclose(weights.std(axis=1), std * cut, rtol=0.01, err_msg=name)
        assert (np.abs(weights).max(axis=1) <= 3 * std * 1.0001).all()
    for name in ("embed", "lm_head"):
        np.testing.assert_allclose(params[name].std(), 256**-0.5 * cut, rtol=0.01)
    for name in ("attn_norm", "ff_norm"):
        assert (params["blocks"][name] == 1).all()


@pytest.mark.slow
def test_biases_start_at_zero_and_are_not_decayed():
    model = make_model(variant(attention_bias="qkvo", qk_norm="per_head"))
    params = jax.jit(model.init)(jax.random.key(0))
    rules = default_config().optimizer.weight_decay_multipliers
    factors = by_path(model.abstract, rules, what="weight_decay_multipliers")["blocks"]
    names = [name for name in params["blocks"] if name.endswith("bias")]
    assert sorted(names) == ["attn_out_bias", "k_bias", "q_bias", "v_bias"]
    assert all((params["blocks"][name] == 0).all() for name in names)
    assert {name for name, factor in factors.items() if not factor} == {
        *names,
        "attn_norm",
        "ff_norm",
        "q_norm",
        "k_norm",
    }


@pytest.mark.slow
def test_an_untrained_model_with_the_published_vocabulary_starts_near_12_25_nats():
    a = variant(
        vocab_size=126_464,
        d_model=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_ff=256,
    )
    model = make_model(a, nll_chunk=16)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens, segments, positions = random_inputs(a, B=16, T=64)
    noisy = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, tokens.shape), 126_336, tokens)
    scores = jax.jit(model.nll_fn)(params, noisy, tokens, tokens >= 0, segments, positions)
    assert math.log(126_464) + 0.5 == pytest.approx(12.25, abs=0.01)
    assert float(scores.nll_BT.mean()) == pytest.approx(12.25, abs=0.1)


@pytest.mark.parametrize(
    ("sizes", "total", "without_embedding"),
    [
        ((126_464, 32, 4096, 32, 32, 128, 12_288), 8_015_581_184, 6_979_588_096),
        ((126_464, 22, 2048, 32, 4, 64, 5634), 1_487_243_264, 969_246_720),
    ],
    ids=["8B", "1B"],
)
def test_the_published_sizes_have_the_published_number_of_parameters(
    sizes, total, without_embedding
):
    names = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff")
    a = Architecture(**dict(zip(names, sizes)))
    assert (
        num_parameters(a)
        == total
        == sum(leaf.size for leaf in jax.tree.leaves(make_model(a).abstract))
    )
    assert total - 2 * a.vocab_size * a.d_model == without_embedding
    matrices = total - a.vocab_size * a.d_model - a.d_model * (2 * a.num_layers + 1)
    assert num_matmul_parameters(a) == matrices


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "output_shift": True},
        {"qk_norm": "full", "attention_bias": "qkv"},
        {"qk_norm": "per_head", "attention_bias": "qkvo"},
    ],
    ids=str,
)
def test_parameter_counts_equal_those_of_the_tree(changes):
    a = variant(**changes)
    assert num_parameters(a) == sum(leaf.size for leaf in jax.tree.leaves(make_model(a).abstract))
