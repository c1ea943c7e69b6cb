"""The steps of the reverse process: the canvas, what a step reveals, and where a row ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from support.toy_networks import (
    EOS,
    MASK,
    PAD,
    VOCAB,
    eos_after,
    fixed_distribution,
    toy_logits,
    toy_logits_of_row,
    toy_params,
    windowed,
    without_tokens,
)

from llada_jax.errors import UserError
from llada_jax.samplers.canvas import make_canvas
from llada_jax.samplers.denoise import denoise, generate
from llada_jax.samplers.settings import check_request
from llada_jax.samplers.text import generate_tokens


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
        **without_tokens(canvas),
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


def test_of_positions_that_are_equally_certain_the_leftmost_are_revealed_first():
    canvas = make_canvas([[], []], gen_length=8, mask_id=MASK, pad_id=PAD)
    states = denoise(
        Partial(fixed_distribution, np.arange(VOCAB, dtype=np.float32)),
        canvas.tokens_BT,
        jax.random.key(0),
        mask_id=MASK,
        gen_length=8,
        block_length=8,
        steps=3,
        **without_tokens(canvas),
    )
    revealed = [np.argwhere(np.asarray(state.is_new_BT)).tolist() for state in states]
    columns = [range(0, 3), range(3, 6), range(6, 8)]
    assert revealed == [[[row, column] for row in (0, 1) for column in step] for step in columns]


def test_the_mask_token_is_never_generated_even_when_it_is_the_most_likely():
    @windowed
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
        **without_tokens(canvas),
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


def test_rows_end_at_eos_and_sampling_stops_when_all_rows_have_ended():
    request = {"mask_id": MASK, "pad_id": PAD, "gen_length": 16, "block_length": 4, "steps": 8}
    logits_fn = eos_after([1, 6])
    tokens_BT, num_steps_B = generate_tokens(logits_fn, {}, [[1, 1], [1]], eos_id=EOS, **request)
    assert tokens_BT.tolist() == [[3] + [EOS] * 15, [3] * 6 + [EOS] * 10]
    # EOS of the second row is in its second block, and each block has two steps.
    assert num_steps_B.tolist() == [2, 4]
    tokens_BT, num_steps_B = generate_tokens(logits_fn, {}, [[1, 1], [1]], eos_id=None, **request)
    assert tokens_BT.tolist() == [[3, EOS] + [3] * 14, [3] * 6 + [EOS] + [3] * 9]
    assert num_steps_B.tolist() == [8, 8]


def test_eos_in_the_prompt_ends_nothing():
    @windowed
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
        # the next multiple of the blocks would be refused as well
        ({"block_length": 4, "steps": 17}, "use steps=16."),
        ({"steps": 0}, "steps=0 must be at least 1."),
        ({"block_length": -4}, "block_length=-4 must be at least 1."),
        ({"temperature": -1.0}, "temperature=-1.0 must be a number from 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a number from 0"),
        ({"cfg_scale": -0.5}, "cfg_scale=-0.5 must be a number from 0"),
        ({"temperature": 1e39}, "temperature=1e+39 must be a number from 0 to 1e+06; use 0"),
        ({"remasking": "low-confidence"}, "Did you mean 'low_confidence'?"),
        ({"seed": -1}, "seed=-1 must lie between"),
        ({"seed": 2**32}, "seed=4294967296 must lie between 0 and 2**32 - 1."),
        ({"batch_size": 0}, "batch_size=0 must be at least 1."),
        ({"prompts": []}, "at least one"),
    ],
)
def test_impossible_requests_are_refused_with_a_remedy(changes, sentence):
    request = {"prompts": [[1]], "mask_id": MASK, "pad_id": PAD, "gen_length": 16} | changes
    with pytest.raises(UserError) as error:
        generate_tokens(toy_logits, toy_params(), request.pop("prompts"), **request)
    assert sentence in str(error.value)


def test_more_texts_than_a_request_can_have_are_refused():
    check_request(num_prompts=2**24, batch_size=1, seed=0)
    with pytest.raises(UserError, match="There are 16777217 texts to generate, .* at most 167772"):
        check_request(num_prompts=2**24 + 1, batch_size=1, seed=0)


def test_logits_of_the_whole_row_are_refused_where_a_block_was_asked_for():
    def whole_row(params, *canvas, start, length):
        return toy_logits_of_row(params, *canvas)

    with pytest.raises(UserError, match=r"shape \(1, 40, 16\) for length=4; .* = \[1, 4, V\]"):
        generate_tokens(
            whole_row,
            toy_params(),
            [[1]],
            mask_id=MASK,
            pad_id=PAD,
            gen_length=8,
            block_length=4,
        )
