"""Signals during an evaluation: the run stops within a batch and continues from its sums."""

import os
import signal
import types

import pytest
from support.mishaps import copy, train_argv
from support.runs import metric_lines

from llada_jax.__main__ import main
from llada_jax.cluster import sharding
from llada_jax.cluster.stop_request import StopRequest
from llada_jax.config import default_config
from llada_jax.evaluation import splits
from llada_jax.run.metrics_file import read_samples

WHOLE = ("evaluation.final_num_batches=0", "evaluation.num_batches=0", "evaluation.every_steps=2")


def count_batches(argv, status, *, signal_at=None, number=signal.SIGTERM) -> int:
    """Returns how many held-out batches a `train` has scored; the signal comes while it places
    batch `signal_at`.
    """
    num_placed = 0

    def place_batch(*args):
        nonlocal num_placed
        num_placed += 1
        if num_placed == signal_at:
            os.kill(os.getpid(), number)
        return sharding.place_batch(*args)

    with pytest.MonkeyPatch.context() as patch:
        watched = types.SimpleNamespace(**{**vars(sharding), "place_batch": place_batch})
        patch.setattr(splits, "sharding", watched)
        assert main(argv) == status
    return num_placed


@pytest.fixture(scope="module")
def undisturbed(home, tmp_path_factory):
    """A run without a signal, and the batches of one evaluation of its whole split."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    num_batches = count_batches(train_argv(home, workdir, *WHOLE), 0)
    return workdir, num_batches // 2  # one evaluation after step 2, one after step 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_final_evaluation_stops_within_a_batch(
    number, undisturbed, home, tmp_path, capsys
):
    workdir, whole = undisturbed
    assert whole > 6
    argv = train_argv(home, tmp_path / "run", *WHOLE)
    capsys.readouterr()
    assert count_batches(argv, 42, signal_at=whole + 3, number=number) == whole + 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert "asked to stop during the final evaluation" in last
    assert "step 4 of 4 is saved; the same command continues" in last
    assert (tmp_path / "run" / "evaluation.json").exists()
    # the same numbers as without the signal, to the last bit
    assert count_batches(argv, 0) == whole
    assert metric_lines(tmp_path / "run") == metric_lines(undisturbed[0])
    assert not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.slow
def test_an_evaluation_between_steps_is_finished_by_the_next_start(
    undisturbed, home, tmp_path, capsys
):
    argv = train_argv(home, tmp_path / "run", *WHOLE)
    capsys.readouterr()
    assert count_batches(argv, 42, signal_at=3) == 3
    assert "step 2 of 4 is saved" in capsys.readouterr().err.splitlines()[-1]
    count_batches(argv, 0)
    assert metric_lines(tmp_path / "run") == metric_lines(undisturbed[0])


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"step": 4}', '{"step": 4, "settings": 1}'])
def test_damaged_partial_sums_cost_time_and_not_the_run(content, undisturbed, home, tmp_path):
    argv = train_argv(home, tmp_path / "run", *WHOLE)
    count_batches(argv, 42, signal_at=3)
    (tmp_path / "run" / "evaluation.json").write_text(content)
    count_batches(argv, 0)
    assert metric_lines(tmp_path / "run", "final") == metric_lines(undisturbed[0], "final")


@pytest.mark.slow
def test_the_sums_of_weights_that_were_rolled_back_are_forgotten(undisturbed, home, tmp_path):
    _, whole = undisturbed
    run, copied = tmp_path / "run", tmp_path / "copy"
    words = (*WHOLE, "num_steps=6", "checkpoint.keep=9")
    # in the evaluation after step 4
    count_batches(train_argv(home, run, *words), 42, signal_at=whole + 3)
    assert main(["rollback", "--workdir", str(run), "--to", "2"]) == 0
    copy(run, copied)
    (copied / "evaluation.json").unlink()
    for workdir in (run, copied):
        assert main(train_argv(home, workdir, *words)) == 0
    assert metric_lines(run) == metric_lines(copied)


@pytest.mark.slow
def test_the_sums_of_an_interrupted_final_evaluation_are_not_continued_by_one_of_fewer_rows(
    home, tmp_path
):
    words = ("evaluation.final_num_batches=0", "evaluation.num_batches=2")
    words = (*words, "evaluation.every_steps=4")
    longer = train_argv(home, tmp_path / "run", *words, "num_steps=6")
    count_batches(train_argv(home, tmp_path / "run", *words), 42, signal_at=2)
    assert main(longer) == 0
    assert main(train_argv(home, tmp_path / "straight", *words, "num_steps=6")) == 0
    assert metric_lines(tmp_path / "run") == metric_lines(tmp_path / "straight")


@pytest.mark.slow
def test_the_final_evaluation_takes_as_many_batches_as_it_is_told_to(home, tmp_path):
    few = ("evaluation.final_num_batches=2", "evaluation.every_steps=0")
    assert count_batches(train_argv(home, tmp_path / "run", *few), 0) == 2
    assert default_config().evaluation.final_num_batches > 0  # 0 takes the whole split


SAMPLES = ("samples.every_steps=2", "samples.gen_length=4", "samples.steps=4")


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [2, 4])
def test_the_samples_of_a_step_at_which_a_run_stops_are_made_by_the_next_start(
    stop_at, home, tmp_path, monkeypatch
):
    words = (*SAMPLES, "samples.block_length=4", "evaluation.every_steps=0")
    assert main(train_argv(home, tmp_path / "straight", *words)) == 0
    argv = train_argv(home, tmp_path / "run", *words)
    with monkeypatch.context() as patch:
        reached = StopRequest.reached

        def reached_at(self, step):
            return step == stop_at or reached(self, step)

        patch.setattr(StopRequest, "reached", reached_at)
        assert main(argv) == 42
    assert [line["step"] for line in read_samples(tmp_path / "run")] == [2] * (stop_at == 4)
    assert main(argv) == 0
    assert read_samples(tmp_path / "run") == read_samples(tmp_path / "straight")
    # and only once
    assert main(argv) == 0
    assert read_samples(tmp_path / "run") == read_samples(tmp_path / "straight")
