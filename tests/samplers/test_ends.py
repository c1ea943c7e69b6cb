"""The end-of-text token: free, off, or kept last; rows that stop and rows that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.reference_sampler import reference_generate
from support.toy_networks import EOS, MASK, PAD, VOCAB, toy_logits, toy_params, windowed

from llada_jax.samplers.text import generate_tokens

SECOND_END = 13
REQUEST = {"mask_id": MASK, "pad_id": PAD, "gen_length": 6}


@windowed
def likes_the_end(params, tokens_BT, segment_ids_BT, positions_BT):
    """Proposes EOS, and is surest of it, at the positions 3 and 4; token 3 elsewhere, and 5 where
    EOS is off.
    """
    is_end_BT1 = ((positions_BT == 3) | (positions_BT == 4))[..., None]
    id_V = jnp.arange(VOCAB)
    end_V = 9.0 * (id_V == EOS) + 4.0 * (id_V == 5)
    return jnp.where(is_end_BT1, end_V, 5.0 * (id_V == 3))


def order_of(**settings):
    """Returns the tokens, and the generated columns in the order in which they were revealed."""
    order = []

    def on_step(rows, state):
        order.extend(np.flatnonzero(np.asarray(state.is_new_BT)[0]).tolist())

    tokens_BT, _ = generate_tokens(
        likes_the_end, {}, [[]], eos_id=EOS, on_step=on_step, **REQUEST, **settings
    )
    return tokens_BT[0].tolist(), order


def test_a_free_end_is_kept_as_soon_as_it_is_the_surest():
    tokens, order = order_of(stop_at_eos=False)
    assert tokens == [3, 3, 3, EOS, EOS, 3]
    assert order[:2] == [3, 4]


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_the_last_end_is_kept_after_everything_else(temperature):
    tokens, order = order_of(eos="last", stop_at_eos=False, temperature=temperature)
    assert tokens == [3, 3, 3, EOS, EOS, 3]
    assert order == [0, 1, 2, 5, 3, 4]


def test_criteria_do_not_count_the_last_end_as_sure():
    tokens_BT, num_steps_B = generate_tokens(
        likes_the_end, {}, [[]], eos_id=EOS, eos="last", commit="threshold=0.5", **REQUEST
    )
    # One pass for the four sure tokens, then one for each EOS.
    assert num_steps_B.tolist() == [3]
    assert tokens_BT[0].tolist() == [3, 3, 3, EOS, EOS, EOS]


def test_an_end_that_is_off_is_never_proposed():
    tokens, _ = order_of(eos="never", stop_at_eos=False)
    assert tokens == [3, 3, 3, 5, 5, 3]


def test_a_row_stops_at_the_first_of_several_ends():
    @windowed
    def two_ends(params, tokens_BT, segment_ids_BT, positions_BT):
        wanted_S = jnp.array([3, SECOND_END, 3, EOS, 3, 3])
        return 5.0 * jnp.eye(VOCAB)[wanted_S[positions_BT]]

    tokens_BT, _ = generate_tokens(two_ends, {}, [[]], eos_id=[EOS, SECOND_END], **REQUEST)
    assert tokens_BT[0].tolist() == [3, SECOND_END, EOS, EOS, EOS, EOS]


def test_an_end_of_turn_still_ends_a_row_where_the_end_of_text_is_off():
    @windowed
    def two_ends(params, tokens_BT, segment_ids_BT, positions_BT):
        wanted_S = jnp.array([EOS, 3, SECOND_END, EOS, 3, 3])
        return (5.0 * jnp.eye(VOCAB) + jnp.eye(VOCAB)[4])[wanted_S[positions_BT]]

    tokens_BT, _ = generate_tokens(
        two_ends, {}, [[]], eos_id=[EOS, SECOND_END], eos="never", **REQUEST
    )
    assert tokens_BT[0].tolist() == [4, 3, SECOND_END, EOS, EOS, EOS]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("block_length", [2, 6])
def test_rows_end_where_the_reference_ends_them_at_the_first_of_two_ends(block_length, temperature):
    """Against plain numpy. The second end is the token that rows begin with most often."""
    prompts = [[1], [3, 5], [7], [4, 4, 9], [8], [6, 1]]
    schedule = {"gen_length": 6, "block_length": block_length, "steps": 6}
    request = {"mask_id": MASK, "pad_id": PAD, "temperature": temperature, "seed": 3, **schedule}
    endless_BT, _ = generate_tokens(toy_logits, toy_params(1), prompts, **request)
    second = int(np.bincount(endless_BT[:, :2].ravel()).argmax())
    ends = [EOS, second]
    tokens_BT, _ = generate_tokens(toy_logits, toy_params(1), prompts, eos_id=ends, **request)
    expected_BT = [
        reference_generate(
            toy_params(1),
            prompt,
            eos_id=ends,
            temperature=temperature,
            seed=3,
            row=row,
            **schedule,
        )
        for row, prompt in enumerate(prompts)
    ]
    np.testing.assert_array_equal(tokens_BT, expected_BT)
    # some rows end at the second end, and not in their last column
    assert any(second in row[:-1] and row[-1] == EOS for row in tokens_BT)


def test_a_batch_stops_when_its_caller_has_enough():
    asked = []

    def is_enough(rows, state):
        asked.append((rows, state.block))
        return [state.block == 2] * len(rows)

    tokens_BT, _ = generate_tokens(
        likes_the_end, {}, [[], []], block_length=2, is_enough=is_enough, **REQUEST
    )
    assert asked == [([0, 1], 1), ([0, 1], 2)]
    assert tokens_BT[0].tolist() == [3, 3, 3, EOS, MASK, MASK]


@pytest.mark.parametrize("commit", ["schedule", "threshold=0.3"])
@pytest.mark.parametrize("block_length", [2, 6])
def test_steps_in_one_loop_are_the_steps_one_by_one(commit, block_length):
    request = REQUEST | {
        "block_length": block_length,
        "commit": commit,
        "eos_id": EOS,
        "temperature": 0.7,
    }
    shown = []
    one_by_one = generate_tokens(
        toy_logits,
        toy_params(),
        [[1], [2, 3]],
        on_step=lambda rows, state: shown.append(np.asarray(state.canvas_BT)),
        **request,
    )
    in_one_loop = generate_tokens(toy_logits, toy_params(), [[1], [2, 3]], **request)
    np.testing.assert_array_equal(one_by_one[0], in_one_loop[0])
    np.testing.assert_array_equal(one_by_one[1], in_one_loop[1])
    assert len(shown) >= in_one_loop[1].max()
    masks = [(canvas == MASK).sum() for canvas in shown]
    assert masks == sorted(masks, reverse=True)
    assert masks[-1] == 0


def test_the_host_is_asked_once_per_block_unless_it_is_shown_every_step(monkeypatch):
    num_asked, device_get = [], jax.device_get

    def counted(values):
        num_asked.append(1)
        return device_get(values)

    monkeypatch.setattr(jax, "device_get", counted)
    request = REQUEST | {"block_length": 2, "temperature": 0.7}
    generate_tokens(toy_logits, toy_params(), [[1], [2, 3]], **request)
    assert len(num_asked) == 3 + 1, "after each block of two steps, and for the tokens at the end"
    num_asked.clear()
    generate_tokens(toy_logits, toy_params(), [[1], [2, 3]], on_step=lambda *_: None, **request)
    assert len(num_asked) == 6 + 1
