"""Analytic operations: those of published models, and what XLA counts."""

import math

import jax
import jax.numpy as jnp
import pytest

from llada_jax.models.flops import flops_per_token


@pytest.mark.parametrize(
    ("n", "layers", "d", "length", "matmul_gflop", "attention_gflop"),
    [
        (8_015_581_184 - 126_464 * 4096, 32, 4096, 4096, 45.0, 6.44),  # LLaDA-8B
        (8_030_261_248 - 128_256 * 4096, 32, 4096, 8192, 45.03, 12.88),  # Llama-3.1-8B
    ],
)
def test_operations_of_published_models(n, layers, d, length, matmul_gflop, attention_gflop):
    full = flops_per_token(n, layers, d, length)
    assert full == pytest.approx((matmul_gflop + attention_gflop) * 1e9, rel=1e-3)
    assert flops_per_token(n, layers, d, length, causal=True) == pytest.approx(
        full - attention_gflop / 2 * 1e9, rel=1e-3
    )


def test_operations_agree_with_what_xla_counts():
    """A dense network of matrices and attention; the rest that XLA counts (softmax, relu, adds) is
    a few percent.
    """
    L, D, N, H, F, V, B, T = 2, 128, 2, 64, 512, 512, 2, 128

    def loss(params, x):
        for p in params["blocks"]:
            q, k, v = (jnp.einsum("btd,dnh->btnh", x, p[name]) for name in "qkv")
            probs = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k), axis=-1)
            x = x + jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", probs, v), p["o"])
            x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
        return jnp.sum(x @ params["head"])

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    block = {
        **{name: leaf(D, N, H) for name in "qkv"},
        "o": leaf(N, H, D),
        "up": leaf(D, F),
        "down": leaf(F, D),
    }
    params = {"blocks": [block] * L, "head": leaf(D, V)}
    num_params = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, leaf(B, T, D)).compile()
    counted = step.cost_analysis()["flops"] / (B * T)
    assert flops_per_token(num_params, L, N * H, T) == pytest.approx(counted, rel=0.05)
