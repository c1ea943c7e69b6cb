"""The account of a run's time: every second in one place, across restarts."""

import json

import pytest

from llada_jax.run.clock import Clock
from llada_jax.run.goodput import Ledger


class Time:
    """A wall clock, and a process clock, that move only when a test moves them."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def attempt(workdir, time, *, start_step, steps, init=3.0, per_step=2.0, save_every=5):
    """One start of a run: initialises, does the steps, and is killed."""
    clock = Clock(now=time)
    time.seconds += init
    ledger = Ledger(workdir, clock, start_step=start_step, now=time)
    clock.start_training()
    for step in range(start_step + 1, start_step + steps + 1):
        time.seconds += per_step
        if step % save_every == 0:
            with clock.span("checkpoint"):
                ledger.mark(step)
                time.seconds += 1.0
    return ledger


def test_every_second_of_one_attempt_is_counted_once(tmp_path):
    time = Time()
    report = attempt(tmp_path, time, start_step=0, steps=10).report()
    assert report == {
        "goodput": pytest.approx(20 / 25),
        "lost_init_s": 3.0,
        "lost_checkpoint_s": 2.0,
    }


def test_steps_done_again_and_the_time_between_are_lost(tmp_path):
    time = Time()
    # marked at steps 5 and 10, at seconds 13 and 24
    attempt(tmp_path, time, start_step=0, steps=10)
    time.seconds = 100.0
    ledger = attempt(tmp_path, time, start_step=5, steps=10)
    report = ledger.report()
    # step 10 was given to the disk at second 24, where the first account ends; the save of step 10
    # was not finished
    assert report["lost_down_s"] == pytest.approx(76)
    assert report["lost_replay_s"] == pytest.approx(10)  # steps 6 to 10 of the first attempt
    assert report["lost_init_s"] == pytest.approx(6)
    productive = 5 * 2.0 + 10 * 2.0
    assert report["goodput"] == pytest.approx(
        productive / sum([productive, 76, 10, 6, report["lost_checkpoint_s"]])
    )


def test_steps_that_a_kill_between_two_saves_has_lost_are_done_again_and_not_down(tmp_path):
    """Saved at step 5 and killed after step 105, where the last log line is that of step 100."""
    time = Time()
    first = attempt(tmp_path, time, start_step=0, steps=5)
    for step in range(6, 106):
        time.seconds += 2.0
        if step % 10 == 0:
            first.reach(step)
    report = attempt(tmp_path, time, start_step=5, steps=0, init=0.0).report()
    # The file is written every 30 s: at the log lines of steps 20, 40, ... and 100.
    assert report["lost_replay_s"] == pytest.approx(95 * 2.0)
    assert report["lost_down_s"] == pytest.approx(5 * 2.0)
    assert report["goodput"] == pytest.approx(5 * 2.0 / time.seconds)


def test_a_return_counts_only_the_steps_since_then_as_done_again(tmp_path):
    """Copies every 10 steps; then a host is lost, and the run continues from an old checkpoint."""
    time = Time()
    attempt(tmp_path, time, start_step=0, steps=2500, per_step=1.0, save_every=10)
    assert len(json.loads((tmp_path / "goodput.json").read_text())["marks"]) < 200
    # attempts that save nothing, and so leave the account as it is
    for start_step in (2490, 2300, 1000):
        ledger = attempt(tmp_path, time, start_step=start_step, steps=0)
        lost = 2500 - start_step
        assert ledger.seconds()["step"] == pytest.approx(start_step, abs=0.02 * lost)
        assert sum(ledger.seconds().values()) == pytest.approx(time.seconds)


def test_the_whole_of_the_time_since_the_first_start_is_accounted_for(tmp_path):
    time = Time()
    attempt(tmp_path, time, start_step=0, steps=5)
    time.seconds = 50.0
    attempt(tmp_path, time, start_step=5, steps=5)
    time.seconds = 90.0
    ledger = attempt(tmp_path, time, start_step=10, steps=5)
    assert sum(ledger.seconds().values()) == pytest.approx(time.seconds)


def test_a_host_whose_clock_is_behind_takes_nothing_from_the_account(tmp_path):
    time = Time()
    attempt(tmp_path, time, start_step=0, steps=5)
    time.seconds = 1.0
    report = attempt(tmp_path, time, start_step=5, steps=5).report()
    assert report["lost_down_s"] == 0


def test_a_run_that_starts_from_scratch_starts_a_new_account(tmp_path):
    time = Time()
    attempt(tmp_path, time, start_step=0, steps=10)
    report = attempt(tmp_path, time, start_step=0, steps=10).report()
    assert "lost_down_s" not in report
    assert report["lost_init_s"] == 3.0


def test_only_the_first_process_writes(tmp_path):
    ledger = Ledger(tmp_path, Clock(now=Time()), start_step=0, enabled=False, now=Time())
    ledger.mark(1)
    assert not list(tmp_path.iterdir())


def test_the_line_names_the_largest_loss_first(tmp_path):
    time = Time()
    line = attempt(tmp_path, time, start_step=0, steps=10).line()
    assert line == "goodput     80% of 0.01 h; lost to init 12%, checkpoint 8%"
