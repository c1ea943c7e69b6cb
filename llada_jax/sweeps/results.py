"""What one run of a sweep has left in its workdir: how it ended, its curve and its last numbers."""

import contextlib
import json
import math
from typing import NamedTuple

from etils import epath

from llada_jax.errors import UserError
from llada_jax.run.metrics_file import METRICS, bound_of, is_over, read_lines
from llada_jax.storage import files, remote

# How the last attempt ended. `sweep` writes it, because `train` cannot record that it was killed.
EXIT_FILE = "exit.json"

# States in which starting a run again would give the same result.
FINISHED = ("complete", "diverged", "pruned")

# Exit statuses of a run that was stopped and may continue: 42 has saved; 129 (SIGHUP), 130
# (Ctrl-C) and 143 (SIGTERM) came before there was anything to save.
INTERRUPTED = (42, 129, 130, 143)


class Result(NamedTuple):
    """What one run of a sweep has to show.

    knobs: what the run sets. state: missing, partial, complete, failed (fix it and start it again),
    diverged (its loss is not finite), pruned (by Optuna), damaged (its metrics.jsonl) or unreadable
    (for this user). step: that of the last line of metrics.jsonl; 0 without one. tokens: trained on
    until then. bits_per_byte, standard_error (of bits per byte), nats_per_token: the final held-out
    bound, or the newest one while there is no final one; nan without any; the mean over the
    held-out splits of a mixture. curve: (step, held-out bits per byte) during training. The final
    bound is not part of it, because it is taken on more of the text. train_curve: the same on
    training batches; empty where their bits per byte are not known.
    """

    index: int  # type: ignore[assignment]
    knobs: dict
    workdir: str
    state: str
    step: int
    num_steps: int
    tokens: float
    bits_per_byte: float
    standard_error: float
    nats_per_token: float
    curve: list[tuple[int, float]]
    train_curve: list[tuple[int, float]]


def read_result(workdir, *, index: int, knobs: dict, num_steps: int) -> Result:
    """Returns what a workdir holds, of a run that may be missing, under way or over.

    Of metrics that are damaged, or that this user may not read, nothing is taken.
    """
    unknown = Result(
        index=index,
        knobs=knobs,
        workdir=str(workdir),
        state="damaged",
        step=0,
        num_steps=num_steps,
        tokens=0,
        bits_per_byte=math.nan,
        standard_error=math.nan,
        nats_per_token=math.nan,
        curve=[],
        train_curve=[],
    )
    try:
        # what lies in a workdir that is hidden counts as missing
        files.check_readable(remote.path_of(workdir) / METRICS)
    except UserError:
        return unknown._replace(state="unreadable")
    try:
        return _result(workdir, index=index, knobs=knobs, num_steps=num_steps)
    # One run whose metrics are damaged must not hide the results of all others.
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return unknown


def _result(workdir, *, index: int, knobs: dict, num_steps: int) -> Result:
    entries = read_lines(workdir)
    train = [(entry["step"], entry["train"]) for entry in entries if "train" in entry]
    bounds = [(e["step"], bound) for e in entries if (bound := bound_of(e, "heldout"))]
    final = [bound for entry in entries if (bound := bound_of(entry, "final"))]
    unknown = dict.fromkeys(("bits_per_byte", "bits_error", "nats_per_token"), math.nan)
    last = [unknown, *(bound for _, bound in bounds), *final][-1]
    step = entries[-1]["step"] if entries else 0
    state = _state(workdir, is_over=is_over(entries, num_steps), has_begun=bool(entries))
    return Result(
        index=index,
        knobs=knobs,
        workdir=str(workdir),
        state=state,
        step=step,
        num_steps=num_steps,
        tokens=train[-1][1]["tokens"] if train else 0,
        bits_per_byte=last["bits_per_byte"],
        standard_error=last["bits_error"],
        nats_per_token=last["nats_per_token"],
        curve=[(step, bound["bits_per_byte"]) for step, bound in bounds],
        train_curve=[
            (step, float(numbers["bits_per_byte"]))
            for step, numbers in train
            if "bits_per_byte" in numbers
        ],
    )


def write_exit(workdir, *, status: int, pruned: bool = False) -> None:
    """Records how an attempt at a run ended: the exit status of `train`."""
    path = epath.Path(workdir) / EXIT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    ended = {"exit_status": status, "pruned": pruned}
    # All processes of a run on several hosts write it.
    files.write_whole(path, json.dumps(ended) + "\n", concurrent=True)


def _state(workdir, *, is_over: bool, has_begun: bool) -> str:
    path = epath.Path(workdir) / EXIT_FILE
    # Without the file the run was never started, or this machine went down with it: as interrupted.
    ended = {"exit_status": 42, "pruned": False}
    if path.exists():
        # A file that is damaged says no more than one that is missing.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            found = files.decode_json(path.read_text())
            ended = {"exit_status": int(found["exit_status"]), "pruned": bool(found["pruned"])}
    if is_over or ended["exit_status"] == 0:
        return "complete"
    if ended["pruned"]:
        return "pruned"
    if ended["exit_status"] == 3:
        return "diverged"
    if ended["exit_status"] not in INTERRUPTED:
        return "failed"
    return "partial" if has_begun else "missing"
