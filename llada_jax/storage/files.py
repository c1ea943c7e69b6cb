"""Files and directories that appear whole or not at all, and what is said when a disk refuses.

Everything that is written under a final name goes through this file. The new content is written
next to it as NAME.partial and takes the name in one rename, so a reader, or the next start after a
kill at any moment, sees the old content or the new one and never a half.

The policy for `durable`: a whole write reaches the disk before its name does. A rename alone
protects against a killed process but not against a machine that loses power: many file systems
write the new name first, and the file then comes back with no bytes, which is worse than not
having written it. So the bytes are synced, then the name changes, then the directory is synced.
`durable=False` is for what may be lost with the machine and is checked when it is read (the copies
of the state on a host's own disk carry checksums), where the wait would cost training time.

In a bucket (gs://, s3://) an object appears whole when it is closed, and there is neither a rename
nor a folder to rename, so files are written in place. Of a folder of objects, the caller writes
that file last which shows readers that the folder is complete.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from llada_jax.errors import UserError, reason
from llada_jax.storage.remote import is_remote

# Directories cannot be synced on some network and FUSE file systems, which answer with one of
# these; a rename is there as durable as the system makes it.
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP)
# How long no file of a folder may go before the folder counts as one that stays.
QUIET_SECONDS = 1.0


@contextlib.contextmanager
def writing(what, *, remedy: str) -> Iterator[None]:
    """Turns what a disk or bucket refuses in its block (OSError) into a UserError.

    The message is "WHAT cannot be written (REASON); REMEDY." and names the file where the system
    does and `what` does not. Only writes belong in the block: a file that cannot be read would be
    reported as one that cannot be written.

    Args:
        what: a path, or words with a path in them, such as "--output data/books".
        remedy: what the user can do, without a full stop.
    """
    try:
        yield
    except OSError as error:
        # `filename` is a descriptor's number where a call was given one, and None for a full disk.
        name = error.filename if isinstance(error.filename, str) else ""
        where = f"{name}: " if name and name not in str(what) else ""
        raise UserError(f"{what} cannot be written ({where}{reason(error)}); {remedy}.") from error


@contextlib.contextmanager
def reading(what, *, remedy: str) -> Iterator[None]:
    """Turns what a disk or bucket refuses in its block (OSError), and text in it that is not UTF-8,
    into a UserError: "WHAT cannot be read (REASON); REMEDY.".

    Only the reading belongs in the block. What the content says is another mistake with another
    remedy: a file that is called damaged gets deleted.

    Args:
        what: a path, or words with a path in them.
        remedy: what the user can do, without a full stop.
    """
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} cannot be read ({reason(error)}); {remedy}.") from error


def write_whole(
    path, content: str | bytes, *, durable: bool = True, concurrent: bool = False
) -> None:
    """Writes a small file of which a reader sees all or nothing. The folder must exist.

    Args:
        path: local, gs:// or s3://.
        content: bytes, or text that is written as UTF-8.
        durable, concurrent: see `whole_file`.

    Raises:
        OSError: the disk refuses; `writing` turns it into a UserError.
    """
    data = content.encode() if isinstance(content, str) else content
    with whole_file(path, durable=durable, concurrent=concurrent) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def whole_file(path, *, durable: bool = True, concurrent: bool = False) -> Iterator[epath.Path]:
    """Yields the path to write to; the file takes the name `path` when the block ends well.

    When the block raises, what was written is removed and an older file stays as it was. In a
    bucket the path itself is yielded.

    Args:
        path: local, gs:// or s3://.
        durable: wait until the file and its name are on the disk (see the policy above).
        concurrent: other processes may write the same file at the same time, and the last one
            wins: each then gets a partial file of its own. A killed process leaves it behind for
            good, while the shared name is overwritten by the next attempt, hence not the default.

    Raises:
        OSError: the disk refuses.
    """
    path = epath.Path(path)
    if is_remote(path):
        yield path
        return
    # Not the process id: the hosts of a cluster share folders, and in a container it is often 1.
    own = f".{uuid.uuid4().hex[:12]}" if concurrent else ""
    partial = path.with_name(f"{path.name}{own}.partial")
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


@contextlib.contextmanager
def whole_directory(path, *, durable: bool = True) -> Iterator[epath.Path]:
    """Yields an empty directory to write into; it takes the name `path` when the block ends well.

    An older directory of that name is replaced. When the block raises, what was written is removed
    and the older one stays. In a bucket the path itself is yielded, and the caller writes that file
    last which shows readers that the folder is complete.

    Args:
        path: local, gs:// or s3://.
        durable: wait until all files and the names are on the disk (see the policy above).

    Raises:
        OSError: the disk refuses.
    """
    path = epath.Path(path)
    if is_remote(path):
        yield path
        return
    undo_replacement(path)
    partial = path.with_name(f"{path.name}.partial")
    # Left by a process that was killed.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        take_name(partial, path, durable=durable)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def take_name(partial, path, *, durable: bool = True) -> None:
    """Gives a finished local directory its name; an older one is removed once that has succeeded.

    A directory cannot be renamed onto one that holds files, so there are two renames: the older one
    becomes PATH.replaced, then `partial` becomes PATH. A process that is killed between the two
    leaves no PATH; `undo_replacement` gives the older one its name back.
    """
    partial, path = epath.Path(partial), epath.Path(path)
    if durable:
        _sync_tree(partial)
    replaced = _replaced(path)
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    partial.rename(path)
    if durable:
        sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def undo_replacement(path) -> None:
    """Puts an older directory back in its place when `take_name` was killed between its renames."""
    path = epath.Path(path)
    if not path.exists() and _replaced(path).exists():
        _replaced(path).rename(path)
    shutil.rmtree(_replaced(path), ignore_errors=True)


def _replaced(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.name}.replaced")


def decode_json(text: str | bytes) -> Any:
    """Returns json.loads(text); ValueError for whatever is wrong with it, too deep nesting too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it has more brackets within brackets than Python can read") from error


def sizes_in(folder) -> dict[str, int]:
    """Returns {name: bytes} of the files of a folder, {} where there is no folder; local, gs:// or
    s3://. A bucket is asked once for a thousand files.

    Raises:
        OSError: the disk or bucket refuses.
    """
    if is_remote(folder):
        from fsspec.core import url_to_fs

        filesystem, path = url_to_fs(os.fspath(folder))
        try:
            listed = filesystem.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            # The clients share no class of errors for what can go wrong.
            raise OSError(str(error)) from error
        return {
            entry["name"].rsplit("/", 1)[1]: entry["size"]
            for entry in listed
            if entry["type"] == "file"
        }
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def is_going(folder) -> bool:
    """Whether a folder is gone, or another process is removing it at this moment; local, gs:// or
    s3://. Waits until it is gone, or until nothing of it has gone for QUIET_SECONDS.
    """
    folder, left, since = epath.Path(folder), math.inf, time.monotonic()
    while folder.exists():
        # nothing is counted in a bucket, where a folder goes in few requests
        if (found := sum(len(names) for _, _, names in os.walk(folder))) < left:
            left, since = found, time.monotonic()
        if time.monotonic() - since > QUIET_SECONDS:
            return False
        time.sleep(0.05)
    return True


def check_readable(path, *, whole: bool = False) -> None:
    """Raises UserError when this user may not read a local file or folder.

    For the moment after something was not found or a library has failed: a file in a folder that is
    hidden counts as missing, and some libraries say so of any file that they may not read.

    Args:
        whole: looks at everything below the folder as well.
    """
    if is_remote(path):
        return
    walked = os.walk(path) if whole else ()
    below = (os.path.join(at, name) for at, *names in walked for name in sum(names, []))
    for one in (os.fspath(path), *below):
        try:
            mode = os.R_OK | (os.X_OK if stat.S_ISDIR(os.stat(one).st_mode) else 0)
            may_read = os.access(one, mode)
        except OSError as error:
            may_read = error.errno != errno.EACCES
        if not may_read:
            raise UserError(
                f"{one} cannot be read (Permission denied); change its permissions, or start the "
                "command as a user who has them."
            )


def sync(path) -> None:
    """Waits until a local file, or the names in a directory, are on the disk.

    A full disk or a quota may refuse bytes only here: the write before it filled the cache.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (os.path.isdir(path) and error.errno in _NO_DIRECTORY_SYNC):
            raise
    finally:
        os.close(descriptor)


def _sync_tree(directory: epath.Path) -> None:
    """Waits until all files below a directory, and their names, are on the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(os.path.join(folder, name))
        sync(folder)
