"""Low-rank adapters against plain matrix products."""

import jax
import numpy as np
import pytest
from support.errors import error_of

from llada_jax.models.adapters import (
    NUM_INPUT_DIMS,
    Lora,
    adapter_shapes,
    make_adapters,
    merged,
)
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture

MODEL = make_model(
    Architecture(
        vocab_size=11, num_layers=2, d_model=12, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=20
    )
)
EVERYTHING = Lora(rank=3, alpha=6.0, targets="blocks/")


@pytest.fixture(scope="module")
def network():
    return jax.jit(MODEL.init)(jax.random.key(0))


def filled(adapters, seed=0):
    """Replaces all numbers of a tree of arrays or shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), adapters)


def test_fresh_adapters_change_nothing_and_have_the_published_initialisation(network):
    adapters = make_adapters(network, jax.random.key(1), Lora(rank=400, targets="blocks/ff_out"))
    assert set(adapters["blocks"]) == {"ff_out"}
    assert adapters["blocks"]["ff_out"]["a"].std() == pytest.approx(20**-0.5, rel=0.05)
    jax.tree.map(np.testing.assert_array_equal, merged(network, adapters, Lora(rank=400)), network)


def test_fresh_adapters_of_different_matrices_are_independent(network):
    blocks = make_adapters(network, jax.random.key(1), EVERYTHING)["blocks"]
    assert blocks["q"]["a"].shape == blocks["k"]["a"].shape
    assert not np.any(blocks["q"]["a"] == blocks["k"]["a"])


def test_an_adapter_adds_the_scaled_product_of_its_matrices(network):
    adapters = filled(adapter_shapes(network, EVERYTHING))
    result = merged(network, adapters, EVERYTHING)
    assert set(adapters["blocks"]) == {path.split("/")[1] for path in NUM_INPUT_DIMS}
    letters = {"q": "dr,rnh->dnh", "attn_out": "nhr,rd->nhd", "ff_up": "dr,rf->df"}
    for name, product in letters.items():
        matrix = np.asarray(network["blocks"][name], np.float64)
        pair = adapters["blocks"][name]
        for layer in range(2):
            shape = matrix[layer].shape
            a, b = (pair[part][layer].astype(np.float64) for part in "ab")
            if name == "attn_out":
                a = a.reshape(*shape[:2], 3)
            if name == "q":
                b = b.reshape(3, *shape[1:])
            expected = matrix[layer] + 2.0 * np.einsum(product, a, b)
            np.testing.assert_allclose(
                result["blocks"][name][layer], expected, rtol=1e-4, atol=1e-5
            )
    for name in ("embed", "final_norm", "lm_head"):
        assert result[name] is network[name]
    assert result["blocks"]["ff_norm"] is network["blocks"]["ff_norm"]


def test_adapters_of_full_rank_can_be_any_update(network):
    """Found by a singular value decomposition: what full fine-tuning does, they can do."""
    for path, split in NUM_INPUT_DIMS.items():
        name = path.split("/")[1]
        matrix = np.asarray(network["blocks"][name])
        update = np.random.default_rng(1).normal(size=matrix.shape).astype(np.float32)
        inputs = int(np.prod(matrix.shape[1 : 1 + split]))
        flat = update.reshape(2, inputs, -1)
        u, s, v = np.linalg.svd(flat, full_matrices=False)
        rank = min(flat.shape[1:])
        lora = Lora(rank=rank, alpha=8.0, targets=f"{path}$")
        pair = {"a": u * s[:, None] / lora.scale, "b": v}
        shapes = adapter_shapes(network, lora)["blocks"][name]
        assert {part: array.shape for part, array in pair.items()} == {
            part: leaf.shape for part, leaf in shapes.items()
        }
        result = merged(network, {"blocks": {name: pair}}, lora)["blocks"][name]
        np.testing.assert_allclose(result, matrix + update, rtol=1e-3, atol=1e-4)


def test_targets_that_name_nothing_are_refused(network):
    lora = Lora(rank=2, targets="attention")
    assert "blocks/q" in error_of(adapter_shapes, network, lora)
    assert Lora(rank=2).paths == ["blocks/q", "blocks/k", "blocks/v", "blocks/attn_out"]
