"""Exact duplicates among the documents of all inputs: counted always, and left out on request.

Each unit leaves the hashes of its documents next to its receipt. Which copy is the first depends on
the order of the inputs alone, so that what is left out does not depend on the number of processes.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from llada_jax.data.build import (
    RECEIPTS,
    Job,
    Unit,
    duplicates_path,
    fingerprint,
    hashes_path,
    read_json,
    write_json,
    writing_to,
)
from llada_jax.storage import files

# Two 64-bit numbers: among 10^12 documents two different ones meet with a chance of 10^-15.
_HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
NOTE = "duplicates.json"
# How many hashes are compared at once. There is no room for another copy of all of them.
BLOCK = 1 << 20


def count_duplicates(output: Path, units: list[Unit]) -> int | None:
    """Returns how many documents are copies of an earlier one; None where a unit that an older
    version has finished left no hashes.
    """
    if not all(hashes_path(output, unit).exists() for unit in units):
        return None
    hashes = _read_hashes(output, units)
    hashes.sort()
    return sum(
        int(np.count_nonzero(_is_as_before(hashes[block]))) for block in _blocks(len(hashes))
    )


def without_duplicates(
    units: list[Unit], job: Job, hash_all: Callable[[list[Unit], Job], None]
) -> list[Unit]:
    """Returns the units as they are once every document that is a copy of an earlier one is left
    out, and writes down for each which these are.

    Args:
        hash_all: hash_all(units, job) writes the hashes of all units; it is called when the inputs
            have changed since the last time, or there was none.
    """
    note = job.output / RECEIPTS / NOTE
    key = fingerprint([unit.fingerprint for unit in units])
    known = read_json(note) if note.exists() else {}
    is_known = known.get("key") == key and all(
        duplicates_path(job.output, unit).exists() for unit in units
    )
    if not is_known:
        # An older note could be right again after the next change of an input.
        with writing_to(job.output):
            note.unlink(missing_ok=True)
        hash_all(units, dataclasses.replace(job, only_hashes=True))
        with writing_to(job.output):
            _write_duplicates(job.output, units)
            write_json(note, {"key": key})
    return [
        dataclasses.replace(
            unit,
            fingerprint=fingerprint(
                [
                    unit.fingerprint,
                    hashlib.sha256(duplicates_path(job.output, unit).read_bytes()).hexdigest(),
                ]
            ),
        )
        for unit in units
    ]


def _write_duplicates(output: Path, units: Sequence[Unit]) -> None:
    hashes = _read_hashes(output, units)
    # stable: of equal hashes the first document comes first
    order = np.lexsort((hashes["low"], hashes["high"]))
    is_copy = np.zeros(len(hashes), dtype=bool)
    for block in _blocks(len(hashes)):
        places = order[block]
        is_copy[places[1:][_is_as_before(hashes[places])]] = True
    ends = np.cumsum([_num_hashes(output, unit) for unit in units])
    for unit, copies in zip(units, np.split(is_copy, ends[:-1])):
        places = np.flatnonzero(copies).astype("<u8")
        files.write_whole(duplicates_path(output, unit), places.tobytes())


def _read_hashes(output: Path, units: Sequence[Unit]) -> np.ndarray:
    """Returns the hashes of all units, in their order, read into one array."""
    hashes = np.empty(sum(_num_hashes(output, unit) for unit in units), _HASH)
    start = 0
    for unit in units:
        part = np.fromfile(hashes_path(output, unit), _HASH)
        hashes[start : start + len(part)] = part
        start += len(part)
    return hashes


def _num_hashes(output: Path, unit: Unit) -> int:
    return hashes_path(output, unit).stat().st_size // _HASH.itemsize


def _blocks(num_hashes: int) -> Iterator[slice]:
    """Yields places in blocks, each overlapping the next by one place."""
    for start in range(0, num_hashes, BLOCK):
        yield slice(start, start + BLOCK + 1)


def _is_as_before(hashes: np.ndarray) -> np.ndarray:
    """Returns which hashes from the second on are equal to the one before."""
    return hashes[1:] == hashes[:-1]
