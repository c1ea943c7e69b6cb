"""The progress of a run: its step, its latest numbers, and the time to its end."""

from llada_jax.progress import Display
from llada_jax.units import format_count, format_seconds


class Progress:
    """The display of a run, on stderr.

        with Progress(num_steps=2000, start_step=0) as progress:
            progress.advance(step)                       # every step, cheap
            progress.report(step, metrics, speed)        # every log interval
            progress.say("checkpoint saved: step 1000")  # a line of its own, above the bar

    Args:
        num_steps: the last step of the run. start_step: the step that is already done.
        enabled: False shows nothing at all; for all processes of a run except the first.
    """

    def __init__(self, *, num_steps: int, start_step: int = 0, enabled: bool = True, stream=None):
        self._num_steps, self._start_step = num_steps, start_step
        self._display = Display(
            total=num_steps, completed=start_step, enabled=enabled, stream=stream
        )

    def __enter__(self):
        self._display.__enter__()
        self._move(self._start_step, after="first steps")
        return self

    def __exit__(self, *exception):
        self._display.__exit__(*exception)

    def _move(self, step: int, **words: str) -> None:
        self._display.update(step, before=f"step {step}/{self._num_steps}", **words)

    def advance(self, step: int) -> None:
        """Moves the bar to `step` steps done."""
        self._move(step)

    def report(self, step: int, metrics: dict[str, float], speed: dict[str, float]) -> None:
        """Shows the numbers of a log interval: next to the bar, or as a line without one."""
        numbers = summary_line(metrics, speed, steps_left=self._num_steps - step)
        if self._display.has_bar:
            self._move(step, after=numbers)
        else:
            self.say(f"step {step}/{self._num_steps} {numbers}")

    def say(self, message: str) -> None:
        """Prints a line; a bar stays whole below it."""
        self._display.say(message)


def summary_line(metrics: dict[str, float], speed: dict[str, float], *, steps_left: int) -> str:
    """Returns e.g. "loss 3.412 bits/byte 2.91 tokens/s 12.3k wait 0.1% eta 3m10s"; what is not
    known is left out.
    """
    parts = [f"loss {metrics['loss']:.3f}"]
    if "bits_per_byte" in metrics:
        parts += [f"bits/byte {metrics['bits_per_byte']:.2f}"]
    parts += [f"tokens/s {format_count(speed['tokens_per_s'])}"]
    if "mfu" in speed:
        parts += [f"mfu {speed['mfu']:.1%}"]
    parts += [
        f"wait {speed['data_wait_share']:.1%}",
        f"eta {format_seconds(steps_left * speed['step_s'])}",
    ]
    return " ".join(parts)
