"""One process at a time: advisory locks on files, which the system releases however the process
that holds them ends.
"""

import contextlib
import fcntl
import os

from llada_jax.errors import UserError


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


@contextlib.contextmanager
def only_run_in(workdir: str):
    """Keeps a second `train` out of a local workdir: each would remove what the other is saving.

    A remote workdir cannot be locked. There the newest train continues, and the older one finds out
    in Checkpoints.save (llada_jax.storage.remote.Claim).

    Raises:
        UserError: another train holds the workdir.
    """
    if "://" in workdir or not os.path.isdir(workdir):
        yield
        return
    # The directory itself is locked and not a file in it, so that nothing is left behind.
    directory = os.open(workdir, os.O_RDONLY)
    try:
        if not try_lock(directory, fcntl.LOCK_EX):
            raise UserError(
                f"Another train is writing into {workdir}; wait for it to end, or give another "
                "--workdir."
            )
        yield
    finally:
        os.close(directory)
