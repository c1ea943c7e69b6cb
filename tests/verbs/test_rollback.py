"""Going back to an earlier step: which data a run reads afterwards, and that nothing is lost."""

import errno
import json
import os
import subprocess
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.errors import error_of
from support.records import small_record
from support.runs import metric_lines
from support.states import saved_steps

from llada_jax.__main__ import main
from llada_jax.checkpoints.workdir import Checkpoints, find_checkpoint
from llada_jax.cluster import sharding
from llada_jax.errors import UserError
from llada_jax.run.rollbacks import (
    Rollbacks,
    as_rollbacks,
    batch_of_step,
    read_rollbacks,
    rollbacks_of_run,
    skip_after,
    write_rollbacks,
)
from llada_jax.storage import remote
from llada_jax.storage.locks import only_run_in
from llada_jax.sweeps.results import FINISHED, read_result, write_exit
from llada_jax.verbs import train
from llada_jax.verbs.rollback import roll_back

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


def saved_run(workdir, *, logged_to: int, rollbacks: dict | None = None, after: int = 0) -> str:
    """Saves steps 4, 8 and 12 of a run, or those `after` one, and lines up to another."""
    steps = [step for step in (4, 8, 12) if step > after]
    saved_steps(workdir, *steps, keep=9, record=small_record(rollbacks=rollbacks)).close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = "".join(f'{{"step": {step}}}\n' for step in range(1, logged_to + 1))
        (workdir / name).write_text(lines)
    return str(workdir)


def test_a_second_rollback_leaves_out_only_what_a_step_has_read(tmp_path):
    run = saved_run(tmp_path, logged_to=14)
    roll_back(run, to=8)
    assert read_rollbacks(run) == (1, ((9, 14),))
    roll_back(run, to=4)
    assert read_rollbacks(run) == (2, ((5, 14),))
    roll_back(run, to=4)
    assert read_rollbacks(run) == (3, ((5, 14),))
    # what was later is kept where it was moved
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert len((tmp_path / name).read_text().splitlines()) == 4
        kept = [tmp_path / "rolled-back" / number / name for number in "123"]
        assert [len(path.read_text().splitlines()) for path in kept] == [14, 8, 4]


@pytest.mark.parametrize("status", [0, 3])
def test_a_run_of_a_sweep_that_has_ended_is_to_be_done_again(tmp_path, status):
    """Its loss was not finite, or its end was not wanted."""
    run = saved_run(tmp_path, logged_to=14)
    write_exit(run, status=status)

    def state() -> str:
        return read_result(run, index=0, knobs={}, num_steps=20).state

    assert state() in FINISHED
    roll_back(run, to=8)
    assert state() == "partial"


def test_a_run_that_was_restored_elsewhere_keeps_the_rollbacks_of_its_record(tmp_path):
    # step 4 is older than the rollbacks
    saved_steps(tmp_path, 4, keep=9, record=small_record()).close()
    rollbacks = {"count": 3, "skipped": [[6, 7]]}
    run = saved_run(tmp_path, logged_to=12, rollbacks=rollbacks, after=4)
    roll_back(run, to=8)
    assert read_rollbacks(run) == (4, ((6, 7), (11, 14)))


def damage_record(workdir, step: int):
    file = workdir / f"checkpoints/{step}/_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace('"rope_theta"', '"rope_other"'))
    with pytest.raises(UserError):
        Checkpoints(workdir, owned=False).record(step)


def test_the_list_of_a_run_counts_more_than_the_record_of_an_older_checkpoint():
    found = Rollbacks(2, ((6, 7), (11, 14)))
    assert rollbacks_of_run(found, {"count": 1, "skipped": [[6, 7]]}) == found


def test_bytes_that_are_no_text_are_kept_as_they_are(tmp_path):
    run = saved_run(tmp_path, logged_to=8)
    for name, damage in (("metrics.jsonl", b'{"st\xff'), ("samples.jsonl", b"\xff\n")):
        with open(tmp_path / name, "ab") as file:
            file.write(damage)
    before = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}
    roll_back(run, to=4)
    for name, content in before.items():
        assert (tmp_path / "rolled-back/1" / name).read_bytes() == content
        assert len((tmp_path / name).read_text().splitlines()) == 4


@pytest.mark.parametrize("has_list", [True, False])
def test_a_step_whose_record_is_damaged_is_moved_away_like_another(tmp_path, has_list):
    rollbacks = {"count": 3, "skipped": [[6, 7]]}
    run = saved_run(tmp_path, logged_to=12, rollbacks=rollbacks)
    if has_list:
        write_rollbacks(run, as_rollbacks(rollbacks))
    damage_record(tmp_path, 12)
    roll_back(run, to=8)
    assert read_rollbacks(run) == (4, ((6, 7), (11, 14)))


def test_a_run_without_list_and_records_is_not_given_an_empty_list(tmp_path):
    run = saved_run(tmp_path, logged_to=12, rollbacks={"count": 3, "skipped": [[6, 7]]})
    for step in (4, 8, 12):
        damage_record(tmp_path, step)
    message = error_of(roll_back, run, to=8)
    assert "checkpoints/4" in message
    assert not (tmp_path / "rollbacks.json").exists()


@pytest.mark.parametrize("does_repeat", [True, False])
@pytest.mark.parametrize("killed_in", ["remote.move", "drop_lines_after", "write_rollbacks"])
def test_a_rollback_that_was_killed_is_repeated_or_the_run_continues(
    killed_in, does_repeat, tmp_path, monkeypatch
):
    run = saved_run(tmp_path, logged_to=10)
    whole, moved = remote.move, []

    def killed(*args, **kwargs):
        moved.append(args)
        if killed_in == "remote.move" and len(moved) == 1:  # step 12, which no line has
            return whole(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"llada_jax.verbs.rollback.{killed_in}", killed)
        assert main(["rollback", "--workdir", run, "--to", "4"]) == 130
    # the newest steps go first, so that no step is missing between those that are left
    assert Checkpoints(run, owned=False).steps == ([4, 8] if killed_in == "remote.move" else [4])
    if not does_repeat:
        saved_run(tmp_path, logged_to=12, after=Checkpoints(run, owned=False).steps[-1])
    roll_back(run, to=4)
    assert Checkpoints(run, owned=False).steps == [4]
    assert read_rollbacks(run) == (2, ((5, 12),))
    kept = [path.name for path in (tmp_path / "rolled-back").glob("*/*") if path.is_dir()]
    assert set(kept) == {"8", "12"}
    # its folders are those of calls that have ended
    roll_back(run, to=4)
    assert read_rollbacks(run) == (3, ((5, 12),))


def test_a_workdir_that_cannot_be_written_is_refused_in_a_sentence(tmp_path, mount, capsys):
    run = tmp_path / "run"
    saved_run(run, logged_to=12)
    read_only = mount("bind", run)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(read_only)], check=True)
    assert main(["rollback", "--workdir", str(read_only), "--to", "4"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert f"{read_only} cannot be written (" in sentence
    assert "repeat the command" in sentence
    assert Checkpoints(run, owned=False).steps == [4, 8, 12]


def test_a_workdir_of_somebody_else_is_refused_in_a_sentence(tmp_path, monkeypatch, capsys):
    def refuses(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    # root, who runs this in CI, may open everything
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuses)
        status = main(["rollback", "--workdir", str(tmp_path), "--to", "4"])
    assert status == 2
    sentence = f"The workdir {tmp_path} cannot be read (Permission denied); change its permissions."
    assert sentence in capsys.readouterr().err


def test_a_run_goes_back_to_a_saved_step_only(tmp_path, capsys):
    assert main(["rollback", "--workdir", str(tmp_path), "--to", "4"]) == 2
    assert "holds no checkpoints" in capsys.readouterr().err


def test_a_rollback_of_a_run_that_is_not_stopped_says_to_stop_it(tmp_path, capsys):
    saved_steps(tmp_path, 10, 20).close()
    with only_run_in(str(tmp_path)):
        assert main(["rollback", "--workdir", str(tmp_path), "--to", "10"]) == 2
    said = capsys.readouterr().err
    assert "stop it" in said
    assert "--workdir" not in said
    assert find_checkpoint(str(tmp_path))[1] == 20
