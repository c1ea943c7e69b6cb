"""What a long command shows while it works: a bar on a terminal, lines elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from llada_jax.streams import write_line


@contextlib.contextmanager
def reported_every(period_s: float, report: Callable[[float], None]) -> Iterator[None]:
    """Calls report(seconds so far) every `period_s` seconds while the block runs.

    From a thread, for a block that says nothing until it returns: a trainer in C++, or a client
    that tries a bucket again and again.
    """
    began, ended = time.monotonic(), threading.Event()

    def keep_reporting() -> None:
        while not ended.wait(period_s):
            report(time.monotonic() - began)

    thread = threading.Thread(target=keep_reporting, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Display:
    """A progress bar on a terminal; elsewhere (a file, a pipe, a scheduler's log) only the lines.

        with Display(total=2000) as display:
            display.update(20, before="step 20/2000", after="loss 3.4")  # moves the bar
            display.say("saving step 20")                                # a line above the bar

    Both go to stderr: stdout belongs to the result of the command, which may be piped elsewhere.

    Args:
        total: the number at which the bar is full. completed: where it begins.
        enabled: False shows nothing at all; for all processes of a run except the first.
    """

    def __init__(self, *, total: float, completed: float = 0, enabled: bool = True, stream=None):
        self._total, self._completed, self._enabled = total, completed, enabled
        # looked up now and not in the signature, where a redirected stderr would be missed
        self._stream = sys.stderr if stream is None else stream
        self._bar = None
        self.has_bar = enabled and self._stream.isatty()

    def __enter__(self):
        if self.has_bar:
            self._bar, self._task = self._open_bar()
        return self

    def __exit__(self, *exception):
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _open_bar(self):
        # imported here: in a log there is no bar, and rich takes its time to load
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        bar = Progress(
            TextColumn("{task.fields[before]}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[after]}", markup=False),
            console=Console(file=self._stream, force_terminal=True),
            # a result that goes to a pipe must not land in the bar
            redirect_stdout=sys.stdout.isatty(),
            expand=True,
        )
        task = bar.add_task("", total=self._total, completed=self._completed, before="", after="")
        bar.start()
        return bar, task

    def update(self, completed: float, **words: str) -> None:
        """Moves the bar; `before` and `after` replace the words on its two sides."""
        if self._bar:
            self._bar.update(self._task, completed=completed, **words)

    def say(self, message: str) -> None:
        """Prints a line; a bar stays whole below it."""
        if not self._enabled:
            return
        if self._bar:
            # no markup: "[1]" in a path is text, and not a style of rich
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            write_line(message, self._stream)
