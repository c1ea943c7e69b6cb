"""What the loader refuses before the first batch, and damage that it finds while it reads."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from support.counting import T, batches, write_counting_dataset
from support.errors import error_of

from llada_jax.data.loader import describe, heldout_batches, train_batches


@pytest.mark.parametrize("asked", [4, 16])
def test_another_sequence_length_is_answered_with_both_numbers(small, asked):
    for message in (
        error_of(train_batches, [(small, 1.0)], batch_size=2, sequence_length=asked, seed=0),
        error_of(heldout_batches, small, batch_size=2, sequence_length=asked),
        error_of(describe, [(small, 1.0)], sequence_length=asked),
    ):
        assert small in message
        assert f"sequence_length {T}" in message
        assert f"--sequence-length {asked}" in message


def test_datasets_of_different_tokenizers_are_both_named(small, tmp_path):
    other = write_counting_dataset(tmp_path / "other", first_token=1, fingerprint="cafe")
    message = error_of(batches, [(small, 1.0), (other, 1.0)], num_batches=1)
    assert small in message
    assert other in message
    assert "beef" in message
    assert "cafe" in message


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e-310, 1e308])
def test_a_weight_that_is_not_positive_or_cannot_be_compared_is_refused(small, weight):
    assert f"weight {weight}" in error_of(batches, [(small, 1.0), (small, weight)], num_batches=1)


def test_a_split_without_records_is_refused(large, tmp_path):
    assert "heldout split" in error_of(heldout_batches, large, batch_size=2, sequence_length=T)
    empty = write_counting_dataset(tmp_path / "empty", first_token=1, train=(0,))
    assert "train split" in error_of(batches, [(empty, 1.0)], num_batches=1)


def test_unusable_arguments_are_refused_before_the_first_batch(small, tmp_path):
    kwargs = {"batch_size": 2, "sequence_length": T, "seed": 0}
    assert "No dataset" in error_of(train_batches, [], **kwargs)
    assert "holds no dataset.json" in error_of(train_batches, [(str(tmp_path), 1.0)], **kwargs)
    assert "seed is -1" in error_of(train_batches, [(small, 1.0)], **{**kwargs, "seed": -1})
    assert "batch_size is 0" in error_of(
        train_batches, [(small, 1.0)], **{**kwargs, "batch_size": 0}
    )
    assert "1.5" in error_of(train_batches, [(small, 1.0)], random_length_probability=1.5, **kwargs)
    assert "Did you mean 'heldout'?" in error_of(
        heldout_batches, small, batch_size=2, sequence_length=T, split="held"
    )
    for rows in ([], [2], [-1]):
        with pytest.raises(ValueError, match="global rows"):
            train_batches([(small, 1.0)], rows=rows, **kwargs)


@pytest.mark.parametrize("num_threads", [0, 4])
def test_a_damaged_record_is_a_user_error_that_names_the_shard(tmp_path, num_threads):
    directory = write_counting_dataset(tmp_path / "damaged", first_token=1)
    for name in ("train-00001.records", "heldout-00001.records"):
        shard = Path(directory, name)
        data = bytearray(shard.read_bytes())
        # The stored row of 8 little-endian ids of 4 bytes that begins with the first id of this
        # shard.
        first_token = {"train": 1 + 11 * T - 3, "heldout": 1 + 17 * T - 6 + 3 * T - 3}[
            name.split("-")[0]
        ]
        data[data.index(np.arange(first_token, first_token + T, dtype="<u4").tobytes()) + 9] ^= 1
        shard.write_bytes(data)
    kwargs = {
        "batch_size": 4,
        "sequence_length": T,
        "num_threads": num_threads,
        "prefetch": num_threads,
    }
    for iterator, name in (
        (train_batches([(directory, 1.0)], seed=0, **kwargs), "train-00001.records"),
        (heldout_batches(directory, **kwargs), "heldout-00001.records"),
    ):
        message = error_of(list, itertools.islice(iterator, 10))
        assert f"Record 0 of shard {directory}/{name}" in message
        assert "run prepare again" in message
