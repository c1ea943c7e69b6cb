"""Errors that end a command on purpose, each with the exit status that launchers and schedulers act
on.

    0   The command is done.
    2   The input cannot be used; stderr has one sentence and no traceback.
    3   The numbers went wrong.
    42  The command stopped without having failed, because it was asked to, because another process
        is gone, or because a bucket does not answer: start it again.

    129, 130, 143  SIGHUP (a closed terminal), Ctrl-C or SIGTERM came before there was anything to
        save.

Any other status, and any traceback, is a bug in llada_jax.
"""

import difflib
import errno
import importlib
import os

# What a limit of the shell says when it is met, by the number of the error, and the way out.
_LIMITS = {
    errno.EMFILE: "raise the limit of this shell with ulimit -n",
    errno.EFBIG: "raise the limit of this shell with ulimit -f, or use another file system",
}


class UserError(ValueError):
    """The input cannot be used: the message gives the value, the constraint and the remedy in one
    sentence.
    """

    exit_status = 2


class NumericsError(ArithmeticError):
    """The numbers are wrong: a loss is not finite, or an export differs from its checkpoint.

    The message says in which steps, and which checkpoint is the last good one.
    """

    exit_status = 3


class Preempted(RuntimeError):
    """The run was asked to stop and has saved: starting the same command again continues it."""

    exit_status = 42


class LostPeer(RuntimeError):
    """Another process of the run is gone or stuck: starting all of them again continues from the
    last checkpoint.
    """

    exit_status = 42


class Unreachable(RuntimeError):
    """A bucket has not answered for a long time: starting the same command again continues from the
    last checkpoint.
    """

    exit_status = 42


def without_value(flag: str) -> UserError:
    """Returns the error about a flag, such as "--config.seed", that was given without its value."""
    return UserError(f"{flag} has no value; write {flag}=VALUE.")


def reason(error: BaseException) -> str:
    """Returns the message of an error in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return with_limit(one_line(text))


def with_limit(text: str) -> str:
    """Returns a message with the way out of a limit of the shell that it is about, if it is.

    Such a limit stops a write as a full disk does, and to free space does not help.
    """
    ways = [f": {way}" for number, way in _LIMITS.items() if os.strerror(number) in text]
    return text + "".join(ways)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that the memory, of this machine or of its devices, is not enough."""
    is_jax = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    return is_jax or isinstance(error, MemoryError)


def one_line(text: str) -> str:
    """Returns a text without line breaks and its full stop, cut in the middle when it is long."""
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= 250 else f"{text[:80]} ... {text[-160:]}"


def did_you_mean(word: str, known) -> str:
    """Returns ' Did you mean ...?' with the closest of `known`, or ' Known: ...' with all of them
    when none is close.
    """
    known = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(known)}."


def look_up(table: dict, name: str, what: str):
    """Returns `table[name]`; raises UserError that lists what exists when the name is not there."""
    if name not in table:
        raise UserError(f"Unknown {what} {name!r}.{did_you_mean(name, table)}")
    return table[name]


def require(module: str, *, extra: str = ""):
    """Imports an optional library and returns it.

    Raises:
        UserError: the library is missing; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"This needs the Python library {module.split('.')[0]!r}, which is not installed: "
            f"pip install 'llada_jax{f'[{extra}]' if extra else ''}'."
        ) from error
