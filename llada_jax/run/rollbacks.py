"""Stretches of the data that a run leaves out after a rollback: which batch a step reads.

Without any, step s reads batch s. A stretch (first, last) takes those batches out of the order for
good: a later rollback to an earlier step does not bring them back. The list is kept in
WORKDIR/rollbacks.json and in the record of every checkpoint.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from llada_jax.storage import files, remote

FILE = "rollbacks.json"

Stretch = tuple[int, int]  # first and last batch, counted from 1 like steps


def batch_of_step(step: int, skipped: Sequence[Stretch]) -> int:
    """Returns the number of the batch that a step reads, the step-th one that is not skipped.

    Both are counted from 1.
    """
    batch = step
    # in ascending order: each stretch moves the batch, and only then is it known whether it has
    # come to the next one
    for first, last in sorted(skipped):
        if batch >= first:
            batch += last - first + 1
    return batch


def skip_after(step: int, num_batches: int, skipped: Sequence[Stretch]) -> list[Stretch]:
    """Returns the stretches after the `num_batches` batches that follow `step` are taken out too.

    Those may lie on both sides of an older stretch; stretches that touch become one.
    """
    batches = [batch_of_step(step + i, skipped) for i in (1, num_batches)]
    merged: list[Stretch] = []
    for first, last in sorted([*(tuple(stretch) for stretch in skipped), (batches[0], batches[1])]):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


class Rollbacks(NamedTuple):
    """How often a run went back, and the batches that it leaves out since."""

    count: int = 0
    skipped: Sequence[Stretch] = ()


def read_rollbacks(workdir) -> Rollbacks:
    """Returns what WORKDIR/rollbacks.json says; without that file, that nothing happened."""
    path = remote.path_of(workdir) / FILE
    return as_rollbacks(json.loads(path.read_text())) if path.exists() else Rollbacks()


def write_rollbacks(workdir, rollbacks: Rollbacks) -> None:
    """Replaces WORKDIR/rollbacks.json as a whole."""
    files.write_whole(remote.path_of(workdir) / FILE, json.dumps(rollbacks._asdict()) + "\n")


def as_rollbacks(record: dict) -> Rollbacks:
    """Returns what a file, or the record of a checkpoint, holds as JSON."""
    return Rollbacks(record["count"], tuple(tuple(stretch) for stretch in record["skipped"]))
