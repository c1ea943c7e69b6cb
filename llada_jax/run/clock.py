"""Where the time of a run goes, and the measurements of the machine that follow from it."""

import contextlib
import resource
import sys
import time
from collections import defaultdict


class Clock:
    """Accounts for every second since its start, each under exactly one activity.

    Time begins as "init". After `start_training` it is "step", the productive one, except within a
    `span`, which names another activity:

        with clock.span("data"):        # also: compile, checkpoint, evaluation, samples
            batch = next(batches)

    Spans may nest; the inner one takes its seconds from the outer. JAX computes in the background:
    wait for the training steps (`jax.block_until_ready`) before you open a span that computes, or
    their time is counted under the span.
    """

    def __init__(self, now=time.perf_counter):
        self._now = now
        self._activities = ["init"]
        self._seconds = defaultdict(float)
        self._last = now()
        self._reported = {}

    def _account(self) -> None:
        now = self._now()
        self._seconds[self._activities[-1]] += now - self._last
        self._last = now

    def start_training(self) -> None:
        """Ends the initialisation: from here on, time outside spans is productive."""
        self._account()
        self._activities[0] = "step"

    @contextlib.contextmanager
    def span(self, activity: str):
        """Counts the time within the block under `activity`, also when the block fails."""
        self._account()
        self._activities.append(activity)
        try:
            yield
        finally:
            self._account()
            self._activities.pop()

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each activity since the start."""
        self._account()
        return dict(self._seconds)

    def interval(self) -> dict[str, float]:
        """Returns the seconds of each activity since the last call of this method."""
        seconds = self.seconds()
        since = {
            activity: total - self._reported.get(activity, 0.0)
            for activity, total in seconds.items()
        }
        self._reported = seconds
        return since


def speed_metrics(
    clock: Clock,
    *,
    num_steps: int,
    tokens_per_step: float,
    flops_per_token: float,
    num_devices: int,
    peak_flops: float | None,
) -> dict[str, float]:
    """Returns the group "speed" for the interval since the last call: what the machine did, not the
    model.

    Args:
        num_steps: training steps in the interval. tokens_per_step: global, padding included.
        num_devices: JAX devices of all hosts. peak_flops: of one device; None where it is unknown.

    Returns:
        tokens_per_s and step_s, over the time of steps and of waiting for data. data_wait_share:
        the loader's part of that time. tflops_per_device. mfu, only where the peak is known.
        rss_gib: the memory of this process.
    """
    interval = clock.interval()
    data_s = interval.get("data", 0.0)
    # evaluation, samples and saving are left out: they would make the speed depend on how often
    # they are done
    training_s = max(interval.get("step", 0.0) + data_s, 1e-9)
    tokens_per_s = num_steps * tokens_per_step / training_s
    flops_per_device = tokens_per_s * flops_per_token / num_devices
    result = {
        "tokens_per_s": tokens_per_s,
        "step_s": training_s / max(num_steps, 1),
        "data_wait_share": data_s / training_s,
        "tflops_per_device": flops_per_device / 1e12,
        "rss_gib": host_rss_bytes() / 2**30,
    }
    if peak_flops:
        result["mfu"] = flops_per_device / peak_flops
    return result


def host_rss_bytes() -> int:
    """Returns the memory that this process holds, in bytes; its peak on systems without /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        # in bytes on macOS, in KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
