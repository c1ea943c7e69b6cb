"""The store of data sets that version 0.1 prepared, ArrayRecord files, which are only read."""

import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from array_record.python.array_record_data_source import ArrayRecordDataSource

from llada_jax.data.shards import Shard
from llada_jax.errors import UserError, one_line

PREPARE_AGAIN = "prepare the text again"


class ArrayRecords:
    """What StoredRecords is for the shards of today. Riegeli, the format below ArrayRecord, hashes
    every record. A shard that was opened stays open, and takes 31 bytes of memory per record.
    """

    def __init__(self, directory: str, shards: Sequence[Shard]):
        self._directory = directory
        self._shards = [shard for shard in shards if shard.num_records]
        self._ends = list(accumulate(shard.num_records for shard in self._shards))
        paths = [os.path.join(directory, shard.file) for shard in self._shards]
        # "path[0:n]" passes on the count from dataset.json, so that the shards need not be opened
        # at the start of a run.
        self._source = (
            ArrayRecordDataSource(
                [f"{path}[0:{shard.num_records}]" for path, shard in zip(paths, self._shards)]
            )
            if paths
            else ()
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        """Returns the bytes of a record; UserError names the one that cannot be read."""
        try:
            return self._source[index]
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            found = one_line(str(error).splitlines()[0])
            # When a system call fails ("open() failed: Too many open files"), nothing is known
            # about the shard, and the advice to delete it could cost hours.
            if re.search(r"\w\(\) failed", found):
                raise UserError(
                    f"{self.name_of(index)} cannot be read ({found}): check the disk, the "
                    "permissions and the limit of open files."
                ) from error
            raise self.damaged(index, found) from error

    def name_of(self, index: int) -> str:
        """Returns the words that say which record of which file this is."""
        number = bisect_right(self._ends, index)
        shard = self._shards[number]
        record = index - (self._ends[number] - shard.num_records)
        return f"Record {record} of shard {os.path.join(self._directory, shard.file)}"

    def damaged(self, index: int, found: str) -> UserError:
        """Returns the error for a record that was read and is not what was written."""
        return UserError(f"{self.name_of(index)} is damaged ({found}): {PREPARE_AGAIN}.")
