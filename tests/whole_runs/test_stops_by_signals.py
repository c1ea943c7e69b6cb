"""Signals to a run: it saves, says so, and is continued by the same command."""

import re
import signal

import pytest
from support.mishaps import TrainProcess, check_sentence, copy, damaged_step, train_argv, truncate
from support.runs import metric_lines

from llada_jax.__main__ import main
from llada_jax.checkpoints.workdir import Checkpoints


@pytest.mark.slow
def test_a_signal_saves_the_step_and_the_same_command_continues_to_the_end(home, tmp_path):
    run, step = tmp_path / "run", 0
    argv = train_argv(
        home, run, "num_steps=500", "checkpoint.every_steps=100000", "log.every_steps=50"
    )
    for number, printed in ((signal.SIGTERM, 50), (signal.SIGINT, 300)):
        stopped, before = TrainProcess(argv), step
        stopped.wait_for(f"step {printed}/500")
        stopped.process.send_signal(number)
        assert stopped.end() == 42
        says = ["asked to stop", "of 500 is saved", "the same command continues"]
        check_sentence(stopped.lines[-1], says)
        step = int(re.search(r"step (\d+) of 500", stopped.lines[-1]).group(1))
        assert Checkpoints(run).steps == ([before, step] if before else [step])
        assert printed <= step < 500

    continued = TrainProcess(argv)
    assert continued.end() == 0
    assert continued.lines[0] == f"start       step {step} of {run}"
    assert Checkpoints(run).steps == [step, 500]
    assert [line["step"] for line in metric_lines(run, "train")] == list(range(50, 501, 50))


@pytest.mark.slow
def test_a_signal_before_the_first_step_asks_to_be_started_again(home, tmp_path):
    # Without a cache, so that there is time for a signal while the step is compiled.
    stopped = TrainProcess(
        train_argv(home, tmp_path / "run", "num_steps=500", "log.compilation_cache=")
    )
    stopped.wait_for("start ")
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.end() == 42
    check_sentence(stopped.lines[-1], ["asked to stop", "the same command"])


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_and_the_last_saved_step_continues(home, tmp_path):
    run = copy(home / "run", tmp_path / "run")
    # The step is slow enough that two signals reach the same one.
    argv = train_argv(
        home, run, "num_steps=500", "checkpoint.every_steps=100000", "log.every_steps=1"
    )
    stopped = TrainProcess(argv)
    stopped.wait_for("step 5/500")
    stopped.process.send_signal(signal.SIGINT)
    stopped.process.send_signal(signal.SIGINT)
    status = stopped.end()
    assert status in (42, 130)  # 42 when the first was answered before the second came
    steps = Checkpoints(run).steps
    assert steps[0] in (2, 4)
    # An answered signal has saved the step at which it came, which may be any.
    assert main(train_argv(home, run, f"num_steps={steps[-1] + 2}")) == 0
    assert Checkpoints(run).steps[-1] == steps[-1] + 2


@pytest.mark.slow
def test_a_refusal_in_a_process_of_its_own_is_one_line(home, tmp_path):
    run = copy(home / "run", tmp_path / "run")
    damaged_step(run, "numbers", "params", truncate)
    for argv in (["sample", "--checkpoint", str(run), "--gen-length", "4"], train_argv(home, run)):
        refused = TrainProcess(argv)
        assert refused.end() == 2
        assert len(refused.lines) == 1, refused.lines
        check_sentence(refused.lines[0], [str(run / "checkpoints" / "4"), "move that folder away"])
