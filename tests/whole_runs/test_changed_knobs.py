"""A run that is continued says what it does not share with its past."""

import pytest
from support.mishaps import copy, train_argv

from llada_jax.__main__ import main


@pytest.mark.slow
def test_a_run_that_is_continued_names_each_knob_that_changed_and_what_its_log_lacks(
    home, tmp_path, capfd
):
    run = copy(home / "run", tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    capfd.readouterr()
    assert main(train_argv(home, run, "num_steps=5", "schedule.learning_rate=0.002")) == 0
    said = capfd.readouterr().err
    assert "metrics.jsonl has no lines of steps 1 to 4: the run continues" in said
    lines = [line for line in said.splitlines() if "changed from" in line]
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        "config.num_steps changed from 4 to 5",
        "config.schedule.learning_rate changed from 0.001 to 0.002",
    ]
    assert main(train_argv(home, run, "num_steps=5", "schedule.learning_rate=0.002")) == 0
    assert "changed from" not in capfd.readouterr().err
