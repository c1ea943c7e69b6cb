"""Packed records: bytes there and back, the dataset.json that describes them, and errors that name
the file.
"""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import error_of

from llada_jax.data.records import (
    FORMAT,
    Records,
    check_shards,
    decode_record,
    encode_record,
    read_dataset,
    record_size,
    write_dataset_json,
)
from llada_jax.data.shards import write_shard

T, V = 16, 300


def numbered_record(number: int) -> bytes:
    """A full row whose first token is `number`; its documents begin at 0 and 5."""
    tokens = [number, *range(1, T)]
    return encode_record(tokens, [i in (0, 5) for i in range(T)], sequence_length=T, vocab_size=V)


def write_dataset(directory, num_records_by_shard=(3, 0, 4), **changes):
    """Writes a dataset of numbered records, the numbers running through the shards, and returns its
    directory.
    """
    directory.mkdir(exist_ok=True)
    shards, number = [], 0
    for i, num_records in enumerate(num_records_by_shard):
        path = directory / f"train-{i:05d}.records"
        assert (
            write_shard(path, (numbered_record(number + k) for k in range(num_records)))
            == num_records
        )
        number += num_records
        shards.append({"file": path.name, "num_records": num_records})
    counts = {
        "num_tokens": number * T,
        "num_bytes": 4 * number * T,
        "num_documents": 2 * number,
        "num_padding": 0,
    }
    content = {
        "format": FORMAT,
        "sequence_length": T,
        "fingerprint": "f00d",
        "tokenizer": {"kind": "bytes", "fingerprint": "beef", "vocab_size": V},
        "splits": {"train": {"num_records": number, **counts, "shards": shards}},
        "source": {},
    }
    write_dataset_json(directory, {**content, **changes})
    return directory


def segments_and_positions(starts: list[bool]) -> tuple[list[int], list[int]]:
    """The definition, one token after the other."""
    segment, position, segments, positions = 0, 0, [], []
    for i, is_start in enumerate(starts):
        if is_start or i == 0:
            segment, position = segment + 1, 0
        segments.append(segment)
        positions.append(position)
        position += 1
    return segments, positions


@st.composite
def rows(draw):
    sequence_length = draw(st.integers(1, 70))
    vocab_size = draw(st.sampled_from([1, 2, 259, 65_535, 65_536, 65_537, 126_464, 2**31 - 1]))
    num_tokens = draw(st.integers(1, sequence_length))
    tokens = draw(
        st.lists(st.integers(0, vocab_size - 1), min_size=num_tokens, max_size=num_tokens)
    )
    starts = draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    return sequence_length, vocab_size, tokens, starts


@pytest.mark.slow
@given(rows())
@settings(max_examples=300)
def test_a_decoded_record_is_the_encoded_row_and_padding(row):
    sequence_length, vocab_size, tokens, starts = row
    sizes = {"sequence_length": sequence_length, "vocab_size": vocab_size}
    data = encode_record(tokens, starts, **sizes)
    decoded = decode_record(data, **sizes)
    segments, positions = segments_and_positions(starts)
    padding = [0] * (sequence_length - len(tokens))
    assert decoded["tokens"].tolist() == tokens + padding
    assert decoded["segment_ids"].tolist() == segments + padding
    assert decoded["positions"].tolist() == positions + padding
    assert {values.dtype for values in decoded.values()} == {np.dtype(np.int32)}
    assert len(data) == record_size(**sizes)
    merged = decode_record(data, **sizes, with_documents=False)
    assert merged.keys() == {"tokens", "segment_ids"}
    assert merged["tokens"].tolist() == tokens + padding
    assert merged["segment_ids"].tolist() == [1] * len(tokens) + padding


def test_the_bytes_of_a_record_are_as_documented():
    data = encode_record([7, 258, 9], [False, True, True], sequence_length=10, vocab_size=300)
    assert data.hex(" ", -2) == "0300 0000 0700 0201 0900 0000 0000 0000 0000 0000 0000 0000 0600"
    wide = encode_record([7, 126_336], [True, False], sequence_length=3, vocab_size=126_464)
    assert wide.hex(" ", -4) == "02000000 07000000 80ed0100 00000000 01"
    assert record_size(sequence_length=4096, vocab_size=65_536) == 8_708
    assert record_size(sequence_length=4096, vocab_size=65_537) == 16_900


@pytest.mark.parametrize("tokens", [[-1], [V], [0, V + 1]])
def test_an_id_outside_the_vocabulary_is_not_written(tokens):
    assert f"the {V} ids" in error_of(
        encode_record, tokens, [True] * len(tokens), sequence_length=T, vocab_size=V
    )


@pytest.mark.parametrize(("num_tokens", "num_starts"), [(0, 0), (T + 1, T + 1), (3, 2)])
def test_a_row_of_the_wrong_length_is_not_written(num_tokens, num_starts):
    with pytest.raises(ValueError, match="must both be"):
        encode_record([1] * num_tokens, [True] * num_starts, sequence_length=T, vocab_size=V)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "0 bytes"),
        (numbered_record(1)[:-1], f"{record_size(sequence_length=T, vocab_size=V) - 1} bytes"),
        (b"\0\0\0\0" + numbered_record(1)[4:], "0 tokens"),
        (b"\x11\0\0\0" + numbered_record(1)[4:], "17 tokens"),
        (numbered_record(1)[:4] + b"\xff\xff" + numbered_record(1)[6:], "65535"),
    ],
)
def test_bytes_that_are_no_record_are_refused(data, expected):
    assert expected in error_of(decode_record, data, sequence_length=T, vocab_size=V)


def test_an_id_that_overflows_int32_is_refused():
    data = bytearray(encode_record([1, 2], [True, False], sequence_length=2, vocab_size=70_000))
    data[7] = 0x80
    assert str(2**31 + 1) in error_of(
        decode_record, bytes(data), sequence_length=2, vocab_size=70_000
    )


def test_read_dataset_returns_what_was_written(tmp_path):
    info = read_dataset(write_dataset(tmp_path / "set"))
    assert (info.sequence_length, info.fingerprint, info.vocab_size) == (T, "f00d", V)
    train = info.split("train")
    assert (train.num_records, train.num_tokens, train.num_bytes) == (7, 7 * T, 28 * T)
    assert (train.num_documents, train.num_padding) == (14, 0)
    assert [shard.num_records for shard in train.shards] == [3, 0, 4]
    folder = tmp_path / "set"
    assert all(os.path.getsize(folder / s.file) == s.num_bytes for s in train.shards)


def test_records_run_through_the_shards_and_skip_empty_ones(tmp_path):
    records = Records(read_dataset(write_dataset(tmp_path / "set")), split="train")
    assert [int(records[i]["tokens"][0]) for i in range(len(records))] == list(range(7))
    with pytest.raises(IndexError):
        records[7]


def test_a_directory_that_is_no_dataset_is_named(tmp_path):
    assert str(tmp_path / "none") in error_of(read_dataset, tmp_path / "none")
    assert "holds no dataset.json" in error_of(read_dataset, tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000 + "]" * 100_000, "not valid JSON"),
        ("[1]", "names no format"),
        ('{"splits": {}}', "names no format"),
        ('{"format": 2}', "sequence_length"),
        ('{"format": 5}', "format 5"),
        ('{"format": 1}', "sequence_length"),
        (
            '{"format": 1, "sequence_length": 8, "fingerprint": "", "tokenizer": {}, "splits": {}}',
            "has no field 'tokenizer.fingerprint'",
        ),
        (
            '{"format": 1, "sequence_length": 8, "fingerprint": "", "tokenizer": 3, "splits": {}}',
            "tokenizer=3, which must be an object",
        ),
    ],
)
def test_a_foreign_dataset_json_is_refused(tmp_path, text, expected):
    (tmp_path / "dataset.json").write_text(text)
    message = error_of(read_dataset, tmp_path)
    assert str(tmp_path / "dataset.json") in message
    assert expected in message


@pytest.mark.parametrize("value", [True, -1, 1.0, "7", None, [7], 10**30])
@pytest.mark.parametrize(
    "place",
    [
        ("splits", "train", "num_bytes"),
        ("splits", "train", "num_records"),
        ("splits", "train", "shards", 0, "num_records"),
        ("sequence_length",),
        ("tokenizer", "vocab_size"),
        ("lengths", "documents", "16"),
    ],
)
def test_a_count_that_is_none_is_refused_by_its_place(tmp_path, place, value):
    message = changed_dataset_json(tmp_path, place, value)
    assert f"{place[-1]}={value!r}, which must" in message
    assert "damaged or was not written by llada-jax prepare" in message


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("tokenizer", "mask_id"), V, f"must have ids below its vocab_size of {V}"),
        (("tokenizer", "mask_id"), -1, "must be greater than or equal to 0"),
        (("tokenizer", "eos_id"), 1, "must have the id 1 for its mask alone"),
        (("tokenizer", "fingerprint"), 7, "must be a text"),
        (("splits", "train", "num_records"), 8, "must have the num_records to which its shards"),
        (("splits", "train", "shards", 0, "file"), "../other.records", "in the directory of"),
        (("splits", "train", "shards", 0, "file"), "/tmp/other.records", "in the directory of"),
        (("splits", "train", "shards"), {}, "must be a list"),
        (("dialogues",), {"turns": "some", "rows": "packed"}, "'one', 'all' or 'each'"),
        (("lengths", "documents"), {"long": 1}, "must match pattern"),
    ],
)
def test_values_that_no_data_set_can_have_are_refused(tmp_path, place, value, says):
    assert says in changed_dataset_json(tmp_path, place, value)


def changed_dataset_json(folder, place, value) -> str:
    """Returns how a dataset.json is refused in which one value is another."""
    directory = write_dataset(folder / "set")
    content = json.loads((directory / "dataset.json").read_text())
    content["tokenizer"] |= {"mask_id": 1, "eos_id": 2}
    content["lengths"] = {"documents": {"16": 14}}
    write_dataset_json(directory, content)
    read_dataset(directory)
    within = content
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = value
    write_dataset_json(directory, content)
    return error_of(read_dataset, directory)


def test_an_unknown_split_is_answered_with_those_that_exist(tmp_path):
    assert "'train'" in error_of(read_dataset(write_dataset(tmp_path)).split, "trian")


def test_a_missing_or_truncated_shard_is_named_with_the_remedy(tmp_path):
    info = read_dataset(write_dataset(tmp_path))
    check_shards(info)
    shard = tmp_path / "train-00002.records"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    message = error_of(check_shards, info)
    assert str(shard) in message
    assert f"{len(whole) - 1} bytes instead of the {len(whole)}" in message
    assert "run prepare again" in message
    shard.unlink()
    message = error_of(check_shards, info)
    assert str(shard) in message
    assert "missing" in message


def test_bytes_that_have_the_checksum_of_no_record_name_the_shard(tmp_path):
    info = read_dataset(write_dataset(tmp_path))
    shard = tmp_path / "train-00002.records"
    rows = [numbered_record(3), b"\xff" + numbered_record(4)[1:], *map(numbered_record, (5, 6))]
    write_shard(shard, rows)
    records = Records(info, split="train")
    message = error_of(records.__getitem__, 4)
    assert f"Record 1 of shard {shard} is damaged (a record claims 255 tokens" in message
    assert [int(records[i]["tokens"][0]) for i in (0, 3, 5, 6)] == [0, 3, 5, 6]


def test_shards_of_another_length_than_dataset_json_says_are_refused(tmp_path):
    info = read_dataset(write_dataset(tmp_path, sequence_length=2 * T))
    assert f"Shard {tmp_path / 'train-00000.records'} has " in error_of(check_shards, info)
    assert "is damaged" in error_of(Records(info, split="train").__getitem__, 4)


def test_dataset_json_is_replaced_whole_or_not_at_all(tmp_path):
    write_dataset_json(tmp_path, {"format": 1, "name": "été"})
    assert json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8")) == {
        "format": 1,
        "name": "été",
    }
    with pytest.raises(TypeError):
        write_dataset_json(tmp_path, {"format": object()})
    assert os.listdir(tmp_path) == ["dataset.json"]
    assert str(tmp_path / "none") in error_of(write_dataset_json, tmp_path / "none", {})


def test_records_of_dialogues_say_which_tokens_are_of_answers():
    is_answer = [False, True, True, False, True]
    sizes = {"sequence_length": 9, "vocab_size": 300}
    starts = [True, False, False, True, False]
    plain = encode_record([7, 8, 9, 10, 11], starts, **sizes)
    data = encode_record([7, 8, 9, 10, 11], starts, **sizes, is_answer=is_answer)
    # the record of other text is what it was, and the new part comes after it
    assert data[: len(plain)] == plain
    assert data[len(plain) :] == bytes([0b10110, 0])
    decoded = decode_record(data, **sizes, with_answers=True)
    assert decoded["is_maskable"].tolist() == [*is_answer, False, False, False, False]
    assert decoded["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0, 0]
    assert "is_maskable" not in decode_record(plain, **sizes)
    assert "instead of" in error_of(decode_record, data, **sizes)
    assert "instead of" in error_of(decode_record, plain, **sizes, with_answers=True)
