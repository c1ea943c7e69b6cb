"""Small Transformers for tests of the network: an architecture, variants of it, and inputs."""

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.models.model import Model
from llada_jax.models.transformer import Architecture

SMALL = Architecture(
    vocab_size=97, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48
)


def variant(**changes) -> Architecture:
    """Returns SMALL with some fields changed."""
    return Architecture(**{**{f: getattr(SMALL, f) for f in SMALL.__dataclass_fields__}, **changes})


def random_inputs(a: Architecture, *, B=3, T=12, seed=0):
    """Returns random tokens, one segment per row, and positions from 0, [B, T] each."""
    tokens = jax.random.randint(jax.random.key(seed), (B, T), 0, a.vocab_size)
    return tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(T), (B, T))


def perturbed(model: Model, seed=1) -> dict:
    """Returns parameters away from their initialisation, so that norms of 1 cannot hide."""
    rng = np.random.default_rng(seed)
    params = jax.jit(model.init)(jax.random.key(seed))
    return jax.tree.map(lambda x: np.float32(x + 0.05 * rng.normal(size=x.shape)), params)
