"""The end of a process in which nothing happens for too long."""

import faulthandler
import threading
import time

from llada_jax.cluster.distributed import leave
from llada_jax.errors import LostPeer


class Watchdog:
    """Ends the process with status 42 and prints all stacks when nothing happens for too long.

        with Watchdog(timeout_s=1800) as watchdog:
            watchdog.beat("step 7")          # whenever something has happened

    A collective that waits for a host which is alive but stuck never returns, and the heartbeat
    does not notice; the same holds for a file system that hangs. `timeout_s` 0 turns it off.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._last, self._what = time.monotonic(), "the start"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, what: str) -> None:
        """Records that something has happened: the clock starts again."""
        self._last, self._what = time.monotonic(), what

    def __enter__(self):
        if self._timeout_s > 0:
            self.beat("the start of training")
            self._thread.start()
        return self

    def __exit__(self, *exception):
        self._ended.set()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(min(1.0, self._timeout_s / 4)):
            before, looked = looked, time.monotonic()
            # Ctrl-Z or `scontrol suspend` has stopped this thread too: nothing hangs
            if looked - before > self._timeout_s / 2:
                self._last = looked
            silent_s = looked - self._last
            if silent_s > self._timeout_s:
                faulthandler.dump_traceback(all_threads=True)
                leave(
                    f"Nothing has happened for {silent_s:.0f} s since {self._what} "
                    f"(config.distributed.step_timeout_s={self._timeout_s:g}); the stacks of all "
                    "threads are above, and the same command continues from the last checkpoint.",
                    LostPeer,
                )
