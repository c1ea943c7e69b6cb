"""Packed records: fixed-length rows of token ids, and the dataset.json that describes them.

A record of a dataset with `sequence_length` T is, in little endian,
    uint32                        num_tokens n, 1 <= n <= T
    uint16[T] or uint32[T]        token ids, uint16 when vocab_size <= 65,536; zero from n on
    uint8[ceil(T/8)]              bit i (least significant first) is 1 where token i begins a
    document
    uint8[ceil(T/8)]              of dialogues alone, whose maskable tokens are those of answers:
    bit i is 1 where token i is maskable
so every record of a dataset has the same number of bytes: 4 + 2 * 4096 + 512 = 8,708 at T = 4096
with uint16. llada_jax.data.shards stores them, each with a checksum.
"""

import json
import os
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from etils import epath

from llada_jax.data.array_records import PREPARE_AGAIN, ArrayRecords
from llada_jax.data.shards import Shard, StoredRecords, check_sizes, remedy, stored_size
from llada_jax.errors import UserError, look_up
from llada_jax.schemas import DatasetJson, StoredShard, StoredSplit, fault_of
from llada_jax.storage import files
from llada_jax.storage.remote import is_remote, path_of

FORMAT = 4
# Version 0.1 has written these, in ArrayRecord files: text, dialogues, and pairs of answers.
_ARRAY_RECORD_FORMATS = (1, 2, 3)
JSON_NAME = "dataset.json"


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
    data: bytes,
    *,
    sequence_length: int,
    vocab_size: int,
    with_answers: bool = False,
    with_documents: bool = True,
) -> dict[str, np.ndarray]:
    """Unpacks the bytes of `encode_record`.

    Returns {"tokens": int32[T], "segment_ids": int32[T], "positions": int32[T]}, and with_answers
    "is_maskable": bool[T], True on the tokens of answers. Segments count the
    documents of the row from 1 in order, 0 is padding; positions restart from 0 at each document,
    and at the beginning of a row that continues a document of the row before; tokens and positions
    of the padding are 0. with_documents=False, for text, takes a third of the time: all tokens of
    the row are segment 1, and there are no positions.

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

    tokens_T = stored_T.astype(np.int32)
    segment_ids_T = np.zeros(sequence_length, dtype=np.int32)
    if not with_documents:
        segment_ids_T[:n] = 1
        return {"tokens": tokens_T, "segment_ids": segment_ids_T}

    (starts,) = np.nonzero(np.unpackbits(bitmap, count=n, bitorder="little"))
    # Without a start at 0 the row opens with the rest of a document from the row before, which is a
    # segment too.
    is_continued = len(starts) == 0 or starts[0] > 0
    bounds = np.concatenate(([0] if is_continued else [], starts, [n])).astype(np.int32)
    lengths = bounds[1:] - bounds[:-1]
    positions_T = np.zeros(sequence_length, dtype=np.int32)
    segment_ids_T[:n] = np.repeat(np.arange(1, len(bounds), dtype=np.int32), lengths)
    positions_T[:n] = np.arange(n, dtype=np.int32) - np.repeat(bounds[:-1], lengths)
    row: dict[str, np.ndarray] = {
        "tokens": tokens_T,
        "segment_ids": segment_ids_T,
        "positions": positions_T,
    }
    if with_answers:
        answers = np.frombuffer(data, dtype=np.uint8, offset=end + bitmap_size)
        bits_T = np.unpackbits(answers, count=sequence_length, bitorder="little")
        row["is_maskable"] = bits_T.astype(bool) & (segment_ids_T > 0)
    return row


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
    """What dataset.json says.

    lengths: {"answers" or "documents": {length: number}} of the texts of the training split; {}
        where they were not counted. is_array_record: whether version 0.1 has written the records.
    """

    directory: str
    sequence_length: int
    fingerprint: str
    tokenizer: dict
    splits: dict[str, Split]
    dialogues: Dialogues | None = None
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    is_array_record: bool = False

    @property
    def record_size(self) -> int:
        """The bytes of a record, without its checksum."""
        return record_size(
            sequence_length=self.sequence_length,
            vocab_size=self.vocab_size,
            with_answers=self.dialogues is not None,
        )

    @property
    def vocab_size(self) -> int:
        """All rows of the vocabulary, special ids included."""
        return self.tokenizer["vocab_size"]

    def split(self, name: str) -> Split:
        """Returns the named split; UserError lists those that exist."""
        return look_up(self.splits, name, f"split of {self.directory}")

    def filled_split(self, name: str) -> Split:
        """Returns the named split; UserError when it is unknown or holds nothing."""
        split = self.split(name)
        if split.num_records == 0:
            raise UserError(
                f"The {name} split of {self.directory} holds no records: prepare more text, with "
                "--heldout above 0, or read another split."
            )
        return split


def write_dataset_json(directory, content: dict, *, concurrent: bool = False) -> None:
    """Writes DIR/dataset.json, whole or not at all; raises UserError when the disk refuses.

    Args:
        concurrent: see llada_jax.storage.files.whole_file.
    """
    path = epath.Path(directory) / JSON_NAME
    with files.writing(path, remedy="free some space or choose another --output"):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        files.write_whole(path, text, concurrent=concurrent)


def read_dataset(directory) -> DatasetInfo:
    """Reads DIR/dataset.json, local, gs:// or s3://, and no other file.

    Raises UserError when prepare has not written the directory, or has written it in another
    version of the format.
    """
    directory = path_of(directory)
    return parse_dataset(directory, read_json_of(directory))


def parse_dataset(directory: epath.Path, content: dict) -> DatasetInfo:
    """Returns the DatasetInfo in the given content of a directory's dataset.json; raises UserError
    when prepare has not written it.
    """
    is_array_record = content["format"] in _ARRAY_RECORD_FORMATS
    if is_array_record and is_remote(directory):
        raise UserError(
            f"{directory} was prepared by version 0.1, whose records are read from a disk alone: "
            f"copy it to a disk or mount it, or {PREPARE_AGAIN} with `llada-jax prepare "
            f"--input TEXT --output {directory}-new --sequence-length "
            f"{content.get('sequence_length')}`."
        )
    if fault := fault_of(content, DatasetJson):
        raise UserError(
            f"{directory / JSON_NAME} is damaged or was not written by llada-jax prepare, because "
            f"it {fault}: run prepare again into an empty directory."
        )
    stated = DatasetJson.model_validate(content)
    dialogues = None if stated.dialogues is None else Dialogues(**dict(stated.dialogues))
    record_bytes = record_size(
        sequence_length=stated.sequence_length,
        vocab_size=stated.tokenizer.vocab_size,
        with_answers=dialogues is not None,
    )

    def shard_of(shard: StoredShard) -> Shard:
        num_bytes = shard.num_records * stored_size(record_bytes)
        if is_array_record:
            num_bytes = shard.num_bytes_on_disk or 0
        return Shard(file=shard.file, num_records=shard.num_records, num_bytes=num_bytes)

    def split_of(split: StoredSplit) -> Split:
        counts = dict(split) | {"shards": tuple(map(shard_of, split.shards))}
        # Of other text than dialogues everything is scored.
        for name in ("tokens", "bytes"):
            if counts[f"num_scored_{name}"] is None:
                counts[f"num_scored_{name}"] = counts[f"num_{name}"]
        return Split(**counts)

    return DatasetInfo(
        directory=os.fspath(directory),
        sequence_length=stated.sequence_length,
        fingerprint=stated.fingerprint,
        tokenizer=content["tokenizer"],
        splits={name: split_of(split) for name, split in stated.splits.items()},
        dialogues=dialogues,
        lengths=stated.lengths,
        is_array_record=is_array_record,
    )


def check_shards(info: DatasetInfo) -> None:
    """Raises UserError when a shard is missing or its size is not the one that was written.

    For the start of a run. A shard that is damaged later, or whose bytes are, is named when a
    record of it is read.
    """
    what_to_do = PREPARE_AGAIN if info.is_array_record else remedy(info.directory)
    # All splits at once, because they are in the same folders, and each folder is listed once.
    shards = chain.from_iterable(split.shards for split in info.splits.values())
    check_sizes(info.directory, shards, what_to_do=what_to_do)


def read_json_of(directory: epath.Path) -> dict:
    """Returns the content of DIR/dataset.json once it is known to be one of these formats.

    Raises UserError, which was caused by an OSError when the file is not there.
    """
    path = directory / JSON_NAME
    with files.reading(path, remedy="check its permissions"):
        try:
            content = files.decode_json(path.read_text())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"{directory} holds no {JSON_NAME}: give the --output directory of a finished "
                "llada-jax prepare (parts are finished with prepare --join)."
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
    if content["format"] not in (*_ARRAY_RECORD_FORMATS, FORMAT):
        raise UserError(
            f"{path} has format {content['format']!r}, but this version reads the formats 1 to "
            f"{FORMAT}: prepare the text again."
        )
    return content


class Records:
    """The decoded records of one split, in the order of its shards, as a random-access source for
    grain.

    Threads may read at the same time. Shards are opened when first read. A record that cannot be
    read or decoded raises UserError with the shard, the record's number in it and the remedy.
    """

    def __init__(self, info: DatasetInfo, *, split: str, with_documents: bool = True):
        """with_documents: whether rows have segments and positions of their documents; rows of
        dialogues have them always.
        """
        shards = info.split(split).shards
        self._sizes: dict[str, Any] = {
            "sequence_length": info.sequence_length,
            "vocab_size": info.vocab_size,
            "with_answers": info.dialogues is not None,
            "with_documents": with_documents or info.dialogues is not None,
        }
        self._are_pairs = info.dialogues is not None and info.dialogues.are_pairs
        self._stored = (
            ArrayRecords(info.directory, shards)
            if info.is_array_record
            else StoredRecords(info.directory, shards, record_size=info.record_size)
        )
        self._num_shards = len(shards)

    def __len__(self) -> int:
        return len(self._stored)

    def __repr__(self) -> str:
        return f"Records({len(self)} records in {self._num_shards} shards)"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        data = self._stored[index]
        try:
            row = decode_record(data, **self._sizes)
        except UserError as error:
            raise self._stored.damaged(index, str(error)) from error
        if self._are_pairs:
            row["is_chosen"] = row["segment_ids"] % 2 == 1
        return row
