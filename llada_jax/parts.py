"""Parts that a config names: ours by a word, your own as module:attribute.

An own part is imported, called with documented arguments, and checked; docs/extend.md states what
each kind must keep. Whatever goes wrong in it is the user's to fix, so that it is answered by a
UserError with the file and the line, and not by a traceback through JAX.
"""

import contextlib
import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llada_jax.errors import UserError, did_you_mean, look_up, one_line

PACKAGE = Path(__file__).parent


def is_own(name: str) -> bool:
    """Returns whether a name in a config means a part of the user's, as module:attribute."""
    return ":" in name


def add_to_path(directory) -> None:
    """Lets own parts be imported from a directory, behind all that is importable already.

    Behind, because a user's `types.py` or `random.py` must not replace the standard library's.
    """
    directory = str(Path(directory).resolve())
    if directory not in sys.path:
        sys.path.append(directory)


def load_part(name: str, kind: str, table: dict) -> Callable:
    """Returns `table[name]`, or imports what "module:attribute" names.

    Args:
        kind: what the part is, for messages: "objective", "optimizer", "schedule", "commit rule".
        table: our own parts of this kind.

    Raises:
        UserError: there is no such part, its module cannot be imported, or it cannot be called.
    """
    if not is_own(name):
        return look_up(table, name, kind)
    module_name, _, attribute = name.partition(":")
    module = _module_of(name, kind)
    part = module
    for step in attribute.split("."):
        if not hasattr(part, step):
            names = [known for known in vars(part) if not known.startswith("_")]
            raise UserError(
                f"The {kind} {name!r}: {module_name} has no {step!r}.{did_you_mean(step, names)}"
            )
        part = getattr(part, step)
    if not callable(part):
        raise UserError(
            f"The {kind} {name!r} has the type {type(part).__name__}; name a function of "
            f"{module_name}."
        )
    return part


def _module_of(name: str, kind: str):
    """Returns the imported module of an own part; UserError when it cannot be imported."""
    module_name = name.partition(":")[0]
    # `python -m` has the current directory on the path already, the installed command has not
    add_to_path(os.getcwd())
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # the module itself is missing, or a package around it; not what it imports in turn
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise UserError(
                f"The {kind} {name!r} cannot be imported: there is no module {error.name!r} in the "
                "current directory, next to the config file, or among the installed ones; put it "
                "there, or set PYTHONPATH."
            ) from error
        raise broken(kind, name, "cannot be imported", error) from error
    except (Exception, SystemExit) as error:
        raise broken(kind, name, "cannot be imported", error) from error


def with_arguments(given: dict, arguments: Any, name: str, kind: str) -> dict:
    """Returns what an own part is called with: `given`, and the ((name, value), ...) of its config.

    Raises:
        UserError: both have an argument of one name.
    """
    if taken := sorted(given.keys() & dict(arguments).keys()):
        raise UserError(
            f"The {kind} {name!r} is given {taken[0]}= by the run; leave it out of "
            f"config.{kind}.arguments, or give it another name."
        )
    return {**given, **dict(arguments)}


def call_part(part: Callable, name: str, kind: str, /, *args, **kwargs):
    """Returns what an own part returns; raises UserError when it does not take these arguments, or
    fails.
    """
    check_takes(part, f"The {kind} {name!r}", *args, **kwargs)
    with blamed_on(name, kind):
        return part(*args, **kwargs)


def check_takes(function: Callable, what: str, /, *args, **kwargs) -> None:
    """Raises UserError when a function cannot be called with these arguments; it is not called."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # It may be written in C, and only the call itself can show what it takes.
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [*["..."] * len(args), *(f"{key}=" for key in kwargs)]
        raise UserError(
            f"{what} is called with ({', '.join(given)}), which its signature {signature} does not "
            f"take ({error}); see docs/extend.md for what it must take."
        ) from error


@contextlib.contextmanager
def blamed_on(name: str, kind: str):
    """Turns what an own part raises within the block into a UserError; our own parts raise as they
    are.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if not is_own(name):
            raise
        raise broken(kind, name, "fails", error) from error


def broken(kind: str, name: str, how: str, error: BaseException) -> UserError:
    """Returns a UserError with the innermost line of the user's own files in the traceback."""
    ours = (str(PACKAGE), "site-packages", "<frozen", f"{os.sep}lib{os.sep}python")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in ours)
    ]
    where = f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    said = one_line(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    return UserError(f"The {kind} {name!r} {how}{where} ({said}); fix it there.")


def provenance(names: dict[str, str]) -> dict[str, dict]:
    """Returns where own parts came from, for run.json: {knob: {name, file, sha256 of the file}}.

    Args:
        names: {knob: name} of what a config names; parts of this package are left out.

    Raises:
        UserError: a module cannot be imported.
    """
    found = {}
    for knob, name in names.items():
        if is_own(name):
            file = getattr(_module_of(name, knob.partition(".")[0]), "__file__", None)
            digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
            found[knob] = {"name": name, "file": file or "", "sha256": digest}
    return found
