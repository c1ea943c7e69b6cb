"""Stretches of the data that a run leaves out after a rollback: which batch a step reads.

Without any, step s reads batch s. A stretch (first, last) takes those batches out of the order for
good: a later rollback to an earlier step does not bring them back. The list is kept in
WORKDIR/rollbacks.json and in the record of every checkpoint.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from llada_jax.errors import UserError, reason
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

    count: int = 0  # type: ignore[assignment]
    skipped: Sequence[Stretch] = ()


def read_rollbacks(workdir) -> Rollbacks:
    """Returns what WORKDIR/rollbacks.json says; without that file, that nothing happened.

    Raises:
        UserError: the file cannot be read, or is damaged. Unlike an account it decides which data a
            run reads, so that a guess would be worse than a stop.
    """
    path = remote.path_of(workdir) / FILE
    if not path.exists():
        return Rollbacks()
    with files.reading(path, remedy="change its permissions and repeat the command"):
        content = path.read_bytes()
    try:
        return as_rollbacks(files.decode_json(content))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{path} cannot be read ({reason(error)}); put back a copy of it, or move it away to "
            "leave out the batches that the record of the newest checkpoint names."
        ) from error


def write_rollbacks(workdir, rollbacks: Rollbacks) -> None:
    """Replaces WORKDIR/rollbacks.json as a whole."""
    files.write_whole(remote.path_of(workdir) / FILE, json.dumps(rollbacks._asdict()) + "\n")


def rollbacks_of_run(found: Rollbacks, recorded: dict | None) -> Rollbacks:
    """Returns what a run leaves out: by its own file or, without one, by its newest checkpoint.

    A run that was restored from another workdir has no file of its own, and must leave out the same
    data as the run that it continues.

    Args:
        found: of read_rollbacks. recorded: of the record of the checkpoint; None: nothing.
    """
    return as_rollbacks(recorded) if recorded and not found.count else found


def as_rollbacks(record: dict) -> Rollbacks:
    """Returns what a file, or the record of a checkpoint, holds as JSON."""
    stretches = tuple((int(first), int(last)) for first, last in record["skipped"])
    if any(not 1 <= first <= last for first, last in stretches) or int(record["count"]) < 0:
        raise ValueError(f"it holds {record}, which are not stretches of batches")
    return Rollbacks(int(record["count"]), stretches)
