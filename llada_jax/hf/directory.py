"""An export directory that becomes visible whole or not at all."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.errors import UserError, reason
from llada_jax.hf.write import sync
from llada_jax.storage.locks import try_lock


@contextlib.contextmanager
def becoming(output: Path):
    """Yields OUTPUT.partial, which becomes OUTPUT if all goes well in every process and is removed
    otherwise.

    Raises:
        UserError: the disk refuses, another export writes there, or another process has failed.
    """
    is_first = jax.process_index() == 0
    partial, replaced = (
        output.with_name(output.name + ".partial"),
        output.with_name(output.name + ".replaced"),
    )
    with contextlib.ExitStack() as until_end:
        with everywhere(output):
            if is_first:
                begin_directory(partial, output, replaced, until_end)
        with everywhere(output):
            yield partial
        with everywhere(output):
            if is_first:
                move(partial, output, replaced)


@contextlib.contextmanager
def everywhere(output: Path):
    """Ends in all processes together, and raises in each of them when one has failed."""
    failure = None
    try:
        yield
    except OSError as error:
        failure = UserError(
            f"--output {output} cannot be written ({reason(error)}); free some space, change its "
            "permissions, or give another."
        )
        failure.__cause__ = error
    except UserError as error:
        failure = error
    if jax.process_count() > 1:
        has_failed = multihost_utils.process_allgather(np.array(failure is not None))
        if failure is None and has_failed.any():
            number = int(np.flatnonzero(has_failed)[0])
            failure = UserError(
                f"{output} was not written, because process {number} failed; its log says why."
            )
    if failure is not None:
        raise failure


def begin_directory(
    partial: Path, output: Path, replaced: Path, until_end: contextlib.ExitStack
) -> None:
    """Makes an empty OUTPUT.partial that is locked against other exports, and removed at the end if
    it is still there.
    """
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    until_end.callback(os.close, descriptor)
    if not try_lock(descriptor, fcntl.LOCK_EX):
        raise UserError(
            f"Another export is writing into {partial}; wait for it to end, or give another "
            "--output."
        )
    until_end.callback(shutil.rmtree, partial, ignore_errors=True)
    for leftover in partial.iterdir():  # of an export that was killed
        leftover.unlink()
    if replaced.exists() and not output.exists():  # killed between the two renames of `move`
        replaced.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def move(partial: Path, output: Path, replaced: Path) -> None:
    """Gives the finished directory its name; what bore it is removed once that has succeeded."""
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    sync(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)
