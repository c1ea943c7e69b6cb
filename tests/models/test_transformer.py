"""The logits of the network: against plain numpy in float64, and what each token may see."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.jaxprs import equations
from support.networks import SMALL, perturbed, random_inputs, variant
from support.rotary import reference_frequencies

from llada_jax.cluster.sharding import make_mesh
from llada_jax.masks import BIDIRECTIONAL, CAUSAL, Mask, may_attend
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture


def reference_logits(
    a: Architecture, params, tokens_BT, segment_ids_BT, positions_BT, *, mask=BIDIRECTIONAL
):
    """The block of the LLaDA paper written once more, in numpy and float64, layer by layer and head
    by head.
    """
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    # as plain arrays: a loop over the elements of JAX's dispatches an operation for each
    rows = zip(*(np.asarray(x) for x in (tokens_BT, segment_ids_BT, positions_BT)))

    def norm(x, scale, axes=(-1,)):
        return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + a.norm_eps) * scale

    def rotate(x, position):
        half = a.head_dim // 2
        angle = position * reference_frequencies(a.head_dim, a.rope_theta, a.rope_scaling)
        first, second = x[:half], x[half:]
        return np.concatenate(
            [
                first * np.cos(angle) - second * np.sin(angle),
                second * np.cos(angle) + first * np.sin(angle),
            ]
        )

    logits = []
    for tokens, segments, positions in rows:
        x = p["embed"][tokens]
        T = len(tokens)
        for layer in range(a.num_layers):
            w = {name: stacked[layer] for name, stacked in p["blocks"].items()}
            y = norm(x, w["attn_norm"])
            q, k, v = (
                np.einsum("td,dnh->tnh", y, w[name]) + w.get(f"{name}_bias", 0) for name in "qkv"
            )
            if a.qk_norm != "none":
                axes = (-2, -1) if a.qk_norm == "full" else (-1,)
                q, k = norm(q, w["q_norm"], axes), norm(k, w["k_norm"], axes)
            out = np.zeros((T, a.num_heads, a.head_dim))
            for head in range(a.num_heads):
                shared = head // (a.num_heads // a.num_kv_heads)
                for t in range(T):
                    visible = [
                        s
                        for s in range(T)
                        if may_attend(
                            mask,
                            query_segment=segments[t],
                            key_segment=segments[s],
                            query_index=t,
                            key_index=s,
                        )
                    ]
                    scores = np.array(
                        [
                            rotate(q[t, head], int(positions[t]))
                            @ rotate(k[s, shared], int(positions[s]))
                            for s in visible
                        ]
                    ) / math.sqrt(a.head_dim)
                    weights = np.exp(scores - scores.max())
                    out[t, head] = (weights / weights.sum()) @ v[visible, shared]
            x = x + np.einsum("tnh,nhd->td", out, w["attn_out"]) + w.get("attn_out_bias", 0)
            y = norm(x, w["ff_norm"])
            gate, up = y @ w["ff_gate"], y @ w["ff_up"]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w["ff_out"]
        head = p["embed"].T if a.tie_embeddings else p["lm_head"]
        row = norm(x, p["final_norm"]) @ head
        if a.output_shift:
            row = np.stack(
                [row[t - 1 if t and segments[t - 1] == segments[t] else t] for t in range(T)]
            )
        logits.append(row)
    return np.array(logits)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [BIDIRECTIONAL, CAUSAL, Mask(block_length=4)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"d_ff": 45},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
        {"tie_embeddings": True},
        {"qk_norm": "full"},
        {"qk_norm": "per_head", "attention_bias": "qkvo"},
        {"attention_bias": "qkv", "output_shift": True},
        # wavelengths of 6 (kept), 20 (mixed), 63 and 199
        {"rope_theta": 100.0, "rope_scaling": (8.0, 1.0, 4.0, 40.0)},
    ],
    ids=str,
)
def test_logits_equal_a_float64_reference(changes, mask):
    a = variant(**changes)
    model = make_model(a, mask=mask)
    params = perturbed(model)
    tokens, segments, positions = random_inputs(a, B=2, T=9)
    segments = segments.at[0, 5:].set(2).at[1, 7:].set(0)
    positions = positions.at[0, 5:].set(jnp.arange(4))
    logits = jax.jit(model.logits_fn)(params, tokens, segments, positions)
    expected = reference_logits(a, params, tokens, segments, positions, mask=mask)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_padding_and_other_documents_do_not_change_a_token():
    model = make_model(SMALL)
    params = perturbed(model)
    tokens, segments, positions = random_inputs(SMALL)
    segments = segments.at[:, 4:8].set(2).at[:, 8:].set(0)
    logits = jax.jit(model.logits_fn)
    before = logits(params, tokens, segments, positions)
    after = logits(params, tokens.at[:, 4:].set(5), segments, positions)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:8] - after[:, 4:8]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"output_shift": True}], ids=str)
def test_logits_of_a_window_equal_those_columns_of_all_logits(changes):
    """With an output shift too, which moves vectors into the window from the column before it."""
    model = make_model(variant(**changes))
    params = perturbed(model)
    row = random_inputs(SMALL)
    row = (row[0], row[1].at[:, 6:].set(2), row[2])
    whole = jax.jit(model.logits_fn)(params, *row)
    window = jax.jit(functools.partial(model.logits_fn, length=5))
    for start in (0, 3, 7):
        np.testing.assert_allclose(
            window(params, *row, start=jnp.int32(start)), whole[:, start : start + 5], atol=1e-6
        )
    hidden = jax.jit(model.hidden_fn)(params, *row)
    assert hidden.shape == (*row[0].shape, SMALL.d_model)
    np.testing.assert_allclose(jax.jit(model.head_fn)(params, hidden), whole, atol=1e-6)


@pytest.mark.slow
def test_every_token_sees_every_other_unless_causal():
    tokens, segments, positions = random_inputs(SMALL)
    changed = tokens.at[:, -1].set((tokens[:, -1] + 1) % SMALL.vocab_size)
    for mask in (BIDIRECTIONAL, CAUSAL):
        model = make_model(SMALL, mask=mask)
        params = perturbed(model)
        logits = jax.jit(model.logits_fn)
        difference = np.abs(
            logits(params, tokens, segments, positions)
            - logits(params, changed, segments, positions)
        )
        assert (difference[:, :-1].max(axis=(1, 2)) > 1e-4).all() != mask.causal


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
@pytest.mark.parametrize("is_unrolled", [False, True])
def test_recomputation_changes_memory_but_not_the_gradient(remat, is_unrolled):
    tokens, segments, positions = random_inputs(SMALL, B=4, T=32)
    grads, memory = [], []
    for changes in ({"remat": "none"}, {"remat": remat, "is_unrolled": is_unrolled}):
        model = make_model(SMALL, **changes)

        def loss(params, model=model):
            scores = model.nll_fn(params, tokens, tokens, tokens > 0, segments, positions)
            return scores.nll_BT.sum()

        params = perturbed(model)
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        grads.append(compiled(params))
    assert memory[1] < 0.9 * memory[0], memory
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *grads)


def test_layers_without_a_loop_are_those_of_the_loop():
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    for is_unrolled in (False, True):
        model = make_model(SMALL, is_unrolled=is_unrolled)
        lowered = jax.jit(model.logits_fn).lower(model.abstract, tokens, tokens, tokens)
        assert ("while" in lowered.compile().as_text()) is not is_unrolled


@pytest.mark.parametrize(
    ("ways", "d_ff", "width"), [(1, 90, 96), (1, 2562, 2688), (1, 2552, 2552), (2, 90, 90)]
)
def test_an_uneven_width_is_widened_where_the_mesh_does_not_split_it(ways, d_ff, width):
    model = make_model(variant(d_ff=d_ff))
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    with jax.set_mesh(make_mesh({"data": 1, "tensor": ways}, jax.devices()[:ways])):
        traced = jax.make_jaxpr(model.logits_fn)(model.abstract, tokens, tokens, tokens)
    products = [e for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
    sizes = {size for e in products for v in (*e.invars, *e.outvars) for size in v.aval.shape}
    assert sizes & {d_ff, width} == {width}


def test_bfloat16_stays_close_to_float32():
    tokens, segments, positions = random_inputs(SMALL)
    full, half = (make_model(SMALL, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    params = perturbed(full)
    exact, rough = (jax.jit(m.logits_fn)(params, tokens, segments, positions) for m in (full, half))
    assert rough.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(rough - exact) / np.linalg.norm(exact) < 0.03


@pytest.mark.slow
def test_the_module_can_be_used_directly_too():
    model = make_model(SMALL)
    module = model.build(jax.random.key(0))
    assert isinstance(module, nnx.Module)
    tokens, segments, positions = random_inputs(SMALL)
    params = nnx.to_pure_dict(nnx.split(module)[1])
    np.testing.assert_allclose(
        module(tokens, segments, positions),
        model.logits_fn(params, tokens, segments, positions),
        atol=1e-6,
    )
