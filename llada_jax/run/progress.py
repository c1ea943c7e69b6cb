"""The progress bar of a run on a terminal, or its lines elsewhere."""

import sys

from llada_jax.units import format_count, format_seconds


class Progress:
    """A progress bar on a terminal, plain lines elsewhere (a file, a pipe, a scheduler's log);
    always on stderr.

        with Progress(num_steps=2000, start_step=0) as progress:
            progress.advance(step)                       # every step, cheap
            progress.report(step, metrics, speed)        # every log interval
            progress.say("checkpoint saved: step 1000")  # a line of its own, above the bar

    Args:
        num_steps: the last step of the run. start_step: the step that is already done.
        enabled: False prints nothing at all; for all processes of a run but the first.
    """

    def __init__(self, *, num_steps: int, start_step: int = 0, enabled: bool = True, stream=None):
        self._num_steps, self._start_step, self._enabled = num_steps, start_step, enabled
        self._stream = sys.stderr if stream is None else stream
        self._bar = None

    def __enter__(self):
        if self._enabled and self._stream.isatty():
            self._bar, self._task = self._open_bar()
        return self

    def __exit__(self, *exception):
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _open_bar(self):
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        bar = Bar(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=Console(file=self._stream, force_terminal=True),
            # a result that goes to a pipe must not land in the bar
            redirect_stdout=sys.stdout.isatty(),
            expand=True,
        )
        task = bar.add_task(
            "", total=self._num_steps, completed=self._start_step, numbers="first steps"
        )
        bar.start()
        return bar, task

    def advance(self, step: int) -> None:
        """Moves the bar to `step` steps done."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, metrics: dict[str, float], speed: dict[str, float]) -> None:
        """Shows the numbers of a log interval: loss, bits/byte, tokens/s, waiting or MFU, and the
        time to the end.
        """
        numbers = summary_line(metrics, speed, steps_left=self._num_steps - step)
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=numbers)
        else:
            self.say(f"step {step}/{self._num_steps} {numbers}")

    def say(self, message: str) -> None:
        """Prints a line; a bar below it stays whole."""
        if not self._enabled:
            return
        if self._bar:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=self._stream, flush=True)


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
