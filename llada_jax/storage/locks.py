"""One process at a time: advisory locks on files, which the system releases however their holder
ends.
"""

import contextlib
import fcntl
import os

from llada_jax.errors import UserError


def try_lock(file, how: int) -> bool:
    """Locks an open file or descriptor with fcntl.LOCK_EX or LOCK_SH; returns whether that was
    possible at once.
    """
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (
        OSError
    ):  # a file system without locks: two commands at once are then the user's to avoid
        return True
    return True


@contextlib.contextmanager
def only_run_in(workdir: str):
    """Keeps a second `train` out of a local workdir: each would remove what the other is saving.

    A remote workdir cannot be locked; there the newest train goes on and Checkpoints.save tells the
    older one.
    """
    if "://" in workdir or not os.path.isdir(workdir):
        yield
        return
    directory = os.open(
        workdir, os.O_RDONLY
    )  # the directory itself is what is locked: nothing is left behind
    try:
        if not try_lock(directory, fcntl.LOCK_EX):
            raise UserError(
                f"Another train is writing into {workdir}; wait for it to end, or give another "
                "--workdir."
            )
        yield
    finally:
        os.close(directory)
