"""Ranges of many files: few are open at a time, whoever reads, and none is mixed up."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.runs import free_port

from llada_jax.errors import Unreachable
from llada_jax.storage import byte_ranges
from llada_jax.storage.byte_ranges import Folder


def test_a_range_ends_where_the_file_does(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(10)))
    folder = Folder(tmp_path)
    assert folder.read("a", 3, 4) == bytes([3, 4, 5, 6])
    assert folder.read("a", 8, 4) == bytes([8, 9])
    assert folder.read("a", 10, 4) == b""


def test_short_reads_of_the_system_are_completed(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(range(10)))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, at: pread(file, min(length, 3), at))
    assert Folder(tmp_path).read("a", 1, 8) == bytes(range(1, 9))
    assert Folder(tmp_path).read("a", 1, 80) == bytes(range(1, 10))


def test_a_folder_that_is_opened_again_sees_the_file_that_was_replaced(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    before = Folder(tmp_path)
    assert before.read("a", 0, 3) == b"old"
    (tmp_path / "b").write_bytes(b"new")
    (tmp_path / "b").rename(tmp_path / "a")
    assert Folder(tmp_path).read("a", 0, 3) == b"new"


def test_threads_that_take_the_open_files_from_each_other_read_the_right_ones(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(byte_ranges, "_opened", lambda path, reader: byte_ranges._Descriptor(path))
    for number in range(50):
        (tmp_path / str(number)).write_bytes(number.to_bytes(2, "little") * 1000)
    folder = Folder(tmp_path)

    def is_right(i: int) -> bool:
        number = i % 50
        return folder.read(str(number), 2 * (i % 900), 2) == number.to_bytes(2, "little")

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_right, range(5_000)))


def test_thousands_of_files_are_read_under_a_limit_of_400_open_ones(tmp_path):
    program = """
import os, random, resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from llada_jax.storage.byte_ranges import Folder
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
for number in range(3_000):
    Path(sys.argv[1], str(number)).write_bytes(number.to_bytes(4, "little"))
folders = [Folder(sys.argv[1]) for _ in range(6)]  # as many data sets in one mixture
numbers = list(range(3_000)) * 2
random.Random(0).shuffle(numbers)
with ThreadPoolExecutor(16) as pool:
    read = pool.map(lambda i: folders[i % 6].read(str(i), 0, 4), numbers)
    assert [int.from_bytes(data, "little") for data in read] == numbers
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_a_bucket_that_does_not_answer_is_waited_for_and_then_a_reason_to_start_again(
    monkeypatch, capfd
):
    monkeypatch.setattr(byte_ranges, "path_of", lambda path: path)  # it did answer at the start
    monkeypatch.setattr(byte_ranges, "NUM_RETRIES", 1)
    monkeypatch.setattr(byte_ranges, "WAITING_S", 0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    folder = Folder("s3://bucket/set")
    with pytest.raises(Unreachable, match="s3://bucket/set does not answer") as refused:
        folder.read("train-00000.records", 0, 10)
    assert refused.value.exit_status == 42
    assert "for s3://bucket/set to answer" in capfd.readouterr().err
