"""Readers of compressed files: all streams or an error, whatever lies between and behind them."""

import bz2
import gzip
import io
import lzma
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.data.compression import BLOCK_BYTES, READERS, Damaged, decompressed
from llada_jax.data.text import Cut, read_documents
from llada_jax.errors import UserError

# Every stream carries a checksum, so that damage anywhere in it can be seen.
COMPRESS = {
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}
# What may stand behind a stream: (bytes, whether the format allows it). Zeros are padding in .gz
# and .bz2, in .xz four at a time; .zst has skippable frames instead.
SKIPPABLE = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
PADDINGS = {
    ".gz": [b"", b"\0", b"\0" * 512],
    ".xz": [b"", b"\0" * 4, b"\0" * 512],
    ".bz2": [b"", b"\0", b"\0" * 512],
    ".zst": [b"", SKIPPABLE, SKIPPABLE * 3],
}
TEXTS = st.lists(st.binary(max_size=300), min_size=1, max_size=4)
each_compression = pytest.mark.parametrize("suffix", READERS)


def read(data: bytes, suffix: str) -> bytes:
    return b"".join(decompressed(io.BytesIO(data), f"a.txt{suffix}"))


def refused(data: bytes, suffix: str) -> bool:
    try:
        read(data, suffix)
    except (EOFError, Damaged, gzip.BadGzipFile, zlib.error, zstandard.ZstdError):
        return True
    return False


def test_every_compression_that_is_read_is_tested_here():
    assert list(READERS) == list(COMPRESS) == list(PADDINGS)


@each_compression
@given(texts=TEXTS, data=st.data())
@settings(max_examples=40)
def test_all_streams_are_read_with_any_padding_between_and_behind_them(suffix, texts, data):
    parts = [COMPRESS[suffix](t) + data.draw(st.sampled_from(PADDINGS[suffix])) for t in texts]
    assert read(b"".join(parts), suffix) == b"".join(texts)


@each_compression
@pytest.mark.parametrize("padding", [0, 1])
def test_streams_that_end_at_any_byte_of_a_block_are_read(suffix, padding, monkeypatch):
    monkeypatch.setattr("llada_jax.data.compression.BLOCK_BYTES", 7)
    monkeypatch.setattr("llada_jax.data.compression.plain_blocks.__defaults__", (7,))
    texts = [b"a" * 1000, b"", b"bc", b"d" * 50]
    data = b"".join(COMPRESS[suffix](text) + PADDINGS[suffix][padding] for text in texts)
    assert read(data, suffix) == b"".join(texts)


@each_compression
def test_a_truncation_at_any_byte_of_any_stream_is_refused(suffix):
    streams = [COMPRESS[suffix](text) for text in (b"one\n" * 9, b"two\n", b"three")]
    whole, boundaries = b"".join(streams), {len(streams[0]), len(streams[0] + streams[1])}
    for size in range(len(whole)):
        # Cut between two streams, a file looks like a whole one with fewer of them.
        assert refused(whole[:size], suffix) == (size not in boundaries), size


@each_compression
def test_a_flipped_bit_in_any_byte_of_any_stream_is_refused_or_changes_nothing(suffix):
    """Some header fields (a time, the name of a system) do not decide the text."""
    texts = [b"one\n" * 9, b"two\n", b"three"]
    whole = b"".join(COMPRESS[suffix](text) for text in texts)
    num_refused = 0
    for i in range(len(whole)):
        for bit in (0, 7):
            damaged = bytearray(whole)
            damaged[i] ^= 1 << bit
            if refused(bytes(damaged), suffix):
                num_refused += 1
            else:
                assert read(bytes(damaged), suffix) == b"".join(texts), (i, bit)
    assert num_refused > len(whole)


@each_compression
@pytest.mark.parametrize("garbage", [b"x", b"garbage behind", b"\0\0\0\0x", b"\n"])
def test_anything_else_between_or_behind_streams_is_refused(suffix, garbage):
    one, two = COMPRESS[suffix](b"one\n"), COMPRESS[suffix](b"two\n")
    assert refused(one + garbage + two, suffix)
    assert refused(one + two + garbage, suffix)
    assert refused(garbage + one, suffix)


@pytest.mark.parametrize("num_zeros", [1, 2, 3, 5])
def test_padding_of_xz_that_is_not_a_multiple_of_four_is_refused(num_zeros):
    one, zeros = lzma.compress(b"one\n"), b"\0" * num_zeros
    assert refused(one + zeros, ".xz")
    assert refused(one + zeros + one, ".xz")


def test_the_older_lzma_format_is_read_under_the_name_xz_but_not_as_a_later_stream():
    old = lzma.compress(b"one\n", format=lzma.FORMAT_ALONE)
    assert read(old, ".xz") == b"one\n"
    assert refused(lzma.compress(b"one\n") + old, ".xz")


@each_compression
def test_blocks_stay_small_when_the_text_is_very_repetitive(suffix):
    data = COMPRESS[suffix](b"\0" * (20 * BLOCK_BYTES)) * 2
    sizes = [len(block) for block in decompressed(io.BytesIO(data), f"a{suffix}")]
    assert sum(sizes) == 40 * BLOCK_BYTES
    # zstd is bounded by what 1 kB can become, the others by the block.
    assert max(sizes) <= (32 if suffix == ".zst" else 1) * BLOCK_BYTES


@each_compression
def test_the_error_names_the_file_and_what_to_do(suffix, tmp_path):
    path = tmp_path / f"a.txt{suffix}"
    one, two = COMPRESS[suffix](b"one\n"), COMPRESS[suffix](b"two\n")
    for data, message in (
        (b"", "is truncated"),
        (one + two[:-3], "is truncated"),
        (one + b"\xff" + two[1:], "is damaged"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"a\.txt\{suffix} {message}.*again\.$"):
            list(read_documents(str(path), Cut()))
