"""Packed records: fixed-length rows of token ids in ArrayRecord shards, and the dataset.json that
describes them.

A record of a dataset with `sequence_length` T is, in little endian,
    uint32                        num_tokens n, 1 <= n <= T
    uint16[T] or uint32[T]        token ids, uint16 when vocab_size <= 65,536; zero from n on
    uint8[ceil(T/8)]              bit i (least significant first) is 1 where token i begins a
    document
    uint8[ceil(T/8)]              of dialogues alone: bit i is 1 where token i is of an answer
so every record of a dataset has the same number of bytes: 4 + 2 * 4096 + 512 = 8,708 at T = 4096
with uint16. Riegeli, the format below ArrayRecord, hashes every record, so a flipped bit is found
when the record is read.
"""

import errno
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from array_record.python import array_record_module
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from llada_jax.errors import UserError, look_up
from llada_jax.storage import files

FORMAT = 1
# Its records say which tokens are of answers, and dataset.json has the part "dialogues". A version
# of the package that knows FORMAT alone would train on the prompts, and must refuse it.
DIALOGUE_FORMAT = 2
# Their documents are pairs of a chosen and a rejected answer: a version that knows DIALOGUE_FORMAT
# alone would train on the rejected ones too.
PAIR_FORMAT = 3
JSON_NAME = "dataset.json"
_WRITE_REMEDY = (
    "check that the folder exists, can be written to and has free space, then run prepare again"
)


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the little-endian integer type that stores ids below `vocab_size`: 2 bytes wide where
    they fit, otherwise 4.
    """
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def record_size(*, sequence_length: int, vocab_size: int, with_answers: bool = False) -> int:
    """Returns the bytes of one record: 4 + T * itemsize + ceil(T / 8), and ceil(T / 8) more with
    answers.
    """
    num_bitmaps = 2 if with_answers else 1
    num_bytes = 4 + sequence_length * token_dtype(vocab_size).itemsize
    return num_bytes + num_bitmaps * ((sequence_length + 7) // 8)


def encode_record(
    tokens, starts, *, sequence_length: int, vocab_size: int, is_answer=None
) -> bytes:
    """Packs one row into bytes.

    Args:
        tokens: int[n] token ids in [0, vocab_size), 1 <= n <= sequence_length.
        starts: bool[n], True where a document begins; False at 0 when the row continues the
            document of the row before.
        sequence_length: T; the row is padded to it.
        vocab_size: decides the width of an id and bounds it.
        is_answer: bool[n] of dialogues: the tokens that the loss may mask. None for other text.

    Raises UserError for an id outside the vocabulary, ValueError for arrays of the wrong length.
    """
    tokens, starts = np.asarray(tokens), np.asarray(starts, dtype=bool)
    n = len(tokens)
    if tokens.ndim != 1 or starts.shape != tokens.shape or not 1 <= n <= sequence_length:
        raise ValueError(
            f"{tokens.shape=} and {starts.shape=} must both be (n,) with 1 <= n <= "
            f"{sequence_length=}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"Token ids reach from {low} to {high}, outside the {vocab_size} ids of the "
            "vocabulary: use the tokenizer that has this vocab_size."
        )
    padded_T = np.zeros(sequence_length, dtype=token_dtype(vocab_size))
    padded_T[:n] = tokens
    starts_T = np.zeros(sequence_length, dtype=bool)
    starts_T[:n] = starts
    bitmaps = [starts_T]
    if is_answer is not None:
        is_answer = np.asarray(is_answer, dtype=bool)
        if is_answer.shape != tokens.shape:
            raise ValueError(f"{is_answer.shape=} must be that of the tokens, {tokens.shape}")
        bitmaps.append(np.pad(is_answer, (0, sequence_length - n)))
    return (
        np.uint32(n).astype("<u4").tobytes()
        + padded_T.tobytes()
        + b"".join(np.packbits(bitmap, bitorder="little").tobytes() for bitmap in bitmaps)
    )


def decode_record(
    data: bytes, *, sequence_length: int, vocab_size: int, with_answers: bool = False
) -> dict[str, np.ndarray]:
    """Unpacks the bytes of `encode_record`.

    Returns {"tokens": int32[T], "segment_ids": int32[T], "positions": int32[T]}, and with_answers
    "is_maskable": bool[T], True on the tokens of answers. Segments count the
    documents of the row from 1 in order, 0 is padding; positions restart from 0 at each document,
    and at the beginning of a row that continues a document of the row before; tokens and positions
    of the padding are 0.

    Raises UserError, without the name of a file, when the bytes are not a record of this length and
    vocabulary.
    """
    size = record_size(
        sequence_length=sequence_length, vocab_size=vocab_size, with_answers=with_answers
    )
    if len(data) != size:
        raise UserError(
            f"a record has {len(data)} bytes instead of the {size} of sequence_length "
            f"{sequence_length} with {vocab_size} token ids"
        )
    dtype = token_dtype(vocab_size)
    end = 4 + sequence_length * dtype.itemsize
    n = int.from_bytes(data[:4], "little")
    stored_T = np.frombuffer(data, dtype=dtype, count=sequence_length, offset=4)
    bitmap_size = (sequence_length + 7) // 8
    bitmap = np.frombuffer(data, dtype=np.uint8, count=bitmap_size, offset=end)
    if not 1 <= n <= sequence_length:
        raise UserError(f"a record claims {n} tokens, which must be 1 to {sequence_length}")
    if stored_T.max() >= vocab_size:
        raise UserError(
            f"a record holds the token id {stored_T.max()} of a vocabulary of {vocab_size}"
        )

    (starts,) = np.nonzero(np.unpackbits(bitmap, count=n, bitorder="little"))
    # Without a start at 0 the row opens with the rest of a document from the row before, which is a
    # segment too.
    is_continued = len(starts) == 0 or starts[0] > 0
    bounds = np.concatenate(([0] if is_continued else [], starts, [n])).astype(np.int32)
    lengths = bounds[1:] - bounds[:-1]
    segment_ids_T = np.zeros(sequence_length, dtype=np.int32)
    positions_T = np.zeros(sequence_length, dtype=np.int32)
    segment_ids_T[:n] = np.repeat(np.arange(1, len(bounds), dtype=np.int32), lengths)
    positions_T[:n] = np.arange(n, dtype=np.int32) - np.repeat(bounds[:-1], lengths)
    row: dict[str, np.ndarray] = {
        "tokens": stored_T.astype(np.int32),
        "segment_ids": segment_ids_T,
        "positions": positions_T,
    }
    if with_answers:
        answers = np.frombuffer(data, dtype=np.uint8, offset=end + bitmap_size)
        bits_T = np.unpackbits(answers, count=sequence_length, bitorder="little")
        row["is_maskable"] = bits_T.astype(bool) & (segment_ids_T > 0)
    return row


def write_shard(path, records: Iterable[bytes]) -> int:
    """Writes the records as one ArrayRecord file and returns their number.

    A shard that exists is whole and has reached the disk. Raises UserError when the disk refuses,
    and leaves no partial file, whatever is raised.
    """
    num_records = 0
    with files.writing(path, remedy=_WRITE_REMEDY), files.whole_file(path) as partial:
        # group_size:1 makes every record its own chunk, so that a shuffled read decodes one record
        # and none of its neighbours.
        writer = array_record_module.ArrayRecordWriter(os.fspath(partial), "group_size:1")
        try:
            for record in records:
                writer.write(record)
                num_records += 1
                # The writer keeps a failure to itself until it is closed; without this question a
                # full disk would be noticed only after all of the text has been tokenized.
                if not writer.ok():
                    break
        finally:
            _close(writer, path)
    return num_records


def _close(writer, path) -> None:
    """Closes the writer; the error that it kept until now becomes a UserError."""
    try:
        writer.close()
    except RuntimeError as error:
        raise UserError(
            f"{path} cannot be written ({str(error).splitlines()[0]}); {_WRITE_REMEDY}."
        ) from error


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One ArrayRecord file of a split."""

    path: str
    num_records: int
    num_bytes_on_disk: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """The counts of one split. num_tokens counts the text and one EOS per document; num_bytes is
    the text in UTF-8.
    """

    num_records: int
    num_tokens: int
    num_bytes: int
    num_documents: int
    num_padding: int
    shards: tuple[Shard, ...]
    # of dialogues, in which only the answers are scored; otherwise those of all text
    num_scored_tokens: int
    num_scored_bytes: int


@dataclass(frozen=True, kw_only=True)
class Dialogues:
    """How a data set of dialogues is read.

    turns: "one": one answer of each dialogue is drawn per epoch, and what follows it is left out;
        "all" or "each": every answer of a document is scored. rows: "packed" or "padded" (one
        document, or one pair, per row). records: "dialogues", or "pairs": of the documents of a row
        the odd ones, counted from 1, are chosen and each is followed by the one rejected.
    """

    turns: str
    rows: str
    records: str = "dialogues"

    @property
    def are_pairs(self) -> bool:
        return self.records == "pairs"


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What dataset.json says, checked against the files next to it."""

    directory: str
    sequence_length: int
    fingerprint: str
    tokenizer: dict
    splits: dict[str, Split]
    dialogues: Dialogues | None = None

    @property
    def vocab_size(self) -> int:
        """All rows of the vocabulary, special ids included."""
        return self.tokenizer["vocab_size"]

    def split(self, name: str) -> Split:
        """Returns the named split; UserError lists those that exist."""
        return look_up(self.splits, name, f"split of {self.directory}")


def write_dataset_json(directory, content: dict) -> None:
    """Writes DIR/dataset.json, whole or not at all; raises UserError when the disk refuses."""
    path = epath.Path(directory) / JSON_NAME
    with files.writing(path, remedy="free some space or choose another --output"):
        files.write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_dataset(directory) -> DatasetInfo:
    """Reads DIR/dataset.json and checks that every shard lies next to it and has the recorded size.

    Raises UserError when prepare has not written the directory, has written it in another version
    of the format, or when a shard is missing or damaged.
    """
    directory = epath.Path(directory)
    if "://" in str(directory):
        raise UserError(
            f"{directory} is not on a mounted disk: ArrayRecord reads local paths, so copy or "
            "mount it first."
        )
    content = _read_json(directory)
    try:
        info = DatasetInfo(
            directory=os.fspath(directory),
            sequence_length=_count(content, "sequence_length", least=2),
            fingerprint=str(content["fingerprint"]),
            tokenizer={
                **content["tokenizer"],
                "vocab_size": _count(content["tokenizer"], "vocab_size", least=1),
            },
            splits={
                name: _parse_split(directory, split) for name, split in content["splits"].items()
            },
            dialogues=(
                Dialogues(
                    turns=content["dialogues"]["turns"],
                    rows=content["dialogues"]["rows"],
                    records=content["dialogues"].get("records", "dialogues"),
                )
                if content["format"] in (DIALOGUE_FORMAT, PAIR_FORMAT)
                else None
            ),
        )
        info.tokenizer["fingerprint"]  # Compared across the datasets of a mixture.
        for name in ("mask_id", "eos_id", "bos_id", "pad_id"):
            if _count(info.tokenizer, name, default=0) >= info.vocab_size:
                raise ValueError(f"{name} is beyond the {info.vocab_size} ids of the vocabulary")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{directory / JSON_NAME} is damaged or was not written by llada-jax prepare "
            f"({type(error).__name__}: {error}): run prepare again into an empty directory."
        ) from error
    for split in info.splits.values():
        for shard in split.shards:
            _check_shard(shard)
    return info


def _read_json(directory) -> dict:
    """Returns the parsed dataset.json once it is known to be one of this format."""
    path = directory / JSON_NAME
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{directory} holds no {JSON_NAME}: give the --output directory of a finished "
            "llada-jax prepare."
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check its permissions."
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}): run prepare again into an empty directory."
        ) from error
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(
            f"{path} was not written by llada-jax prepare, because it names no format: give the "
            "directory of a dataset."
        )
    if content["format"] not in (FORMAT, DIALOGUE_FORMAT, PAIR_FORMAT):
        raise UserError(
            f"{path} has format {content['format']!r}, but this version reads the formats {FORMAT} "
            f"to {PAIR_FORMAT}: prepare the text again."
        )
    return content


def _parse_split(directory, content: dict) -> Split:
    """Builds a Split; raises KeyError, TypeError or ValueError when the content is not one."""
    shards = tuple(
        Shard(
            path=os.fspath(directory / shard["file"]),
            num_records=_count(shard, "num_records"),
            num_bytes_on_disk=_count(shard, "num_bytes_on_disk"),
        )
        for shard in content["shards"]
    )
    counts = ("num_records", "num_tokens", "num_bytes", "num_documents", "num_padding")
    split = Split(
        shards=shards,
        **{name: _count(content, name) for name in counts},
        num_scored_tokens=_count(content, "num_scored_tokens", default=content["num_tokens"]),
        num_scored_bytes=_count(content, "num_scored_bytes", default=content["num_bytes"]),
    )
    if sum(shard.num_records for shard in shards) != split.num_records:
        raise ValueError(f"the shards do not add up to num_records = {split.num_records}")
    return split


def _count(content: dict, name: str, *, least: int = 0, default: int | None = None) -> int:
    """Returns a number of dataset.json; ValueError unless it is an integer of at least `least`.

    Not int(), which takes true for 1 and "12" for 12.
    """
    value = content[name] if default is None else content.get(name, default)
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r} and not an integer of at least {least}")
    return value


def _check_shard(shard: Shard) -> None:
    """Raises UserError when a shard is missing or is not as long as when it was written."""
    try:
        size = epath.Path(shard.path).stat().length
    except OSError as error:
        reason = (
            "is missing"
            if error.errno in (errno.ENOENT, None)
            else f"cannot be read ({error.strerror})"
        )
        raise UserError(
            f"Shard {shard.path} {reason}: run prepare again, which writes only what is missing."
        ) from error
    if size != shard.num_bytes_on_disk:
        raise UserError(
            f"Shard {shard.path} has {size} bytes instead of the {shard.num_bytes_on_disk} that "
            "were written: delete it and run prepare again, which writes only what is missing."
        )


class Records:
    """The decoded records of one split, in the order of its shards, as a random-access source for
    grain.

    Threads may read at the same time. Shards are opened when first read. A record that cannot be
    read or decoded raises UserError with the shard, the record's number in it and the remedy.
    """

    def __init__(self, info: DatasetInfo, *, split: str):
        self._shards = [shard for shard in info.split(split).shards if shard.num_records]
        self._ends = list(accumulate(shard.num_records for shard in self._shards))
        self._sizes: dict[str, Any] = {
            "sequence_length": info.sequence_length,
            "vocab_size": info.vocab_size,
            "with_answers": info.dialogues is not None,
        }
        self._are_pairs = info.dialogues is not None and info.dialogues.are_pairs
        # "path[0:n]" passes on the count from dataset.json, so that thousands of shards need not be
        # opened at the start of a run.
        self._source = (
            ArrayRecordDataSource([f"{s.path}[0:{s.num_records}]" for s in self._shards])
            if self._shards
            else ()
        )

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"Records({len(self)} records in {len(self._shards)} shards)"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            row = decode_record(self._source[index], **self._sizes)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise UserError(self._explain(index, str(error).splitlines()[0])) from error
        if self._are_pairs:
            row["is_chosen"] = row["segment_ids"] % 2 == 1
        return row

    def _explain(self, index: int, reason: str) -> str:
        """Returns the error for a record that cannot be read: which one, why, and what to do."""
        number = bisect_right(self._ends, index)
        shard = self._shards[number]
        record = f"Record {index - (self._ends[number] - shard.num_records)} of shard {shard.path}"
        # When a system call fails ("open() failed: Too many open files"), nothing is known about
        # the shard, and the advice to delete it could cost hours.
        if re.search(r"\w\(\) failed", reason):
            return (
                f"{record} cannot be read ({reason}): "
                "check the disk, the permissions and the limit of open files."
            )
        return (
            f"{record} is damaged ({reason}): "
            "delete the shard and run prepare again, which writes only what is missing."
        )
