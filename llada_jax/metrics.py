"""What a run reports: sums to means, where the time went, metrics.jsonl, TensorBoard and the progress bar.

Two kinds of numbers are kept apart everywhere. Metrics of the model (loss, nelbo, accuracy, gradient norm, learning
rate) are a function of config and data: a run that was interrupted and resumed writes the same ones as a straight run.
Measurements of the machine (tokens/s, waiting, memory) differ from run to run and stand in the group "speed" alone.
"""

import contextlib
import errno
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict

from llada_jax import remote
from llada_jax.errors import UserError, reason

FLUSH_SECONDS = 30.0  # how long TensorBoard events, and lines for a remote workdir, may stay in memory


# ---------------------------------------------------------------------------------------------------- sums to means


def means(sums: dict) -> dict[str, float]:
    """Returns sum / count for each {name: (sum, count)}, as floats; what was never counted is left out.

    A name such as "nll_by_t" with vectors of sums and counts becomes one mean an element: "nll_t0", "nll_t1", ...
    The sums and counts are arrays or numbers on the host (`jax.device_get` first): this never waits for a device twice.
    """
    result = {}
    for name, (total, count) in sums.items():
        if getattr(total, "ndim", 0) == 0:
            entries = [(name, total, count)]
        else:
            stem = name.removesuffix("_by_t")
            entries = [(f"{stem}_t{i}", *pair) for i, pair in enumerate(zip(total, count, strict=True))]
        result |= {entry: float(total) / float(count) for entry, total, count in entries if float(count) > 0}
    return result


def bits_per_byte(nats_per_token: float, *, bytes_per_token: float) -> float:
    """Returns a likelihood that can be compared between tokenizers: nats/token / ln 2 / (UTF-8 bytes/token)."""
    return nats_per_token / math.log(2) / bytes_per_token


# ------------------------------------------------------------------------------------------------ analytic operations


def flops_per_token(
    num_matmul_params: int, num_layers: int, d_attention: int, sequence_length: int, *, causal: bool = False
) -> float:
    """Returns the floating-point operations of one training step for one token: 6 N + 12 L d T.

    A matrix of n entries costs one token 2 n in the forward pass (a multiplication and an addition each) and twice that
    in the backward pass (gradients of its input and of itself): 6 N over all matrices, the head among them, the
    embedding lookup not. Scores and weighted values are two products of T x d_attention for each of L layers: 2 * 2 d T
    forward and twice that backward, 12 L d T. A masked diffusion model attends to all T positions, so that this is the
    full count; `causal=True` (the autoregressive control) takes the usual half. Recomputation is not counted, so that
    this over the peak is model FLOP utilisation (PaLM, arXiv 2204.02311, appendix B).

    Args:
        num_matmul_params: N. num_layers: L. d_attention: d = query heads * head width. sequence_length: T.
    """
    attention = 12 * num_layers * d_attention * sequence_length
    return float(6 * num_matmul_params + (attention / 2 if causal else attention))


# ------------------------------------------------------------------------------------------------------------- timing


class Clock:
    """Accounts every second since its start to exactly one activity.

    Time begins as "init"; `start_training` makes it "step", the productive one, and `span` names a stretch otherwise:

        with clock.span("data"):        # also: compile, checkpoint, evaluation, samples
            batch = next(batches)

    Spans may nest; the inner one takes its seconds from the outer. JAX computes in the background, so whoever opens
    a span after training steps first waits for them (`jax.block_until_ready`), or their time is accounted to the span.
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
        """Ends the initialisation: from here on, time outside of spans is productive."""
        self._account()
        self._activities[0] = "step"

    @contextlib.contextmanager
    def span(self, activity: str):
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
        """Returns the seconds of each activity since the last call of this method, or since the start."""
        seconds = self.seconds()
        since = {activity: total - self._reported.get(activity, 0.0) for activity, total in seconds.items()}
        self._reported = seconds
        return since


def speed(
    clock: Clock,
    *,
    num_steps: int,
    tokens_per_step: int,
    flops_per_token: float,
    num_devices: int,
    peak_flops: float | None,
) -> dict[str, float]:
    """Returns the group "speed" for the interval since the last call: what the machine did, not the model.

    Args:
        num_steps: training steps in the interval. tokens_per_step: global, padding included.
        num_devices: JAX devices of all hosts. peak_flops: of one device, None where it is not known.

    Returns:
        tokens_per_s and step_s over the time of steps and of waiting for data; data_wait_share: the loader's part of
        that time; tflops_per_device; mfu only where the peak is known; rss_gib: memory of this process on this host.
    """
    interval = clock.interval()
    data_s = interval.get("data", 0.0)
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
    """Returns the resident memory of this process in bytes, or its peak where the system tells only that."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


# ------------------------------------------------------------------------------------------------------------- on disk


class MetricsWriter:
    """Writes WORKDIR/metrics.jsonl, one object a line, and the same numbers as TensorBoard scalars.

        {"step": 40, "train": {"loss": 3.41, ...}, "speed": {"tokens_per_s": 12310.5, ...}}

    Lines are whole when the process is killed at any moment, and a resumed run drops what the interrupted one wrote
    after the checkpoint, so that the file of a run is the same however often it was interrupted ("speed" apart). For
    that the caller writes the metrics of step k, and calls `flush`, before it saves checkpoint k.

    Args:
        workdir: local directory, or a URL that etils.epath can write (gs://, s3://). Its TensorBoard events go to
            WORKDIR/tensorboard.
        enabled: False makes every method do nothing; for all processes of a run but the first.
        resume_step: the step of the restored checkpoint: lines and events of later steps are dropped. None: the run
            starts from scratch, and all that an earlier attempt left is dropped.
        tensorboard: False writes metrics.jsonl alone.

    Raises UserError when the disk is full, the workdir cannot be written, or metrics.jsonl holds something else.
    """

    def __init__(self, workdir, *, enabled: bool = True, resume_step: int | None = None, tensorboard: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        self._workdir = remote.path_of(workdir)
        self._path = self._workdir / "metrics.jsonl"
        self._is_remote = remote.is_remote(workdir)
        self._events = None
        self._last_flush = time.monotonic()
        with self._disk():
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._text = self._keep_until(-1 if resume_step is None else resume_step)
            if not self._is_remote:  # object stores cannot append: there the whole text is kept and sent at each flush
                self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (open for the writer's life)
            if tensorboard:
                self._open_tensorboard(first_step=0 if resume_step is None else resume_step + 1)

    def _keep_until(self, step: int) -> str:
        """Drops the lines of later steps and a half-written last line; returns the text that stays."""
        if not self._path.exists():
            return ""
        lines = self._path.read_bytes().decode("utf-8", errors="replace").splitlines(keepends=True)
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                if int(entry["step"]) <= step and line.endswith("\n"):
                    kept.append(line)
            except (ValueError, KeyError, TypeError) as error:
                is_half_written = number == len(lines) and not line.endswith("\n")
                if not is_half_written:
                    raise UserError(
                        f"{self._path} line {number} is no metrics line, so the file was not written by a training "
                        "run; move it away, or choose another --workdir."
                    ) from error
        text = "".join(kept)
        if len(kept) < len(lines):
            partial = self._workdir / "metrics.jsonl.partial"
            partial.write_text(text)
            partial.replace(self._path)
        return text

    def _open_tensorboard(self, *, first_step: int) -> None:
        # The event writer itself and not SummaryWriter: that one writes from a thread which dies silently on a full
        # disk, and then blocks the training loop on its queue.
        with _without(
            "torch"
        ):  # 1.5 s and 200 MB where it is installed, for a type of tensor that is never written here
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory = self._workdir / "tensorboard"
        directory.mkdir(parents=True, exist_ok=True)
        # an object cannot grow: events for a remote workdir gather on this disk, and the whole file is sent at each flush
        self._spool = tempfile.TemporaryDirectory() if self._is_remote else None
        folder = self._spool.name if self._is_remote else os.fspath(directory)
        self._events = EventsWriter(os.path.join(folder, "events"), filename_suffix=f".{os.getpid()}.{first_step}")
        start = SessionLog(status=SessionLog.START)  # TensorBoard hides events of these steps in older files
        self._events.write_event(Event(step=first_step, wall_time=time.time(), session_log=start))

    @contextlib.contextmanager
    def _disk(self):
        """Turns what the file system refuses into a UserError."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"The disk of {self._workdir} is full while writing metrics: free some space and start the same "
                    "command again; it continues from the last checkpoint."
                ) from error
            raise UserError(
                f"{self._workdir} cannot be written ({reason(error)}): choose another --workdir or mend its "
                "permissions."
            ) from error

    def write(self, step: int, groups: dict[str, dict[str, float]]) -> None:
        """Writes one line, and one scalar GROUP/NAME for each number.

        Args:
            groups: e.g. {"train": {"loss": 3.4}, "speed": {...}}; "speed" holds what differs from run to run.
        """
        if not self._enabled:
            return
        line = json.dumps({"step": int(step)} | {group: _plain(values) for group, values in groups.items()}) + "\n"
        with self._disk():
            if self._is_remote:
                self._text += line
            else:
                self._file.write(line)
                self._file.flush()  # to the system, which keeps it when this process is killed
            if self._events:
                from tensorboardX.summary import scalar

                for group, values in groups.items():
                    for name, value in values.items():
                        self._event(step, scalar(f"{group}/{name}", float(value)))
        if time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def text(self, step: int, name: str, markdown: str) -> None:
        """Writes a text to TensorBoard (samples, the config); metrics.jsonl holds numbers only."""
        if not self._enabled or not self._events:
            return
        from tensorboardX.summary import text

        with self._disk():
            self._event(step, text(name, markdown))

    def _event(self, step: int, summary) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(step=int(step), wall_time=time.time(), summary=summary))

    def flush(self) -> None:
        """Makes everything written so far visible to readers, and durable for a remote workdir."""
        if not self._enabled:
            return
        with self._disk():
            if self._is_remote:
                self._path.write_text(self._text)
            if self._events:
                self._events.flush()
                if self._is_remote:
                    remote.upload(self._spool.name, self._workdir / "tensorboard")
        self._last_flush = time.monotonic()

    def close(self) -> None:
        if not self._enabled:
            return
        self.flush()
        with self._disk():
            if not self._is_remote:
                self._file.close()
            if self._events:
                self._events.close()
                if self._is_remote:
                    self._spool.cleanup()


def read_lines(workdir) -> list[dict]:
    """Returns the lines of WORKDIR/metrics.jsonl, without a last one that is half written; [] where there is no file.

    Raises UserError when a line is no JSON.
    """
    path = remote.path_of(workdir) / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise UserError(
            f"{path} holds a line that is no JSON ({error}); mend that line, or move the file away."
        ) from error


def is_over(lines: list[dict], num_steps: int) -> bool:
    """Whether a run has written its last line: the bound on all of the held-out text after its last step."""
    return any(line["step"] == num_steps and any(group.startswith("final") for group in line) for line in lines)


@contextlib.contextmanager
def _without(module: str):
    """Makes `import module` fail, as where it is not installed, unless it has been imported before."""
    is_hidden = sys.modules.setdefault(module, None) is None
    try:
        yield
    finally:
        if is_hidden:
            del sys.modules[module]


def _plain(values: dict) -> dict:
    """Returns what JSON can hold: floats, and "nan", "inf" or "-inf" as text, because JSON has no such numbers."""
    numbers = {name: float(value) for name, value in values.items()}
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}


# ------------------------------------------------------------------------------------------------------- on the screen


class Progress:
    """A progress bar on a terminal, plain lines elsewhere (a file, a pipe, a scheduler's log); always on stderr.

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
            redirect_stdout=sys.stdout.isatty(),  # a result that goes to a pipe must not land in the bar
            expand=True,
        )
        task = bar.add_task("", total=self._num_steps, completed=self._start_step, numbers="first steps")
        bar.start()
        return bar, task

    def advance(self, step: int) -> None:
        """Moves the bar to `step` steps done."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, metrics: dict[str, float], speed: dict[str, float]) -> None:
        """Shows the numbers of a log interval: loss, bits/byte, tokens/s, waiting or MFU, and the time to the end."""
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
    """Returns e.g. "loss 3.412 bits/byte 2.91 tokens/s 12.3k wait 0.1% eta 3m10s"; what is not known is left out."""
    parts = [f"loss {metrics['loss']:.3f}"]
    if "bits_per_byte" in metrics:
        parts += [f"bits/byte {metrics['bits_per_byte']:.2f}"]
    parts += [f"tokens/s {format_count(speed['tokens_per_s'])}"]
    if "mfu" in speed:
        parts += [f"mfu {speed['mfu']:.1%}"]
    parts += [f"wait {speed['data_wait_share']:.1%}", f"eta {format_seconds(steps_left * speed['step_s'])}"]
    return " ".join(parts)


# ------------------------------------------------------------------------------------------------------------- numbers


def format_count(number: float) -> str:
    """Returns three digits and a decimal prefix: 999, 12.3k, 1.23M, 8.02B, 2.30T."""
    for prefix in ("", "k", "M", "B", "T"):
        digits = _three_digits(number) if prefix or number != int(number) else f"{number:.0f}"
        if abs(float(digits)) < 1000 or prefix == "T":
            return digits + prefix
        number /= 1000
    raise AssertionError("unreachable: the last prefix takes any number")


def format_bytes(number: float) -> str:
    """Returns three digits and a binary unit: 512 B, 4.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        digits = _three_digits(number) if unit != "B" else f"{number:.0f}"
        if abs(float(digits)) < 1000 or unit == "TiB":
            return f"{digits} {unit}"
        number /= 1024
    raise AssertionError("unreachable: the last unit takes any number")


def _three_digits(number: float) -> str:
    size = abs(number)
    return f"{number:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


def format_seconds(seconds: float) -> str:
    """Returns the two largest units: 0.4s, 45s, 3m10s, 2h05m, 11d03h."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"
