"""Joins the records of units into shards of some GB.

A unit is small, so that an interruption costs little; a shard is large, so that terabytes are a few
thousand files. Consecutive units share a shard, which units depends on their sizes alone. A note
says which shards are finished: it is written after a shard has its name, and only then are the
files of its units removed, so a kill at any moment loses no record.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llada_jax.data.build import (
    RECEIPTS,
    SPLITS,
    Unit,
    fingerprint,
    read_json,
    records_path,
    write_json,
    writing_to,
)
from llada_jax.data.shards import SUFFIX
from llada_jax.storage import files

# The most bytes of a shard, unless a single unit has more.
SHARD_BYTES = 2 << 30
NOTE = "shards.json"
_COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class PlannedShard:
    """A shard and what goes into it.

    Attributes:
        units: with their number of records each, in order.
        key: of the content.
        num_bytes: of the whole shard.
    """

    file: str
    split: str
    units: tuple[tuple[Unit, int], ...]
    key: str
    num_bytes: int


def plan_shards(
    units: Sequence[Unit], receipts: Sequence[dict], *, stored_size: int
) -> list[PlannedShard]:
    """Returns the shards of all units, whose receipts are given; stored_size: of a record."""
    planned = []
    for split in SPLITS:
        groups: list[list[tuple[Unit, dict]]] = []
        size = 0
        for unit, receipt in zip(units, receipts, strict=True):
            part = receipt["splits"][split]
            num_bytes = part["num_records"] * stored_size
            if not num_bytes:
                continue
            if not groups or size + num_bytes > SHARD_BYTES:
                groups.append([])
                size = 0
            groups[-1].append((unit, part))
            size += num_bytes
        for number, group in enumerate(groups):
            held = tuple((unit, part["num_records"]) for unit, part in group)
            planned.append(
                PlannedShard(
                    file=f"{split}-{number:05d}{SUFFIX}",
                    split=split,
                    units=held,
                    key=fingerprint([stored_size, *(part["digest"] for _, part in group)]),
                    num_bytes=sum(num_records for _, num_records in held) * stored_size,
                )
            )
    return planned


def shards_json(planned: Sequence[PlannedShard]) -> dict[str, list[dict]]:
    """Returns what dataset.json says of the shards, by split."""
    return {
        split: [
            {"file": shard.file, "num_records": sum(number for _, number in shard.units)}
            for shard in planned
            if shard.split == split
        ]
        for split in SPLITS
    }


def unfinished(output: Path, planned: Sequence[PlannedShard]) -> list[PlannedShard]:
    """Returns the shards that are missing, cut short, or hold something else than they should."""
    finished = _finished(output)
    return [
        shard
        for shard in planned
        if finished.get(shard.file) != shard.key or _size(output / shard.file) != shard.num_bytes
    ]


def lost_units(output: Path, shards: Sequence[PlannedShard], *, stored_size: int) -> list[Unit]:
    """Returns the units of these unfinished shards whose records are not there any more, each once
    and in order.
    """
    lost = {
        unit.index: unit
        for shard in shards
        for unit, num_records in shard.units
        if _size(records_path(output, unit, shard.split)) != num_records * stored_size
    }
    return [lost[index] for index in sorted(lost)]


def join_units(output: Path, planned: Sequence[PlannedShard]) -> None:
    """Writes the shards that are not finished, and removes the files of units and shards that are
    not needed any more.
    """
    with writing_to(output):
        for path in output.glob(f"*{SUFFIX}*"):
            if path.name not in {shard.file for shard in planned}:
                path.unlink()
        for shard in unfinished(output, planned):
            # Without a note until it has its new content: the note of an older one could be right
            # again after the next change of an input.
            _note(output, shard, key=None)
            with files.whole_file(output / shard.file) as partial, open(partial, "wb") as file:
                for unit, _ in shard.units:
                    with open(records_path(output, unit, shard.split), "rb") as part:
                        shutil.copyfileobj(part, file, _COPY_BYTES)
            _note(output, shard, key=shard.key)
            _remove_parts(output, shard)
        for shard in planned:
            _remove_parts(output, shard)


def _remove_parts(output: Path, shard: PlannedShard) -> None:
    for unit, _ in shard.units:
        records_path(output, unit, shard.split).unlink(missing_ok=True)


def _finished(output: Path) -> dict[str, str]:
    """Returns the key of each shard that was finished."""
    path = output / RECEIPTS / NOTE
    return read_json(path) if path.exists() else {}


def _note(output: Path, shard: PlannedShard, *, key: str | None) -> None:
    finished = _finished(output)
    finished.pop(shard.file, None)
    write_json(output / RECEIPTS / NOTE, finished | ({shard.file: key} if key else {}))


def _size(path: Path) -> int:
    """Returns the bytes of a file, -1 when there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
