"""Records in buckets are those on the disk from which they were copied, and what is wrong with them
is named.
"""

import itertools

import numpy as np
import pytest
from etils import epath
from support.buckets import EMULATORS, emulated
from support.corpora import write_corpus
from support.counting import T, write_counting_dataset
from support.errors import error_of
from support.paths import ROOT

from llada_jax.__main__ import main
from llada_jax.data.loader import describe, heldout_batches, train_batches
from llada_jax.data.parts import join_parts
from llada_jax.data.preparation import prepare
from llada_jax.data.records import Records, read_dataset
from llada_jax.storage.remote import upload


@pytest.fixture(scope="module", params=list(EMULATORS))
def places(request, tmp_path_factory) -> tuple[str, str]:
    """A data set on a disk, and its copy in a bucket."""
    folder = tmp_path_factory.mktemp("remote")
    local = write_counting_dataset(folder / "set", first_token=1, train=(11, 0, 6))
    with emulated(request.param, folder / "log") as url:
        upload(local, f"{url}/some/set")
        yield local, f"{url}/some/set"


@pytest.mark.slow
def test_batches_and_summaries_are_those_of_the_disk(places):
    local, remote = places
    settings = {"batch_size": 4, "sequence_length": T, "seed": 3, "random_length_probability": 0.5}
    streams = [
        itertools.islice(train_batches([(place, 1.0)], num_threads=4, **settings), 12)
        for place in (local, remote)
    ]
    for ours, theirs in zip(*streams, strict=True):
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])
    for ours, theirs in zip(
        *(heldout_batches(place, batch_size=4, sequence_length=T) for place in places), strict=True
    ):
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
    described = [describe([(place, 1.0)], sequence_length=T)[0] for place in places]
    assert described[0].fingerprint == described[1].fingerprint
    assert described[1].directory == remote


def test_what_is_wrong_with_a_shard_in_a_bucket_is_named(places):
    _, remote = places
    info = read_dataset(remote)
    shard = epath.Path(remote) / "train-00002.records"
    whole = shard.read_bytes()
    try:
        flipped = bytearray(whole)
        flipped[len(whole) // 6 + 7] ^= 1
        shard.write_bytes(bytes(flipped))
        records = Records(info, split="train")
        message = error_of(records.__getitem__, 12)
        assert f"Record 1 of shard {shard} is damaged (its checksum is wrong)" in message
        assert "copy the shard again" in message
        assert records[11]["tokens"][0] > 0
        shard.write_bytes(whole[:-1])
        message = error_of(Records(info, split="train").__getitem__, 16)
        assert f"Record 5 of shard {shard} is damaged (the file ends" in message
        message = error_of(describe, [(remote, 1.0)], sequence_length=T)
        assert f"Shard {shard} has {len(whole) - 1} bytes instead of the {len(whole)}" in message
        shard.unlink()
        message = error_of(Records(info, split="train").__getitem__, 16)
        assert f"Record 5 of shard {shard} cannot be read (no such object" in message
        assert f"Shard {shard} is missing" in error_of(describe, [(remote, 1.0)], sequence_length=T)
    finally:
        shard.write_bytes(whole)


def test_parts_in_a_bucket_are_joined_as_on_a_disk(places, tmp_path, capsys):
    _, remote = places
    write_corpus(tmp_path / "corpus", num_files=2, num_documents=20)
    for number, file in enumerate(sorted((tmp_path / "corpus").iterdir())):
        settings = {"sequence_length": 32, "tokenizer": "bytes", "heldout": 0.2}
        prepare([str(file)], tmp_path / "set", part=(number, 2), **settings)
    url = f"{remote}-parts"
    upload(str(tmp_path / "set"), url)
    shard = next(epath.Path(f"{url}/part-00001-of-00002").glob("train-*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert main(["prepare", "--join", url]) == 2
    assert f"Shard {shard} has {len(whole) - 1} bytes" in capsys.readouterr().err
    shard.write_bytes(whole)
    assert main(["prepare", "--join", url]) == 0
    expected = join_parts(tmp_path / "set")
    info = read_dataset(url)
    assert info.fingerprint == expected["fingerprint"]
    for ours, theirs in zip(
        Records(info, split="heldout"),
        Records(read_dataset(tmp_path / "set"), split="heldout"),
        strict=True,
    ):
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])


def test_a_data_set_of_version_0_1_is_read_from_a_disk_alone(places):
    _, remote = places
    folder = epath.Path(f"{remote}-old")
    old = ROOT / "tests/fixtures/version_0.1/data/dataset.json"
    (folder / "dataset.json").write_text(old.read_text())
    refusal = error_of(read_dataset, folder)
    assert f"{folder} was prepared by version 0.1" in refusal
    assert f"`llada-jax prepare --input TEXT --output {folder}-new --sequence-length " in refusal


def test_a_folder_of_a_bucket_without_a_data_set_is_named(places):
    _, remote = places
    assert f"{remote}x holds no dataset.json" in error_of(read_dataset, f"{remote}x")
