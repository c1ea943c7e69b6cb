"""A run that is continued with other knobs says which ones changed."""

import pytest
from support.mishaps import copy, train_argv

from llada_jax.__main__ import main


@pytest.mark.slow
def test_a_run_that_is_continued_names_each_knob_that_changed(home, tmp_path, capfd):
    run = copy(home / "run", tmp_path / "run")
    capfd.readouterr()
    assert main(train_argv(home, run, "num_steps=5", "schedule.learning_rate=0.002")) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "changed from" in line]
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        "config.num_steps changed from 4 to 5",
        "config.schedule.learning_rate changed from 0.001 to 0.002",
    ]
    assert main(train_argv(home, run, "num_steps=5", "schedule.learning_rate=0.002")) == 0
    assert "changed from" not in capfd.readouterr().err
