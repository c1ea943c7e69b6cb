"""A run's numbers and texts as TensorBoard events, in the order in which they are looked at."""

import contextlib
import os
import sys
import tempfile
import time

from llada_jax.storage import files, remote

# TensorBoard sorts the groups of tags by name, and the machine is looked at last.
ORDER = ("train", "heldout", "final")


def tags_of(group: str) -> list[str]:
    """Returns the groups of tags under which the numbers of a group are shown.

    The final bound is also the last point of the held-out curve: it estimates the same with more
    rows, and a curve of one point is easily overlooked.
    """
    for number, beginning in enumerate(ORDER, start=1):
        if group.startswith(beginning):
            heldout = group.replace("final", "heldout", 1)
            return [f"{number}_{group}", *([f"2_{heldout}"] if beginning == "final" else [])]
    return [f"9_{group}"]


class EventsFile:
    """One file of events in WORKDIR/tensorboard, which is what one start of a run writes.

    Args:
        workdir: an epath.Path of a directory that exists.
        first_step: TensorBoard hides what older files say about this step and later ones; None: it
            hides nothing.
    """

    def __init__(self, workdir, *, first_step: int | None):
        # EventsWriter and not the usual SummaryWriter: that one writes from a thread, which dies
        # silently on a full disk and then blocks the training loop on its queue.
        # tensorboardX imports torch where it is installed, which costs 1.5 s and 200 MB, for a kind
        # of tensor that is never written here.
        with _without("torch"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._directory = workdir / "tensorboard"
        self._directory.mkdir(parents=True, exist_ok=True)
        # An object cannot grow: events for a remote workdir gather on this disk, and the whole file
        # is sent at each flush.
        self._spool = tempfile.TemporaryDirectory() if remote.is_remote(workdir) else None
        folder = self._spool.name if self._spool else os.fspath(self._directory)
        # TensorBoard reads the files in the order of their names, in which the time comes next. On
        # a host whose clock is behind, what an earlier start wrote would hide what this one does.
        number = len(files.sizes_in(self._directory))
        self._file = EventsWriter(
            # the "s", because without a number, as in version 0.1, an "o" follows
            os.path.join(folder, f"events.s{number:05}"),
            filename_suffix=f".{os.getpid()}.{first_step}",
        )
        if first_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(step=first_step, wall_time=time.time(), session_log=start))

    def scalars(self, step: int, groups: dict[str, dict[str, float]]) -> None:
        """Writes one scalar for each number; see `tags_of` for their names."""
        from tensorboardX.summary import scalar

        for group, values in groups.items():
            for shown in tags_of(group):
                for name, value in values.items():
                    self._write(step, scalar(f"{shown}/{name}", float(value)))

    def text(self, step: int, name: str, markdown: str) -> None:
        from tensorboardX.summary import text

        self._write(step, text(name, markdown))

    def hparams(self, knobs: dict[str, object], metrics: dict[str, float]) -> None:
        """Writes what a run of a sweep changes and its results, for TensorBoard's table of them.

        Args:
            knobs: {"optimizer.b2": 0.98}. metrics: {"bits_per_byte": 1.9}; shown as hparam/NAME.
        """
        from tensorboardX.summary import hparams, scalar

        plain = {
            name: value if isinstance(value, bool | int | float | str) else repr(value)
            for name, value in knobs.items()
        }
        for summary in hparams(plain, {f"hparam/{name}": None for name in metrics}):
            self._write(0, summary)
        for name, value in metrics.items():
            self._write(0, scalar(f"hparam/{name}", float(value)))

    def _write(self, step: int, summary) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(step=int(step), wall_time=time.time(), summary=summary))

    def flush(self) -> None:
        self._file.flush()
        if self._spool:
            remote.upload(self._spool.name, self._directory)

    def close(self) -> None:
        self._file.close()
        if self._spool:
            self._spool.cleanup()


def as_code(text: str) -> str:
    """Returns Markdown that shows a text as it is, whatever characters it has, but for "&#1": the
    library that TensorBoard converts it with (Python-Markdown 3.11) ends such numbers with ";".
    """
    # a carriage return or a form feed would end the block
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


@contextlib.contextmanager
def _without(module: str):
    """Makes `import module` fail as if it were not installed, unless it was imported before."""
    is_hidden = sys.modules.setdefault(module, None) is None  # type: ignore[arg-type]
    try:
        yield
    finally:
        if is_hidden:
            del sys.modules[module]
