"""A start that is refused leaves nothing behind that looks like a run."""

import pytest
from support.mishaps import copy, damaged_step, train_argv, truncate

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
