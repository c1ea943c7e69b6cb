"""Going back to an earlier step: which data a run reads afterwards, and that nothing is lost."""

import json
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.runs import metric_lines

from llada_jax.__main__ import main
from llada_jax.cluster import sharding
from llada_jax.run.rollbacks import batch_of_step, skip_after
from llada_jax.verbs import train

stretches = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), max_size=5)


@given(stretches)
def test_a_step_reads_the_batch_that_many_places_into_what_is_left(rollbacks):
    skipped, left_out = [], set()
    for step, number in rollbacks:
        remaining = [batch for batch in range(1, 400) if batch not in left_out]
        left_out |= set(remaining[step : step + number])
        skipped = skip_after(step, number, skipped)
    remaining = [batch for batch in range(1, 400) if batch not in left_out]
    # the file may hold them in any order
    for stretches in (skipped, skipped[::-1]):
        assert [batch_of_step(step, stretches) for step in range(1, 100)] == remaining[:99]


@given(stretches, st.integers(1, 50), st.integers(1, 9))
def test_batches_once_left_out_never_come_back(rollbacks, step, number):
    skipped = []
    for where, count in rollbacks:
        skipped = skip_after(where, count, skipped)
    before = {batch_of_step(s, skipped) for s in range(1, 300)}
    after = {batch_of_step(s, skip_after(step, number, skipped)) for s in range(1, 250)}
    assert after <= before
    assert len(before - after) >= number


def test_steps_before_a_rollback_read_what_they_read():
    assert [batch_of_step(step, [(6, 8)]) for step in (1, 5, 6, 7)] == [1, 5, 9, 10]


@pytest.mark.slow
def test_a_run_rolled_back_continues_on_the_data_behind_the_bad_stretch(runs, capsys):
    workdir = runs.directory / "rolled"
    knobs = ("num_steps=8", "checkpoint.every_steps=4", "log.every_steps=1")
    runs.train(workdir, *knobs)
    before = metric_lines(workdir, "train")
    assert main(["rollback", "--workdir", str(workdir), "--to", "4"]) == 0
    assert "is back at step 4; the 4 batches after it are left out" in capsys.readouterr().out
    log = runs.train(workdir, *knobs)
    assert "step 4 of" in log
    after = metric_lines(workdir, "train")
    assert after[:4] == before[:4]
    assert all(
        new["train"]["loss"] != old["train"]["loss"]
        for new, old in zip(after[4:], before[4:], strict=True)
    )
    # what was later is kept, not deleted
    assert sorted(path.name for path in (workdir / "rolled-back" / "1").iterdir()) == [
        "8",
        "metrics.jsonl",
    ]
    # the record of a checkpoint says which data it has not seen
    assert json.loads((workdir / "run.json").read_text())["rollbacks"] == {
        "count": 1,
        "skipped": [[5, 8]],
    }


@pytest.fixture
def batches_read(runs, monkeypatch):
    """Returns batches_read(workdir, num_steps) -> the tokens of each batch that a `train` places on
    the devices, as bytes and in their order.
    """

    def batches_read(workdir, num_steps: int) -> list[bytes]:
        placed = []

        def place_batch(batch, *args):
            placed.append(batch["tokens"].tobytes())
            return sharding.place_batch(batch, *args)

        watched = types.SimpleNamespace(**{**vars(sharding), "place_batch": place_batch})
        monkeypatch.setattr(train, "sharding", watched)
        knobs = {
            "data.path": runs.dataset,
            "num_steps": num_steps,
            "checkpoint.every_steps": 4,
            "checkpoint.keep": 9,
            "evaluation.every_steps": 0,
        }
        words = [f"--config.{knob}={value}" for knob, value in knobs.items()]
        config = str(runs.directory / "small.py")
        assert main(["train", "--config", config, "--workdir", str(workdir), *words]) == 0
        return placed

    return batches_read


@pytest.mark.slow
def test_left_out_batches_stay_out_when_the_run_later_goes_back_before_them(batches_read, tmp_path):
    run = tmp_path / "run"
    undisturbed = batches_read(run, 12)
    further = batches_read(tmp_path / "further", 16)
    assert further[:12] == undisturbed
    assert len(set(further)) == 16
    # 9 to 12 are left out; then the run goes back to a step before them and leaves out nothing more
    assert main(["rollback", "--workdir", str(run), "--to", "8"]) == 0
    assert main(["rollback", "--workdir", str(run), "--to", "4", "--skip", "0"]) == 0
    assert batches_read(run, 12) == further[4:8] + further[12:16]


def test_a_run_goes_back_to_a_saved_step_only(tmp_path, capsys):
    assert main(["rollback", "--workdir", str(tmp_path), "--to", "4"]) == 2
    assert "holds no checkpoints" in capsys.readouterr().err
