"""The processes that work on units in parallel, and the progress that they report.

The command's process hands out the units and shows the progress; each worker writes its unit
(build.write_unit) and shares only counters with the others.
"""

import concurrent.futures
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool

from llada_jax.data.build import LOCK, Job, Unit, size_of, write_unit
from llada_jax.data.dialogue_units import write_dialogues
from llada_jax.data.tokenizer import Tokenizer, load_tokenizer
from llada_jax.errors import UserError
from llada_jax.progress import Display
from llada_jax.storage.locks import try_lock
from llada_jax.units import format_seconds


class _Stopped(Exception):
    """Raised inside a worker when the command ends early."""


def run_units(units: list[Unit], job: Job, *, workers: int, num_bytes_done: int) -> None:
    """Writes the units, in this process when one is enough."""
    if not units:
        return
    total = num_bytes_done + size_of(units)
    workers = min(workers, len(units))
    # Not fork, which would copy locks that a library's thread holds at that moment.
    context = multiprocessing.get_context("spawn")
    # Bytes read, bytes of text, tokens, and 1 once the workers must stop.
    counters = context.Array("q", 4)
    counters[0] = num_bytes_done
    with _Progress(total, counters) as progress:
        if workers == 1:
            tokenizer = load_tokenizer(job.output / "tokenizer")
            for unit in units:
                write(unit, job, tokenizer, _counting(counters, progress.show))
            return
        with concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(job, counters)
        ) as pool:
            pending = {pool.submit(_work, unit) for unit in units}
            try:
                while pending:
                    done, pending = concurrent.futures.wait(
                        pending, timeout=0.2, return_when="FIRST_COMPLETED"
                    )
                    for future in done:
                        future.result()
                    progress.show()
            except BrokenProcessPool as error:
                raise UserError(
                    "A worker of prepare was killed, most likely for lack of memory; run the same "
                    f"command with fewer --workers than {workers}: what is finished is kept."
                ) from error
            finally:
                counters[3] = 1
                pool.shutdown(wait=True, cancel_futures=True)


def _counting(counters, after: Callable[[], None]) -> Callable[..., None]:
    def on_progress(read_bytes: int = 0, text_bytes: int = 0, tokens: int = 0) -> None:
        with counters.get_lock():
            for i, number in enumerate((read_bytes, text_bytes, tokens)):
                counters[i] += number
        after()

    return on_progress


# What _start_worker keeps for _work: job, tokenizer, on_progress, and the open lock file.
_worker = {}


def _start_worker(job: Job, counters) -> None:
    # Ctrl-C reaches every process of the group; the command then stops its workers by a counter.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # One process per core is enough.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def stop_if_told():
        if counters[3]:
            raise _Stopped

    # Held as long as this process lives.
    lock = open(job.output / LOCK, "a")  # noqa: SIM115
    try_lock(lock, fcntl.LOCK_SH)
    tokenizer = load_tokenizer(job.output / "tokenizer")
    _worker.update(
        job=job, tokenizer=tokenizer, on_progress=_counting(counters, stop_if_told), lock=lock
    )


def _die_with_parent() -> None:
    """Ends this worker when the command is killed, which cannot tell its workers to stop."""
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def _work(unit: Unit) -> None:
    write(unit, _worker["job"], _worker["tokenizer"], _worker["on_progress"])


def write(unit: Unit, job: Job, tokenizer: Tokenizer, on_progress: Callable[..., None]) -> None:
    """Writes a unit of text or of dialogues."""
    of_inputs = write_dialogues if job.chat else write_unit
    of_inputs(unit, job, tokenizer, on_progress)


class _Progress:
    """Shows the counters on stderr: a bar on a terminal, otherwise a line every few seconds."""

    def __init__(self, total: int, counters):
        self._total, self._counters, self._first_read = max(1, total), counters, counters[0]
        self._display = Display(total=self._total, completed=self._first_read)
        self._every = 0.2 if self._display.has_bar else 5.0
        self._started = self._shown = time.monotonic()

    def __enter__(self):
        self._display.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._show()
        self._display.__exit__(*exception)

    def show(self) -> None:
        """Brings the display up to date, at most every few moments."""
        if time.monotonic() - self._shown > self._every:
            self._shown = time.monotonic()
            self._show()

    def _show(self) -> None:
        read, text, tokens, _ = self._counters[:]
        seconds = max(1e-9, time.monotonic() - self._started)
        rates = f"{text / seconds / 1e6:.1f} MB/s, {tokens / seconds:,.0f} tokens/s"
        if self._display.has_bar:
            # of this start alone: what an earlier one has read came at no cost to this one
            pace = (read - self._first_read) / seconds
            eta = f" eta {format_seconds((self._total - read) / pace)}" if pace else ""
            self._display.update(read, before=f"{read / self._total:.0%}", after=rates + eta)
        else:
            done = f"{read / self._total:.0%} of {self._total / 1e6:.1f} MB"
            self._display.say(f"prepare: {done}, {rates}, {seconds:.0f} s")
