"""Paths in object stores, gs:// and s3://: what they need, and how they differ from a disk.

An object appears whole or not at all, so it is written in place. A folder is only a common
beginning of names, so it can be neither renamed in one step nor locked. Small files go through
gcsfs and s3fs (below etils.epath), arrays through tensorstore (below Orbax). All of them take the
endpoint and the credentials from the environment, as the clouds' own tools do (docs/operations.md).
"""

import functools
import logging
import os
import uuid
from pathlib import Path

from etils import epath

from llada_jax.errors import UserError, look_up, reason, require
from llada_jax.progress import reported_every
from llada_jax.streams import write_line

# Scheme -> the library that reads it. The extra that installs the library has the scheme's name.
LIBRARIES = {"gs": "gcsfs", "s3": "s3fs"}

# Seconds between two lines about a bucket that does not answer.
WAITING_S = 3.0


def is_remote(path) -> bool:
    """Whether a path is a URL."""
    return "://" in os.fspath(path)


def path_of(path) -> epath.Path:
    """Returns a path that can be used: of a URL, the bucket has answered.

    Raises:
        UserError: the kind of URL is unknown, its library is missing, or the bucket does not
            answer.
    """
    text = os.fspath(path)
    if is_remote(text):
        scheme, _, rest = text.partition("://")
        _connect(scheme, rest.partition("/")[0])
    return epath.Path(text)


@functools.cache
def _connect(scheme: str, bucket: str) -> None:
    """Checks a bucket once per process; see `path_of` for what is raised."""
    module = look_up(LIBRARIES, scheme, "kind of URL")
    require(module, extra=scheme)
    # The library logs a traceback of everything that it then raises as well.
    logging.getLogger(module).setLevel(logging.CRITICAL)
    from fsspec.config import conf

    # tensorstore writes to the same bucket, and a listing that is remembered would not show it.
    for name in ("gs", "gcs", "s3"):
        conf.setdefault(name, {})["use_listings_cache"] = False
    try:
        # The clients try again for a minute or more before they give up, and say nothing meanwhile.
        say = functools.partial(_say_what_is_waited_for, what=f"{scheme}://{bucket}")
        with reported_every(WAITING_S, say):
            is_there = epath.Path(f"{scheme}://{bucket}").exists()
    except Exception as error:
        # The clients share no class of errors for what can go wrong here.
        raise UserError(
            f"{scheme}://{bucket} cannot be reached ({reason(error)}): check the credentials and "
            "the endpoint in the environment."
        ) from error
    if not is_there:
        raise UserError(
            f"No bucket {scheme}://{bucket} answers to these credentials: create it, or check its "
            "name, the credentials and the endpoint in the environment."
        )


def _say_what_is_waited_for(seconds: float, what: str) -> None:
    write_line(
        f"waiting     {seconds:.0f} s for {what} to answer: the network, the credentials and the "
        "endpoint in the environment decide"
    )


def upload(folder, target) -> None:
    """Copies the files of a local folder, those in its subfolders included, to a folder of
    objects.
    """
    for file in Path(folder).rglob("*"):
        if file.is_file():
            (epath.Path(target) / file.relative_to(folder)).write_bytes(file.read_bytes())


def move(folder, target, *, mark: str) -> None:
    """Moves a folder, within a disk or within a bucket.

    On a disk it is renamed. The objects of a bucket are copied and then removed, and readers take
    the folder for whole while it has its mark: a call that is interrupted leaves the folder as it
    was, or a target that is whole and a folder without its mark.

    Args:
        folder, target: both local, or both in one bucket. The target does not exist, but its parent
            does.
        mark: the name of the file in the folder that is written last.

    Raises:
        OSError: the disk or bucket refuses.
    """
    if not is_remote(folder):
        Path(folder).rename(target)
        return
    from fsspec.core import url_to_fs

    filesystem, source = url_to_fs(os.fspath(folder))
    _, destination = url_to_fs(os.fspath(target))
    first = f"{source}/{mark}"
    try:
        others = [name for name in filesystem.find(source) if name != first]
        for names in (others, [first]):
            copies = [f"{destination}{name.removeprefix(source)}" for name in names]
            filesystem.copy(names, copies)
        for names in ([first], others):
            filesystem.rm(names)
    except Exception as error:
        # The clients share no class of errors for what can go wrong.
        raise OSError(reason(error)) from error


class Claim:
    """Makes the newest process that claims a remote folder its only writer; an older one finds out
    when it next asks `is_ours`.

    Not a lock: object stores have none that ends with its holder, and a job that was restarted must
    not wait for the one that hangs.
    """

    def __init__(self, folder):
        self._path = epath.Path(folder) / ".writer"
        self._token = uuid.uuid4().hex
        self._path.write_text(self._token)

    def is_ours(self) -> bool:
        """Whether no other process has claimed the folder since."""
        return self._path.read_text() == self._token
