"""The reverse process against the published sampler's outputs, a plain numpy one, and the right
distributions.
"""

import json
import math

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial
from safetensors.numpy import load_file
from support.paths import PUBLISHED

from llada_jax.cluster.sharding import make_mesh
from llada_jax.errors import UserError
from llada_jax.models.model import make_model, parameter_shardings
from llada_jax.models.transformer import Architecture
from llada_jax.samplers.denoise import denoise, generate, make_canvas
from llada_jax.samplers.text import cut_at_eos, decode_after, generate_text, generate_tokens

GENERATE = json.loads((PUBLISHED / "expected.json").read_text())["generate"]

# 16 tokens: XLA takes seconds longer to compile random numbers of an odd shape on a CPU.
VOCAB, MASK, PAD, EOS = 16, 15, 0, 14


@pytest.fixture(scope="module")
def official():
    return load_file(PUBLISHED / "model.safetensors"), np.load(PUBLISHED / "expected.npz")


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


def toy_params(seed=0, width=16):
    rng = np.random.default_rng(seed)
    return {
        "token": rng.normal(size=(VOCAB, width)).astype(np.float32),
        "position": rng.normal(size=(64, width)).astype(np.float32),
        "out": rng.normal(size=(width, VOCAB)).astype(np.float32),
    }


def toy_logits(params, tokens_BT, segment_ids_BT, positions_BT):
    """Logits that depend on every real token and its position, and on nothing in the padding."""
    x_BTD = jnp.asarray(params["token"])[tokens_BT] + jnp.asarray(params["position"])[positions_BT]
    mixed_BTD = jnp.sin(x_BTD * (1.0 + jnp.asarray(params["position"])[positions_BT]))
    total_BD = jnp.sum(jnp.where(segment_ids_BT[..., None] > 0, mixed_BTD, 0.0), axis=1)
    return jnp.sin(x_BTD + total_BD[:, None]) @ params["out"]


def whole(canvas, **changes):
    """The keyword arguments of `generate` that a Canvas gives."""
    return {
        "is_fixed_BT": canvas.is_fixed_BT,
        "segment_ids_BT": canvas.segment_ids_BT,
        "positions_BT": canvas.positions_BT,
    } | changes


def reference_generate(logits_of, prompt, *, gen_length, block_length, steps, cfg_scale):
    """The published algorithm for one prompt at temperature 0 in plain numpy: no batch, no padding."""
    canvas = np.array([*prompt, *[MASK] * gen_length])
    is_prompt = np.arange(len(canvas)) < len(prompt)
    hidden = set(np.flatnonzero(~is_prompt))
    num_blocks = gen_length // block_length
    for block in range(num_blocks):
        block_end = len(prompt) + (block + 1) * block_length
        num_hidden = sum(i < block_end for i in hidden)
        for step in range(steps // num_blocks):
            base, remainder = divmod(num_hidden, steps // num_blocks)
            logits = np.array(logits_of(canvas), np.float64)
            if cfg_scale:
                un = np.array(logits_of(np.where(is_prompt, MASK, canvas)), np.float64)
                logits = un + (cfg_scale + 1) * (logits - un)
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            choice = np.where(np.arange(VOCAB) == MASK, -1, p).argmax(-1)
            candidates = sorted(
                (i for i in hidden if i < block_end), key=lambda i: -p[i, choice[i]]
            )
            for i in candidates[: base + (step < remainder)]:
                canvas[i] = choice[i]
                hidden.remove(i)
    assert not hidden
    return canvas[len(prompt) :]


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


@settings(max_examples=8, deadline=None, derandomize=True)
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

    def logits_of(canvas):
        return toy_logits(
            params, canvas[None], np.ones((1, len(canvas)), int), np.arange(len(canvas))[None]
        )[0]

    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(
            tokens_BT[row], reference_generate(logits_of, prompt, **schedule)
        )
    assert (num_steps_B == schedule["steps"]).all()


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

    def counted_logits(params, *canvas):
        num_traces.append(1)
        return toy_logits(params, *canvas)

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


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_a_row_draws_the_same_whatever_else_is_sampled_with_it(remasking):
    request = {
        "mask_id": MASK,
        "pad_id": PAD,
        "gen_length": 16,
        "steps": 4,
        "temperature": 1.0,
        "remasking": remasking,
    }
    prompts = [[1, 2], [3] * 5, [], [4]]
    together, _ = generate_tokens(toy_logits, toy_params(), prompts, seed=5, **request)
    in_pairs, _ = generate_tokens(
        toy_logits, toy_params(), prompts, seed=5, batch_size=2, **request
    )
    replaced, _ = generate_tokens(
        toy_logits, toy_params(), [[9], [3] * 5, [7] * 30, [4]], seed=5, **request
    )
    other_seed, _ = generate_tokens(toy_logits, toy_params(), prompts, seed=6, **request)
    np.testing.assert_array_equal(together, in_pairs)
    np.testing.assert_array_equal(together[[1, 3]], replaced[[1, 3]])
    assert (together != other_seed).any()


def test_the_canvas_is_left_padded_with_positions_from_the_first_real_token():
    canvas = make_canvas([[5, 6, 7], []], gen_length=2, mask_id=MASK, pad_id=PAD)
    assert canvas.tokens_BT.tolist() == [
        [PAD] * 29 + [5, 6, 7, MASK, MASK],
        [PAD] * 32 + [MASK, MASK],
    ]
    assert canvas.segment_ids_BT.tolist() == [[0] * 29 + [1] * 5, [0] * 32 + [1] * 2]
    assert canvas.positions_BT.tolist() == [[0] * 29 + [0, 1, 2, 3, 4], [0] * 32 + [0, 1]]
    assert canvas.is_fixed_BT.tolist() == [[True] * 32 + [False] * 2] * 2
    assert make_canvas([[]], gen_length=3, mask_id=MASK, pad_id=PAD).tokens_BT.tolist() == [
        [MASK] * 3
    ]


def test_every_step_reveals_its_share_of_the_block_and_revises_nothing():
    canvas = make_canvas([[1, MASK, 2], [3]], gen_length=14, mask_id=MASK, pad_id=PAD)
    before_BT = canvas.tokens_BT
    counts = []
    states = denoise(
        Partial(toy_logits, toy_params()),
        canvas.tokens_BT,
        jax.random.key(0),
        mask_id=MASK,
        gen_length=14,
        block_length=7,
        steps=6,
        temperature=1.0,
        **whole(canvas),
    )
    for state in states:
        after_BT, is_new_BT = np.asarray(state.canvas_BT), np.asarray(state.is_new_BT)
        np.testing.assert_array_equal(after_BT != before_BT, is_new_BT)
        assert (before_BT[is_new_BT] == MASK).all()
        assert not is_new_BT[canvas.is_fixed_BT].any()
        columns = np.flatnonzero(is_new_BT.any(axis=0)) - 32
        assert (columns // 7 == state.block - 1).all()
        counts.append(is_new_BT.sum(axis=1).tolist())
        before_BT = after_BT
    assert counts == [[3, 3], [2, 2], [2, 2]] * 2  # 7 tokens in 3 steps: the remainder comes first
    assert (state.step, state.num_steps, state.block, state.num_blocks) == (6, 6, 2, 2)
    assert before_BT[0, 30] == MASK, "a mask token inside the prompt is the prompt's"


def test_the_mask_token_is_never_generated_even_when_it_is_the_most_likely():
    def masks_only(tokens_BT, segment_ids_BT, positions_BT):
        return jnp.zeros((*tokens_BT.shape, VOCAB)).at[..., MASK].set(9.0).at[..., 4].set(1.0)

    canvas = make_canvas([[1]], gen_length=8, mask_id=MASK, pad_id=PAD)
    canvas_BT = generate(
        masks_only,
        canvas.tokens_BT,
        jax.random.key(0),
        mask_id=MASK,
        gen_length=8,
        block_length=4,
        steps=4,
        **whole(canvas),
    )
    assert canvas_BT[0, -8:].tolist() == [4] * 8


def test_given_tokens_inside_the_generation_are_kept():
    canvas_BT = np.full((1, 8), MASK, np.int32)
    canvas_BT[0, [2, 5]] = [7, 8]
    filled_BT = generate(
        Partial(toy_logits, toy_params()),
        canvas_BT,
        jax.random.key(0),
        mask_id=MASK,
        is_fixed_BT=canvas_BT != MASK,
        segment_ids_BT=np.ones_like(canvas_BT),
        positions_BT=np.arange(8)[None],
        gen_length=8,
        block_length=4,
        steps=4,
    )
    assert filled_BT[0, [2, 5]].tolist() == [7, 8]
    assert MASK not in filled_BT[0].tolist()


def eos_after(columns_B):
    """A logits_fn that proposes EOS at generated position columns_B[row] and later, otherwise token
    3.
    """

    def logits_fn(params, tokens_BT, segment_ids_BT, positions_BT):
        prompt_length_B = jnp.sum((segment_ids_BT > 0) & (tokens_BT == 1), axis=1)
        is_eos_BT = positions_BT - prompt_length_B[:, None] == jnp.asarray(columns_B)[:, None]
        choice_BT = jnp.where(is_eos_BT, EOS, 3)
        return 5.0 * jax.nn.one_hot(choice_BT, VOCAB)

    return logits_fn


def test_rows_end_at_eos_and_sampling_stops_when_all_rows_have_ended():
    request = {"mask_id": MASK, "pad_id": PAD, "gen_length": 16, "block_length": 4, "steps": 8}
    logits_fn = eos_after([1, 6])
    tokens_BT, num_steps_B = generate_tokens(logits_fn, {}, [[1, 1], [1]], eos_id=EOS, **request)
    assert tokens_BT.tolist() == [[3] + [EOS] * 15, [3] * 6 + [EOS] * 10]
    assert num_steps_B.tolist() == [
        4,
        4,
    ]  # EOS of the longer row is in the second block of two steps each
    tokens_BT, num_steps_B = generate_tokens(logits_fn, {}, [[1, 1], [1]], eos_id=None, **request)
    assert tokens_BT.tolist() == [[3, EOS] + [3] * 14, [3] * 6 + [EOS] + [3] * 9]
    assert num_steps_B.tolist() == [8, 8]


def test_eos_in_the_prompt_ends_nothing():
    def constant(params, tokens_BT, segment_ids_BT, positions_BT):
        return jax.nn.one_hot(jnp.full(tokens_BT.shape, 3), VOCAB)

    tokens_BT, num_steps_B = generate_tokens(
        constant,
        {},
        [[EOS, 2, EOS]],
        mask_id=MASK,
        pad_id=EOS,
        eos_id=EOS,
        gen_length=4,
        block_length=2,
    )
    assert tokens_BT.tolist() == [[3] * 4]
    assert num_steps_B.tolist() == [4]


def fixed_distribution(params, tokens_BT, segment_ids_BT, positions_BT):
    return jnp.broadcast_to(params, (*tokens_BT.shape, VOCAB))


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_samples_follow_the_tempered_softmax(temperature):
    logits_V = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)
    tokens_BT, _ = generate_tokens(
        fixed_distribution,
        logits_V,
        [[]] * 200,
        mask_id=MASK,
        pad_id=PAD,
        gen_length=64,
        steps=4,
        temperature=temperature,
        remasking="random",
        batch_size=200,
    )
    ordinary = np.arange(VOCAB) != MASK
    p_V = np.where(ordinary, np.exp(logits_V / temperature), 0.0)
    p_V /= p_V.sum()
    observed_V = np.bincount(tokens_BT.ravel(), minlength=VOCAB)
    expected_V = p_V * tokens_BT.size
    chi_square = ((observed_V - expected_V) ** 2)[ordinary] / expected_V[ordinary]
    assert chi_square.sum() < 50.0, (
        "14 degrees of freedom: a correct sampler exceeds this once in 150,000 seeds"
    )
    assert observed_V[MASK] == 0


def first_revealed(remasking, *, num_rows):
    """Counts in which of 16 places the first token of a row is revealed."""
    canvas = make_canvas([[]] * num_rows, gen_length=16, mask_id=MASK, pad_id=PAD)
    state = next(
        denoise(
            Partial(fixed_distribution, np.arange(VOCAB, dtype=np.float32)),
            canvas.tokens_BT,
            jax.random.key(1),
            mask_id=MASK,
            gen_length=16,
            block_length=16,
            steps=16,
            remasking=remasking,
            **whole(canvas),
        )
    )
    assert (np.asarray(state.is_new_BT).sum(axis=1) == 1).all()
    return np.asarray(state.is_new_BT).sum(axis=0)


def test_random_remasking_reveals_every_place_equally_often():
    count_T = first_revealed("random", num_rows=4000)
    chi_square = ((count_T - 250.0) ** 2 / 250.0).sum()
    assert chi_square < 55.0, (
        "15 degrees of freedom: a correct sampler exceeds this once in 500,000 seeds"
    )


def test_low_confidence_reveals_the_leftmost_of_equals():
    assert first_revealed("low_confidence", num_rows=5).tolist() == [5] + [0] * 15


def test_confidence_ignores_the_temperature():
    """Token 0 is certain in place 2 only, so place 2 comes first however hot the choice of tokens
    is.
    """

    def logits_fn(tokens_BT, segment_ids_BT, positions_BT):
        certain_BT = jnp.where(positions_BT == 2, 40.0, 0.0)
        return certain_BT[..., None] * jax.nn.one_hot(jnp.zeros_like(tokens_BT), VOCAB)

    canvas = make_canvas([[]] * 50, gen_length=4, mask_id=MASK, pad_id=PAD)
    settings = {"mask_id": MASK, "gen_length": 4, "block_length": 4, "steps": 4} | whole(canvas)
    for state in denoise(
        logits_fn, canvas.tokens_BT, jax.random.key(0), temperature=2.0, **settings
    ):
        assert np.asarray(state.is_new_BT)[:, 2].all()
        break


def test_temperature_zero_depends_on_no_seed():
    request = {"mask_id": MASK, "pad_id": PAD, "gen_length": 8}
    first, _ = generate_tokens(toy_logits, toy_params(), [[1, 2]], seed=0, **request)
    second, _ = generate_tokens(toy_logits, toy_params(), [[1, 2]], seed=1, **request)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"block_length": 7}, "block_length=7 must divide gen_length=16; nearest: 8."),
        ({"block_length": 4, "steps": 6}, "16/4 = 4; nearest: 4 or 8."),
        ({"block_length": 4, "steps": 3}, "16/4 = 4; nearest: 4."),
        ({"steps": 17}, "use steps=16."),
        ({"steps": 0}, "steps=0 must be at least 1."),
        ({"block_length": -4}, "block_length=-4 must be at least 1."),
        ({"temperature": -1.0}, "temperature=-1.0 must be a finite number"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"cfg_scale": -0.5}, "cfg_scale=-0.5 must be a finite number"),
        ({"remasking": "low-confidence"}, "Did you mean 'low_confidence'?"),
        ({"seed": -1}, "seed=-1 must lie between"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1."),
        ({"prompts": []}, "at least one"),
    ],
)
def test_impossible_requests_are_refused_with_a_remedy(changes, sentence):
    request = {"prompts": [[1]], "mask_id": MASK, "pad_id": PAD, "gen_length": 16} | changes
    with pytest.raises(UserError) as error:
        generate_tokens(toy_logits, toy_params(), request.pop("prompts"), **request)
    assert sentence in str(error.value)


class LetterTokenizer:
    """Words a, b, c, ... with the habit of SentencePiece: the space before the first word is
    dropped in decoding.
    """

    kind = "sentencepiece"
    vocab_size, mask_id, pad_id, eos_id = VOCAB, MASK, PAD, EOS

    def encode(self, text):
        return [ord(word) - ord("a") for word in text.split()]

    def decode(self, ids):
        return " ".join(chr(ord("a") + int(i)) for i in ids if i not in (MASK, EOS))


def test_text_keeps_the_space_after_the_prompt_and_ends_before_eos():
    completions = generate_text(
        eos_after([2, 4]), {}, LetterTokenizer(), ["b b", ""], gen_length=4, block_length=2, steps=4
    )
    assert completions[0].text == " d d"
    assert completions[0].tokens == [3, 3]
    assert completions[1].text == "d d d d"
    assert [c.num_steps for c in completions] == [4, 4]
    unstopped = generate_text(
        eos_after([2]), {}, LetterTokenizer(), ["b b"], gen_length=4, stop_at_eos=False
    )
    assert unstopped[0].tokens == [3, 3, EOS, 3]


def test_decoding_after_a_prompt():
    tokenizer = LetterTokenizer()
    assert decode_after(tokenizer, [1], [2, 3]) == " c d"
    assert decode_after(tokenizer, [], [2, 3]) == "c d"
    assert cut_at_eos([1, 2, EOS, 4], EOS) == [1, 2]
    assert cut_at_eos(np.array([1, 2]), EOS) == [1, 2]


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
        mesh = make_mesh(sizes, devices=jax.devices()[: math.prod(sizes.values())])
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
