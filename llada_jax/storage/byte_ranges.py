"""Ranges of bytes of many files, on a disk or in a bucket, of which only a few are open at a time.

On a disk a range is read with pread and not through a memory map: a map whose file was cut short,
or whose disk fails, ends the process by a signal, where a read returns an error that can be named.
"""

import functools
import os
import time

import tensorstore

from llada_jax.errors import Unreachable, one_line
from llada_jax.storage.arrays import kvstore_of
from llada_jax.storage.remote import is_remote, path_of
from llada_jax.streams import write_line
from llada_jax.units import format_seconds

# Of this process, so that 10,000 shards can be read under `ulimit -n 1024`. Opening a file again
# takes a few microseconds on a local disk.
MAX_OPEN_FILES = 256
# How often tensorstore asks a bucket again that does not answer: after 1, 2, 4, ... and at last
# every 32 s, 15 minutes in all.
NUM_RETRIES = 32
# Seconds after which a wait is reported, and between two such lines of this process.
WAITING_S = 30.0


class Folder:
    """The files below a folder, local, gs:// or s3://. Threads may read at the same time."""

    def __init__(self, path):
        """Raises UserError when the bucket of a URL does not answer; see remote.path_of."""
        self._path = os.fspath(path)
        self._store = None
        if is_remote(path):
            path_of(path)
            retries = {"max_retries": NUM_RETRIES}
            context = {"gcs_request_retries": retries, "s3_request_retries": retries}
            self._store = tensorstore.KvStore.open(
                kvstore_of(self._path), context=tensorstore.Context(context)
            ).result()

    def read(self, name: str, start: int, length: int) -> bytes:
        """Returns the bytes [start, start + length) of a file, and fewer where the file ends.

        Args:
            name: relative to the folder, with "/".

        Raises:
            OSError: the file is not there, or the system or the bucket refuses.
            Unreachable: the bucket has not answered, however often it was asked.
        """
        if self._store is None:
            # This object is part of the key: another one, made after a file was replaced, must not
            # see the old file.
            return _read_fully(_opened(os.path.join(self._path, name), self), start, length)
        try:
            read = self._wait(self._store.read(name, byte_range=slice(start, start + length)))
        except Exception as error:
            # tensorstore has a class for each of absl's status codes.
            # Of a range that reaches beyond the end, nothing is returned.
            if "OUT_OF_RANGE" in str(error):
                return b""
            if "retry attempts failed" in str(error):
                raise Unreachable(
                    f"{self._path} does not answer ({one_line(str(error))}); when it does, the "
                    "same command continues from the last checkpoint."
                ) from error
            raise OSError(str(error)) from error
        if read.state == "missing":
            raise FileNotFoundError(f"no such object in {self._path}")
        return read.value

    def _wait(self, reading: tensorstore.Future):
        """Returns the result; a line every WAITING_S says what is waited for."""
        began = time.monotonic()
        while True:
            try:
                return reading.result(timeout=WAITING_S)
            except TimeoutError:
                _say_what_is_waited_for(self._path, time.monotonic() - began)


_said_at = -WAITING_S


def _say_what_is_waited_for(path: str, seconds: float) -> None:
    """Says it once for all threads."""
    global _said_at
    if time.monotonic() - _said_at < WAITING_S / 2:
        return
    _said_at = time.monotonic()
    write_line(
        f"waiting     {format_seconds(seconds)} for {path} to answer, from which records are read"
    )


class _Descriptor:
    """An open file, closed when nothing refers to it any more.

    So a thread that reads from a file which leaves the table of open files keeps it open until it
    has finished; a number that was closed under it could already belong to another file.
    """

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(maxsize=MAX_OPEN_FILES)
def _opened(path: str, reader: Folder) -> _Descriptor:
    return _Descriptor(path)


def _read_fully(file: _Descriptor, start: int, length: int) -> bytes:
    data = os.pread(file.number, length, start)
    # A network file system may return less than it was asked for.
    while len(data) < length:
        more = os.pread(file.number, length - len(data), start + len(data))
        if not more:
            break
        data += more
    return data
