"""Measures of samples against counts by hand, and what counts as no worse."""

import numpy as np
import pytest

from llada_jax.evaluation import sample_quality
from llada_jax.evaluation.sample_quality import (
    Quality,
    Samples,
    best_of,
    difference,
    is_no_worse,
    quality,
    repetition,
    unigram_distance,
)


def samples_of(rng, *, num_rows=200, bits=2.0, vocabulary=20):
    """Rows of 12 random tokens of 3 bytes each, which cost about `bits` per byte."""
    num_bytes_B = np.full(num_rows, 36)
    nll_B = num_bytes_B * (bits + rng.normal(0, 0.2, num_rows)) * np.log(2)
    return Samples(nll_B, num_bytes_B, rng.integers(vocabulary, size=(num_rows, 12)))


def test_the_best_of_several_is_chosen_for_each_prompt_by_its_score():
    first = Samples(np.array([1.0, 2.0, 3.0]), np.array([4, 5, 6]), np.array([[7], [8], [9]]))
    second = Samples(-first.nll_B, first.num_bytes_B + 10, first.tokens_BT + 10)
    score_NB = np.array([[-1.0, -3.0, -2.0], [-2.0, -1.0, -2.0]])
    chosen = best_of([first, second], score_NB)
    assert chosen.nll_B.tolist() == [1, -2, 3]
    assert chosen.num_bytes_B.tolist() == [4, 15, 6]
    assert chosen.tokens_BT.tolist() == [[7], [18], [9]]
    # of one candidate there is no choice
    for ours, theirs in zip(best_of([second], score_NB[:1]), second, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_repetition_is_the_share_of_phrases_that_a_row_has_had_before():
    tokens_BT = np.array(
        [
            [1, 2, 3, 4, 5, 6, 7, 8],  # five phrases, all new
            [1, 1, 1, 1, 1, 1, 1, 1],  # the same one five times
            [1, 2, 3, 4, 1, 2, 3, 4],  # the last is the first
        ]
    )
    np.testing.assert_allclose(repetition(tokens_BT), [0, 4 / 5, 1 / 5])
    assert repetition(np.array([[1, 1]])).tolist() == [0]


def test_the_unigram_distance_is_half_the_sum_of_differences():
    frequency_V = np.array([0.5, 0.25, 0.25, 0.0])
    assert unigram_distance(np.array([[0, 0], [1, 2]]), frequency_V) == 0
    assert unigram_distance(np.array([[3, 3], [3, 3]]), frequency_V) == 1
    assert unigram_distance(np.array([[0, 0], [0, 2]]), frequency_V) == pytest.approx(0.25)


def test_bits_per_byte_are_those_of_all_rows_together():
    samples = Samples(np.log(2) * np.array([6.0, 2.0]), np.array([2, 6]), np.zeros((2, 4), int))
    assert quality(samples, np.array([1.0])) == pytest.approx((1.0, 0.0, 0.0))


def test_the_error_of_a_difference_is_that_of_its_mean():
    """Of independent rows of equal length: the root of the sum of both variances over the rows."""
    rng = np.random.default_rng(0)
    frequency_V = np.full(20, 1 / 20)
    ours, theirs = samples_of(rng, bits=2.1), samples_of(rng, bits=2.0)
    above, errors = difference(ours, theirs, frequency_V)
    assert above.bits_per_byte == pytest.approx(0.1, abs=5 * 0.02)
    assert errors.bits_per_byte == pytest.approx(0.2 * (2 / 200) ** 0.5, rel=0.25)
    # and for the same texts there is nothing to be uncertain about
    assert difference(ours, ours, frequency_V) == ((0, 0, 0), (0, 0, 0))


@pytest.mark.parametrize(("above", "expected"), [(1.9, True), (2.1, False)])
def test_two_standard_errors_are_what_chance_may_add(above, expected, monkeypatch):
    found = (Quality(0.0, above, 0.0), Quality(1.0, 1.0, 1.0))
    monkeypatch.setattr(sample_quality, "difference", lambda *_: found)
    assert is_no_worse(None, None, None) is expected


def test_samples_that_are_worse_by_any_one_measure_are_worse():
    rng = np.random.default_rng(1)
    frequency_V = np.full(20, 1 / 20)
    theirs = samples_of(rng)
    assert is_no_worse(theirs, theirs, frequency_V)
    assert is_no_worse(samples_of(rng, bits=1.8), theirs, frequency_V)
    assert not is_no_worse(samples_of(rng, bits=2.2), theirs, frequency_V)
    # cheap for the judge, but of few words
    assert not is_no_worse(samples_of(rng, bits=1.0, vocabulary=10), theirs, frequency_V)
    again = theirs._replace(tokens_BT=np.tile(theirs.tokens_BT[:, :6], 2))
    assert not is_no_worse(again, theirs, frequency_V)
