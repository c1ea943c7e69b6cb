"""A run that is killed and started again equals the run that was never killed, bit for bit: every
parameter and every metric.
"""

from pathlib import Path

import numpy as np
import pytest
from support.runs import (
    assert_same_run,
    is_committed,
    kill_when,
    last_logged_step,
    losses,
    metric_lines,
    saved_arrays,
)

from llada_jax.cluster import stop_request

NUM_STEPS = 40
WORDS = (f"num_steps={NUM_STEPS}", "schedule.name=cosine", "optimizer.ema_decay=0.9")


@pytest.fixture(scope="module")
def straight(runs) -> Path:
    workdir = runs.directory / "straight"
    runs.train(workdir, *WORDS)
    # parameters, two moments and the average of each, and the counters
    assert len(saved_arrays(workdir, NUM_STEPS)) > 50
    return workdir


@pytest.mark.parametrize("num_calls_before", [0, 1, 7])
def test_a_request_is_seen_at_the_next_step_of_a_resumed_run(monkeypatch, num_calls_before):
    """Also when it comes before its first step. The test stands in for JAX's preemption service,
    which answers True at one number alone.
    """
    asked = [-1]

    def reached_preemption_sync_point(number):
        asked.append(number)
        return number == sync_point

    monkeypatch.setattr(stop_request.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        stop_request.multihost_utils, "reached_preemption_sync_point", reached_preemption_sync_point
    )
    stop, sync_point, first_step = stop_request.StopRequest(), None, 100
    for step in range(first_step, first_step + num_calls_before):
        assert not stop.reached(step)
    sync_point = max(asked) + 1
    assert stop.reached(first_step + num_calls_before)


@pytest.mark.slow
def test_forty_steps_straight_equal_twenty_and_a_kill_and_twenty_more(runs, straight):
    workdir = runs.directory / "killed"
    process = runs.start(workdir, *WORDS)
    kill_when(process, lambda: is_committed(workdir, 20) and last_logged_step(workdir) >= 23)
    log = runs.train(workdir, *WORDS)
    assert "start       step 20 of" in log
    assert_same_run(workdir, straight, step=NUM_STEPS)


@pytest.mark.slow
def test_a_checkpoint_inside_a_log_interval_keeps_the_sums_of_the_interval(runs):
    words = [
        "num_steps=20",
        "log.every_steps=7",
        "checkpoint.every_steps=5",
        "evaluation.every_steps=0",
    ]
    whole, killed = runs.directory / "interval", runs.directory / "interval-killed"
    runs.train(whole, *words)
    process = runs.start(killed, *words)
    kill_when(process, lambda: is_committed(killed, 5))
    runs.train(killed, *words)
    assert metric_lines(killed) == metric_lines(whole)


@pytest.mark.slow
def test_kills_in_the_middle_of_asynchronous_saves(runs, straight):
    """Saves follow each other so closely here that most kills hit one that is half done."""
    workdir = runs.directory / "random-kills"
    words = [*WORDS, "checkpoint.every_steps=1"]
    checkpoints = workdir / "checkpoints"
    num_half_written = 0
    for target in (3, 17):
        process = runs.start(workdir, *words)
        kill_when(process, lambda target=target: last_logged_step(workdir) >= target)
        steps = [path for path in checkpoints.iterdir() if path.is_dir()]
        num_half_written += sum(not (path / "commit_success.txt").exists() for path in steps)
    log = runs.train(workdir, *words)
    assert "start       step" in log
    assert num_half_written > 0
    assert_same_run(workdir, straight, step=NUM_STEPS)


@pytest.mark.slow
def test_one_run_over_one_two_and_four_processes_and_three_meshes_keeps_its_curve(runs):
    words = ["evaluation.every_steps=0", "evaluation.final_num_batches=1"]
    straight, chain = runs.directory / "chain-straight", runs.directory / "chain"
    runs.train(straight, "num_steps=15", *words)
    links = [  # each ends where the next goes on
        (3, dict(num_devices=1), []),
        (6, dict(num_devices=2, num_processes=2), []),
        (9, dict(num_devices=1, num_processes=4), []),
        (12, dict(num_devices=8), ["mesh.fsdp=8"]),
        (15, dict(num_devices=8), ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]),
    ]
    before = 0
    for step, devices, mesh in links:
        log = runs.train(chain, f"num_steps={step}", *words, *mesh, **devices)
        assert before == 0 or f"start       step {before} of" in log
        before = step
    np.testing.assert_allclose(losses(chain), losses(straight), rtol=1e-5)
    expected = saved_arrays(straight, 15)
    for name, array in saved_arrays(chain, 15).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-2, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_finished_run_says_so_and_changes_nothing(runs, straight):
    before = {
        path: path.read_bytes() for path in straight.glob("checkpoints/**/*") if path.is_file()
    }
    lines = metric_lines(straight)
    log = runs.train(straight, *WORDS)
    assert "the run is complete: step 40 of 40" in log
    assert metric_lines(straight) == lines
    assert before == {
        path: path.read_bytes() for path in straight.glob("checkpoints/**/*") if path.is_file()
    }
