"""One process at a time: advisory locks on files, which the system releases however their holder ends."""

import fcntl


def try_lock(file, how: int) -> bool:
    """Locks an open file or descriptor with fcntl.LOCK_EX or LOCK_SH; returns whether that was possible at once."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: two commands at once are then the user's to avoid
        return True
    return True
