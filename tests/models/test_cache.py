"""Keys and values that are kept, against passes over whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.masks import BIDIRECTIONAL, CAUSAL
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture

V = 64


def small_model(mask=BIDIRECTIONAL, num_layers=2, **changes):
    shape = dict(vocab_size=V, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64)
    model = make_model(Architecture(num_layers=num_layers, **shape, **changes), mask=mask)
    return model, model.init(jax.random.key(5))


def rows(T=10):
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, V, (2, T)).astype(np.int32)
    segment_ids_BT = np.ones((2, T), np.int32)
    segment_ids_BT[1, :3] = 0
    positions_BT = np.maximum(np.arange(T) - np.array([[0], [3]]), 0).astype(np.int32)
    return tokens_BT, segment_ids_BT, positions_BT


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": "full", "attention_bias": "qkvo"}, {"tie_embeddings": True}],
    ids=str,
)
@pytest.mark.parametrize("mask", [BIDIRECTIONAL, CAUSAL], ids=["bidirectional", "causal"])
def test_a_cache_of_the_same_tokens_gives_the_same_logits(mask, changes):
    model, params = small_model(mask, **changes)
    canvas = rows()
    expected_BTV = model.logits_fn(params, *canvas, start=4, length=3)
    logits_BTV, cache = model.cached_fn(params, *canvas, None, start=4, length=3)
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-5)
    tokens_BT, segment_ids_BT, positions_BT = canvas
    for width in (3, 6):
        window = slice(4, 4 + width)
        logits_BTV, _ = model.cached_fn(
            params,
            tokens_BT[:, window],
            segment_ids_BT,
            positions_BT[:, window],
            cache,
            start=jnp.int32(4),
            length=3,
        )
        np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-5)


@pytest.mark.slow
def test_columns_outside_the_window_are_seen_as_they_were():
    """With one layer, keys and values depend on their own token alone: the logits of a window are
    those of a row that has the old tokens elsewhere.
    """
    model, params = small_model(num_layers=1)
    old_BT, segment_ids_BT, positions_BT = rows()
    _, cache = model.cached_fn(
        params, old_BT, segment_ids_BT, positions_BT, None, start=4, length=3
    )
    new_BT = (old_BT + 7) % V
    logits_BTV, cache = model.cached_fn(
        params,
        new_BT[:, 4:7],
        segment_ids_BT,
        positions_BT[:, 4:7],
        cache,
        start=4,
        length=3,
    )
    mixed_BT = old_BT.copy()
    mixed_BT[:, 4:7] = new_BT[:, 4:7]
    expected_BTV, expected = model.cached_fn(
        params, mixed_BT, segment_ids_BT, positions_BT, None, start=4, length=3
    )
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cache, expected)
