"""Readers of compressed files: .gz, .xz, .bz2 and .zst as blocks of bytes, whole or not at all.

A compressed file may hold several streams (members, frames) one after the other, as `cat a.gz b.gz`
and parallel compressors write it. All of them are read, and whatever follows a stream must be
another stream or padding of zeros. Python's own LZMAFile and BZ2File are not used, because they
take anything that is not a stream for the end of the file: a damaged second stream, and all text
behind it, would be lost without a word.
"""

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from llada_jax.errors import require

# Read at once: large enough to stream well from an object store, and small against the memory of
# any machine.
BLOCK_BYTES = 1 << 20


class Damaged(ValueError):
    """A stream holds what its format does not allow, or does not fit its checksum."""


def compression_of(path: str) -> str:
    """Returns the suffix in READERS that a name ends in, in small letters; "" when it has none."""
    suffix = PurePosixPath(path).suffix.lower()
    return suffix if suffix in READERS else ""


def decompressed(file, path: str) -> Iterator[bytes]:
    """Yields the content of an open file in blocks; the name decides how it is compressed.

    Raises:
        EOFError: the file ends inside a stream, or holds none at all.
        Damaged, gzip.BadGzipFile, zlib.error, zstandard.ZstdError: a stream is damaged, or
            something that is neither a stream nor padding follows it.
    """
    compression = compression_of(path)
    if not compression:
        yield from plain_blocks(file)
        return
    yield from READERS[compression](file)
    # Even an empty text has a header when it is compressed.
    if file.tell() == 0:
        raise EOFError("it has no bytes at all")


def plain_blocks(file, num_bytes: int = BLOCK_BYTES, *, end: int | None = None) -> Iterator[bytes]:
    """Yields what is left of a file in blocks, up to a position in it where one is given."""
    while block := file.read(num_bytes if end is None else min(num_bytes, end - file.tell())):
        yield block


def _gzip_blocks(file) -> Iterator[bytes]:
    # GzipFile reads every member, skips zeros behind each, and refuses whatever else follows.
    return plain_blocks(gzip.GzipFile(fileobj=file))


def _xz_blocks(file) -> Iterator[bytes]:
    def decompressor(number: int):
        # The older .lzma format under this name is read too, as xz itself does, but only where a
        # file begins: its header is too weak to tell a later stream from damage.
        return lzma.LZMADecompressor(format=lzma.FORMAT_AUTO if number == 1 else lzma.FORMAT_XZ)

    # Section 2.2 of the format: padding is a multiple of four bytes; xz refuses another.
    return _streams(file, decompressor, padding_unit=4)


def _bz2_blocks(file) -> Iterator[bytes]:
    return _streams(file, lambda number: bz2.BZ2Decompressor(), padding_unit=1)


def _streams(
    file,
    decompressor: Callable[[int], lzma.LZMADecompressor | bz2.BZ2Decompressor],
    *,
    padding_unit: int,
) -> Iterator[bytes]:
    """Yields the content of all streams; no block is longer than BLOCK_BYTES, however well the
    text is compressed.

    Args:
        decompressor: makes the decompressor of a stream from its number, from 1 on.
        padding_unit: bytes.
    """
    stream, num_zeros, num_streams = None, 0, 0
    for data in plain_blocks(file):
        while data or (stream and not stream.needs_input):
            if stream is None:
                rest = data.lstrip(b"\0") if num_streams else data
                num_zeros += len(data) - len(rest)
                data = rest
                if not data:
                    break
                if num_zeros % padding_unit:
                    raise Damaged(f"{num_zeros} bytes of padding after stream {num_streams}")
                num_streams += 1
                stream, num_zeros = decompressor(num_streams), 0
            try:
                block = stream.decompress(data, BLOCK_BYTES)
            except (lzma.LZMAError, OSError) as error:
                # bz2 raises OSError, which would look like a disk that cannot be read.
                raise Damaged(f"stream {num_streams}: {error}") from error
            yield block
            data = b""
            if stream.eof:
                stream, data = None, stream.unused_data  # type: ignore[attr-defined]
    if stream:
        raise EOFError(f"stream {num_streams} is not complete")
    if num_zeros % padding_unit:
        raise Damaged(f"{num_zeros} bytes of padding after stream {num_streams}")


def _zstd_blocks(file) -> Iterator[bytes]:
    # Not the library's own stream reader, which takes a truncated file for a complete one. A
    # decompressobj decompresses at once whatever it is given, however large that becomes, so it is
    # given little: 1 kB becomes a few kB of ordinary text, and never more than 32 MB. The format
    # has no zeros as padding but skippable frames, which decompress to nothing.
    zstandard = require("zstandard", extra="data")
    frame = None
    for block in plain_blocks(file, 1024):
        while block:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("the last frame is not complete")


READERS = {".gz": _gzip_blocks, ".xz": _xz_blocks, ".bz2": _bz2_blocks, ".zst": _zstd_blocks}
