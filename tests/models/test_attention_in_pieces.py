"""Attention to long rows, some queries at a time: the same as all at once, in less memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.programs import shapes_of

from llada_jax.masks import BIDIRECTIONAL, CAUSAL, Mask
from llada_jax.models.attention import attend_in_pieces, xla_attention

B, T, N, K, H = 2, 24, 4, 2, 8
SEGMENTS_BT = jnp.asarray([[0] * 5 + [1] * 19, [1] * 10 + [2] * 14])


def queries_keys_values(T=T):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys, (N, K, K), strict=True)]


@pytest.mark.parametrize("mask", [BIDIRECTIONAL, CAUSAL, Mask(block_length=5)], ids=str)
@pytest.mark.parametrize("segments", [None, SEGMENTS_BT], ids=["whole", "padded and packed"])
def test_pieces_are_the_whole(mask, segments):
    q, k, v = queries_keys_values()
    expected = xla_attention(q, k, v, segments, mask=mask)
    # 24 queries become 8 pieces of 3, and then their number is odd.
    for most_scores in (B * N * T * 6, 1):
        out = attend_in_pieces(q, k, v, segments, mask=mask, most_scores=most_scores)
        np.testing.assert_allclose(out, expected, atol=1e-6)


def test_pieces_of_a_window_are_the_window():
    q, k, v = queries_keys_values()
    window = dict(mask=CAUSAL, start=jnp.int32(10))
    expected = xla_attention(q[:, 10:18], k, v, SEGMENTS_BT, **window)
    out = attend_in_pieces(q[:, 10:18], k, v, SEGMENTS_BT, most_scores=1, **window)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_the_scores_of_a_long_row_are_never_there_together():
    q, k, v = queries_keys_values(128)
    everything = B * N * 128 * 128

    def largest(most_scores: int) -> int:
        attend = functools.partial(attend_in_pieces, mask=CAUSAL, most_scores=most_scores)
        traced = jax.make_jaxpr(lambda q, k, v: attend(q, k, v, None))(q, k, v)
        return max(map(math.prod, shapes_of(traced.jaxpr)))

    assert largest(everything) == everything
    assert largest(everything // 8) == everything // 8
