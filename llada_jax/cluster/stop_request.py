"""A request to stop, which every process sees at the same step.

It comes from a scheduler (SIGTERM), from the keyboard (Ctrl-C) or from a terminal that is closed
(SIGHUP).
"""

import signal

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Within its `with` block, SIGTERM, SIGHUP or the first Ctrl-C lets the step finish.

    With several processes, JAX's preemption service spreads a SIGTERM to any one of them, and all
    of them see it at the same step. Ctrl-C is left alone there, because a launcher forwards
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
        # nohup makes a program ignore SIGHUP, and then it must stay ignored
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            as_sigterm = lambda *_: signal.raise_signal(signal.SIGTERM)  # noqa: E731
            self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, as_sigterm)
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        self._is_requested = True
        # A second Ctrl-C stops at once.
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`; once True, it stays so.

        Call it equally often in every process: once per step, and once per batch of an evaluation.
        """
        if self._is_distributed and not self._is_requested:
            # JAX answers True at exactly one number: the one after the largest that any process has
            # asked about, which is 0 before the first call. The steps of a resumed run begin later,
            # so that it would never hear of a signal that came while it restored or compiled.
            # Therefore calls are counted and not steps.
            self._num_calls += 1
            self._is_requested = multihost_utils.reached_preemption_sync_point(self._num_calls - 1)
        return self._is_requested
