"""The network against plain numpy in float64, against itself by other routes, and against what its
maths promises.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.transformers_versions import VERSIONS, run_python

from llada_jax.config import default_config
from llada_jax.errors import UserError
from llada_jax.models.model import make_model
from llada_jax.models.transformer import (
    Architecture,
    num_matmul_parameters,
    num_parameters,
    rotary_angles,
    rotary_frequencies,
)
from llada_jax.training.optim import by_path

SMALL = Architecture(
    vocab_size=97, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48
)


def variant(**changes) -> Architecture:
    return Architecture(**{**{f: getattr(SMALL, f) for f in SMALL.__dataclass_fields__}, **changes})


def random_inputs(a, *, B=3, T=12, seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (B, T), 0, a.vocab_size)
    return tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(T), (B, T))


def perturbed(model, seed=1):
    """Parameters away from their initialisation, so that norms of 1 cannot hide."""
    rng = np.random.default_rng(seed)
    params = jax.jit(model.init)(jax.random.key(seed))
    return jax.tree.map(lambda x: np.float32(x + 0.05 * rng.normal(size=x.shape)), params)


def reference_frequencies(head_dim: int, theta: float, scaling=()):
    """The rule of Llama 3.1 by its wavelengths, one frequency at a time, in float64."""
    frequencies = []
    for i in range(head_dim // 2):
        frequency = theta ** (-2 * i / head_dim)
        if scaling:
            factor, low, high, original = scaling
            wavelength = 2 * math.pi / frequency
            if wavelength > original / low:
                frequency /= factor
            elif wavelength >= original / high:
                smooth = (original / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        frequencies.append(frequency)
    return np.array(frequencies)


def reference_logits(
    a: Architecture, params, tokens_BT, segment_ids_BT, positions_BT, *, causal=False
):
    """The block of the LLaDA paper written once more, in numpy and float64, layer by layer and head
    by head.
    """
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

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
    for tokens, segments, positions in zip(tokens_BT, segment_ids_BT, positions_BT):
        x = p["embed"][np.asarray(tokens)]
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
                        s for s in range(T) if segments[s] == segments[t] and (s <= t or not causal)
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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
        {"tie_embeddings": True},
        {"qk_norm": "full"},
        {"qk_norm": "per_head", "attention_bias": "qkvo"},
        {"attention_bias": "qkv", "output_shift": True},
        {
            "rope_theta": 100.0,
            "rope_scaling": (8.0, 1.0, 4.0, 40.0),
        },  # wavelengths of 6 (kept), 20 (mixed), 63 and 199
    ],
    ids=str,
)
def test_logits_equal_a_float64_reference(changes, causal):
    a = variant(**changes)
    model = make_model(a, causal=causal)
    params = perturbed(model)
    tokens, segments, positions = random_inputs(a, B=2, T=9)
    segments = segments.at[0, 5:].set(2).at[1, 7:].set(0)
    positions = positions.at[0, 5:].set(jnp.arange(4))
    logits = jax.jit(model.logits_fn)(params, tokens, segments, positions)
    expected = reference_logits(a, params, tokens, segments, positions, causal=causal)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=2e-5)


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
    config = transformers.LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_theta=theta, rope_scaling={
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


def test_a_shifted_output_shifts_the_loss_like_the_logits():
    model = make_model(variant(output_shift=True), nll_chunk=4)
    params = perturbed(model)
    tokens, segments, positions = random_inputs(SMALL)
    segments = segments.at[:, 7:].set(2)
    scores = jax.jit(model.nll_fn)(params, tokens, tokens, tokens >= 0, segments, positions)
    log_p = jax.nn.log_softmax(jax.jit(model.logits_fn)(params, tokens, segments, positions))
    expected = -np.take_along_axis(np.asarray(log_p), np.asarray(tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores.nll_BT, expected, atol=1e-5)


def test_biases_start_at_zero_and_are_not_decayed():
    model = make_model(variant(attention_bias="qkvo", qk_norm="per_head"))
    params = jax.jit(model.init)(jax.random.key(0))
    rules = default_config().optimizer.weight_decay_multipliers
    factors = by_path(model.abstract, rules, what="weight_decay_multipliers")["blocks"]
    names = [name for name in params["blocks"] if name.endswith("bias")]
    assert sorted(names) == ["attn_out_bias", "k_bias", "q_bias", "v_bias"]
    assert all((params["blocks"][name] == 0).all() for name in names)
    assert {name for name, factor in factors.items() if not factor} == {
        *names,
        "attn_norm",
        "ff_norm",
        "q_norm",
        "k_norm",
    }


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


def test_every_token_sees_every_other_unless_causal():
    tokens, segments, positions = random_inputs(SMALL)
    changed = tokens.at[:, -1].set((tokens[:, -1] + 1) % SMALL.vocab_size)
    for causal in (False, True):
        model = make_model(SMALL, causal=causal)
        params = perturbed(model)
        logits = jax.jit(model.logits_fn)
        difference = np.abs(
            logits(params, tokens, segments, positions)
            - logits(params, changed, segments, positions)
        )
        assert (difference[:, :-1].max(axis=(1, 2)) > 1e-4).all() != causal


@pytest.mark.parametrize("nll_chunk", [1, 2, 3, 5, 12, 1024])
def test_chunked_nll_and_its_gradient_equal_the_log_softmax_of_the_logits(nll_chunk):
    model = make_model(SMALL, nll_chunk=nll_chunk)
    params = perturbed(model)
    tokens, segments, positions = random_inputs(SMALL)
    targets, where = (tokens * 7 + 3) % SMALL.vocab_size, tokens % 3 > 0
    weight = jax.random.uniform(jax.random.key(5), tokens.shape)

    def chunked(params):
        return jnp.sum(
            weight * model.nll_fn(params, tokens, targets, where, segments, positions).nll_BT
        )

    def direct(params):
        log_p = jax.nn.log_softmax(model.logits_fn(params, tokens, segments, positions))
        return -jnp.sum(weight * where * jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0])

    (ours, our_grad), (theirs, their_grad) = (
        jax.jit(jax.value_and_grad(f))(params) for f in (chunked, direct)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), our_grad, their_grad
    )
    scores = jax.jit(model.nll_fn)(params, tokens, targets, where, segments, positions)
    best = np.argmax(jax.jit(model.logits_fn)(params, tokens, segments, positions), axis=-1)
    np.testing.assert_array_equal(scores.is_correct_BT, (best == targets) & where)


def test_logits_of_all_positions_never_exist_at_once():
    a = variant(vocab_size=50_000)
    B, T, chunk = 4, 256, 16
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    where = jax.ShapeDtypeStruct((B, T), bool)

    def temporary_bytes(nll_chunk):
        model = make_model(a, nll_chunk=nll_chunk)
        loss = lambda p, t, w: model.nll_fn(p, t, t, w, None, t).nll_BT.sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(model.abstract, tokens, where).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits = B * T * a.vocab_size * 4
    assert temporary_bytes(T) > all_logits
    assert temporary_bytes(chunk) < all_logits / 2  # of which most is the head's own gradient


@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
def test_recomputation_changes_memory_but_not_the_gradient(remat):
    tokens, segments, positions = random_inputs(SMALL, B=2, T=8)
    grads = []
    for name in ("none", remat):
        model = make_model(SMALL, remat=name)
        loss = lambda p, m=model: m.nll_fn(  # noqa: E731
            p, tokens, tokens, tokens > 0, segments, positions
        ).nll_BT.sum()
        grads.append(jax.jit(jax.grad(loss))(perturbed(model)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *grads)


def test_bfloat16_stays_close_to_float32():
    tokens, segments, positions = random_inputs(SMALL)
    full, half = (make_model(SMALL, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    params = perturbed(full)
    exact, rough = (jax.jit(m.logits_fn)(params, tokens, segments, positions) for m in (full, half))
    assert rough.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(rough - exact) / np.linalg.norm(exact) < 0.03


def test_initialisation_has_the_published_standard_deviations():
    a = variant(
        d_model=256,
        num_heads=8,
        num_kv_heads=8,
        head_dim=32,
        d_ff=512,
        vocab_size=2000,
        num_layers=4,
    )
    params = jax.jit(make_model(a).init)(jax.random.key(0))
    cut = 0.98658  # standard deviation of a standard normal truncated at 3
    residual = (2.0 * np.arange(1, 5)) ** -0.5
    expected = {
        "q": np.full(4, 256**-0.5),
        "k": np.full(4, 256**-0.5),
        "v": np.full(4, 256**-0.5),
        "attn_out": 256**-0.5 * residual,
        "ff_gate": np.full(4, 256**-0.5),
        "ff_up": np.full(4, 256**-0.5),
        "ff_out": 512**-0.5 * residual,
    }
    for name, std in expected.items():
        weights = np.asarray(params["blocks"][name]).reshape(4, -1)
        np.testing.assert_allclose(weights.std(axis=1), std * cut, rtol=0.01, err_msg=name)
        assert (np.abs(weights).max(axis=1) <= 3 * std * 1.0001).all()
    for name in ("embed", "lm_head"):
        np.testing.assert_allclose(params[name].std(), 256**-0.5 * cut, rtol=0.01)
    for name in ("attn_norm", "ff_norm"):
        assert (params["blocks"][name] == 1).all()


def test_an_untrained_model_with_the_published_vocabulary_starts_near_12_25_nats():
    a = variant(
        vocab_size=126_464,
        d_model=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_ff=256,
    )
    model = make_model(a, nll_chunk=16)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens, segments, positions = random_inputs(a, B=16, T=64)
    noisy = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, tokens.shape), 126_336, tokens)
    scores = jax.jit(model.nll_fn)(params, noisy, tokens, tokens >= 0, segments, positions)
    assert math.log(126_464) + 0.5 == pytest.approx(12.25, abs=0.01)
    assert float(scores.nll_BT.mean()) == pytest.approx(12.25, abs=0.1)


@pytest.mark.parametrize(
    ("sizes", "total", "without_embedding"),
    [
        ((126_464, 32, 4096, 32, 32, 128, 12_288), 8_015_581_184, 6_979_588_096),
        ((126_464, 22, 2048, 32, 4, 64, 5634), 1_487_243_264, 969_246_720),
    ],
    ids=["8B", "1B"],
)
def test_the_published_sizes_have_the_published_number_of_parameters(
    sizes, total, without_embedding
):
    names = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff")
    a = Architecture(**dict(zip(names, sizes)))
    assert (
        num_parameters(a)
        == total
        == sum(leaf.size for leaf in jax.tree.leaves(make_model(a).abstract))
    )
    assert total - 2 * a.vocab_size * a.d_model == without_embedding
    matrices = total - a.vocab_size * a.d_model - a.d_model * (2 * a.num_layers + 1)
    assert num_matmul_parameters(a) == matrices


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "output_shift": True},
        {"qk_norm": "full", "attention_bias": "qkv"},
        {"qk_norm": "per_head", "attention_bias": "qkvo"},
    ],
    ids=str,
)
def test_parameter_counts_equal_those_of_the_tree(changes):
    a = variant(**changes)
    assert num_parameters(a) == sum(leaf.size for leaf in jax.tree.leaves(make_model(a).abstract))


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
