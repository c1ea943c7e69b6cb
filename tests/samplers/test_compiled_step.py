"""The compiled step: how often it is compiled, and how much memory it takes."""

import math

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from support.programs import shapes_of
from support.toy_networks import EOS, MASK, PAD, toy_logits, toy_params

from llada_jax.cluster.sharding import AXES, make_mesh
from llada_jax.models.model import make_model, parameter_shardings
from llada_jax.models.transformer import Architecture
from llada_jax.samplers import step as sampler
from llada_jax.samplers.network import Network
from llada_jax.samplers.remasking import commit_rule
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
def test_every_mesh_samples_the_same_and_compiles_one_step(count_compilations):
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


def traced_step(
    model, *, rows, width, block_length, is_guided, is_stochastic, with_confidence=False
):
    """Returns the step of the sampler for canvases of a shape, traced but not compiled."""
    ids_BT = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    ids_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
    no_ids = jax.ShapeDtypeStruct((0,), jnp.int32)
    kept_BT = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    number, fraction = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    fixed = sampler.Fixed(
        is_fixed_BT=jax.ShapeDtypeStruct((rows, width), bool),
        segment_ids_BT=ids_BT,
        positions_BT=ids_BT,
        row_B=ids_B,
        mask_id=number,
        fill_id=number,
        eos_ids_n=no_ids,
        suppress_n=no_ids,
        steps_per_block=number,
        lookahead=number,
        refresh=number,
        amount=fraction,
        revise_amount=fraction,
        temperature=fraction,
        top_k=number,
        top_p=fraction,
        cfg_scale=fraction,
        num_ids=number,
    )
    plan = sampler.Plan(
        gen_length=2 * block_length,
        block_length=block_length,
        rule=commit_rule("low_confidence"),
        criterion="schedule",
        reviser="none",
        eos="free",
        is_bounded=False,
        width=width,
        is_stochastic=is_stochastic,
        is_filtered=False,
        is_guided=is_guided,
        window=0,
        with_confidence=with_confidence,
        sharding=None,
    )
    return sampler.denoise_block.trace(
        Network(jax.tree_util.Partial(model.logits_fn, model.abstract), None, None),
        sampler.State(ids_BT, number, ids_B, ids_B, (), kept_BT if with_confidence else ()),
        number,
        number,
        jax.eval_shape(lambda: jax.random.key(0)),
        fixed,
        plan=plan,
    )


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
    step = traced_step(
        make_model(architecture),
        rows=rows,
        width=width,
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
