"""Gaps within a text, and texts that grow block by block."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recital import BYTES, SENTENCE, letters, recite
from support.toy_networks import (
    EOS,
    MASK,
    PAD,
    eos_after,
    toy_logits,
    toy_logits_of_row,
    toy_params,
)

from llada_jax.errors import UserError
from llada_jax.samplers.canvas import make_infill_canvas
from llada_jax.samplers.text import generate_tokens, infill_text, infill_tokens, parse_gaps

IDS = {"mask_id": MASK, "pad_id": PAD}


def fill(texts, is_given, **changes):
    return infill_tokens(toy_logits, toy_params(1), texts, is_given, **IDS, **changes)


def test_texts_with_gaps_are_right_padded_and_keep_what_is_given():
    canvas = make_infill_canvas([[5, 9, 7], [4]], [[True, False, True], [False]], **IDS)
    assert canvas.tokens_BT[:, :4].tolist() == [[5, MASK, 7, PAD], [MASK, PAD, PAD, PAD]]
    assert canvas.is_fixed_BT[:, :4].tolist() == [[True, False, True, True], [False] + [True] * 3]
    assert canvas.segment_ids_BT[:, :4].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert canvas.positions_BT[1, :4].tolist() == [0, 1, 2, 3]


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 1.0]))
def test_given_tokens_are_untouched_and_rows_do_not_see_each_other(data, seed, temperature):
    texts, is_given = [], []
    for _ in range(3):
        text = data.draw(st.lists(st.integers(0, MASK), min_size=1, max_size=12))
        given_T = data.draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text)))
        given_T[data.draw(st.integers(0, len(text) - 1))] = False
        texts.append(text)
        is_given.append(given_T)
    request = {"seed": seed, "temperature": temperature}
    filled, num_steps_B = fill(texts, is_given, **request)
    for text, given_T, row, num_steps in zip(texts, is_given, filled, num_steps_B, strict=True):
        where = np.array(given_T)
        np.testing.assert_array_equal(np.array(row)[where], np.array(text)[where])
        assert MASK not in np.array(row)[~where]
        assert num_steps == (~where).sum()
    # The same rows in other company.
    other, _ = fill(
        [texts[0], [3] * 20, texts[2]], [is_given[0], [False] * 20, is_given[2]], **request
    )
    assert [other[0], other[2]] == [filled[0], filled[2]]


def test_a_gap_is_filled_as_plain_numpy_fills_it():
    params, text, is_given = toy_params(1), [3, 0, 0, 5, 0], [True, False, False, True, False]
    canvas = np.where(is_given, text, MASK)
    hidden = {1, 2, 4}
    while hidden:
        logits = np.asarray(
            toy_logits_of_row(params, canvas[None], np.ones((1, 5), int), np.arange(5)[None])
        )[0].astype(np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        choice = np.where(np.arange(16) == MASK, -1, p).argmax(-1)
        best = max(hidden, key=lambda i: p[i, choice[i]])
        canvas[best] = choice[best]
        hidden.remove(best)
    filled, _ = fill([text], [is_given])
    assert filled == [canvas.tolist()]


def test_without_a_number_of_steps_a_text_has_as_many_as_gaps():
    heard = []
    fill(
        [[3, 0, 0, 5], [0]],
        [[True, False, False, True], [False]],
        on_step=lambda _, s: heard.append(s),
    )
    assert [(state.step, state.num_steps) for state in heard] == [(1, 2), (2, 2)]


def test_the_gaps_of_others_change_nothing_where_tokens_are_taken_back():
    text, given_T = [3, *[0] * 20, 5], [True, *[False] * 20, True]
    settings = {"temperature": 1.0, "revise": "remdm-loop=0.9"}
    alone, num_alone = fill([text], [given_T], **settings)
    # a text of the same width, and one of another
    for length in (30, 40):
        together, num_together = fill([text, [3] * length], [given_T, [False] * length], **settings)
        assert (together[0], num_together[0]) == (alone[0], num_alone[0])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_text_with_few_gaps_is_filled_next_to_one_with_more_gaps_than_columns(
    batch_size,
):
    texts, is_given = [[3, 0, 0, 5], [3] * 40], [[True, False, False, True], [False] * 40]
    for steps in (None, 40):
        filled, num_steps_B = fill(texts, is_given, batch_size=batch_size, steps=steps)
        assert num_steps_B.tolist() == [2, 40]
        assert [len(row) for row in filled] == [4, 40]


def test_gaps_are_read_from_a_text():
    tokens, is_given = parse_gaps(BYTES, "a [MASK:2] b[MASK]")
    assert tokens == [*b"a ", 256, 256, *b" b", 256]
    assert is_given == [True, True, False, False, True, True, False]
    assert sum(not given for given in parse_gaps(BYTES, "[MASK:100000]")[1]) == 100_000


def test_a_space_in_front_of_a_gap_belongs_to_the_word_that_fills_it():
    class Words:
        kind, mask_id = "sentencepiece", 9

        def encode(self, text):
            return [len(text)]

        def decode(self, ids):
            return "".join({1: ".", 3: "The", 4: " sat", 5: " sat "}[i] for i in ids)

    assert parse_gaps(Words(), "The [MASK:2] sat") == ([3, 9, 9, 4], [True, False, False, True])
    # one space alone, and none at the end of the text
    assert parse_gaps(Words(), "The  [MASK] sat ") == ([4, 9, 5], [True, False, True])


def test_no_space_is_put_in_front_of_a_text_that_stands_right_behind_a_gap():
    class Prefixed:
        kind, mask_id = "sentencepiece", 256

        def encode(self, text):
            # ".," is a single token, as in the vocabulary of Llama
            return list(f" {text}".replace(".,", "\xff").encode("latin-1"))

        def decode(self, ids):
            return bytes(ids).decode("latin-1").replace("\xff", ".,").removeprefix(" ")

    tokens, is_given = parse_gaps(Prefixed(), "un[MASK]able[MASK], too")
    assert tokens == [*b" un", 256, *b"able", 256, *b", too"]
    assert is_given == [True] * 3 + [False] + [True] * 4 + [False] + [True] * 5


def test_a_text_is_filled_where_it_has_gaps():
    text = "it [MASK:2] a [MASK:5] universally"
    (completion,) = infill_text(recite, letters(SENTENCE), BYTES, [text])
    assert completion.text == "it is a truth universally"
    assert completion.num_steps == 7
    (fast,) = infill_text(recite, letters(SENTENCE), BYTES, [text], commit="threshold")
    assert (fast.text, fast.num_steps) == (completion.text, 1)


def test_neither_an_end_nor_a_suppressed_id_fills_a_gap():
    """The network proposes both in the places of the gaps."""
    proposed = np.array([*b"it", BYTES.eos_id, *b"is"], np.int32)
    (completion,) = infill_text(recite, proposed, BYTES, ["it[MASK]i[MASK]"], suppress=[ord("s")])
    end, other = completion.tokens[2], completion.tokens[4]
    assert end not in (*BYTES.end_ids, BYTES.mask_id)
    assert other not in (ord("s"), *BYTES.end_ids, BYTES.mask_id)
    (free,) = infill_text(recite, proposed, BYTES, ["it[MASK]i[MASK]"])
    assert free.tokens[4] == ord("s")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("The cat", "has no gap; write [MASK:N]"),
        ("The [MASK:0] sat", "has no token to fill in"),
    ],
)
def test_texts_without_anything_to_fill_are_refused(text, sentence):
    with pytest.raises(UserError) as error:
        parse_gaps(BYTES, text)
    assert sentence in str(error.value)


def test_impossible_requests_to_fill_are_refused():
    with pytest.raises(UserError, match="Text 1 has no gap"):
        fill([[1], [2]], [[False], [True]])
    with pytest.raises(
        UserError, match="steps=3 must lie between 1 and the number of masked tokens, 2"
    ):
        fill([[1, 2]], [[False, False]], steps=3)
    with pytest.raises(UserError, match="number of masked tokens, 1"):
        fill([[1, 2]], [[False, True]], steps=2)


# ------------------------------------------------------------------------------------------- append


def test_appended_blocks_equal_generations_of_one_block_each():
    request = {**IDS, "temperature": 0.0}
    grown_BT, num_steps_B = generate_tokens(
        toy_logits,
        toy_params(2),
        [[1, 2], [3]],
        gen_length=9,
        block_length=3,
        append=True,
        **request,
    )
    prompts = [[1, 2], [3]]
    for _ in range(3):
        block_BT, _ = generate_tokens(toy_logits, toy_params(2), prompts, gen_length=3, **request)
        prompts = [prompt + block.tolist() for prompt, block in zip(prompts, block_BT, strict=True)]
    assert [prompts[0][2:], prompts[1][1:]] == grown_BT.tolist()
    assert num_steps_B.tolist() == [9, 9]
    whole_BT, _ = generate_tokens(
        toy_logits, toy_params(2), [[1, 2], [3]], gen_length=9, block_length=3, **request
    )
    assert (whole_BT != grown_BT).any(), "or the later blocks were not seen in the first place"


def test_appending_stops_at_the_end_of_each_text():
    tokens_BT, num_steps_B = generate_tokens(
        eos_after([1, 6]),
        {},
        [[1, 1], [1]],
        gen_length=16,
        block_length=4,
        append=True,
        eos_id=EOS,
        **IDS,
    )
    assert tokens_BT.tolist() == [[3] + [EOS] * 15, [3] * 6 + [EOS] * 10]
    assert num_steps_B.tolist() == [4, 8]
