"""Stretches of the data that a run leaves out, after a rollback: which batch a step reads.

Without any, step s reads batch s. A stretch (first, last) takes those batches out of the order, for
good: later rollbacks to an earlier step do not bring them back. The list lies in
WORKDIR/rollbacks.json and in the record of every checkpoint.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from llada_jax.storage import remote

FILE = "rollbacks.json"

Stretch = tuple[int, int]  # first and last batch, counted from 1 like steps


def batch_of_step(step: int, skipped: Sequence[Stretch]) -> int:
    """Returns the number of the batch that a step reads, both counted from 1: the step-th that is
    not skipped.
    """
    batch = step
    for first, last in sorted(skipped):
        if batch >= first:
            batch += last - first + 1
    return batch


def skip_after(step: int, num_batches: int, skipped: Sequence[Stretch]) -> list[Stretch]:
    """Returns the stretches with the next `num_batches` batches that would follow `step` taken out
    as well.

    Those may lie on both sides of an older stretch; touching stretches become one.
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
    """What has been done to a run: how often it went back, and the batches that it leaves out
    since.
    """

    count: int = 0
    skipped: Sequence[Stretch] = ()


def read_rollbacks(workdir) -> Rollbacks:
    path = remote.path_of(workdir) / FILE
    return as_rollbacks(json.loads(path.read_text())) if path.exists() else Rollbacks()


def write_rollbacks(workdir, rollbacks: Rollbacks) -> None:
    remote.write_whole(remote.path_of(workdir) / FILE, json.dumps(rollbacks._asdict()) + "\n")


def as_rollbacks(record: dict) -> Rollbacks:
    """Returns the Rollbacks that a file or the record of a checkpoint holds as JSON."""
    return Rollbacks(record["count"], tuple(tuple(stretch) for stretch in record["skipped"]))
