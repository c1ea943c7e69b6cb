"""Turns units of raw text into packed records, each unit on its own and restartable.

A unit is a few input files that one process reads, tokenizes and packs into one file per split. It
is finished when its receipt is written, which happens after these files have reached the disk; the
receipts add up to dataset.json, and the files become shards (llada_jax.data.assembly).
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llada_jax.data.inputs import Input, printable
from llada_jax.data.lengths import DOCUMENTS, LENGTHS, added, lengths_json, rounded_up
from llada_jax.data.packing import is_heldout, pack
from llada_jax.data.records import FORMAT, encode_record
from llada_jax.data.round_trip import num_encoded_bytes
from llada_jax.data.shards import SUFFIX, write_shard
from llada_jax.data.text import Cut, is_seekable, read_documents
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.errors import UserError
from llada_jax.storage import files
from llada_jax.streams import write_line

SPLITS = ("train", "heldout")
COUNTS = ("num_records", "num_tokens", "num_bytes", "num_documents", "num_padding")
# Documents that a lossy tokenizer cannot give back, and their bytes that no token stands for.
LOSSES = ("num_lossy_documents", "num_lost_bytes")
# Small files share a unit until it has this many bytes: ten thousand small files must not give ten
# thousand padded rows, while at a few MB/s a unit still takes well under a minute, all that an
# interruption can cost.
UNIT_BYTES = 64_000_000
# Documents are tokenized in batches of about this many characters: the libraries' fixed costs
# vanish in it.
BATCH_CHARS = 1_000_000
# The folder below the output directory with one receipt per finished unit, its records until they
# are in a shard, and the notes that a later run compares.
RECEIPTS = "receipts"
# In the fingerprints of data sets since version 0.1, whose records were the same in another store,
# so that a run goes on with the same data when the text was prepared again.
_FINGERPRINTED = 1
# Held by the command and shared with its workers, which may outlive it for a moment.
LOCK = f"{RECEIPTS}/lock"


def as_flag(key: str, value, other) -> str:
    """Returns a setting as the command line has it; of those of dialogues, what differs from the
    other ones.
    """
    flag = f"--{key.replace('_', '-')}"
    if value is None or value == "":
        return f"no {flag}"
    if value is True:
        return flag
    if isinstance(value, dict):
        differs = [f"{name}={v}" for name, v in value.items() if v and v != (other or {}).get(name)]
        return " ".join([flag, *differs])
    return f"{flag} {value!r}"


def fingerprint(content) -> str:
    """Returns a hex digest of plain JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def writing_to(output: Path) -> contextlib.AbstractContextManager[None]:
    """Turns what the disk refuses in its block into a UserError."""
    return files.writing(
        output,
        remedy="free some space or give another --output, and run prepare again: what is finished "
        "is kept",
    )


def write_json(path: Path, content) -> None:
    """Writes a receipt or a note, whole or not at all."""
    files.write_whole(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path):
    """Reads what `write_json` wrote; raises UserError when the file is damaged or unreadable."""
    # Read apart from parsed: a file that cannot be read must not be called damaged and deleted.
    with files.reading(path, remedy="check the disk and its permissions"):
        content = path.read_bytes()
    try:
        return files.decode_json(content)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run prepare again.") from error


@dataclass(frozen=True)
class Unit:
    """Inputs that one process turns into the records of both splits."""

    index: int
    inputs: tuple[Input, ...]
    fingerprint: str  # of everything that decides what the records hold


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all units share."""

    output: Path
    sequence_length: int
    cut: Cut
    heldout: float
    # Whether the tokenizer may lose text, so that each document is decoded to count its bytes.
    is_lossy: bool = False
    # Whether documents that duplicates_path lists are left out.
    drops_duplicates: bool = False
    # Whether a unit writes the hashes of its documents and nothing else.
    only_hashes: bool = False
    # llada_jax.data.dialogue_units.ChatSettings; None: the inputs are text.
    chat: Any = None


def in_parts(inputs: list[Input], cut: Cut) -> list[Input]:
    """Returns the inputs with parts of about UNIT_BYTES instead of every larger file that can
    be read from its middle on.

    A part has the documents that begin in it. The parts depend on the file alone, as units do.
    """
    parts = []
    for file in inputs:
        num_parts = -(-file.size // UNIT_BYTES) if is_seekable(file.path, cut) else 1
        ends = [file.size * (i + 1) // num_parts for i in range(num_parts)]
        parts += (
            [
                dataclasses.replace(file, size=end - start, span=(start, end))
                for start, end in zip([0, *ends], ends)
            ]
            if num_parts > 1
            else [file]
        )
    return parts


def units_of(inputs: list[Input], job: Job, tokenizer_fingerprint: str) -> list[Unit]:
    """Groups consecutive inputs into units of up to UNIT_BYTES; a larger input stands alone.

    The groups depend on the files alone and not on the number of workers, so that the same text
    gives the same records on any machine.
    """
    groups, size = [], 0
    for file in inputs:
        if not groups or size + file.size > UNIT_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.size
    cut = [job.cut.documents, job.cut.text_field, job.cut.document_start]
    cut += [job.cut.form] if job.cut.form else []
    settings = [FORMAT, tokenizer_fingerprint, job.sequence_length, job.heldout, cut]
    settings += ["lossy"] if job.is_lossy else []
    settings += ["without duplicates"] if job.drops_duplicates else []
    settings += [job.chat.to_json()] if job.chat else []
    return [
        Unit(index, tuple(group), fingerprint([index, settings, [file.identity for file in group]]))
        for index, group in enumerate(groups)
    ]


def size_of(units: list[Unit]) -> int:
    """Returns the bytes of all inputs, as they are stored."""
    return sum(file.size for unit in units for file in unit.inputs)


def records_path(output: Path, unit: Unit, split: str) -> Path:
    """Where a unit leaves its records of a split, if it has any."""
    return output / RECEIPTS / f"unit-{unit.index:05d}.{split}{SUFFIX}"


def receipt_path(output: Path, unit: Unit) -> Path:
    return output / RECEIPTS / f"unit-{unit.index:05d}.json"


def hashes_path(output: Path, unit: Unit) -> Path:
    """Where a unit leaves the hashes of its documents, in order, the empty ones left out."""
    return output / RECEIPTS / f"unit-{unit.index:05d}.hashes"


def duplicates_path(output: Path, unit: Unit) -> Path:
    """Where llada_jax.data.duplicates writes which of these documents are copies, as uint64."""
    return output / RECEIPTS / f"unit-{unit.index:05d}.duplicates"


def is_done(output: Path, unit: Unit) -> bool:
    """Whether the receipt belongs to this very unit. Where its records are by now is the question
    of llada_jax.data.assembly.
    """
    path = receipt_path(output, unit)
    return path.exists() and read_json(path)["fingerprint"] == unit.fingerprint


def has_training_text(output: Path) -> bool:
    """Whether a finished unit holds a document to train on."""
    receipts = map(read_json, output.glob(f"{RECEIPTS}/unit-*.json"))
    return any(receipt["splits"]["train"]["num_documents"] for receipt in receipts)


def remove_leftovers(output: Path, units: list[Unit]) -> None:
    """Removes half-written files, and what units have left that no longer exist."""
    keep = {records_path(output, unit, split).name for split in SPLITS for unit in units}
    for place_of in (receipt_path, hashes_path, duplicates_path):
        keep |= {place_of(output, unit).name for unit in units}
    for path in output.glob(f"{RECEIPTS}/unit-*"):
        if path.name not in keep:
            path.unlink()


def write_unit(
    unit: Unit, job: Job, tokenizer: Tokenizer, on_progress: Callable[..., None]
) -> None:
    """Writes the records of a unit and then its receipt."""
    if job.only_hashes:
        return write_hashes(unit, job, on_progress)
    counts = {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}
    num_empty = 0
    lossy = dict.fromkeys(LOSSES, 0)
    hashes: list[bytes] = []
    lengths: Counter = Counter()
    copies = set()
    if job.drops_duplicates:
        copies = set(np.fromfile(duplicates_path(job.output, unit), dtype="<u8").tolist())

    def training_documents(spool) -> Iterator[np.ndarray]:
        nonlocal num_empty
        for texts in _batches(unit, job, on_progress):
            full = [text for text in texts if text.strip()]
            num_empty += len(texts) - len(full)
            before = len(hashes)
            hashes.extend(hash_of(text) for text in full)
            full = [text for i, text in enumerate(full, start=before) if i not in copies]
            batch_bytes = batch_tokens = 0
            for text, ids in zip(full, tokenizer.encode_arrays(full)):
                split = "heldout" if is_heldout(text, fraction=job.heldout) else "train"
                num_bytes, num_tokens = len(text.encode()), len(ids) + 1
                if job.is_lossy and (decoded := tokenizer.decode(ids)) != text:
                    num_kept = num_encoded_bytes(text, decoded)
                    lossy["num_lossy_documents"] += 1
                    lossy["num_lost_bytes"] += num_bytes - num_kept
                    num_bytes = num_kept
                counts[split]["num_documents"] += 1
                counts[split]["num_bytes"] += num_bytes
                counts[split]["num_tokens"] += num_tokens
                batch_bytes += num_bytes
                batch_tokens += num_tokens
                if split == "train":
                    lengths[rounded_up(num_tokens)] += 1
                    yield ids
                else:
                    # not tofile, which does not say that a disk has refused what it buffered
                    spool.write(np.int64(len(ids)).tobytes() + ids.tobytes())
            on_progress(text_bytes=batch_bytes, tokens=batch_tokens)

    def heldout_documents(spool) -> Iterator[np.ndarray]:
        spool.seek(0)
        while len(length := np.fromfile(spool, dtype=np.int64, count=1)):
            yield np.fromfile(spool, dtype=np.int32, count=length[0])

    with writing_to(job.output):
        # A file of records is written in one go, so the held-out documents wait on the disk until
        # the training records are finished. Reading the inputs a second time instead would
        # decompress and tokenize them twice. An unnamed file, so that a kill leaves nothing behind.
        with tempfile.TemporaryFile(dir=job.output) as spool:
            documents = {"train": training_documents(spool), "heldout": heldout_documents(spool)}
            rows = {
                split: pack(
                    documents[split],
                    sequence_length=job.sequence_length,
                    eos_id=tokenizer.eos_id,
                )
                for split in SPLITS
            }
            splits = write_records(unit, job, rows, tokenizer, counts)
        files.write_whole(hashes_path(job.output, unit), b"".join(hashes))
        told = {
            "num_empty_documents": num_empty,
            **(lossy if job.is_lossy else {}),
            LENGTHS: {DOCUMENTS: added([lengths])},
        }
        write_receipt(unit, job, splits, told)


def write_hashes(unit: Unit, job: Job, on_progress: Callable[..., None]) -> None:
    """Writes what `hashes_path` describes, without tokenizing anything."""
    hashes = [
        hash_of(text)
        for texts in _batches(unit, job, on_progress)
        for text in texts
        if text.strip()
    ]
    with writing_to(job.output):
        files.write_whole(hashes_path(job.output, unit), b"".join(hashes))


def hash_of(text: str) -> bytes:
    """Returns 16 bytes that differ where the texts differ."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _batches(unit: Unit, job: Job, on_progress: Callable[..., None]) -> Iterator[list[str]]:
    """Yields the documents of a unit in lists of about BATCH_CHARS characters."""
    batch, size = [], 0
    for file in unit.inputs:
        for text in read_documents(
            file.path, job.cut, lambda num_bytes: on_progress(read_bytes=num_bytes), file.span
        ):
            batch.append(text)
            # plus one, so that empty documents fill a batch too
            size += len(text) + 1
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    yield batch


def write_records(
    unit: Unit,
    job: Job,
    rows: Mapping[str, Iterator[tuple[np.ndarray, ...]]],
    tokenizer: Tokenizer,
    counts: dict[str, dict],
) -> dict[str, dict]:
    """Writes the records of both splits, one after the other, and returns their parts of the
    receipt.

    Args:
        rows, counts: by split; see _write_split. The rows of "heldout" are read when those of
            "train" have been, and the counts when a split is finished.
    """
    # The receipt of older records could be right again after the next change of an input.
    receipt_path(job.output, unit).unlink(missing_ok=True)
    splits = {}
    for split in SPLITS:
        digest = _write_split(split, unit, job, rows[split], tokenizer, counts[split])
        splits[split] = {**counts[split], "digest": digest}
    return splits


def write_receipt(unit: Unit, job: Job, splits: dict[str, dict], told: dict) -> None:
    """Writes the receipt, with which a unit is finished.

    Args:
        splits: of write_records. told: what else is known of the unit.
    """
    receipt = {
        "fingerprint": unit.fingerprint,
        "input": [printable(file.path) for file in unit.inputs],
        **told,
        "splits": splits,
    }
    write_json(receipt_path(job.output, unit), receipt)


def _write_split(
    split: str,
    unit: Unit,
    job: Job,
    rows: Iterator[tuple[np.ndarray, ...]],
    tokenizer: Tokenizer,
    counts: dict,
) -> str | None:
    """Writes rows into a file, counts them in `counts`, and returns the digest of the records.
    Without rows it writes nothing and returns None.

    Args:
        rows: (tokens, starts), and of dialogues is_answer; see records.encode_record.
    """
    digest = hashlib.sha256()

    def records() -> Iterator[bytes]:
        num_tokens = 0
        for tokens, starts, *is_answer in rows:
            record = encode_record(
                tokens,
                starts,
                sequence_length=job.sequence_length,
                vocab_size=tokenizer.vocab_size,
                is_answer=is_answer[0] if is_answer else None,
            )
            digest.update(record)
            num_tokens += len(tokens)
            counts["num_records"] += 1
            counts["num_padding"] += job.sequence_length - len(tokens)
            yield record
        assert num_tokens == counts["num_tokens"], (num_tokens, counts)

    path = records_path(job.output, unit, split)
    stream = records()
    first = next(stream, None)
    if first is None:
        path.unlink(missing_ok=True)
        return None
    write_shard(path, itertools.chain([first], stream))
    return digest.hexdigest()


def dataset_json(
    receipts: list[dict], shards: Mapping[str, list[dict]], source: dict, tokenizer: Tokenizer
) -> dict:
    """Returns the content of dataset.json: the receipts added up. shards: by split.

    The fingerprint covers what the records hold and therefore not where the text came from: the
    same text in another folder is the same data set.
    """
    splits = {}
    for name in SPLITS:
        parts = [receipt["splits"][name] for receipt in receipts]
        splits[name] = {count: sum(part[count] for part in parts) for count in COUNTS}
        splits[name]["shards"] = shards[name]
    digests = {name: [receipt["splits"][name]["digest"] for receipt in receipts] for name in SPLITS}
    losses = {name: sum(receipt.get(name, 0) for receipt in receipts) for name in LOSSES}
    names = ("kind", "fingerprint", "vocab_size", "mask_id", "eos_id", "bos_id", "pad_id")
    return {
        "format": FORMAT,
        "sequence_length": source["sequence_length"],
        "fingerprint": fingerprint(
            [_FINGERPRINTED, source["sequence_length"], tokenizer.fingerprint, digests]
        ),
        "tokenizer": {name: getattr(tokenizer, name) for name in names},
        "splits": splits,
        "source": {
            **source,
            "num_empty_documents": sum(receipt["num_empty_documents"] for receipt in receipts),
            **(losses if any(losses.values()) else {}),
        },
        **lengths_json(receipts),
    }


def check_splits(content: dict, *, heldout: float) -> None:
    """Raises UserError when there is nothing to train on; prints a note when `heldout` is positive
    and no document was held out.
    """
    splits, source = content["splits"], content["source"]
    if not any(split["num_documents"] for split in splits.values()):
        raise UserError(
            f"The {source['num_files']} input files hold no text at all; give files with text in "
            "them."
        )
    if not splits["train"]["num_documents"]:
        raise UserError(
            f"All {splits['heldout']['num_documents']} documents fell into the held-out split; "
            f"lower --heldout {heldout}, or cut the text into more documents with --documents or "
            "--document-start."
        )
    if heldout and not splits["heldout"]["num_documents"]:
        write_line(
            f"prepare: none of {splits['train']['num_documents']} documents fell into the held-out "
            f"split; to have one, raise --heldout {heldout} or cut the text into more documents."
        )
