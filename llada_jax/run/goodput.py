"""Goodput: the share of a run's wall time, over all its starts, that went into steps that count.

WORKDIR/goodput.json keeps the account across restarts: what the steps of each attempt took, what
was lost and to what.
"""

import json
import math
import time
from collections.abc import Callable

from llada_jax.errors import reason
from llada_jax.storage import files, remote

FILE = "goodput.json"
# How far marks may be thinned out: to gaps of this share of the distance to the newest mark. A run
# that goes back counts at most so much more as done again than it has to do again.
GAP = 0.02
# How old the file may become while no step is saved; a bucket should not be written at each step.
WRITE_SECONDS = 30.0


class Ledger:
    """The account of one run. Every second since its first start belongs to exactly one activity.

    "step" is productive. "init", "compile", "data", "checkpoint", "evaluation" and "samples" are
    the activities of llada_jax.run.clock.Clock. "down" is the time between two attempts. "replay"
    is the time of steps that had to be done again, because the attempt that did them ended before
    the next checkpoint; what it did in its last seconds, of which the file does not know, is down.

    Args:
        workdir: local directory or URL.
        clock: llada_jax.run.clock.Clock of this attempt, started with it.
        start_step: from which this attempt continues; 0 at the beginning.
        enabled: False writes nothing; for all processes except the first.
        say: takes a sentence for the log. A file that is damaged, or a disk that refuses, is said
            and does not stop the run: the account is worth less than a step.
    """

    def __init__(
        self,
        workdir,
        clock,
        *,
        start_step: int,
        enabled: bool = True,
        say: Callable[[str], None] = lambda sentence: None,
        now=time.time,
    ):
        self._path = remote.path_of(workdir) / FILE
        self._clock, self._now, self._enabled = clock, now, enabled
        began = now() - sum(clock.seconds().values())
        self._first_start = began
        self._before: dict[str, float] = {}  # seconds of the earlier attempts
        # (step, productive seconds of the whole run when it was done)
        self._marks: list[tuple[int, float]] = []
        self._say, self._is_refused, self._written = say, False, -math.inf
        if enabled and start_step and self._path.exists():
            try:
                kept = _checked(files.decode_json(self._path.read_text()))
                self._continue(kept, start_step, began)
            # a file of any content: what is missing or of another type raises one of these
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                say(
                    f"{self._path} cannot be read ({reason(error)}); the account of the run's time "
                    "begins again"
                )

    def _continue(self, kept: dict, start_step: int, began: float) -> None:
        self._first_start = kept["first_start"]
        self._before = dict(kept["seconds"])
        # What was productive after the step from which this attempt continues has to be done again.
        # Only now is it known to be lost, and so it is moved from "step" to "replay".
        self._marks = [(step, seconds) for step, seconds in kept["marks"] if step <= start_step]
        productive = self._marks[-1][1] if self._marks else 0.0
        replayed = self._before.get("step", 0.0) - productive
        self._before["step"] = productive
        self._add("replay", replayed)
        self._add("down", max(0.0, began - kept["last"]))

    def _add(self, activity: str, seconds: float) -> None:
        self._before[activity] = self._before.get(activity, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each activity since the run's first start."""
        now = self._clock.seconds()
        return {
            activity: self._before.get(activity, 0.0) + now.get(activity, 0.0)
            for activity in {**self._before, **now}
        }

    def report(self) -> dict[str, float]:
        """Returns {"goodput": productive share of all seconds, "lost_init_s": ..., ...}."""
        seconds = self.seconds()
        lost = {
            f"lost_{activity}_s": total
            for activity, total in sorted(seconds.items())
            if activity != "step"
        }
        return {"goodput": seconds.get("step", 0.0) / max(sum(seconds.values()), 1e-9), **lost}

    def reach(self, step: int) -> dict[str, float]:
        """Returns `report` at a step that is done and may be lost before it is saved: then it has
        to be done again. The file is written where it is older than WRITE_SECONDS.
        """
        if self._now() - self._written >= WRITE_SECONDS:
            self.mark(step)
        return self.report()

    def mark(self, step: int) -> None:
        """Notes the productive time up to a step that is done, and writes the file."""
        seconds = self.seconds()
        before = [mark for mark in self._marks if mark[0] < step]
        self._marks = _thinned([*before, (step, seconds.get("step", 0.0))])
        if self._enabled:
            self._written = self._now()
            kept = {
                "first_start": self._first_start,
                "last": self._written,
                "seconds": seconds,
                "marks": self._marks,
            }
            try:
                files.write_whole(self._path, json.dumps(kept, indent=1) + "\n")
                self._is_refused = False
            except OSError as error:
                # once and not at each save: a disk that is full stays so for a while
                if not self._is_refused:
                    self._say(f"{self._path} cannot be written ({reason(error)})")
                self._is_refused = True

    def line(self) -> str:
        """Returns the account in one line, the largest losses first."""
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        lost = sorted(
            ((s, a) for a, s in seconds.items() if a != "step" and s >= 0.005 * total), reverse=True
        )
        causes = (
            ", ".join(f"{activity} {s / total:.0%}" for s, activity in lost)
            or "nothing to speak of"
        )
        share = seconds.get("step", 0.0) / total
        return f"goodput     {share:.0%} of {total / 3600:.2f} h; lost to {causes}"


def _thinned(marks: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Returns marks, in their order, without some of the old ones.

    A run that continues from a step without a mark counts from the mark before. The gaps grow with
    the distance from the newest mark, so that there are a few hundred marks however often and
    however long a run saves.
    """
    newest, kept = marks[-1][0], marks[-1:]
    # without a mark, a run counts from its beginning
    for mark, (older, _) in zip(marks[-2::-1], [*marks[-3::-1], (0, 0.0)]):
        if kept[-1][0] - older > GAP * (newest - older):
            kept.append(mark)
    return kept[::-1]


def _checked(kept: dict) -> dict:
    """Returns the content of the file; raises ValueError and the like when it is not an account."""
    marks = [(int(step), float(seconds)) for step, seconds in kept["marks"]]
    seconds = {str(activity): float(total) for activity, total in kept["seconds"].items()}
    first_start, last = float(kept["first_start"]), float(kept["last"])
    numbers = [first_start, last, *seconds.values(), *(s for _, s in marks)]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("it holds a number that is not finite")
    return {"first_start": first_start, "last": last, "seconds": seconds, "marks": marks}
