"""Standard streams that are closed, full, or lead to a process that is gone.

A run must not end because its log did. What is written to stderr never raises; what is written to
stdout is a result, and there a failure counts.
"""

import contextlib
import os
import select
import sys

from llada_jax.errors import UserError, reason


class Log:
    """A text stream in whose place nothing raises; what cannot be written is lost.

    A disk that is full may have space again, so each write is tried. A reader that is gone does not
    come back: the descriptor then leads nowhere, for native libraries as well.
    """

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(lambda: self._stream.flush())

    def isatty(self) -> bool:
        # of a closed stream it raises
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def _try(self, action) -> None:
        try:
            action()
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):
                lead_nowhere(self._stream.fileno())
        # ValueError: the stream was closed
        except (OSError, ValueError):
            pass


class Result:
    """A text stream for results: what a disk refuses becomes a UserError.

    That its reader is gone stays a BrokenPipeError: what has been read was enough.
    """

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._refusals():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._refusals():
            self._stream.flush()

    @contextlib.contextmanager
    def _refusals(self):
        try:
            yield
        except BrokenPipeError:
            raise
        except UnicodeEncodeError as error:
            # half of a surrogate pair, which no encoding has
            if error.encoding == "utf-8":
                raise
            raise UserError(
                f"The result cannot be written to stdout, whose encoding {error.encoding} does not "
                f"have {error.object[error.start]!r}; set PYTHONIOENCODING=utf-8, and run the same "
                "command again."
            ) from error
        except OSError as error:
            # Python would try once more at its exit, and complain.
            with contextlib.suppress(OSError, ValueError):
                lead_nowhere(self._stream.fileno())
            raise UserError(
                f"The result cannot be written to stdout ({reason(error)}); free space where it "
                "leads, and run the same command again."
            ) from error


def write_line(line: str, stream=None) -> None:
    """Writes a line to a stream (stderr unless named otherwise) at once and in one piece.

    Under PYTHONUNBUFFERED, print() writes the end of a line by itself, so that two threads, say one
    that reports what is waited for and one that ends the process, could put two sentences on one
    line.
    """
    stream = sys.stderr if stream is None else stream
    stream.write(f"{line}\n")
    stream.flush()


def warn(message: str) -> None:
    """Prints a message for the user on stderr, next to the result on stdout."""
    write_line(f"llada-jax: {message}")


def lead_nowhere(descriptor: int) -> None:
    """Makes a descriptor swallow whatever is written to it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def open_missing() -> None:
    """Opens the standard streams that this process was started without.

    Otherwise the next file that is opened, a checkpoint say, would get the descriptor of stderr,
    and native libraries would write their messages into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # the lowest free number is taken, which is this one
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for the process' life)


def reader_of_stdout_is_gone() -> bool:
    """Whether stdout is a pipe whose reader is gone, as in `llada-jax sample ... | head`."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False
