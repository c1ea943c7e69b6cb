"""A storm: kills training runs at random moments until they have finished, and compares what they
leave with undisturbed runs.

    python tests/support/storm.py --kills 1000 --work /tmp/storm

Every run trains a tiny model with both tiers of checkpoints and evaluations on the way. Again and
again it is started, and SIGKILL or SIGTERM is sent to one or to all of its processes: while they
start, compile, train, save or evaluate. Now and then the local copies of one process are lost with
its host. Half of the runs stay on one mesh, and must end with the parameters, the optimizer state
and the metrics of the undisturbed run bit for bit. The others change the mesh and the number of
processes from start to start, and must end with the same up to rounding. Every start must find at
least the newest step that was whole before it, and every process must end with a documented status.

The choices of run N follow from its seed, which is printed: `--seed N --runs 1` makes them again.
"""

import argparse
import collections
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

# as a script it finds its neighbours too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# before numpy and JAX are imported, which read the variables that it sets
from support.forked_runs import Child, fork, start_train

# isort: split
import numpy as np

from support.datasets import circle_dataset
from support.runs import SMALL_RUN, free_port, is_committed, metric_lines, saved_arrays

NUM_STEPS = 12
KNOBS = (
    f"num_steps={NUM_STEPS}",
    "schedule.name=cosine",
    "optimizer.ema_decay=0.9",
    "evaluation.every_steps=3",
    "evaluation.num_batches=4",
    "checkpoint.every_steps=2",
    "checkpoint.local_every_steps=1",
    "log.tensorboard=False",
)
PHASES = ("start", "compile", "train", "save", "evaluate")
# A process that has lost its peer before they have met waits minutes for it; a launcher kills it
# earlier, and so does this.
GRACE_S = 8.0
# The watching costs CPU time too.
POLL_S = 0.01
# No attempt takes so long on a machine that is busy with other work too: one that does hangs.
HANGS_S = 600.0
# The status with which a process may end: complete, stopped by the signal with all saved, or killed
# by it.
ALLOWED = (0, 42, -signal.SIGKILL, -signal.SIGTERM)


class Layout(NamedTuple):
    """Processes, devices of each, and how the mesh arranges them."""

    num_processes: int
    num_devices: int
    mesh: tuple[str, ...] = ()


LAYOUTS = (
    Layout(1, 1),
    Layout(2, 1),
    Layout(1, 4, ("mesh.data=2", "mesh.fsdp=2")),
)


class Fault(Exception):
    """The run did something that it must not."""


class Attempt:
    """One start of a run, and what can be seen of it from outside."""

    def __init__(self, work: Path, name: str, number: int, layout: Layout):
        self.workdir, self.local = work / name, work / f"{name}-local"
        self.layout = layout
        knobs = (
            f"data.path={work / 'data'}",
            f"log.compilation_cache={work / 'cache'}",
            f"checkpoint.local_directory={self.local}",
            *KNOBS,
            *layout.mesh,
        )
        self.children = start_train(
            [
                *("--config", str(work / "small.py"), "--workdir", str(self.workdir)),
                *(f"--config.{knob}" for knob in knobs),
            ],
            work / f"{name}-logs" / f"{number:04}",
            num_processes=layout.num_processes,
            num_devices=layout.num_devices,
            address=f"127.0.0.1:{free_port()}",
        )

    def log(self) -> str:
        return "\n".join(f"{c.log}:\n{c.log.read_text()}" for c in self.children if c.log.exists())

    def start_step(self) -> int | None:
        """The step from which the attempt went on; 0: the beginning; None: it came not so far."""
        found = re.search(r"start       (?:step (\d+) of|initialisation)", self.log())
        return None if not found else int(found[1] or 0)

    def whole_steps(self) -> set[int]:
        """The steps of either tier from which a start on the same layout can go on."""
        directory = self.workdir / "checkpoints"
        named = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
        steps = {step for step in named if is_committed(self.workdir, step)}
        count, found = self.layout.num_processes, collections.defaultdict(set)
        for index in self.local.glob(f"*/*-of-{count}/index.json"):
            try:
                attempt = json.loads(index.read_text())["attempt"]
            except (OSError, ValueError):
                continue  # removed meanwhile
            found[int(index.parent.name.split(".")[0]), attempt].add(index.parent.name)
        return steps | {step for (step, _), parts in found.items() if len(parts) == count}

    def is_saving(self) -> bool:
        steps = [path for path in (self.workdir / "checkpoints").glob("*") if path.is_dir()]
        return any(not (path / "commit_success.txt").exists() for path in steps) or any(
            path.suffix == ".partial" for path in self.local.glob("*/*")
        )

    def lines(self) -> list[dict]:
        try:
            return metric_lines(self.workdir)
        except (OSError, ValueError):
            return []  # not there yet, or just being written

    def is_evaluating(self) -> bool:
        """Whether the newest line is of a step after which an evaluation follows."""
        last = (self.lines() or [{}])[-1]
        return "train" in last and (last["step"] % 3 == 0 or last["step"] == NUM_STEPS)

    def phase(self) -> str:
        """What the attempt is doing at this moment, as far as can be seen."""
        log = self.log()
        if "start       " not in log:
            return "start"
        if "compiled " not in log and "the run is complete" not in log:
            return "compile"
        if self.is_saving():
            return "save"
        return "evaluate" if self.is_evaluating() else "train"

    def has_ended(self) -> bool:
        return all([child.poll() is not None for child in self.children])

    def wait_for(self, phase: str) -> None:
        """Waits until the attempt is seen in this phase, or in a later one, or has ended."""
        deadline = time.monotonic() + HANGS_S
        is_late = False
        while not self.has_ended():
            seen = self.phase()
            # any step of this attempt, because training ends after some of them
            is_late = is_late or (phase == "train" and seen in ("save", "evaluate"))
            if seen == phase or (phase == "compile" and seen not in ("start", phase)) or is_late:
                return
            if time.monotonic() > deadline:
                raise Fault(f"waited {HANGS_S:.0f} s for {phase!r}:\n{self.log()}")
            time.sleep(POLL_S)

    def end(self, *, grace_s: float) -> list[int]:
        """Returns how each process ended. What is left `grace_s` after another was killed, or had
        lost it, is killed as by a launcher.
        """
        deadline, first_failed = time.monotonic() + HANGS_S, None
        while not self.has_ended():
            if any(child.status for child in self.children) and first_failed is None:
                first_failed = time.monotonic()
            if first_failed is not None and time.monotonic() > first_failed + grace_s:
                for child in self.children:
                    child.send(signal.SIGKILL)
            if time.monotonic() > deadline:
                for child in self.children:
                    child.send(signal.SIGABRT)
                raise Fault(f"still running after {HANGS_S:.0f} s:\n{self.log()}")
            time.sleep(POLL_S)
        statuses = [child.status for child in self.children]
        if not set(statuses) <= set(ALLOWED):
            raise Fault(f"ended with {statuses}:\n{self.log()}")
        return statuses  # type: ignore[return-value]


def strike(attempt: Attempt, chance: random.Random) -> dict:
    """Sends a signal at a random moment; returns what was done, {} when the attempt had ended."""
    aim, how = chance.choice(PHASES), chance.choice((signal.SIGKILL, signal.SIGTERM))
    victims = chance.choice([attempt.children, [chance.choice(attempt.children)]])
    delay = chance.uniform(0, {"start": 1.2, "compile": 0.5, "train": 0.2}.get(aim, 0.03))
    attempt.wait_for(aim)
    time.sleep(delay)
    phase, kept = attempt.phase(), max(attempt.whole_steps(), default=0)
    if attempt.has_ended():
        return {}
    for child in victims:
        child.send(how)
    who = "all" if len(victims) == len(attempt.children) else "one of two"
    return {"signal": how.name, "to": who, "during": phase, "kept": kept}


def weather(work: Path, name: str, seed: int, *, most_kills: int) -> tuple[Layout | None, list]:
    """Trains the run `name` to its end through at most so many kills.

    Returns the layout of the run, None where it changed, and what was done to it.
    """
    chance, kills, kept, number = random.Random(seed), [], 0, 0
    fixed = chance.choice(LAYOUTS) if chance.random() < 0.5 else None
    while True:
        layout = fixed or chance.choice(LAYOUTS)
        attempt, number = Attempt(work, name, number, layout), number + 1
        did = strike(attempt, chance) if len(kills) < most_kills else {}
        statuses, start = attempt.end(grace_s=GRACE_S), attempt.start_step()
        if start is not None and start < kept:
            raise Fault(f"step {kept} was whole, and the start found {start}:\n{attempt.log()}")
        if did:
            kills.append({**did, "layout": layout, "ended": statuses, "start": start})
            print(f"  {number}: {kills[-1]}", flush=True)
        if set(statuses) == {0}:
            return fixed, kills
        if number > 20 + 3 * most_kills:
            raise Fault(f"no end after {number} starts:\n{attempt.log()}")
        if fixed and fixed.num_processes > 1 and chance.random() < 0.2:
            host = chance.choice((0, 1))  # is replaced, and its disk with it
            for part in attempt.local.glob(f"*/*.{host}-of-2*"):
                shutil.rmtree(part)
        # A local copy is read on its own layout alone, and is dropped by a start on another.
        committed = {s for s in attempt.whole_steps() if is_committed(attempt.workdir, s)}
        kept = max(attempt.whole_steps() if fixed else committed, default=0)


def compare(actual: Path, expected: Path, *, is_exact: bool) -> None:
    """Raises AssertionError unless two runs have the same state and the same metrics."""
    got, want = (saved_arrays(workdir, NUM_STEPS) for workdir in (actual, expected))
    assert got.keys() == want.keys()
    assert len(want) > 50  # parameters, two moments and the average of each, and the counters
    tolerance = {"rtol": 0, "atol": 0} if is_exact else {"rtol": 1e-2, "atol": 1e-4}
    for path, array in want.items():
        np.testing.assert_allclose(got[path], array, **tolerance, err_msg=path)
    lines, undisturbed = metric_lines(actual), metric_lines(expected)
    if is_exact:
        assert lines == undisturbed
        return
    assert [(line["step"], line.keys()) for line in lines] == [
        (line["step"], line.keys()) for line in undisturbed
    ]
    curves = [
        [line["train"]["loss"] for line in side if "train" in line] for side in (lines, undisturbed)
    ]
    np.testing.assert_allclose(*curves, rtol=1e-5)


def undisturbed(work: Path, layout: Layout) -> Path:
    """Returns the workdir of an undisturbed run, which is trained when it is missing."""
    name = f"straight-{LAYOUTS.index(layout)}"
    if not (work / name).exists():
        attempt = Attempt(work, name, 0, layout)
        if set(attempt.end(grace_s=HANGS_S)) != {0}:
            raise Fault(f"the undisturbed run failed:\n{attempt.log()}")
    return work / name


def check(work: Path, name: str, layout: Layout | None) -> None:
    """Compares a run with the undisturbed one, in a process that may ask JAX for a device."""
    straight = undisturbed(work, layout or LAYOUTS[0])

    def work_of_child() -> int:
        compare(work / name, straight, is_exact=layout is not None)
        return 0

    child: Child = fork(work_of_child, work / f"{name}-comparison.log")
    if child.wait(HANGS_S) != 0:
        raise Fault(f"{name} differs from {straight}:\n{child.log.read_text()}")


def storm(work: Path, *, num_kills: int, num_runs: int | None, seed: int) -> list[dict]:
    """Returns all that was done, after `num_kills` kills or `num_runs` runs, whichever comes first.

    Raises:
        Fault: a run did what it must not; its files are left in `work`.
    """
    work.mkdir(parents=True)
    (work / "small.py").write_text(SMALL_RUN)
    # the writer of records has threads, which would not live on in the processes of the runs
    if fork(lambda: 0 * bool(circle_dataset(work / "data")), work / "data.log").wait(HANGS_S):
        raise Fault((work / "data.log").read_text())
    kills: list[dict] = []
    number, kinds = 0, collections.Counter()
    while len(kills) < num_kills and (num_runs is None or number < num_runs):
        name = f"run-{seed + number}"
        print(f"run with seed {seed + number}", flush=True)
        layout, done = weather(work, name, seed + number, most_kills=num_kills - len(kills))
        check(work, name, layout)
        kinds["bit for bit" if layout else "up to rounding"] += 1
        kills, number = kills + done, number + 1
        print(f"  {len(done)} kills, equal; {len(kills)} kills of {number} runs", flush=True)
        for path in work.glob(f"{name}*"):  # of a fault they stay
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(f"runs: {dict(kinds)}")
    return kills


def report(kills: list[dict], wall_s: float) -> None:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = used.ru_utime + used.ru_stime
    print(
        f"{len(kills)} kills in {wall_s / 60:.0f} minutes, {cpu_s / max(len(kills), 1):.1f} CPU "
        f"seconds each; {os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}"
    )
    for key in ("signal", "to", "during", "layout"):
        counts = collections.Counter(str(kill[key]) for kill in kills)
        print(f"  {key}: " + ", ".join(f"{word} {n}" for word, n in counts.most_common()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kills", type=int, default=50, metavar="N", help="stop after so many (50)")
    add("--runs", type=int, metavar="N", help="stop after so many runs")
    add("--seed", type=int, default=0, metavar="N", help="of the first run (0)")
    add("--work", type=Path, required=True, metavar="DIR", help="a directory to create")
    args = parser.parse_args()
    began = time.monotonic()
    try:
        kills = storm(args.work, num_kills=args.kills, num_runs=args.runs, seed=args.seed)
    except Fault as fault:
        sys.exit(f"FAULT: {fault}")
    report(kills, time.monotonic() - began)
