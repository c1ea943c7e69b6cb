"""Paths in object stores, gs:// and s3://: what they need, and how they differ from a disk.

An object appears whole or not at all, so it needs no partial file beside it; a folder is no thing
of its own, so it can neither be renamed at once nor locked. gcsfs and s3fs move small files below
etils.epath, tensorstore the arrays below Orbax; all of them take endpoint and credentials from the
environment, as the clouds' own tools do (docs/operations.md).
"""

import functools
import logging
import os
import uuid
from pathlib import Path

from etils import epath

from llada_jax.errors import UserError, look_up, reason, require

LIBRARIES = {
    "gs": "gcsfs",
    "s3": "s3fs",
}  # scheme -> what reads it; the extra that installs it is called like the scheme


def is_remote(path) -> bool:
    """Whether a path is a URL."""
    return "://" in os.fspath(path)


def path_of(path) -> epath.Path:
    """Returns a path of which a URL is known to work; raises UserError when its bucket cannot be
    reached.
    """
    text = os.fspath(path)
    if is_remote(text):
        scheme, _, rest = text.partition("://")
        _connect(scheme, rest.partition("/")[0])
    return epath.Path(text)


@functools.cache
def _connect(scheme: str, bucket: str) -> None:
    """Raises UserError when the scheme is not known, its library is missing, or the bucket does not
    answer.
    """
    module = look_up(LIBRARIES, scheme, "kind of URL")
    require(module, extra=scheme)
    logging.getLogger(module).setLevel(
        logging.CRITICAL
    )  # it logs tracebacks of what it then raises
    from fsspec.config import conf

    for name in (
        "gs",
        "gcs",
        "s3",
    ):  # what tensorstore writes would not be seen in a remembered listing
        conf.setdefault(name, {})["use_listings_cache"] = False
    try:
        is_there = epath.Path(f"{scheme}://{bucket}").exists()
    except (
        Exception
    ) as error:  # each client has a family of its own for credentials, endpoints and names
        raise UserError(
            f"{scheme}://{bucket} cannot be reached ({reason(error)}): check the credentials and "
            "the endpoint in the "
            "environment."
        ) from error
    if not is_there:
        raise UserError(
            f"No bucket {scheme}://{bucket} answers to these credentials: create it, or check its "
            "name, the credentials and "
            "the endpoint in the environment."
        )


def write_whole(path, text: str) -> None:
    """Writes a small file of which a reader sees all or nothing, whenever the writer is killed."""
    path = epath.Path(path)
    if is_remote(path):
        path.write_text(text)
    else:
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text)
        partial.replace(path)


def upload(folder, target) -> None:
    """Copies the files of a local folder, and of those in it, to a folder of objects."""
    for file in Path(folder).rglob("*"):
        if file.is_file():
            (epath.Path(target) / file.relative_to(folder)).write_bytes(file.read_bytes())


class Claim:
    """Makes the newest process that claims a remote folder its only writer: an older one is told at
    its next `check`.

    Object stores have no locks that end with their holder, and a job that was restarted must not
    wait for the one that hangs.
    """

    def __init__(self, folder):
        self._path = epath.Path(folder) / ".writer"
        self._token = uuid.uuid4().hex
        self._path.write_text(self._token)

    def is_ours(self) -> bool:
        """Whether nobody has claimed the folder since."""
        return self._path.read_text() == self._token
