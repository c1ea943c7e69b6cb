"""Shards are whole or absent, and a record of one that is damaged, cut short or gone is named."""

import functools
import os
import subprocess
import sys
import tracemalloc
import zlib

import pytest
from support.errors import error_of

from llada_jax.data.shards import Shard, StoredRecords, check_sizes, write_shard

SIZE = 20


def record(number: int) -> bytes:
    return bytes([number] * SIZE)


def stored(directory, *num_records_by_shard) -> StoredRecords:
    """Writes shards of numbered records, the numbers running through them."""
    shards, first = [], 0
    for i, num_records in enumerate(num_records_by_shard):
        name = f"{i}.records"
        write_shard(directory / name, map(record, range(first, first + num_records)))
        first += num_records
        shards.append(Shard(file=name, num_records=num_records, num_bytes=num_records * (SIZE + 4)))
    return StoredRecords(str(directory), shards, record_size=SIZE)


def test_a_shard_is_its_records_each_with_its_checksum(tmp_path):
    path = tmp_path / "shard"
    assert write_shard(path, map(record, range(50))) == 50
    assert os.listdir(tmp_path) == ["shard"]
    assert path.read_bytes() == b"".join(
        record(number) + zlib.crc32(record(number)).to_bytes(4, "little") for number in range(50)
    )
    # a shard that is written again replaces the old one
    assert write_shard(path, [record(7)]) == 1
    assert path.read_bytes()[:SIZE] == record(7)


def test_records_run_through_the_shards_and_skip_empty_ones(tmp_path):
    records = stored(tmp_path, 3, 0, 4)
    assert [records[i] for i in range(len(records))] == [record(i) for i in range(7)]
    assert records.name_of(3) == f"Record 0 of shard {tmp_path / '2.records'}"


def test_the_records_of_2_trillion_tokens_need_no_memory_each():
    shards = [
        Shard(file=f"{i}.records", num_records=125_000, num_bytes=125_000 * (SIZE + 4))
        for i in range(4_500)
    ]
    tracemalloc.start()
    try:
        records = StoredRecords("absent", shards, record_size=SIZE)
        assert len(records) == 562_500_000
        assert records.name_of(561_999_999) == "Record 124999 of shard absent/4495.records"
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_failure_while_writing_leaves_the_old_shard_and_no_partial_one(tmp_path):
    path = tmp_path / "shard"
    write_shard(path, [record(1)])
    before = path.read_bytes()

    def broken():
        yield record(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(path, broken())
    assert os.listdir(tmp_path) == ["shard"]
    assert path.read_bytes() == before


def test_a_full_disk_is_a_user_error_and_leaves_no_file(tmp_path):
    # A limit on the size of a file stands for a full disk: both make write(2) fail. It holds for a
    # whole process.
    program = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from llada_jax.data.shards import write_shard
from llada_jax.errors import UserError
count = 0
def records():
    global count
    for count in range(1_000_000):
        yield os.urandom(10_000)
try:
    write_shard(sys.argv[1], records())
except UserError as error:
    print(error)
    sys.exit(0 if count < 10_000 else "the failure was noticed only at the end")
sys.exit("no error")
"""
    path = tmp_path / "shard"
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert str(path) in result.stdout
    assert "free space" in result.stdout
    assert result.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_shard_in_a_missing_folder_is_a_user_error(tmp_path):
    path = tmp_path / "missing" / "shard"
    assert str(path) in error_of(write_shard, path, [record(1)])


@pytest.mark.parametrize("place", range(SIZE + 4))
def test_a_flipped_bit_is_found_in_every_byte_of_a_record_and_of_its_checksum(tmp_path, place):
    records = stored(tmp_path, 3, 4)
    shard = tmp_path / "1.records"
    data = bytearray(shard.read_bytes())
    data[2 * (SIZE + 4) + place] ^= 0x40
    shard.write_bytes(data)
    message = error_of(records.__getitem__, 5)
    assert f"Record 2 of shard {shard} is damaged (its checksum is wrong)" in message
    assert "run prepare again" in message
    assert [records[i] for i in (0, 3, 4, 6)] == [record(i) for i in (0, 3, 4, 6)]


def test_a_record_of_zeros_where_a_file_has_a_hole_is_damaged(tmp_path):
    records = stored(tmp_path, 3)
    os.truncate(tmp_path / "0.records", 24)
    os.truncate(tmp_path / "0.records", 72)
    assert records[0] == record(0)
    assert "Record 1 of shard" in error_of(records.__getitem__, 1)


@pytest.mark.parametrize("num_bytes", [0, 10, 24, 47])
def test_a_shard_that_is_cut_short_while_it_is_read_is_named(tmp_path, num_bytes):
    records = stored(tmp_path, 3)
    assert records[0] == record(0)
    os.truncate(tmp_path / "0.records", num_bytes)
    message = error_of(records.__getitem__, 1)
    assert f"Record 1 of shard {tmp_path / '0.records'} is damaged" in message
    assert "the file ends before" in message


@pytest.mark.parametrize("reason", ["No such file", "Is a directory"])
def test_a_shard_that_the_system_cannot_read_is_not_called_damaged(tmp_path, reason):
    records = stored(tmp_path, 3)
    shard = tmp_path / "0.records"
    shard.unlink()
    if reason == "Is a directory":
        shard.mkdir()
    message = error_of(records.__getitem__, 2)
    assert f"Record 2 of shard {shard} cannot be read" in message
    assert reason in message
    assert "delete" not in message


def test_the_sizes_of_shards_in_several_folders_are_compared(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "0.records", [record(1)])
    shards = [Shard(file=f"{f}/0.records", num_records=1, num_bytes=24) for f in ("a", "b")]
    check = functools.partial(check_sizes, str(tmp_path), shards, what_to_do="write it again")
    check()
    os.truncate(tmp_path / "b/0.records", 23)
    message = error_of(check)
    assert f"Shard {tmp_path / 'b/0.records'} has 23 bytes instead of the 24" in message
    assert message.endswith("write it again.")
    (tmp_path / "b/0.records").unlink()
    assert "b/0.records is missing" in error_of(check)
    (tmp_path / "b").rmdir()
    assert "b/0.records is missing" in error_of(check)
