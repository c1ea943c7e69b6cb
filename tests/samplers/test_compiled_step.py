"""The compiled step: how often it is compiled, and how much memory it takes."""

import math

import jax
import jax.monitoring
import numpy as np
import pytest
from support.programs import shapes_of
from support.toy_networks import EOS, MASK, PAD, toy_logits, toy_params

from llada_jax.cluster.sharding import AXES, make_mesh
from llada_jax.models.model import make_model, parameter_shardings
from llada_jax.models.transformer import Architecture
from llada_jax.planning.sampler_program import traced_block
from llada_jax.samplers.text import generate_tokens


@pytest.fixture
def count_compilations():
    """A list that grows by one with every program XLA compiles."""
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listen)


def test_steps_blocks_and_prompts_of_one_bucket_compile_once(count_compilations):
    num_traces = []

    def counted_logits(params, *canvas, **window):
        num_traces.append(1)
        return toy_logits(params, *canvas, **window)

    request = {"mask_id": MASK, "pad_id": PAD, "gen_length": 24, "block_length": 8}
    # Parameters placed on a device, as a checkpoint leaves them, are where a second compilation
    # would come from.
    params = jax.device_put(toy_params(), jax.devices()[0])
    generate_tokens(
        counted_logits, params, [[1, 2, 3], [4]], steps=6, temperature=0.5, cfg_scale=1.0, **request
    )
    assert len(num_traces) == 1
    before = len(count_compilations)
    other = jax.device_put(toy_params(1), jax.devices()[0])
    generate_tokens(
        counted_logits,
        other,
        [[5] * 31, [6] * 2],
        steps=12,
        temperature=1.5,
        cfg_scale=2.0,
        eos_id=EOS,
        seed=3,
        **request,
    )
    assert len(num_traces) == 1
    assert len(count_compilations) == before


def test_the_last_batch_of_a_request_reuses_the_step_of_the_others(count_compilations):
    request = {"mask_id": MASK, "pad_id": PAD, "gen_length": 4, "batch_size": 3}
    generate_tokens(toy_logits, toy_params(), [[1]] * 3, **request)
    before = len(count_compilations)
    tokens_BT, _ = generate_tokens(toy_logits, toy_params(), [[1], [2], [3], [4], [5]], **request)
    assert len(count_compilations) == before
    assert tokens_BT.shape == (5, 4)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_every_mesh_samples_the_same_and_compiles_one_step(count_compilations, cache):
    """With a batch that the mesh axes do not divide."""
    model = make_model(
        Architecture(
            vocab_size=64,
            num_layers=2,
            d_model=32,
            num_heads=4,
            num_kv_heads=4,
            head_dim=8,
            d_ff=64,
        )
    )
    request = {
        "mask_id": 63,
        "pad_id": 0,
        "gen_length": 32,
        "block_length": 16,
        "steps": 16,
        "cfg_scale": 0.5,
        "cached_fn": model.cached_fn,
        "cache": cache,
    }

    def sample_on(**sizes):
        mesh = make_mesh(
            dict.fromkeys(AXES, 1) | sizes, devices=jax.devices()[: math.prod(sizes.values())]
        )
        params = jax.jit(model.init, out_shardings=parameter_shardings(model, mesh))(
            jax.random.key(0)
        )
        jax.block_until_ready(params)
        before = len(count_compilations)
        tokens_BT, _ = generate_tokens(
            model.logits_fn, params, [[1, 2, 3], [4], [5] * 7], temperature=1.0, seed=2, **request
        )
        return tokens_BT, len(count_compilations) - before

    expected_BT, _ = sample_on(data=1)  # compiles what makes the random key, too
    for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "sequence": 4}):
        tokens_BT, num_compilations = sample_on(**sizes)
        np.testing.assert_array_equal(tokens_BT, expected_BT)
        assert num_compilations == 1, sizes


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"output_shift": True}], ids=str)
@pytest.mark.parametrize("is_guided", [False, True])
@pytest.mark.parametrize("is_stochastic", [False, True])
def test_the_step_computes_logits_of_the_current_block_alone(is_guided, is_stochastic, changes):
    rows, width, block_length, V = 3, 96, 16, 5003
    architecture = Architecture(
        vocab_size=V,
        num_layers=2,
        d_model=32,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        d_ff=64,
        **changes,
    )
    model = make_model(architecture)
    step = traced_block(
        model,
        model.abstract,
        num_rows=rows,
        width=width,
        gen_length=2 * block_length,
        block_length=block_length,
        is_guided=is_guided,
        is_stochastic=is_stochastic,
    )
    passes = 2 * rows if is_guided else rows
    shapes = shapes_of(step.jaxpr.jaxpr)
    assert (passes, block_length, V) in shapes, "or the head is not where this test looks for it"
    assert (passes, width, 32) in shapes, "the whole canvas goes through the network"
    largest = max(math.prod(shape) for shape in shapes if V in shape and len(shape) == 3)
    assert largest == passes * block_length * V
    # The compiled program agrees: one array of logits of the whole canvas would not fit in this.
    if not is_stochastic:
        temporary = step.lower().compile().memory_analysis().temp_size_in_bytes
        assert temporary < passes * width * V * 4
