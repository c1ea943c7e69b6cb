"""The reverse process against what the published sampler produced, and against plain numpy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial
from safetensors.numpy import load_file
from support.paths import PUBLISHED
from support.reference_sampler import reference_generate
from support.toy_networks import (
    MASK,
    PAD,
    VOCAB,
    toy_logits,
    toy_params,
    windowed,
)

from llada_jax.samplers.denoise import generate
from llada_jax.samplers.text import generate_tokens

GENERATE = json.loads((PUBLISHED / "expected.json").read_text())["generate"]


@pytest.fixture(scope="module")
def official():
    return load_file(PUBLISHED / "model.safetensors"), np.load(PUBLISHED / "expected.npz")


@windowed
def official_forward(weights, tokens_BT, segment_ids_BT, positions_BT):
    """The LLaDA forward pass written down a second time, straight from the published tensors."""
    N, theta, eps, prefix = 4, 500_000.0, 1e-5, "model.transformer."

    def norm(x, name):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weights[prefix + name]

    x = jnp.asarray(weights[prefix + "wte.weight"])[tokens_BT]
    B, T, D = x.shape
    H = D // N
    angle = positions_BT[..., None] * theta ** (-jnp.arange(0, H, 2) / H)
    angle = jnp.concatenate([angle, angle], -1)[:, :, None]

    def rope(q):
        return q * jnp.cos(angle) + jnp.concatenate(
            [-q[..., H // 2 :], q[..., : H // 2]], -1
        ) * jnp.sin(angle)

    attends = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    for layer in range(3):
        block = f"blocks.{layer}."
        y = norm(x, block + "attn_norm.weight")
        q, k, v = (
            (y @ weights[f"{prefix}{block}{n}.weight"].T).reshape(B, T, N, H)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        scores = jnp.where(
            attends, jnp.einsum("btnh,bsnh->bnts", rope(q), rope(k)) / np.sqrt(H), -jnp.inf
        )
        out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1), v).reshape(B, T, D)
        x = x + out @ weights[prefix + block + "attn_out.weight"].T
        y = norm(x, block + "ff_norm.weight")
        gate, up = (y @ weights[f"{prefix}{block}{n}.weight"].T for n in ("ff_proj", "up_proj"))
        x = x + (jax.nn.silu(gate) * up) @ weights[prefix + block + "ff_out.weight"].T
    return norm(x, "ln_f.weight") @ weights[prefix + "ff_out.weight"].T


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", sorted(GENERATE))
def test_published_samples_are_reproduced_exactly(official, name, padded):
    weights, expected = official
    prompt_BT = expected["gen_prompt"]
    if padded:
        tokens_BT, _ = generate_tokens(
            official_forward, weights, prompt_BT.tolist(), mask_id=510, pad_id=500, **GENERATE[name]
        )
    else:
        canvas_BT = np.concatenate(
            [prompt_BT, np.full((2, GENERATE[name]["gen_length"]), 510)], axis=1
        )
        tokens_BT = generate(
            Partial(official_forward, weights),
            canvas_BT,
            jax.random.key(0),
            mask_id=510,
            is_fixed_BT=canvas_BT != 510,
            segment_ids_BT=np.ones_like(canvas_BT),
            positions_BT=np.broadcast_to(np.arange(canvas_BT.shape[1]), canvas_BT.shape),
            **GENERATE[name],
        )[:, prompt_BT.shape[1] :]
    np.testing.assert_array_equal(tokens_BT, expected[f"gen_{name}"][:, prompt_BT.shape[1] :])


@pytest.mark.slow
@settings(max_examples=8, derandomize=True)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=34), min_size=1, max_size=3),
    block_length=st.integers(1, 6),
    num_blocks=st.integers(1, 3),
    cfg_scale=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_batch_of_any_prompts_equals_each_prompt_alone_in_plain_numpy(
    prompts, block_length, num_blocks, cfg_scale, seed, data
):
    schedule = {
        "gen_length": block_length * num_blocks,
        "block_length": block_length,
        "steps": data.draw(st.integers(1, block_length)) * num_blocks,
        "cfg_scale": cfg_scale,
    }
    params = toy_params(seed)
    tokens_BT, num_steps_B = generate_tokens(
        toy_logits, params, prompts, mask_id=MASK, pad_id=PAD, **schedule
    )

    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(
            tokens_BT[row], reference_generate(params, prompt, **schedule)
        )
    assert (num_steps_B == schedule["steps"]).all()
