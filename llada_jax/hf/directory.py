"""An export directory that appears whole or not at all, written by one process or by several."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.errors import UserError
from llada_jax.hf.peft import ADAPTER_FILES
from llada_jax.hf.write import SHARED
from llada_jax.storage import files
from llada_jax.storage.locks import try_lock


def check_output(output: str, *, force: bool) -> None:
    """Raises UserError when a directory cannot become an export, or is one and `force` is False."""
    if "://" in output:
        raise UserError(
            f"--output {output} must be a local or mounted directory; copy the finished one, or "
            "give --push-to-hub."
        )
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {output} is a file; give a directory.")
    if not path.exists() or not any(path.iterdir()):
        return
    # --force replaces the directory, and must never delete anything but an export.
    if not _holds_export(path):
        raise UserError(
            f"--output {output} is not empty and does not hold an export; give a new directory."
        )
    if not force:
        raise UserError(
            f"--output {output} holds an export already; give another, or --force to replace it."
        )


def _holds_export(path: Path) -> bool:
    """Whether `export` has written a directory: a whole model, or adapters alone."""
    names = {file.name for file in path.iterdir()}
    # A config.json alone would not do: other checkpoints have one, and so have many projects.
    return names >= {"config.json", SHARED[0]} or names == set(ADAPTER_FILES)


@contextlib.contextmanager
def becoming(output: Path, *, force: bool):
    """Yields OUTPUT.partial, which becomes OUTPUT if all goes well in every process and is removed
    otherwise.

    storage.files.whole_directory is the same for one process. Here all processes write into the
    folder, the first one makes and renames it, and a failure of one is the failure of all: a
    process that went on alone would wait for the others forever.

    Args:
        force: whether an export that is there, or has come there since it was asked, is replaced.

    Raises:
        UserError: there is an export and `force` is False, the disk refuses, another export writes
            there, or another process has failed.
    """
    is_first = jax.process_index() == 0
    partial = output.with_name(output.name + ".partial")
    with contextlib.ExitStack() as until_end:
        with everywhere(output):
            if is_first:
                begin_directory(partial, output, until_end, force=force)
        with everywhere(output):
            yield partial
        with everywhere(output):
            if is_first:
                files.take_name(partial, output)


@contextlib.contextmanager
def everywhere(output: Path):
    """Ends in all processes together, and raises in each of them when one has failed."""
    failure = None
    try:
        with files.writing(
            f"--output {output}", remedy="free some space, change its permissions, or give another"
        ):
            yield
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
    partial: Path, output: Path, until_end: contextlib.ExitStack, *, force: bool
) -> None:
    """Makes an empty OUTPUT.partial that is locked against other exports, and removed at the end if
    it is still there.
    """
    partial.mkdir(parents=True, exist_ok=True)
    # The directory itself is locked: a lock file would have to be left behind.
    descriptor = os.open(partial, os.O_RDONLY)
    until_end.callback(os.close, descriptor)
    # The one that held it may have given it its final name before it let it go.
    if not try_lock(descriptor, fcntl.LOCK_EX) or not _is_at(partial, descriptor):
        raise UserError(
            f"Another export is writing into {partial}; wait for it to end, or give another "
            "--output."
        )
    until_end.callback(_remove_if_at, partial, descriptor)
    # Left by an export that was killed.
    for leftover in partial.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    files.undo_replacement(output)
    # Again: while the checkpoint was read, another export may have finished.
    check_output(str(output), force=force)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open directory still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_if_at(partial: Path, descriptor: int) -> None:
    # Once ours has its final name, this name may be that of the next export.
    if _is_at(partial, descriptor):
        shutil.rmtree(partial, ignore_errors=True)
