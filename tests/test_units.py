"""Numbers as people read them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_jax.units import bits_per_byte, format_bytes, format_count, format_seconds


def test_a_uniform_model_over_bytes_scores_eight_bits_a_byte():
    assert bits_per_byte(math.log(256), bytes_per_token=1.0) == pytest.approx(8.0)
    assert bits_per_byte(math.log(256), bytes_per_token=4.0) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (0.5, "0.50"),
        (12_345, "12.3k"),
        (999_999, "1.00M"),
        (1_234_567, "1.23M"),
    ]
    + [
        (8_015_581_184, "8.02B"),
        (2.3e12, "2.30T"),
        (4e16, "40000T"),
        (9.996, "10.0"),
        (-1500, "-1.50k"),
    ],
)
def test_counts(number, text):
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1023, "1.00 KiB"),
        (4.5 * 2**30, "4.50 GiB"),
        (95 * 2**30, "95.0 GiB"),
        (2**50, "1024 TiB"),
    ],
)
def test_bytes(number, text):
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (0.0073, "7.3ms"), (0.0949, "95ms"), (0.0951, "0.1s"), (0.44, "0.4s")]
    + [(9.96, "10s"), (59.6, "1m00s"), (190, "3m10s"), (3599.7, "1h00m")]
    + [(7500, "2h05m"), (86399.9, "1d00h"), (961_200, "11d03h")],
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


@given(st.floats(0, 1e15))
def test_counts_are_within_half_of_their_last_digit(number):
    text = format_count(number)
    factor = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1.0)
    assert float(text.rstrip("kMBT")) * factor == pytest.approx(number, rel=0.006, abs=0.006)
