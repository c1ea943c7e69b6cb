"""Rows of dialogues in a batch: one answer is drawn per epoch, and rows are filled up."""

import collections
import json

import grain
import numpy as np
import pytest
from support.errors import error_of

from llada_jax.data.dialogue_rows import BucketCut, draw_answers, split_in_two
from llada_jax.data.dialogue_units import ChatSettings
from llada_jax.data.loader import describe, heldout_batches, train_batches
from llada_jax.data.preparation import prepare
from llada_jax.data.tokenizer import load_tokenizer

T = 96
TOKENIZER = load_tokenizer("bytes")
EOS = TOKENIZER.eos_id
# A template whose turns end with a character, so that the end of text is there only once.
TEMPLATE = "{% for m in messages %}{{ m.content }};{% endfor %}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Returns directory(rows) -> a data set of 12 dialogues of three answers each."""
    folder = tmp_path_factory.mktemp("dialogues")
    (folder / "template.jinja").write_text(TEMPLATE)
    with open(folder / "in.jsonl", "w") as file:
        for n in range(12):
            words = [f"q{n}a", "A" * (1 + n), f"q{n}b", "B" * (1 + n), f"q{n}c", "C"]
            turns = [
                {"role": ("user", "assistant")[i % 2], "content": word}
                for i, word in enumerate(words)
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    for rows in ("packed", "padded"):
        prepare(
            [str(folder / "in.jsonl")],
            folder / rows,
            sequence_length=T,
            tokenizer="bytes",
            heldout=0.5,
            chat=ChatSettings(template=str(folder / "template.jinja"), rows=rows),
        )
    return lambda rows: str(folder / rows)


def batches(directory, num_batches=2, **changes):
    arguments = dict(
        batch_size=4,
        sequence_length=T,
        seed=0,
        random_length_probability=0.0,
        attend_across_documents=False,
        num_threads=0,
        prefetch=0,
    )
    stream = train_batches([(directory, 1.0)], **{**arguments, **changes})
    return [next(stream) for _ in range(num_batches)]


def documents(batch):
    """Yields (tokens, is_maskable, positions) of each document of a batch."""
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            yield tuple(batch[name][row][here] for name in ("tokens", "is_maskable", "positions"))


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_each_epoch_draws_one_answer_of_a_dialogue_and_leaves_out_what_follows(directory, rows):
    drawn = collections.Counter()
    for batch in batches(directory(rows), num_batches=40):
        assert not (batch["is_maskable"] & (batch["segment_ids"] == 0)).any()
        for tokens, is_maskable, positions in documents(batch):
            assert positions.tolist() == list(range(len(tokens)))
            assert (tokens == EOS).sum() == 1
            assert tokens[-1] == EOS
            answer = TOKENIZER.decode(tokens[is_maskable])
            assert is_maskable[-len(answer) - 1 :].all()  # the answer, its end, and nothing else
            assert is_maskable.sum() == len(answer) + 1
            assert len(set(answer)) == 2
            drawn[answer[0]] += 1
            questions = TOKENIZER.decode(tokens).count("q")
            assert questions == "ABC".index(answer[0]) + 1
    total = drawn.total()
    for letter in "ABC":
        assert drawn[letter] == pytest.approx(total / 3, abs=4 * np.sqrt(total * 2 / 9))


def test_an_answer_that_ends_with_end_of_text_gets_no_second_one():
    row = {
        "tokens": np.array([5, 6, EOS, 7, 8, EOS, 0], np.int32),
        "segment_ids": np.array([1, 1, 1, 1, 1, 1, 0], np.int32),
        "positions": np.array([0, 1, 2, 3, 4, 5, 0], np.int32),
        "is_maskable": np.array([0, 1, 1, 0, 1, 1, 0], bool),
    }
    seen = {tuple(draw_answers(EOS)(row, np.random.default_rng(n))["tokens"]) for n in range(20)}
    assert seen == {(5, 6, EOS, 0, 0, 0, 0), (5, 6, EOS, 7, 8, EOS, 0)}


@pytest.mark.parametrize("eos_padding", [0, 2])
def test_batches_depend_neither_on_hosts_nor_on_where_a_run_continues(directory, eos_padding):
    whole = batches(directory("padded"), 6, eos_padding=eos_padding)
    late = batches(directory("padded"), 2, start_step=4, eos_padding=eos_padding)
    part = batches(directory("padded"), 6, rows=[3, 1], num_threads=2, eos_padding=eos_padding)
    for name, array in whole[0].items():
        for step in range(2):
            np.testing.assert_array_equal(late[step][name], whole[4 + step][name])
        for step in range(6):
            np.testing.assert_array_equal(part[step][name], whole[step][name][[3, 1]])
        assert array.dtype == (bool if name == "is_maskable" else np.int32)


def test_rows_are_filled_up_to_the_longest_of_their_group(directory):
    plain = batches(directory("padded"), 3)
    filled = batches(directory("padded"), 3, eos_padding=2)
    for before, after in zip(plain, filled):
        lengths = (before["segment_ids"] > 0).sum(axis=1)
        longest = np.repeat(lengths.reshape(-1, 2).max(axis=1), 2)
        for row, (length, end) in enumerate(zip(lengths, longest)):
            assert after["tokens"][row, :length].tolist() == before["tokens"][row, :length].tolist()
            assert (after["tokens"][row, length:end] == EOS).all()
            assert after["is_maskable"][row, length:end].all()
            assert after["segment_ids"][row].tolist() == [1] * end + [0] * (T - end)
            assert after["positions"][row, :end].tolist() == list(range(end))
            assert not after["is_maskable"][row, end:].any()


def test_a_rainbow_fills_rows_up_with_a_cycle_that_begins_after_the_answer(directory):
    cycle = (250, 251, 252)
    eos = batches(directory("padded"), 3, eos_padding=4)
    rainbow = batches(directory("padded"), 3, eos_padding=4, padding_cycle=cycle)
    num_filled = 0
    for plain, other in zip(eos, rainbow):
        for name in ("segment_ids", "positions", "is_maskable"):
            np.testing.assert_array_equal(plain[name], other[name])
        for before, after in zip(plain["tokens"], other["tokens"]):
            (changed,) = np.nonzero(before != after)
            num_filled += len(changed)
            assert (before[changed] == EOS).all()
            assert after[changed].tolist() == [cycle[n % 3] for n in range(len(changed))]
            assert EOS in after  # the one that ends the answer
    assert num_filled > 20


@pytest.mark.parametrize(
    ("cycle", "says"),
    [
        ((250, TOKENIZER.mask_id), "not an ordinary id"),
        ((TOKENIZER.mask_id,), "not an ordinary id"),
        ((10**6,), "not an ordinary id"),
    ],
)
def test_a_rainbow_of_ids_that_mean_something_else_is_refused(directory, cycle, says):
    assert says in error_of(batches, directory("padded"), eos_padding=2, padding_cycle=cycle)


def test_rows_that_are_cut_in_two_are_not_filled_up(directory):
    says = error_of(batches, directory("padded"), eos_padding=2, split_probability=0.5)
    assert "cuts rows in two" in says


def test_each_record_comes_in_as_many_rows_as_the_objective_asks_for(directory):
    once = batches(directory("padded"), 4, eos_padding=2)
    twice = batches(directory("padded"), 8, eos_padding=2, copies=2)
    for name in once[0]:
        rows = np.concatenate([batch[name] for batch in once])
        copies = np.concatenate([batch[name] for batch in twice])
        np.testing.assert_array_equal(copies[::2], rows)
        np.testing.assert_array_equal(copies[1::2], rows)
    part = batches(directory("padded"), 8, rows=[1, 2], eos_padding=2, copies=2)
    np.testing.assert_array_equal(part[5]["tokens"], twice[5]["tokens"][[1, 2]])
    assert "multiple of 3" in error_of(batches, directory("padded"), copies=3)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"eos_padding": 2}, {"copies": 2}])
def test_batches_are_cut_to_the_shortest_bucket_that_holds_the_rows_of_all_hosts(
    directory, changes
):
    buckets = (20, 30, 40)
    whole = batches(directory("padded"), 12, **changes)
    cut = batches(directory("padded"), 12, length_buckets=buckets, **changes)
    # a host whose own rows may be short
    part = batches(directory("padded"), 12, rows=[2], length_buckets=buckets, **changes)
    late = batches(directory("padded"), 2, start_step=7, length_buckets=buckets, **changes)
    found = set()
    for step, (before, after) in enumerate(zip(whole, cut)):
        longest = (before["segment_ids"] > 0).sum(axis=1).max()
        length = min(n for n in (*buckets, T) if n >= longest)
        found.add(length)
        for name, array in after.items():
            np.testing.assert_array_equal(array, before[name][:, :length])
            np.testing.assert_array_equal(part[step][name], array[[2]])
            if step in (7, 8):
                np.testing.assert_array_equal(late[step - 7][name], array)
    assert len(found) > 1


def test_a_row_may_fill_its_bucket_exactly():
    rows = [
        {"segment_ids": (np.arange(12) < length).astype(np.int32)}
        for length in (3, 4, 1, 5, 12, 2, 8, 8)
    ]
    every_row = grain.MapDataset.source(rows)
    cut = BucketCut(every_row.batch(2), every_row, num_rows=2, lengths=(4, 8, 12))
    assert [batch["segment_ids"].shape for batch in cut] == [(2, 4), (2, 8), (2, 12), (2, 8)]


def test_buckets_for_rows_that_are_full_are_refused(directory):
    assert "rows=padded" in error_of(batches, directory("packed"), length_buckets=(20,))


def test_a_row_is_cut_in_two_at_a_random_place_with_the_probability_asked_for():
    row = {
        "tokens": np.arange(12, dtype=np.int32),
        "segment_ids": np.array([1] * 4 + [2] * 5 + [0] * 3, np.int32),
        "positions": np.array([0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0], np.int32),
        "is_maskable": np.arange(12) < 9,
    }
    cuts = collections.Counter()
    num = 4000
    for n in range(num):
        after = split_in_two(0.3)(row, np.random.default_rng(n))
        np.testing.assert_array_equal(after["tokens"], row["tokens"])
        np.testing.assert_array_equal(after["is_maskable"], row["is_maskable"])
        assert after["segment_ids"].dtype == after["positions"].dtype == np.int32
        starts = np.flatnonzero(np.diff(after["segment_ids"][:9], prepend=0))
        assert (
            after["segment_ids"].tolist()[:9]
            == np.repeat(np.arange(1, len(starts) + 1), np.diff([*starts, 9])).tolist()
        )
        assert not after["segment_ids"][9:].any()
        for start, end in zip(starts, [*starts[1:], 9]):
            assert after["positions"][start:end].tolist() == list(range(end - start))
        cuts[tuple(sorted(set(starts.tolist()) - {0, 4}))] += 1
    # 7 of the 8 cuts are within a document; 5 standard errors of a binomial
    for place in (1, 2, 3, 5, 6, 7, 8):
        assert cuts[(place,)] == pytest.approx(num * 0.3 / 8, abs=5 * np.sqrt(num * 0.3 / 8))
    assert set(cuts) == {(), *((place,) for place in (1, 2, 3, 5, 6, 7, 8))}


@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_rows_that_are_cut_are_the_same_on_every_host_and_after_a_restart(directory, probability):
    plain = batches(directory("packed"), 6)
    whole = batches(directory("packed"), 6, split_probability=probability)
    part = batches(directory("packed"), 6, rows=[3, 1], split_probability=probability)
    late = batches(directory("packed"), 2, start_step=4, split_probability=probability)
    for steps in (slice(4), slice(4, 6)):
        pairs = zip(plain[steps], whole[steps])
        assert any((a["segment_ids"] != b["segment_ids"]).any() for a, b in pairs)
    for step in range(6):
        for name, array in whole[step].items():
            np.testing.assert_array_equal(part[step][name], array[[3, 1]])
            if step >= 4:
                np.testing.assert_array_equal(late[step - 4][name], array)


def test_held_out_dialogues_are_scored_on_the_same_answers_always(directory):
    arguments = dict(batch_size=4, sequence_length=T, attend_across_documents=False, num_threads=0)
    first, again = (list(heldout_batches(directory("padded"), **arguments)) for _ in range(2))
    assert len(first) == len(again) > 0
    for one, other in zip(first, again):
        np.testing.assert_array_equal(one["is_maskable"], other["is_maskable"])
        for tokens, is_maskable, _ in documents(one):
            assert len(set(TOKENIZER.decode(tokens[is_maskable]))) == 2  # of a single answer


def test_settings_that_would_spoil_dialogues_are_refused(directory):
    packed = directory("packed")
    assert "random_length_probability" in error_of(batches, packed, random_length_probability=0.01)
    assert "must not see each other" in error_of(batches, packed, attend_across_documents=True)
    assert "rows=padded" in error_of(batches, packed, eos_padding=2)
    assert "multiple" in error_of(batches, directory("padded"), eos_padding=3)


def test_bits_per_byte_are_of_the_answers(directory):
    (summary,) = describe([(directory("padded"), 1.0)], sequence_length=T)
    assert 0.5 < summary.bytes_per_token["train"] < 1.0  # each answer has one token without bytes
