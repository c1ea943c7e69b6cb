"""What a run reports: the means of its sums, in metrics.jsonl and as TensorBoard events; and the
texts that it samples, in samples.jsonl.

Two kinds of numbers are kept apart everywhere. Metrics of the model (loss, nelbo, accuracy,
gradient norm, learning rate) are a function of config and data: a run that was interrupted and
resumed writes the same ones as a run without interruption. Measurements of the machine (tokens/s,
waiting, memory) differ from run to run and are in the group "speed" only.
"""

import contextlib
import json
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from llada_jax.errors import UserError, reason
from llada_jax.run.samples import as_markdown
from llada_jax.run.tensorboard import EventsFile
from llada_jax.run.trackers import Tracker
from llada_jax.storage import files, remote

if TYPE_CHECKING:
    from llada_jax.samplers.text import Completion

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"

# how long TensorBoard events, and lines for a remote workdir, may stay in memory
FLUSH_SECONDS = 30.0


def means(sums: dict) -> dict[str, float]:
    """Returns sum / count for each {name: (sum, count)}, as floats.

    What was never counted is left out: a bucket without a token has no mean, and 0 would look like
    a perfect one. A name such as "nll_by_t" with vectors of sums and counts becomes one mean per
    element: "nll_t0", "nll_t1", ...

    Args:
        sums: arrays or numbers on the host. Fetch them with one `jax.device_get`; each float() of
            an array on a device would wait for that device.
    """
    result = {}
    for name, (total, count) in sums.items():
        if getattr(total, "ndim", 0) == 0:
            entries = [(name, total, count)]
        else:
            stem = name.removesuffix("_by_t")
            entries = [
                (f"{stem}_t{i}", *pair) for i, pair in enumerate(zip(total, count, strict=True))
            ]
        result |= {
            entry: float(total) / float(count)
            for entry, total, count in entries
            if float(count) > 0
        }
    return result


class StepLines:
    """A file of one JSON object per line, each with its "step", of which a resumed run drops what
    the interrupted one wrote after the checkpoint.

    Lines are whole when the process is killed at any moment. The file is there from the first line
    on, or from `open` on.

    Args:
        path: in the workdir. is_remote: in a bucket.
        until: lines of later steps are dropped; -1: all of them, at a start from scratch.
        what: one line is called.

    Raises:
        UserError: the file holds something else, and no run is resumed.
    """

    def __init__(self, path, *, is_remote: bool, until: int, what: str):
        # Object stores cannot append: there the whole text is kept and sent at each flush.
        self._path, self._is_remote = path, is_remote
        self._file: TextIO | None = None
        self.damage = ""  # a sentence about lines that cannot be read and were left out
        kept = self._keep_until(until, what)
        self._text = "".join(line for line, _ in kept) if is_remote else ""
        # of each key, the last step whose line has it
        self.last_steps = {key: entry["step"] for _, entry in kept for key in entry}

    def _keep_until(self, step: int, what: str) -> list[tuple[str, dict]]:
        """Drops the lines of later steps and a half-written last line; returns the others as they
        stand and as they are read.

        A kill breaks the last line alone. Where any other cannot be read and no run is resumed, the
        file may be a file of notes, and must not be rewritten. A run that is resumed leaves out
        such lines and keeps the whole file next to the new one.
        """
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().decode("utf-8", errors="replace").splitlines(keepends=True)
        kept, damaged = [], []
        for number, line in enumerate(lines, start=1):
            try:
                entry = _entry(line)
                if entry["step"] <= step and line.endswith("\n"):
                    kept.append((line, entry))
            except (ValueError, KeyError, TypeError) as error:
                is_half_written = number == len(lines) and not line.endswith("\n")
                if is_half_written:
                    continue
                if step < 0:
                    raise UserError(
                        f"{self._path} line {number} is not a line of {what}, so the file was not "
                        "written by a training run; move it away, or choose another --workdir."
                    ) from error
                damaged.append(number)
        if damaged:
            aside = self._path.parent / f"{self._path.name}.damaged"
            number = 2
            while aside.exists():
                aside, number = aside.with_name(f"{self._path.name}.damaged-{number}"), number + 1
            files.write_whole(aside, self._path.read_bytes())
            self.damage = (
                f"{self._path}: {len(damaged)} of {len(lines)} lines cannot be read, the first of "
                f"them line {damaged[0]}; the run continues without them, and {aside.name} keeps "
                "the file as it was"
            )
        if len(kept) < len(lines):
            files.write_whole(self._path, "".join(line for line, _ in kept))
        return kept

    def open(self) -> TextIO:
        """Returns the local file, which stays open for the life of the writer."""
        if self._file is None:
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        return self._file

    def write(self, entry: dict) -> None:
        line = json.dumps(entry) + "\n"
        if self._is_remote:
            self._text += line
            return
        file = self.open()
        file.write(line)
        # to the system, which keeps it when this process is killed; an fsync per line would also
        # survive a power cut, and cost a disk's latency each time
        file.flush()

    def flush(self) -> None:
        if self._is_remote and self._text:
            self._path.write_text(self._text)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class MetricsWriter:
    """Writes WORKDIR/metrics.jsonl, one object per line, and the numbers as TensorBoard scalars;
    and WORKDIR/samples.jsonl.

        {"step": 40, "train": {"loss": 3.41, ...}, "speed": {"tokens_per_s": 12310.5, ...}}
        {"step": 40, "prompt": "Once", "text": " upon a time"}

    The files of a run are the same however often it was interrupted ("speed" apart), see
    `StepLines`. For that the caller writes the lines of step k, and calls `flush`, before it saves
    checkpoint k.

    Args:
        workdir: local directory, or a URL that etils.epath can write (gs://, s3://). Its
            TensorBoard events go to WORKDIR/tensorboard.
        enabled: False makes every method do nothing; for all processes of a run except the first.
        resume_step: the step of the restored checkpoint: lines and events of later steps are
            dropped. None: the run starts from scratch, and all that an earlier attempt left is
            dropped.
        tensorboard: False writes no events.
        tracker: an experiment tracker that gets the same numbers; the writer closes it.

    Raises:
        UserError: the disk is full, the workdir cannot be written, or metrics.jsonl holds something
            else.
    """

    def __init__(
        self,
        workdir,
        *,
        enabled: bool = True,
        resume_step: int | None = None,
        tensorboard: bool = True,
        tracker: Tracker | None = None,
    ):
        self._enabled, self._tracker = enabled, tracker
        if not enabled:
            return
        self._workdir = remote.path_of(workdir)
        self._path = self._workdir / METRICS
        self._events: EventsFile | None = None
        self._last_flush = time.monotonic()
        is_remote = remote.is_remote(workdir)
        until = -1 if resume_step is None else resume_step
        place: dict[str, Any] = dict(is_remote=is_remote, until=until)
        with self._disk():
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._metrics = StepLines(self._path, what="metrics", **place)
            self._samples = StepLines(self._workdir / SAMPLES, what="samples", **place)
            if not is_remote:
                self._metrics.open()
            if tensorboard:
                self._events = EventsFile(self._workdir, first_step=until + 1)
        self._last_train_step = self._metrics.last_steps.get("train", 0)

    def _disk(self) -> contextlib.AbstractContextManager[None]:
        """Turns what the file system refuses in its block into a UserError."""
        return files.writing(
            f"The metrics in {self._workdir}",
            remedy="free some space or change the permissions, and start the same command again, "
            "which continues from the last checkpoint, or choose another --workdir",
        )

    @property
    def damage(self) -> list[str]:
        """Sentences about lines of an earlier attempt that cannot be read and were left out."""
        return (
            [found for lines in (self._metrics, self._samples) if (found := lines.damage)]
            if self._enabled
            else []
        )

    def gap_before(self, step: int, *, num_unlogged: int) -> str:
        """Returns a sentence about lines that are missing at the end of what a resumed run kept.

        "" when there are none. Lines are written before the checkpoint of their step, so they are
        missing only when the file was removed or a disk lost it.

        Args:
            step: the step from which the run continues.
            num_unlogged: how many steps before it the sums of its state hold, for the next line.
        """
        expected = step - num_unlogged
        if not self._enabled or self._last_train_step >= expected:
            return ""
        return (
            f"{self._path} has no lines of steps {self._last_train_step + 1} to {expected}: the "
            "run continues, and its curve has a gap there"
        )

    def write(self, step: int, groups: dict[str, dict[str, float]]) -> None:
        """Writes one line, and each number for TensorBoard and the tracker.

        Args:
            groups: e.g. {"train": {"loss": 3.4}, "speed": {...}}; "speed" holds what differs from
                run to run.
        """
        if not self._enabled:
            return
        plain = {group: _plain(values) for group, values in groups.items()}
        with self._disk():
            self._metrics.write({"step": int(step)} | plain)
            if self._events:
                self._events.scalars(step, groups)
        if self._tracker:
            self._tracker.log(step, groups)
        if time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def text(self, step: int, name: str, markdown: str) -> None:
        """Writes a text, such as the config, to TensorBoard."""
        if not self._enabled or not self._events:
            return
        with self._disk():
            self._events.text(step, name, markdown)

    def samples(self, step: int, completions: "Sequence[Completion]") -> None:
        """Writes what the model makes of each prompt to samples.jsonl and for TensorBoard."""
        if not self._enabled:
            return
        with self._disk():
            for completion in completions:
                found = {"prompt": completion.prompt, "text": completion.text}
                self._samples.write({"step": int(step)} | found)
        self.text(step, "samples", as_markdown(completions))

    def lacks_samples(self, step: int) -> bool:
        """Returns whether the step from which a resumed run continues has no samples yet."""
        return self._samples.last_steps.get("prompt", 0) < step

    def flush(self) -> None:
        """Makes everything written so far visible to readers, and durable for a remote workdir."""
        if not self._enabled:
            return
        with self._disk():
            self._metrics.flush()
            self._samples.flush()
            if self._events:
                self._events.flush()
        self._last_flush = time.monotonic()

    def close(self) -> None:
        if not self._enabled:
            return
        self.flush()
        with self._disk():
            self._metrics.close()
            self._samples.close()
            if self._events:
                self._events.close()
        if self._tracker:
            self._tracker.close()


def drop_lines_after(workdir, step: int) -> None:
    """Drops the lines of later steps from metrics.jsonl and samples.jsonl, as a start from `step`
    would.
    """
    path, is_remote = remote.path_of(workdir), remote.is_remote(workdir)
    for name, what in ((METRICS, "metrics"), (SAMPLES, "samples")):
        StepLines(path / name, is_remote=is_remote, until=step, what=what)


def read_lines(workdir) -> list[dict]:
    """Returns the lines of WORKDIR/metrics.jsonl; [] for a run without that file.

    Raises:
        UserError: a line is not JSON with a step.
    """
    return _read(remote.path_of(workdir) / METRICS, "metrics")


def read_samples(workdir) -> list[dict]:
    """Returns the lines of WORKDIR/samples.jsonl, each with "step", "prompt" and "text"; [] for a
    run without that file.

    Raises:
        UserError: a line is not such an object.
    """
    return _read(remote.path_of(workdir) / SAMPLES, "samples", texts=("prompt", "text"))


def _entry(line: str) -> dict:
    """Returns one line as JSON; ValueError, KeyError or TypeError unless it has a step."""
    entry = files.decode_json(line)
    # True and 4.0 would pass for numbers
    if type(entry["step"]) is not int:
        raise ValueError(f"its step is {entry['step']!r}")
    return entry


def _read(path, what: str, *, texts: Sequence[str] = ()) -> list[dict]:
    """Returns the lines of a file that StepLines writes.

    A last line that is half written is left out: the run may be writing it at this moment.
    """
    if not path.exists():
        return []
    with files.reading(path, remedy="change its permissions, or move it away"):
        content = path.read_bytes()
    lines = content.decode("utf-8", errors="replace").rpartition("\n")[0].split("\n")
    entries = []
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        try:
            entry = _entry(line)
            for name in texts:
                if not isinstance(entry[name], str):
                    raise ValueError(f"its {name} is {entry[name]!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} line {number} is not a line of {what} ({reason(error)}); fix that line, "
                "or move the file away."
            ) from error
        entries.append(entry)
    return entries


def is_over(lines: list[dict], num_steps: int) -> bool:
    """Whether a run has written its last line, the bound on held-out text after its last step."""
    return any(
        line["step"] == num_steps and any(group.startswith("final") for group in line)
        for line in lines
    )


def bound_of(line: dict, kind: str) -> dict | None:
    """Returns the bound on held-out text in a line of metrics.jsonl; None for a line without one.

    A mixture has several splits, whose mean is taken: every source counts alike, whatever its size.

    Args:
        kind: "heldout" (during training) or "final".

    Returns:
        {"name": "nelbo" or "nll", "nats_per_token", "bits_per_byte", "nats_error", "bits_error":
        the standard errors of these two, nan where there is none, "num_splits"}.

    Raises:
        KeyError: the line is damaged, and has another metric in place of the bound.
    """
    groups = [group for key, group in line.items() if key.startswith(kind)]
    if not groups:
        return None
    name = "nelbo" if "nelbo" in groups[0] else "nll"
    nats = [float(group[name]) for group in groups]
    bits = [float(group.get("bits_per_byte", math.nan)) for group in groups]
    errors = [float(group.get("standard_error", math.nan)) for group in groups]
    # It is logged in nats, and the ratio of the two bounds converts it.
    in_bits = [error * b / n for error, b, n in zip(errors, bits, nats)]
    count = len(groups)
    return {
        "name": name,
        "nats_per_token": sum(nats) / count,
        "bits_per_byte": sum(bits) / count,
        # The splits are scored independently of each other.
        "nats_error": math.hypot(*errors) / count,
        "bits_error": math.hypot(*in_bits) / count,
        "num_splits": count,
    }


def last_bound(lines: list[dict], step: int) -> dict | None:
    """Returns `bound_of` the last line before or at a step that has one, with its "step"; None
    where nothing was measured.
    """
    found = None
    for line in lines:
        for kind in ("heldout", "final"):
            # a damaged line has no bound
            with contextlib.suppress(KeyError):
                if line["step"] <= step and (bound := bound_of(line, kind)):
                    found = {"step": line["step"], **bound}
    return found


def _plain(values: dict) -> dict:
    """Returns floats, and "nan", "inf" or "-inf" as text, because JSON has no such numbers."""
    numbers = {name: float(value) for name, value in values.items()}
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
