"""Rotary positions: frequencies and their scaling against float64 and transformers."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from support.networks import SMALL, variant
from support.rotary import reference_frequencies
from support.transformers_versions import VERSIONS, run_python

from llada_jax.errors import UserError
from llada_jax.models.transformer import rotary_angles, rotary_frequencies

# head width, theta and scaling: Llama 3.2 1B, Llama 3.1 8B, a narrow band, and none
ROTARY = [
    (64, 500_000.0, (32.0, 1.0, 4.0, 8192.0)),
    (128, 500_000.0, (8.0, 1.0, 4.0, 8192.0)),
    (128, 1e4, (3.0, 0.3, 0.5, 1000.0)),
    (128, 500_000.0, ()),
]


@pytest.mark.parametrize(("head_dim", "theta", "scaling"), ROTARY)
def test_rotary_angles_equal_a_float64_reference(head_dim, theta, scaling):
    expected = reference_frequencies(head_dim, theta, scaling)
    frequencies = rotary_frequencies(head_dim, theta, scaling)
    assert frequencies.dtype == jnp.float32
    np.testing.assert_allclose(frequencies, expected, rtol=2e-6)
    if scaling:  # the case has all three kinds
        slowdown = reference_frequencies(head_dim, theta) / expected
        assert slowdown.min() == 1
        assert slowdown.max() == pytest.approx(scaling[0])
        assert ((slowdown > 1.01) & (slowdown < 0.99 * scaling[0])).any()
    positions = np.array([[0, 1, 57], [300, 2047, 9000]])
    cos, sin = rotary_angles(jnp.asarray(positions), head_dim, theta, scaling)
    assert cos.shape == sin.shape == (2, 3, head_dim // 2)
    np.testing.assert_allclose(cos, np.cos(positions[..., None] * expected), atol=2e-6 * 9000)
    np.testing.assert_allclose(sin, np.sin(positions[..., None] * expected), atol=2e-6 * 9000)


FREQUENCIES = """
import json, sys, transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
frequencies = []
for head_dim, theta, (factor, low, high, original) in json.loads(sys.argv[1]):
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, rope_theta=theta, rope_scaling={
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": int(original)})
    frequencies.append(ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].tolist())
print(json.dumps(frequencies))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_rotary_frequencies_equal_those_of_transformers(version, tmp_path):
    scaled = [case for case in ROTARY if case[2]]
    output = run_python(version, FREQUENCIES, json.dumps(scaled), home=tmp_path)
    for case, theirs in zip(scaled, json.loads(output.splitlines()[-1]), strict=True):
        np.testing.assert_allclose(rotary_frequencies(*case), theirs, rtol=1e-6)


def test_no_scaling_changes_no_bit():
    positions = jnp.arange(5000)[None]
    angle = positions[..., None].astype(jnp.float32) * 5e5 ** (
        -jnp.arange(0, 64, 2, dtype=jnp.float32) / 64
    )
    for ours, plain in zip(rotary_angles(positions, 64, 5e5), (jnp.cos(angle), jnp.sin(angle))):
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize(
    "scaling",
    [
        (8.0,),
        (8.0, 1.0, 4.0),
        (8.0, 1.0, 4.0, 8192.0, 1.0),
        (0.0, 1.0, 4.0, 8192.0),
        (8.0, -1.0, 4.0, 8192.0),
        (8.0, 4.0, 4.0, 8192.0),
        (8.0, 4.0, 1.0, 8192.0),
        (8.0, 1.0, 4.0, 8192.5),
        (math.inf, 1.0, 4.0, 8192.0),
        (8.0, 1.0, math.nan, 8192.0),
        ("llama3", 1.0, 4.0, 8192.0),
        (True, 1.0, 4.0, 8192.0),
    ],
    ids=str,
)
def test_a_scaling_that_is_none_is_refused_by_value(scaling):
    with pytest.raises(
        UserError, match=r"model\.rope_scaling=\(.* must be \(\), or four positive numbers \("
    ):
        variant(rope_scaling=scaling)


def test_a_scaling_is_the_same_written_with_whole_numbers_or_read_from_json():
    ours = variant(rope_scaling=(8.0, 1.0, 4.0, 8192.0))
    for same in ((8, 1, 4, 8192), json.loads(json.dumps(ours.rope_scaling))):
        assert variant(rope_scaling=same) == ours
        assert hash(variant(rope_scaling=same)) == hash(ours)
    assert variant(rope_scaling=[]) == SMALL
