"""A request to stop, from a scheduler (SIGTERM) or the keyboard (Ctrl-C), seen at the same step by
every process.
"""

import signal

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Within its `with` block, SIGTERM or the first Ctrl-C lets the step finish instead of killing
    the process.

    With several processes, SIGTERM to any one of them is spread by JAX's preemption service, and
    all of them see it at the same step; Ctrl-C is left alone there, because a launcher forwards
    SIGTERM.
    """

    def __init__(self):
        self._is_distributed = jax.process_count() > 1
        self._previous = {}
        self._is_requested = False
        self._num_calls = 0

    def __enter__(self):
        if not self._is_distributed:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        self._is_requested = True
        if number == signal.SIGINT:  # a second Ctrl-C means now
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`; call it once a step, in every process."""
        if self._is_distributed:
            # JAX answers True at one number: that after the largest it was asked for, which is 0
            # before the first. A resumed run, whose steps begin later, would never be told of a
            # signal that came while it restored or compiled.
            self._num_calls += 1
            return multihost_utils.reached_preemption_sync_point(self._num_calls - 1)
        return self._is_requested
