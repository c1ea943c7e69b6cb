"""Questions from a file: how they are read, and answers of models that know them by heart."""

import json
import math
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.paths import ROOT

from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.errors import UserError
from llada_jax.evaluation.answer_rows import Question
from llada_jax.evaluation.tasks import answer, items_of, read_tasks, written
from llada_jax.masks import BIDIRECTIONAL, CAUSAL

BYTES = load_tokenizer("bytes")


def tasks(tmp_path, *rows):
    file = tmp_path / "tasks.jsonl"
    file.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return str(file)


ADA = {
    "prompt": "Ada",
    "answer": " is first",
    "choices": [" is last", " is first"],
    "prompt_choices": ["Bob", "Ada"],
    "backwards": {"prompt": "first is", "answer": " Ada"},
}
BOB = {"prompt": "Bob", "answer": " is last"}


# ---- a network that knows one text by heart


class Reciter:
    """Gives the byte of TEXT at each position the probability of nearly 1, whatever it sees; the
    causal one by one position earlier, as the input is shifted.
    """

    text = b"Ada is first"

    @classmethod
    def hidden_fn(cls, params, tokens_BT, segment_ids_BT, positions_BT):
        at_BT = jnp.minimum(positions_BT, len(cls.text) - 1)
        return jnp.asarray(list(cls.text))[at_BT][..., None]

    @staticmethod
    def head_fn(params, hidden_BTD):
        return 9.0 * jax.nn.one_hot(hidden_BTD[..., 0], BYTES.vocab_size)

    @classmethod
    def logits_fn(cls, params, tokens_BT, segment_ids_BT, positions_BT, start=0, length=None):
        hidden = cls.hidden_fn(params, tokens_BT, segment_ids_BT, positions_BT)
        if length is not None:
            hidden = jax.lax.dynamic_slice_in_dim(hidden, start, length, axis=1)
        return cls.head_fn(params, hidden)


def asked(rows, direction, *, mask=BIDIRECTIONAL, **settings):
    items = items_of(rows, direction, BYTES)
    return answer(Reciter, {}, items, tokenizer=BYTES, mask=mask, num_samples=8, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [BIDIRECTIONAL, CAUSAL])
def test_what_the_model_knows_is_matched_and_ranked_first(mask):
    found = asked([ADA, BOB], "forwards", mask=mask)
    assert (found.num_questions, found.exact_match) == (2, 0.5)
    assert found.exact_match_standard_error == pytest.approx(math.sqrt(0.25 / 2))
    assert (found.num_ranked, found.ranking_accuracy, found.ranking_chance) == (1, 1.0, 0.5)
    # per letter log(1 + 259 / e^9), and 9 more for each of "Ada"'s or "Bob"'s answer that is wrong:
    # at the place of " is last" the text has " is firs"
    wrong = sum(a != b for a, b in zip(" is last", " is firs"))
    expected = -(17 * math.log1p(259 * math.exp(-9)) + 9 * wrong) / 2
    assert found.log_likelihood == pytest.approx(expected, rel=0.01 if mask.causal else 0.5)


def test_questions_backwards_are_those_that_have_one():
    found = asked([ADA, BOB], "backwards")
    assert (found.num_questions, found.exact_match, found.num_ranked) == (1, 0.0, 0)
    assert math.isnan(found.ranking_accuracy)
    assert items_of([BOB], "backwards", BYTES) == []


def test_infilling_asks_for_the_prompt_in_front_of_the_answer():
    (item,) = items_of([ADA], "infill", BYTES)
    assert item.question == Question((), tuple(b"Ada"), tuple(b" is first"))
    found = asked([ADA], "infill")
    assert (found.exact_match, found.ranking_accuracy) == (1.0, 1.0)


@pytest.mark.parametrize("empty", ["", " \n"])
def test_infilling_leaves_out_questions_that_have_no_prompt_and_refuses_such_choices(empty):
    rows = [{"prompt": empty, "answer": "Ada is first"}, ADA]
    assert len(items_of(rows, "forwards", BYTES)) == 2
    assert items_of(rows, "infill", BYTES) == items_of([ADA], "infill", BYTES)
    with pytest.raises(UserError, match="' is first' has no token to ask for; give it and each"):
        items_of([{**ADA, "prompt_choices": ["Ada", empty]}], "infill", BYTES)


@pytest.mark.parametrize("direction", ["forwards", "infill"])
def test_the_error_of_the_mean_holds_for_questions_that_are_alike(direction):
    """As in an infilling of many prompts in front of one answer. Only the same noise for all of
    them would make the spread four times as large as the error.
    """
    rows = [{"prompt": "Ada is gone", "answer": " is first of"}] * 16
    found = [asked(rows, direction, seed=seed) for seed in range(24)]
    spread = np.std([one.log_likelihood for one in found])
    error = math.sqrt(np.mean([one.mc_standard_error**2 for one in found]))
    assert 0.5 < spread / error < 1.8


def test_choices_of_one_question_share_their_noise():
    first, second = items_of([ADA, ADA], "forwards", BYTES)
    noises = [one.noise for one in (*second.choices, second.question)]
    assert first.question.noise is None
    assert noises[0] is not None
    assert len(set(noises)) == 1


def test_what_surrounds_an_answer_is_left_alone_and_each_question_is_answered_alone():
    """Answers of several lengths in batches of two are what each is alone."""
    questions = [
        Question(tuple(b"A"), tuple(b"xx"), tuple(b" is")),
        Question((), tuple(b"y")),
        Question(tuple(b"Ada"), tuple(b"zzzzz")),
    ]
    expected = [tuple(b"da"), tuple(b"A"), tuple(b" is f")]
    assert written(Reciter, {}, questions, tokenizer=BYTES, batch_size=2) == expected
    assert written(Reciter, {}, questions[:1], tokenizer=BYTES) == expected[:1]


class Ending(Reciter):
    """Ends its text, as a model does that has learned where answers end."""

    @classmethod
    def hidden_fn(cls, params, tokens_BT, segment_ids_BT, positions_BT):
        ids = jnp.asarray([*cls.text, BYTES.eos_id])
        return ids[jnp.minimum(positions_BT, len(cls.text))][..., None]


class EndingTurns(Ending):
    """Ends a turn with another token than EOS, and goes on."""

    end_of_turn = 0

    @classmethod
    def hidden_fn(cls, params, tokens_BT, segment_ids_BT, positions_BT):
        ids = jnp.asarray([*cls.text, cls.end_of_turn, ord("x")])
        return ids[jnp.minimum(positions_BT, len(cls.text) + 1)][..., None]


SHORTER = {"prompt": "Ada", "answer": " is"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "gen_length", "exact_match"),
    [
        (Ending, None, 1.0),  # the length is given, and both answers are the beginning of the text
        (Ending, 16, 0.5),  # not given, the model ends the longer one by itself
        (EndingTurns, 16, 0.5),
        (Reciter, 16, 0.0),  # which never ends
        (Ending, 4, 0.0),  # there is no room for the right one
    ],
)
def test_an_answer_of_no_given_length_ends_at_end_of_text_or_of_a_turn(
    model, gen_length, exact_match
):
    tokenizer = load_tokenizer("bytes")
    if model is EndingTurns:
        tokenizer.eot_id = model.end_of_turn
    found = answer(
        model,
        {},
        items_of([ADA, SHORTER], "forwards", tokenizer),
        tokenizer=tokenizer,
        mask=BIDIRECTIONAL,
        num_samples=2,
        gen_length=gen_length,
    )
    assert found.exact_match == exact_match


def test_an_answer_in_front_of_a_given_text_keeps_its_length():
    assert asked([ADA], "infill", gen_length=8).exact_match == 1.0


# ---- the file


def test_facts_of_one_order_are_never_stated_in_the_one_in_which_they_are_asked_backwards(tmp_path):
    """Of the reversal experiment: it would show nothing if the training text held them."""
    runpy.run_path(str(ROOT / "configs/reversal/make_pairs.py"))["main"](tmp_path)
    text = (tmp_path / "facts.txt").read_text()

    def stated(name, ask):
        rows = read_tasks(str(tmp_path / name))
        assert len(rows) == 32
        return [ask(row)["prompt"] + ask(row)["answer"] + "." in text for row in rows]

    for name, backwards in (("one_order.jsonl", False), ("both_orders.jsonl", True)):
        assert all(stated(name, lambda row: row))
        assert stated(name, lambda row: row["backwards"]) == [backwards] * 32


def test_a_file_is_read_with_a_byte_order_mark_and_empty_lines(tmp_path):
    assert read_tasks(tasks(tmp_path, "\ufeff" + json.dumps(ADA), "", BOB)) == [ADA, BOB]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "tasks.jsonl:1 is not valid JSON"),
        ("[1]", "is not an object"),
        ({"prompt": "a"}, "needs a text 'answer'"),
        ({"prompt": "a", "answer": 1}, "needs a text 'answer'"),
        ({**BOB, "choice": []}, "has the key 'choice'; known are"),
        ({**BOB, "choices": "ab"}, "'choices' must be a list of texts"),
        ({**BOB, "choices": ["b"]}, "must hold the answer ' is last'"),
        ({**BOB, "backwards": {"prompt": "a"}}, "tasks.jsonl:1, backwards needs a text"),
        ("", "has no questions"),
    ],
)
def test_what_is_no_question_is_refused_with_its_line(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        read_tasks(tasks(tmp_path, line))
