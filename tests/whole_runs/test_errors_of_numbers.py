"""Numbers that are not finite: exit status 3, the steps concerned, and the last good one."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from support.mishaps import copy, train_argv, write_config
from support.runs import losses

import llada_jax
from llada_jax.__main__ import main
from llada_jax.checkpoints.workdir import Checkpoints
from llada_jax.run.rollbacks import read_rollbacks


def exploding(home: Path, tmp_path: Path, rate: str) -> list[str]:
    """A run whose learning rate jumps from 1e-3 after step 4; every step is saved."""
    stages = f"((512, 1e-3, 1e-3), (1e9, {rate}, {rate}))"
    change = f"config.schedule.name = 'llada'; config.schedule.stages = {stages}"
    change += "; config.schedule.learning_rate = 4e-4"  # the default, which llada does not read
    write_config(home, change, name="exploding.py")
    every = ["num_steps=12", "checkpoint.every_steps=1", "log.every_steps=3"]
    return train_argv(home, tmp_path / "run", *every, config="exploding.py")


@pytest.mark.slow
def test_not_a_number_exits_3_with_the_interval_and_a_last_good_step_that_is_good(
    home, tmp_path, refused
):
    argv = exploding(home, tmp_path, "1e25")
    says = ["lower the rates in config.schedule.stages", "start the same command again"]
    sentence = refused(argv, status=3, says=says, is_late=True)
    first, last, good = map(
        int, re.search(r"steps (\d+) to (\d+);.* step (\d+)[: ]", sentence).groups()
    )
    assert first <= last
    assert (
        last == 5
    )  # the first with the wild rate: its own loss is finite, what its update leaves behind is not
    assert good == 4
    params = llada_jax.load(tmp_path / "run").params
    assert Checkpoints(tmp_path / "run").steps[-1] == good
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    # the data of the bad interval can be left out
    copied = copy(tmp_path / "run", tmp_path / "copy")
    assert main(["rollback", "--workdir", str(copied), "--to", str(good)]) == 0
    assert read_rollbacks(copied).skipped == ((5, 5),)
    # the remedy works
    exploding(home, tmp_path, "1e-3")
    assert main(argv) == 0
    assert len(losses(tmp_path / "run")) == 4
    assert np.isfinite(losses(tmp_path / "run")).all()


@pytest.mark.slow
def test_not_a_number_before_the_first_save_says_that_there_is_none(home, tmp_path, refused):
    argv = train_argv(
        home, tmp_path / "run", "schedule.learning_rate=1e38", "checkpoint.every_steps=4"
    )
    says = ["steps 1 to 2", "no checkpoint was saved yet", "config.schedule.learning_rate"]
    refused(argv, status=3, says=says, is_late=True)
    assert Checkpoints(tmp_path / "run").steps == []


@pytest.mark.slow
def test_skipped_updates_are_counted_over_log_lines_that_have_nothing_to_say(
    home, tmp_path, refused
):
    argv = exploding(home, tmp_path, "1e16")  # after step 5 no gradient is finite any more
    argv += ["--config.log.every_steps=1", "--config.optimizer.max_skipped_updates=3"]
    says = ["4 updates in steps 6 to 9 were not finite", "allows 3", "llada-jax rollback"]
    sentence = refused(argv, status=3, says=says, is_late=True)
    # the save that was under way has been finished
    last = Checkpoints(tmp_path / "run").steps[-1]
    assert f"the last good checkpoint is step {last}: lower" in sentence
    assert last == 8
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "train" in line] == [1, 2, 3, 4, 5]
    assert lines[-1] == {"step": 9, "not_finite": {"num_steps": 4.0}}
