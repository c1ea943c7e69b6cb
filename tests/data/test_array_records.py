"""Data sets of version 0.1, whose records lie in ArrayRecord files, are read as before."""

import hashlib
import json
import shutil

import pytest
from support.errors import error_of
from support.paths import ROOT

from llada_jax.data.array_records import ArrayRecords
from llada_jax.data.build import dataset_json
from llada_jax.data.loader import describe, train_batches
from llada_jax.data.records import Records, read_dataset
from llada_jax.data.tokenizer import load_tokenizer


@pytest.fixture
def old(tmp_path):
    return shutil.copytree(ROOT / "tests/fixtures/version_0.1/data", tmp_path / "old")


def test_its_records_and_counts_agree(old):
    info = read_dataset(old)
    describe([(str(old), 1.0)], sequence_length=info.sequence_length)
    for name, split in info.splits.items():
        rows = Records(info, split=name)
        assert len(rows) == split.num_records > 0
        assert sum(int((row["segment_ids"] > 0).sum()) for row in rows) == split.num_tokens
        starts = sum(int((row["positions"] == 0)[row["segment_ids"] > 0].sum()) for row in rows)
        assert split.num_documents <= starts <= split.num_documents + split.num_records


@pytest.mark.parametrize("damage", ["flipped", "missing", "cut short"])
def test_a_damaged_one_is_named(old, damage):
    info, shard = read_dataset(old), old / "train-00000.arrayrecord"
    data = bytearray(shard.read_bytes())
    for place in range(0, len(data), 64):
        data[place] ^= 0x40
    shard.unlink()
    if damage != "missing":
        shard.write_bytes(data if damage == "flipped" else data[:100])
    message = error_of(list, Records(info, split="train"))
    assert f"Record 0 of shard {shard} " in message
    assert ("cannot be read" if damage == "missing" else "is damaged") in message
    if damage != "flipped":
        sources = [(str(old), 1.0)]
        refusal = error_of(describe, sources, sequence_length=info.sequence_length)
        assert str(shard) in refusal
        assert refusal.endswith("prepare the text again.")
        args = {"batch_size": 2, "sequence_length": info.sequence_length, "seed": 0}
        assert str(shard) in error_of(next, train_batches(sources, **args))


def test_the_same_records_have_the_same_fingerprint_in_the_store_of_today(old):
    """So that a run goes on with its data when they were prepared again."""
    info = read_dataset(old)
    receipt = json.loads((old / "receipts/unit-00000.json").read_text())
    for name, split in info.splits.items():
        stored = ArrayRecords(info.directory, split.shards)
        digest = hashlib.sha256(b"".join(stored[i] for i in range(len(stored))))
        assert digest.hexdigest() == receipt["splits"][name]["digest"]
    source = json.loads((old / "dataset.json").read_text())["source"]
    content = dataset_json(
        [receipt], {"train": [], "heldout": []}, source, load_tokenizer(old / "tokenizer")
    )
    assert content["fingerprint"] == info.fingerprint
