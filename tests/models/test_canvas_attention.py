"""The attention of canvases on one GPU: what cuDNN is asked for, and which networks take it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention import SEGMENTS, B, T, inputs, reference

from llada_jax.masks import BIDIRECTIONAL, CAUSAL
from llada_jax.models import cache
from llada_jax.models.attention import (
    IN_PIECES,
    ON_CANVASES,
    attend,
    attend_in_pieces,
    choose_for_canvases,
    cudnn_on_canvases,
)
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture

ROWS = {name: SEGMENTS[name] for name in ("whole", "padded", "left-padded")} | {
    # as a canvas of which the far end is not there yet
    "both sides": np.array([[0] * 40 + [1] * 100 + [0] * 116, [1] * 30 + [0] * 226]),
    "with a gap": np.array([[1] * 40 + [0] * 100 + [1] * 116, [0] * 30 + [1] * 226]),
}
SHAPE = dict(vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.fixture
def asked(monkeypatch):
    """cuDNN needs a GPU; what jax.nn is asked to let it compute is computed here by XLA."""
    calls = []
    real = jax.nn.dot_product_attention

    def stand_in(q, k, v, *, implementation, **kwargs):
        calls.append({**kwargs, "implementation": implementation})
        return real(q, k, v, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return calls


@pytest.mark.parametrize("rows", ROWS)
def test_padding_on_either_side_becomes_a_length(asked, rows):
    q, k, v = inputs(4, 2)
    segments = ROWS[rows]
    ids = None if segments is None else jnp.asarray(segments, jnp.int32)
    out = jax.jit(functools.partial(cudnn_on_canvases, mask=BIDIRECTIONAL))(q, k, v, ids)
    expected, _ = reference(q, k, v, segments, BIDIRECTIONAL, np.ones_like(q))
    is_read = np.ones((B, T), bool) if segments is None else segments > 0
    np.testing.assert_allclose(np.asarray(out)[is_read], expected[is_read], atol=2e-5)
    assert np.isfinite(out).all()
    (call,) = asked
    assert call["implementation"] == "cudnn"
    # a mask would have the shape of the scores
    assert call["mask"] is None
    assert "bias" not in call


@pytest.mark.parametrize("rows", ROWS)
def test_a_window_of_queries_sees_the_whole_row(asked, rows):
    q, k, v = inputs(4, 2)
    ids = None if ROWS[rows] is None else jnp.asarray(ROWS[rows], jnp.int32)
    window = {"mask": BIDIRECTIONAL, "start": 50}
    out = cudnn_on_canvases(q[:, 50:82], k, v, ids, **window)
    expected = attend_in_pieces(q[:, 50:82], k, v, ids, **window)
    is_read = np.ones((B, 32), bool) if ids is None else np.asarray(ids)[:, 50:82] > 0
    np.testing.assert_allclose(np.asarray(out)[is_read], np.asarray(expected)[is_read], atol=2e-5)
    (call,) = asked
    assert call["query_seq_lengths"] is call["key_value_seq_lengths"] is None


def test_a_row_of_padding_alone_gives_numbers(asked):
    """A batch is filled up with such rows, and NaN would be in the sum of all rows' logits."""
    q, k, v = inputs(4, 2)
    ids = jnp.zeros((B, T), jnp.int32)
    assert np.isfinite(cudnn_on_canvases(q, k, v, ids, mask=BIDIRECTIONAL)).all()


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, ON_CANVASES),
        ({"platform": "cuda"}, ON_CANVASES),
        ({"platform": "cpu"}, IN_PIECES),
        ({"platform": "tpu"}, IN_PIECES),
        ({"num_devices": 8}, IN_PIECES),
        ({"mask": CAUSAL}, IN_PIECES),
        ({"head_dim": 36}, IN_PIECES),
        ({"head_dim": 256}, IN_PIECES),
        ({"dtype": "float32"}, IN_PIECES),
    ],
)
def test_one_gpu_takes_it_where_cudnn_can(changed, name):
    usual = {"platform": "gpu", "num_devices": 1, "mask": BIDIRECTIONAL, "head_dim": 128}
    assert choose_for_canvases(**{**usual, "dtype": "bfloat16", **changed}) == name


def test_a_network_attends_with_it_with_a_cache_and_without(asked):
    a = Architecture(**SHAPE, d_ff=64)
    ours, pieces = (make_model(a, attention=name) for name in (ON_CANVASES, IN_PIECES))
    params = ours.init(jax.random.key(0))
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 48)), jnp.int32)
    segments_BT = jnp.asarray([[0] * 16 + [1] * 32, [1] * 48], jnp.int32)
    positions_BT = jnp.maximum(jnp.cumsum(segments_BT, axis=1) - 1, 0)
    rows = (tokens_BT, segments_BT, positions_BT)
    is_read = np.asarray(segments_BT) > 0

    logits_BTV, expected_BTV = (m.logits_fn(params, *rows) for m in (ours, pieces))
    np.testing.assert_allclose(logits_BTV[is_read], expected_BTV[is_read], atol=1e-4)
    assert len(asked) == 1  # traced once, for the loop over the layers

    where = {"start": 16, "length": 8}
    kept = [m.cached_fn(params, *rows, None, **where) for m in (ours, pieces)]
    np.testing.assert_allclose(kept[0][0], kept[1][0], atol=1e-4)
    assert len(asked) == 2

    window = (tokens_BT[:, 16:24] + 1, segments_BT, positions_BT[:, 16:24])
    again = [
        m.cached_fn(params, *window, cache, **where)[0]
        for m, (_, cache) in zip((ours, pieces), kept)
    ]
    np.testing.assert_allclose(again[0], again[1], atol=1e-4)
    assert len(asked) == 3
    assert cache.attend_from_canvas(IN_PIECES) is attend_in_pieces


def test_rows_of_several_segments_have_a_network_of_their_own(asked):
    a = Architecture(**SHAPE, d_ff=64)
    ours = make_model(a, attention=ON_CANVASES)
    general = ours.for_any_rows
    assert general is ours.for_any_rows is not ours
    assert general.for_any_rows is general
    params = ours.init(jax.random.key(0))
    tokens_BT = jnp.arange(64, dtype=jnp.int32)[None] % 61
    segments_BT = jnp.repeat(jnp.asarray([[1, 2]], jnp.int32), 32, axis=1)
    positions_BT = jnp.arange(64)[None] % 32
    packed = general.logits_fn(params, tokens_BT, segments_BT, positions_BT)
    alone = general.logits_fn(params, tokens_BT[:, 32:], None, positions_BT[:, 32:])
    np.testing.assert_allclose(packed[:, 32:], alone, atol=1e-4)
    assert not asked


def test_the_mesh_changes_nothing_about_it(asked):
    q, k, v = inputs(4, 2)
    mesh = jax.make_mesh((1,), ("data",))
    with jax.set_mesh(mesh):
        out = attend(q, k, v, None, implementation=ON_CANVASES, mask=BIDIRECTIONAL)
    expected = attend_in_pieces(q, k, v, None, mask=BIDIRECTIONAL)
    np.testing.assert_allclose(out, expected, atol=2e-5)
