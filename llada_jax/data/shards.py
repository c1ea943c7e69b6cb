"""The store of records: flat files of records of one size, each followed by its checksum.

Record i of a shard is the bytes [i * s, (i + 1) * s) of its file, with s the size of a record and
of its checksum. So no index is needed, neither in the file nor in the memory of a process, and a
record takes one read of a file or one request to a bucket. docs/log.md (2026-11-26) compares this
with ArrayRecord and with zarr3.

The checksum is the CRC-32 of the record (zlib's, 4 bytes in little endian), which is looked at
whenever a record is read.
"""

import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from llada_jax.errors import UserError, one_line, reason
from llada_jax.storage import files
from llada_jax.storage.byte_ranges import Folder
from llada_jax.storage.remote import is_remote

CHECKSUM_BYTES = 4
SUFFIX = ".records"
_WRITE_REMEDY = (
    "check that the folder exists, can be written to and has free space, then run prepare again"
)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a split.

    Attributes:
        file: its path, relative to the directory of the data set.
        num_records: may be 0.
        num_bytes: of the file.
    """

    file: str
    num_records: int
    num_bytes: int


def stored_size(record_size: int) -> int:
    """Returns the bytes that a record takes in a shard."""
    return record_size + CHECKSUM_BYTES


def write_shard(path, records: Iterable[bytes]) -> int:
    """Writes the records, all of one size, as a file and returns their number.

    A shard that exists is whole and has reached the disk. Raises UserError when the disk refuses,
    and leaves no partial file, whatever is raised.
    """
    num_records = 0
    with (
        files.writing(path, remedy=_WRITE_REMEDY),
        files.whole_file(path) as partial,
        open(partial, "wb", buffering=1 << 20) as file,
    ):
        for record in records:
            file.write(record)
            file.write(zlib.crc32(record).to_bytes(CHECKSUM_BYTES, "little"))
            num_records += 1
    return num_records


class StoredRecords:
    """The bytes of the records of some shards, one after the other. Threads may read at the same
    time. A shard is opened when it is first read.
    """

    def __init__(self, directory: str, shards: Sequence[Shard], *, record_size: int):
        self._directory, self._folder = directory, Folder(directory)
        self._shards = [shard for shard in shards if shard.num_records]
        self._ends = list(accumulate(shard.num_records for shard in self._shards))
        self._record_size = record_size

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        """Returns the bytes of a record; UserError names the one that cannot be read."""
        shard, number = self._place_of(index)
        size = stored_size(self._record_size)
        found = ""
        # Read twice before it is called damaged: a bit may have flipped on the way here.
        for _ in range(2):
            try:
                data = self._folder.read(shard.file, number * size, size)
            except OSError as error:
                # Nothing is known about the shard, and the advice to delete it could cost hours.
                raise UserError(
                    f"{self.name_of(index)} cannot be read ({one_line(reason(error))}): "
                    + (
                        "check that the bucket holds it, the credentials and the network."
                        if is_remote(self._directory)
                        else "check the disk, the permissions and the limit of open files."
                    )
                ) from error
            record = data[: self._record_size]
            if len(data) < size:
                found = "the file ends before the record does"
            elif zlib.crc32(record) != int.from_bytes(data[self._record_size :], "little"):
                found = "its checksum is wrong"
            else:
                return record
        raise self.damaged(index, found)

    def name_of(self, index: int) -> str:
        """Returns the words that say which record of which file this is."""
        shard, number = self._place_of(index)
        return f"Record {number} of shard {os.path.join(self._directory, shard.file)}"

    def damaged(self, index: int, found: str) -> UserError:
        """Returns the error for a record that was read and is not what was written."""
        return UserError(f"{self.name_of(index)} is damaged ({found}): {remedy(self._directory)}.")

    def _place_of(self, index: int) -> tuple[Shard, int]:
        number = bisect_right(self._ends, index)
        shard = self._shards[number]
        return shard, index - (self._ends[number] - shard.num_records)


def remedy(directory: str) -> str:
    """Returns what to do about a shard that is lost or damaged."""
    if is_remote(directory):
        return "copy the shard again from where it was prepared"
    return "delete the shard and run prepare again, which writes only what is missing"


def check_sizes(directory: str, shards: Iterable[Shard], *, what_to_do: str) -> None:
    """Raises UserError when a shard is missing or its size is not the one that was written.

    Each folder is listed once, which takes one request to a bucket for a thousand files.
    """
    sizes: dict[str, dict[str, int]] = {}
    for shard in shards:
        folder, name = os.path.split(shard.file)
        if folder not in sizes:
            place = os.path.join(directory, folder)
            with files.reading(place, remedy="check its permissions"):
                sizes[folder] = files.sizes_in(place)
        path = os.path.join(directory, shard.file)
        if name not in sizes[folder]:
            raise UserError(f"Shard {path} is missing: {what_to_do}.")
        if sizes[folder][name] != shard.num_bytes:
            raise UserError(
                f"Shard {path} has {sizes[folder][name]} bytes instead of the {shard.num_bytes} "
                f"that were written: {what_to_do}."
            )
