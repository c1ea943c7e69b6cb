"""Paths that a user writes: the one place that gives them their meaning, before anything uses them.

Below the verbs and the config a path is taken as it stands. Libraries differ in what else they
would make of it (some expand ~, some take brackets for a pattern), and a run would be torn in two.
"""

import argparse
import errno
import os
from pathlib import Path

from llada_jax.errors import UserError, one_line

# Orbax lists the files of a step by patterns, in which the first three have a meaning of their own,
# and tensorstore takes the last for a slash.
UNREADABLE = "*?[\\"


def user_path(text: str | os.PathLike[str]) -> str:
    """Returns the path that a user means by a text: a ~ at its beginning is a home directory.

    Raises:
        UserError: the home directory is that of an unknown user, or the path is longer than the
            system allows.
    """
    text = os.fspath(text)
    if not text.startswith("~"):
        # pathlib makes ~/run of ./~/run, and what is handed that may expand it.
        path = os.path.abspath(text) if os.path.normpath(text).startswith("~") else text
    elif (path := os.path.expanduser(text)).startswith("~"):
        raise UserError(
            f"{text!r} names the home directory of a user that this machine does not know; write "
            f"the directory in full, or ./{text} for one with that name."
        )
    longest = max(path.split("/"), key=len)
    # the name also apart, because a directory above it that is missing is found first
    if "://" not in path and (is_too_long(path) or is_too_long(f"/{longest}")):
        raise UserError(
            f"{one_line(repr(text))} cannot be the path of a file: it has {len(path)} characters, "
            f"its longest name has {len(longest)}, and the system refuses that as too long; write "
            "a shorter one."
        )
    return path


def path_of_flag(text: str) -> Path:
    """Returns the path that a user means by the value of a flag: the `type` of an argparse flag.

    Raises:
        argparse.ArgumentTypeError: `user_path` refuses it.
    """
    try:
        return Path(user_path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def is_too_long(path: str) -> bool:
    """Whether the system refuses a path for its length alone, or for that of a name in it."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def check_savable(workdir: str) -> None:
    """Raises UserError for a local workdir whose checkpoints could not be written, or not read."""
    path = os.path.abspath(workdir)
    if "://" in workdir:
        return
    if found := [c for c in UNREADABLE if c in path]:
        raise UserError(
            f"The workdir {workdir}: its path {path} contains {found[0]!r}, and checkpoints below "
            f"such a path cannot be read again; choose a path without {' '.join(UNREADABLE)}."
        )
    # Python puts lone surrogates in place of bytes that it cannot decode
    if any("\ud800" <= c <= "\udfff" for c in path):
        raise UserError(
            f"The workdir {workdir!a}: its path {path!a} is not UTF-8, and checkpoints cannot be "
            "written below such a path; choose another name."
        )


def split_step(checkpoint: str | os.PathLike[str]) -> tuple[str, int | None]:
    """Returns (workdir, step) of "WORKDIR" or "WORKDIR@STEP"; step None means the latest.

    An @ within the path, as in me@home/run, belongs to the path.

    Raises:
        UserError: what follows the last @ is neither a step nor the end of an existing path.
    """
    checkpoint = user_path(checkpoint)
    workdir, at, step = checkpoint.rpartition("@")
    is_path = os.path.isdir(checkpoint) and not (step.isdigit() and os.path.isdir(workdir))
    if not at or "/" in step or is_path:
        return checkpoint, None
    # isdecimal and ASCII: int() would also take digits of other scripts
    if not (step.isascii() and step.isdigit()):
        raise UserError(
            f"{checkpoint!r}: the part after @ must be a step number, as in {workdir}@1000."
        )
    return workdir, int(step)
