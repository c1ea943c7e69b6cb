"""Packing: every token and one EOS per document exactly once, in order; a split that only the text
decides.
"""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llada_jax.data.packing import is_heldout, pack

EOS = 99


@given(lengths=st.lists(st.integers(1, 40), max_size=30), sequence_length=st.integers(2, 17))
@example(lengths=[7, 15], sequence_length=8)  # ends exactly with a row
@example(lengths=[200], sequence_length=4)
@settings(max_examples=200)
def test_rows_joined_are_the_documents_with_an_eos_each(lengths, sequence_length):
    numbers = iter(range(1_000_000))
    documents = [np.array([next(numbers) for _ in range(n)], dtype=np.int32) for n in lengths]
    rows = list(pack(iter(documents), sequence_length=sequence_length, eos_id=EOS))
    expected, starts = [], []
    for document in documents:
        starts += [len(expected)]
        expected += [*document.tolist(), EOS]
    joined = np.concatenate([tokens for tokens, _ in rows]) if rows else np.array([])
    joined_starts = np.concatenate([starts for _, starts in rows]) if rows else np.array([])
    assert joined.tolist() == expected
    assert np.flatnonzero(joined_starts).tolist() == starts
    assert all(len(tokens) == len(is_start) == sequence_length for tokens, is_start in rows[:-1])
    assert all(
        1 <= len(tokens) <= sequence_length and tokens.dtype == np.int32 for tokens, _ in rows[-1:]
    )


def test_rows_come_as_soon_as_they_are_full():
    taken = []

    def documents():
        for i in range(1000):
            taken.append(i)
            yield np.arange(9)

    next(pack(documents(), sequence_length=20, eos_id=EOS))
    assert taken == [0, 1]


@pytest.mark.parametrize("fraction", [0.01, 0.3])
def test_the_held_out_share_is_the_fraction_asked_for(fraction):
    """20,000 documents; five standard deviations on either side, a chance of failure below 1e-6."""
    n = 20_000
    share = np.mean([is_heldout(f"document {i}", fraction=fraction) for i in range(n)])
    assert abs(share - fraction) < 5 * (fraction * (1 - fraction) / n) ** 0.5


@given(text=st.text(max_size=20))
def test_the_held_out_split_is_empty_at_0_and_grows_with_the_fraction(text):
    assert not is_heldout(text, fraction=0.0)
    assert is_heldout(text, fraction=0.1) <= is_heldout(text, fraction=0.2)


def test_the_held_out_split_is_the_same_on_every_machine():
    assert [i for i in range(40) if is_heldout(f"text {i}", fraction=0.1)] == [2, 3, 6, 18, 33, 38]
