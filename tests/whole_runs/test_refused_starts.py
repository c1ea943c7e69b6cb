"""A start that is refused leaves nothing behind that looks like a run."""

import shutil

import pytest
from support.mishaps import copy, damaged_step, train_argv, truncate

from llada_jax.__main__ import main
from llada_jax.checkpoints.workdir import Checkpoints


@pytest.mark.slow
def test_a_restore_that_is_refused_leaves_no_workdir(home, tmp_path, refused):
    other = copy(home / "run", tmp_path / "other")
    damaged_step(other, "numbers", "params", truncate)
    for knob in (f"checkpoint.restore={other}", f"checkpoint.init_from={other}"):
        new = tmp_path / "some" / "where" / "new"
        refused(train_argv(home, new, knob), says=["cannot be read"], creates=tmp_path / "some")


@pytest.mark.slow
def test_a_workdir_that_was_there_before_is_never_removed(home, tmp_path, refused):
    run = copy(home / "run", tmp_path / "run")
    damaged_step(run, "numbers", "params", truncate)
    (tmp_path / "empty").mkdir()
    refused(train_argv(home, run), says=["cannot be read"])
    assert Checkpoints(run).steps
    refused(train_argv(home, tmp_path / "empty", f"checkpoint.restore={run}"), says=["be read"])
    assert (tmp_path / "empty").is_dir()


@pytest.mark.slow
def test_the_local_copies_of_a_run_that_was_deleted_are_not_taken_for_the_new_one(
    home, tmp_path, refused, capfd
):
    run, disk = tmp_path / "run", tmp_path / "disk"
    tiers = [f"checkpoint.local_directory={disk}", "checkpoint.local_every_steps=1"]
    argv = train_argv(home, run, *tiers)
    assert main(argv) == 0
    (copies,) = disk.iterdir()
    begun = run.rename(tmp_path / "begun")
    says = [f"{copies} holds step 4", str(run), "to begin again, remove"]
    refused(argv, says=says, keeps=[disk], creates=run)
    # a run that was killed before its first save in the workdir goes on from its copies
    shutil.rmtree(begun / "checkpoints")
    begun.rename(run)
    capfd.readouterr()
    assert main(argv) == 0
    assert f"step 4 of {copies}" in capfd.readouterr().err
    shutil.rmtree(run)
    shutil.rmtree(copies)
    assert main(argv) == 0
    assert "initialisation" in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_that_takes_the_place_of_another_does_not_go_on_from_its_local_copies(
    home, tmp_path, capfd
):
    run, disk = tmp_path / "run", tmp_path / "disk"
    tiers = [f"checkpoint.local_directory={disk}", "checkpoint.local_every_steps=1"]
    assert main(train_argv(home, run, *tiers)) == 0
    shutil.rmtree(run)
    # the two differ in a knob that may change within a run
    assert main(train_argv(home, tmp_path / "other", "schedule.learning_rate=1e-5")) == 0
    (tmp_path / "other").rename(run)
    shutil.rmtree(run / "checkpoints" / "4")
    (step,) = Checkpoints(run).steps
    capfd.readouterr()
    assert main(train_argv(home, run, *tiers)) == 0
    says = f"step {step} of {run} (the local copies are of another run)"
    assert says in capfd.readouterr().err


@pytest.mark.parametrize(
    ("rows", "words", "says"),
    [
        ("packed", [], "random_length_probability=0.2 would cut off"),
        ("padded", ["random_length_probability=0.0", "eos_padding=3"], "a multiple of"),
    ],
)
def test_knobs_that_do_not_suit_the_records_are_refused_before_anything_is_written(
    runs, dialogues, tmp_path, refused, rows, words, says
):
    words = [f"--config.data.{word}" for word in (f"path={dialogues(rows)}", *words)]
    argv = ["train", "--config", runs.directory / "small.py", "--workdir", tmp_path / "run"]
    refused([*argv, "--config.objective.name=sft", *words], says=[says], creates=tmp_path / "run")
