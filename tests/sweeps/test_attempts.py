"""Processes of a sweep: how they are started, stopped and continued."""

import json
import os
import signal

import pytest
from support.runs import metric_lines
from support.sweeps import RATES, states, stopped_under_way

from llada_jax.sweeps import attempts, devices, results, targets
from llada_jax.sweeps.attempts import Attempts


def test_run_local_runs_all_with_their_knobs_each_in_its_workdir(
    write_config, call_sweep, tmp_path, fake_train
):
    write_config(RATES)
    out, err = call_sweep("--run", "local", "--config.seed=5")
    assert out == ""
    assert states(lambda *flags: call_sweep(*flags, "--config.seed=5")) == ["complete"] * 3
    for index, rate in enumerate((1e-3, 3e-3, 1e-2)):
        log = (tmp_path / "runs" / f"{index:03d}" / "train.log").read_text()
        assert log == f"fake training seed=5 schedule.learning_rate={rate}\n"
        assert f"{index:03d} complete: {2 + 100 * rate:.3f} bits/byte, step 10/10" in err


@pytest.mark.slow
def test_a_second_start_runs_only_what_is_not_finished(
    write_config, call_sweep, tmp_path, fake_train
):
    write_config(RATES, "add(seed=13)", "add(seed=14)")
    _, err = call_sweep("--run", "local", status=1)
    assert "1 failed, the first with status 1" in err
    assert f"{tmp_path}/runs/003/train.log says why" in err
    assert states(call_sweep) == ["complete", "complete", "complete", "failed", "diverged"]
    logs = [path.read_text() for path in sorted((tmp_path / "runs").glob("*/train.log"))]
    _, err = call_sweep("--run", "local", status=1)
    assert "1 of 5 runs are to be done" in err  # what diverged would diverge again
    again = [path.read_text() for path in sorted((tmp_path / "runs").glob("*/train.log"))]
    assert [after.removeprefix(before) for before, after in zip(logs, again)] == [
        "",
        "",
        "",
        "fake training seed=13\n",
        "",
    ]
    out, _ = call_sweep("--list")
    assert out.splitlines()[3:] == [
        "003  failed 0/10       seed=13",
        "004  diverged 5/10     seed=14",
    ]


@pytest.mark.slow
def test_sigterm_reaches_the_runs_and_the_same_command_continues_them(
    write_config, call_sweep, tmp_path, fake_train
):
    write_config("for seed in (1, 2, 3): add(seed=seed, num_steps=200)")
    before = signal.getsignal(signal.SIGTERM)
    with stopped_under_way(tmp_path / "runs" / "001"):
        _, err = call_sweep("--run", "local", "--parallel", "2", status=42)
    assert signal.getsignal(signal.SIGTERM) == before
    assert "3 of 3 runs left; the same command continues" in err
    first, second, third = json.loads(call_sweep("--list", "--json")[0])["runs"]
    assert first["state"] == second["state"] == "partial"
    assert 0 < first["step"] < 200
    assert 16 <= second["step"] < 200
    assert third["state"] == "missing"
    call_sweep("--run", "local")
    assert states(call_sweep) == ["complete"] * 3
    for index in range(3):  # each step once: the second attempt went on where the first had stopped
        steps = [line["step"] for line in metric_lines(tmp_path / "runs" / f"{index:03d}", "train")]
        assert steps == list(range(1, 201))


def test_a_signal_while_the_last_run_ends_leaves_nothing_to_continue(
    write_config, call_sweep, fake_train, monkeypatch
):
    def record_end(attempt):
        os.kill(os.getpid(), signal.SIGTERM)
        return attempts.record_end(attempt)

    monkeypatch.setattr(targets, "record_end", record_end)
    write_config("add(seed=1)", "add(seed=2)")
    assert "1 of 2 runs left" in call_sweep("--run", "local", status=42)[1]
    assert "asked to stop" not in call_sweep("--run", "local", status=0)[1]


@pytest.mark.slow
def test_parallel_runs_are_never_more_than_asked_for(
    write_config, call_sweep, tmp_path, fake_train, monkeypatch
):
    # four seconds each, so that three are under way even where starting one takes long
    write_config("for seed in range(1, 6): add(seed=seed, num_steps=400)")
    counts = []
    started = Attempts.start

    def start(self, run, **kwargs):
        started(self, run, **kwargs)
        counts.append(sum(attempt.process.poll() is None for attempt in self.under_way))

    monkeypatch.setattr(Attempts, "start", start)
    call_sweep("--run", "local", "--parallel", "3")
    assert len(counts) == 5
    assert max(counts) == 3
    assert states(call_sweep) == ["complete"] * 5


def test_parallel_runs_get_devices_of_their_own(
    write_config, call_sweep, tmp_path, fake_train, monkeypatch
):
    monkeypatch.setattr(devices, "plugins", lambda: {"cuda"})
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    write_config("for seed in range(1, 5): add(seed=seed, num_steps=40)")
    _, err = call_sweep("--run", "local", "--parallel", "2")
    assert "000 starts on CUDA_VISIBLE_DEVICES=4,5: seed=1" in err
    given = [path.read_text() for path in sorted((tmp_path / "runs").glob("*/devices"))]
    assert given[:2] == ["4,5", "6,7"]
    assert set(given[2:]) <= {"4,5", "6,7"}  # those of a run that has ended
    assert "more than the 4 GPUs" in call_sweep("--run", "local", "--parallel", "5", status=2)[1]


@pytest.mark.slow
def test_index_runs_one_run_and_passes_its_exit_status_on(
    write_config, call_sweep, tmp_path, fake_train
):
    write_config("add(seed=1)", "add(seed=13)", "add(seed=14)")
    call_sweep("--index", "0")
    call_sweep("--index", "1", status=1)
    call_sweep("--index", "2", status=3)
    assert states(call_sweep) == ["complete", "failed", "diverged"]
    call_sweep("--index", "0")  # complete: the second start has nothing left to do
    assert len(metric_lines(tmp_path / "runs" / "000")) == 13  # 10 train, 1 heldout, 2 final


def test_a_disk_that_refuses_the_exit_status_is_said_and_stops_nothing(
    write_config, call_sweep, fake_train, monkeypatch
):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    write_config(RATES)
    with monkeypatch.context() as patch:
        patch.setattr(results.files, "write_whole", full)
        _, err = call_sweep("--run", "local")
    assert err.count("exit.json cannot be written (No space left on device)") == 3
    assert states(call_sweep) == ["complete"] * 3
