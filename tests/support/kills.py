"""Kills a run of two processes at random moments, saves included, and compares what is left with an
undisturbed run.

    python tests/support/kills.py --kills 20 --seed 0 --work /tmp/kills

Each attempt is started by launch/local.py. A random moment later (while the processes start,
compile, restore, train or save) one of them, or the launcher, is sent SIGKILL or SIGTERM. Every
next start must find at least the newest step that was whole when the signal was sent, and the last
attempt must end with the parameters, optimizer state and metrics of the undisturbed run, bit for
bit. Now and then the local copies of one process are lost with its host.
"""

import argparse
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

# as a script it finds its neighbours too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.paths import ROOT
from support.runs import SMALL_RUN, is_committed, last_logged_step, metric_lines, saved_arrays

LAUNCHER = ROOT / "launch" / "local.py"
SAVES = (
    "schedule.name=cosine",
    "checkpoint.every_steps=2",
    "checkpoint.local_every_steps=1",
    "optimizer.ema_decay=0.9",
)


@dataclasses.dataclass
class Team:
    """Two processes under the launcher, with all that they say in one file."""

    launcher: subprocess.Popen
    log: Path

    def processes(self) -> list[int]:
        """The process ids of the two, or of those that have been started and have not ended."""
        try:
            return [
                int(pid)
                for pid in Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children")
                .read_text()
                .split()
            ]
        except FileNotFoundError:
            return []

    def wait(self, timeout: float = 300) -> int:
        return self.launcher.wait(timeout)

    def start_step(self) -> int | None:
        """The step from which the attempt went on; 0 for the beginning, None when it did not come
        so far.
        """
        found = re.search(r"start       (?:step (\d+) of|initialisation)", self.log.read_text())
        return None if not found else int(found[1] or 0)


def start(work: Path, name: str, dataset: Path, number: int, *, num_steps: int) -> Team:
    """Starts an attempt of the run `name`."""
    knobs = {
        "data.path": dataset,
        "num_steps": num_steps,
        "samples.every_steps": 0,
        "checkpoint.local_directory": work / f"{name}-local",
    }
    words = [
        f"--config.{knob}" for knob in [*(f"{key}={value}" for key, value in knobs.items()), *SAVES]
    ]
    log = work / f"{name}-{number}.log"
    with open(log, "wb") as file:
        launcher = subprocess.Popen(
            [
                sys.executable,
                LAUNCHER,
                "--processes",
                "2",
                "--devices",
                "2",
                "--grace",
                "10",
                "--logs",
                work / f"{name}-{number}",
                "--",
                sys.executable,
                "-m",
                "llada_jax",
                "train",
                "--config",
                work / "small.py",
                "--workdir",
                work / name,
                *words,
            ],
            stdout=file,
            stderr=file,
        )
    return Team(launcher, log)


def newest_whole_step(work: Path, name: str) -> int:
    """The newest step of either tier that is whole in both processes at this moment; 0 if none."""
    committed = [int(p.name) for p in (work / name / "checkpoints").glob("*") if p.name.isdigit()]
    steps = {step for step in committed if is_committed(work / name, step)}
    parts = [
        path.name for path in (work / f"{name}-local").glob("*/*") if path.suffix != ".partial"
    ]
    attempt = {part: attempt_of(work, name, part) for part in parts}
    for part in parts:
        step, _, rest = part.partition(".")
        other = f"{step}.{1 - int(rest[0])}-of-2"
        if attempt[part] is not None and attempt[part] == attempt.get(other):
            steps.add(int(step))
    return max(steps, default=0)


def attempt_of(work: Path, name: str, part: str) -> int | None:
    try:
        (index,) = (work / f"{name}-local").glob(f"*/{part}/index.json")
        return json.loads(index.read_text())["attempt"]
    except (OSError, ValueError):
        return None  # removed meanwhile


def is_half_saved(work: Path, name: str) -> bool:
    """Whether a save of either tier is under way."""
    steps = [path for path in (work / name / "checkpoints").glob("*") if path.is_dir()]
    return any(not (path / "commit_success.txt").exists() for path in steps) or any(
        path.suffix == ".partial" for path in (work / f"{name}-local").glob("*/*")
    )


def wait_for_step(team: Team, workdir: Path, step: int) -> None:
    """Waits until the attempt has trained, and a step has been logged; or until it has ended."""
    deadline = time.monotonic() + 300
    while team.launcher.poll() is None:
        assert time.monotonic() < deadline, team.log.read_text()
        before = team.start_step()
        if before is not None and last_logged_step(workdir) >= max(step, before + 1):
            return
        time.sleep(0.002)


def disturb(team: Team, chance: random.Random, work: Path, name: str, step: int) -> dict:
    """Sends a signal at a random moment; returns what was done, and when."""
    how, moment = chance.choice((signal.SIGKILL, signal.SIGTERM)), chance.random()
    if moment < 0.25:  # while it starts, compiles or restores
        when = f"{24 * moment:.1f} s after the start"
        time.sleep(24 * moment)
    else:
        wait_for_step(team, work / name, step)
        when = f"after step {step}"
        time.sleep(chance.uniform(0, 0.3))
    victims, kept = team.processes(), newest_whole_step(work, name)
    victim = chance.choice(victims) if victims else None
    if how == signal.SIGTERM and chance.random() < 0.5:
        victim = team.launcher.pid  # which hands it to both
    deadline = time.monotonic() + 10
    while moment > 0.5 and not is_half_saved(work, name) and time.monotonic() < deadline:
        time.sleep(0.0005)  # half of them into a save
    half_saved = is_half_saved(work, name)
    is_sent = False
    if victim and team.launcher.poll() is None:
        try:
            os.kill(victim, how)
            is_sent = True
        except ProcessLookupError:
            pass
    who = "launcher" if victim == team.launcher.pid else "one process"
    return {
        "signal": how.name,
        "to": who,
        "when": when,
        "sent": is_sent,
        "kept": kept,
        "half saved": half_saved,
    }


def run(work: Path, dataset: Path, *, num_kills: int, num_steps: int, seed: int) -> list[dict]:
    """Returns what was done to the run; raises AssertionError when a restart or the result is not
    as it must be.
    """
    work.mkdir(parents=True, exist_ok=True)
    (work / "small.py").write_text(SMALL_RUN)
    attempt = functools.partial(start, work, dataset=dataset, num_steps=num_steps)
    straight = attempt("straight", number=0)
    assert straight.wait() == 0, straight.log.read_text()

    chance, kills, kept = random.Random(seed), [], 0
    targets = sorted(chance.randint(1, num_steps - 1) for _ in range(num_kills))
    for number, target in enumerate(targets):
        team = attempt("killed", number=number)
        did = disturb(team, chance, work, "killed", target)
        did["status"], did["start"] = team.wait(), team.start_step()
        if did["start"] is not None:
            assert did["start"] >= kept, (f"step {kept} was whole", team.log.read_text())
        assert did["status"] in (0, 42, 128 + 9, 128 + 15, -15), team.log.read_text()
        kept = newest_whole_step(work, "killed")
        assert kept >= did["kept"]
        if chance.random() < 0.2:  # one host is replaced, and its disk with it
            host = chance.choice((0, 1))
            for part in (work / "killed-local").glob(f"*/*.{host}-of-2*"):
                shutil.rmtree(part)
            kept, did["disk lost"] = newest_whole_step(work, "killed"), host
        kills.append(did)
        print(f"{number}: {did}", flush=True)
    number, status = num_kills, 42
    # Started again as by a scheduler: on a machine as busy as this one, processes also lose each
    # other by themselves.
    while status == 42:
        assert number < num_kills + 10
        last, number = attempt("killed", number=number), number + 1
        status = last.wait()
    assert status == 0, last.log.read_text()
    assert last.start_step() >= kept

    expected, actual = (saved_arrays(work / name, num_steps) for name in ("straight", "killed"))
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path)
    assert metric_lines(work / "killed") == metric_lines(work / "straight")
    return kills


if __name__ == "__main__":
    from support.datasets import circle_dataset

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how many (20)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of the run (60)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the moments and victims (0)"
    )
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="an empty directory"
    )
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    kills = run(
        args.work,
        circle_dataset(args.work / "data"),
        num_kills=args.kills,
        num_steps=args.steps,
        seed=args.seed,
    )
    hit = sum(kill["sent"] for kill in kills)
    print(
        f"{hit} signals, {sum(kill['half saved'] for kill in kills)} of them into a save: same "
        "arrays, same metrics"
    )
