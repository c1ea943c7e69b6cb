"""A window of steps in which JAX's profiler records what the devices do, into WORKDIR/profile."""

import contextlib
import tempfile

import jax
from etils import epath

from llada_jax.storage import remote


class ProfilerWindow:
    """Records a few steps of a run; use it as a context manager around the loop.

    Args:
        first_step: where the window begins; 0 records nothing, and so does a run that starts after
            this step.
        num_steps: the length of the window, which ends at `last_step` of the run at the latest.
    """

    def __init__(self, workdir: str, *, first_step: int, num_steps: int, last_step: int):
        self._first = first_step
        self._last = min(first_step + num_steps - 1, last_step)
        self._target = epath.Path(workdir) / "profile"
        # the profiler writes to a disk only, and so a remote workdir gets a copy at the end
        self._spool = tempfile.TemporaryDirectory() if remote.is_remote(workdir) else None
        self._is_recording = False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        # The block has ended with an error, which is worth more than the profile. JAX allows one
        # profile at a time, and the next run of this process may be to record one.
        if self._is_recording:
            with contextlib.suppress(Exception):
                self._stop()
        if self._spool:
            self._spool.cleanup()

    def before(self, step: int) -> None:
        """Starts to record if the window begins with this step."""
        if step == self._first:
            options = jax.profiler.ProfileOptions()
            # the Python tracer hooks into all threads, and crashes when one ends at that moment
            options.python_tracer_level = 0
            folder = self._spool.name if self._spool else str(self._target)
            jax.profiler.start_trace(folder, profiler_options=options)
            self._is_recording = True

    def after(self, step: int, result: jax.Array, *, is_stopping: bool) -> None:
        """Stops to record if the window ends with this step, or the run does.

        Args:
            result: an array of this step. Steps are dispatched ahead of the devices: without
                waiting for it, the window would end before its steps have run.
        """
        if self._is_recording and (step == self._last or is_stopping):
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        self._is_recording = False
        jax.profiler.stop_trace()
        if self._spool:
            remote.upload(self._spool.name, self._target)
