"""Exact duplicates among the documents of all inputs: counted always, and left out on request.

Each unit leaves the hashes of its documents next to its receipt. Which copy is the first depends on
the order of the inputs alone, so that what is left out does not depend on the number of processes.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
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

# Two 64-bit numbers: among 10^12 documents two different ones meet with a chance of 10^-15.
_HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
NOTE = "duplicates.json"


def count_duplicates(output: Path, units: list[Unit]) -> int | None:
    """Returns how many documents are copies of an earlier one; None where a unit that an older
    version has finished left no hashes.
    """
    paths = [hashes_path(output, unit) for unit in units]
    if not all(path.exists() for path in paths):
        return None
    hashes = np.concatenate([np.fromfile(path, _HASH) for path in paths])
    return len(hashes) - len(np.unique(hashes))


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


def _write_duplicates(output: Path, units: Iterable[Unit]) -> None:
    hashes = [np.fromfile(hashes_path(output, unit), _HASH) for unit in units]
    # return_index is that of the first of equal values
    _, first = np.unique(np.concatenate(hashes), return_index=True)
    is_copy = np.ones(sum(map(len, hashes)), dtype=bool)
    is_copy[first] = False
    ends = np.cumsum([len(part) for part in hashes])
    for unit, copies in zip(units, np.split(is_copy, ends[:-1])):
        np.flatnonzero(copies).astype("<u8").tofile(duplicates_path(output, unit))
