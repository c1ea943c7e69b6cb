"""One process at a time: advisory locks on files, which the system releases however the process
that holds them ends.
"""

import contextlib
import fcntl
import os

from llada_jax.errors import UserError
from llada_jax.storage import files
from llada_jax.storage.remote import is_remote


def try_lock(file, how: int) -> bool:
    """Locks an open file without waiting; returns False when another process holds it.

    Args:
        file: an open file or descriptor.
        how: fcntl.LOCK_EX (no other holder) or fcntl.LOCK_SH (shared with others).
    """
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # The file system has no locks. Refusing would make it unusable, so it is up to the user not
        # to run two commands at once.
        return True
    return True


class InUse(UserError):
    """Another process writes into a directory, which must be left as it is."""


@contextlib.contextmanager
def only_run_in(
    workdir: str,
    *,
    holder: str = "Another train is",
    remedy: str = "wait for it to end, or give another --workdir",
):
    """Keeps a second `train` out of a local workdir: each would remove what the other is saving.

    A remote workdir cannot be locked. There the newest train continues, and the older one finds out
    in Checkpoints.save (llada_jax.storage.remote.Claim).

    Args:
        holder: who holds it, with the verb. remedy: what the user can do, without a full stop.

    Raises:
        InUse: another process holds the workdir.
    """
    with _locked(workdir, fcntl.LOCK_EX, holder=holder, remedy=remedy):
        yield


@contextlib.contextmanager
def only_sweep_in(workdir: str, *, shared: bool):
    """Keeps a second `sweep` out of a local DIR: it would start the same runs again, and adopt the
    trials of the first.

    Yields the descriptors that hold the lock, [] where there is none. Runs that inherit them hold
    it too, so that a sweep which was killed keeps the next one out until its runs have ended.

    Args:
        shared: whether others that share it may run, such as the tasks of an array, each of which
            has a run of its own.

    Raises:
        InUse: another sweep holds the directory.
    """
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    holder = "Another sweep, or a run that it left behind, is"
    remedy = "wait for it to end, or give another --workdir"
    with _locked(workdir, how, holder=holder, remedy=remedy) as held:
        yield held


@contextlib.contextmanager
def _locked(workdir: str, how: int, *, holder: str, remedy: str):
    if is_remote(workdir) or not os.path.isdir(workdir):
        yield []
        return
    # The directory itself is locked and not a file in it, so that nothing is left behind.
    with files.reading(f"The workdir {workdir}", remedy="change its permissions"):
        directory = os.open(workdir, os.O_RDONLY)
    try:
        if not try_lock(directory, how):
            raise InUse(f"{holder} writing into {workdir}; {remedy}.")
        yield [directory]
    finally:
        os.close(directory)
