"""An export on its own run's data: scored, and the start of a run. Its tokenizer has other files
than the run's, and does the same.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from support.exports import export
from support.mishaps import train_argv

import llada_jax
from llada_jax.__main__ import main

FROZEN = ("schedule.learning_rate=0.0", "num_steps=1", "checkpoint.every_steps=1")


def evaluated(checkpoint, data, capsys, *more) -> float:
    words = ["--checkpoint", str(checkpoint), "--data", str(data), "--batch-size", "8", "--json"]
    capsys.readouterr()
    assert main(["evaluate", *words, *map(str, more)]) == 0
    return json.loads(capsys.readouterr().out)["nelbo_nats_per_token"]


def assert_started_from(start, expected) -> None:
    jax.tree.map(
        np.testing.assert_array_equal,
        llada_jax.load(str(start)).params,
        llada_jax.load(str(expected)).params,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "spm"])
def test_an_export_scores_and_trains_on_its_own_runs_data(name, home, tmp_path, capsys):
    data, run = home / name, home / "run"
    if name != "data":
        run = tmp_path / "run"
        assert main(train_argv(home, run, f"data.path={data}")) == 0
    out = export(run, tmp_path / "out", "--dtype", "float32")
    ours, theirs = llada_jax.load(str(run)).tokenizer, llada_jax.load(str(out)).tokenizer
    assert ours.fingerprint != theirs.fingerprint
    assert ours.special_ids == theirs.special_ids
    assert evaluated(out, data, capsys) == pytest.approx(evaluated(run, data, capsys), rel=1e-6)
    knobs = (f"data.path={data}", f"checkpoint.init_from={out}", *FROZEN)
    assert main(train_argv(home, tmp_path / "begun", *knobs)) == 0
    assert_started_from(tmp_path / "begun", run)


@pytest.mark.slow
def test_an_export_without_its_tokenizer_trains_on_and_is_scored_with_that_of_the_run(
    home, tmp_path, capsys
):
    run, data = home / "run", home / "data"
    out = export(run, tmp_path / "out", "--dtype", "float32")
    for file in out.glob("*token*"):
        file.unlink()
    given = ("--tokenizer", run / "tokenizer")
    expected = evaluated(run, data, capsys)
    assert evaluated(out, data, capsys, *given) == pytest.approx(expected, rel=1e-6)
    knobs = (f"checkpoint.init_from={out}", *FROZEN)
    assert main(train_argv(home, tmp_path / "begun", *knobs)) == 0
    assert_started_from(tmp_path / "begun", run)
    shutil.rmtree(tmp_path / "begun" / "tokenizer")
    ids_alone = llada_jax.load(str(tmp_path / "begun"))
    assert ids_alone.generate_tokens([[1, 2]], gen_length=2).shape == (1, 4)


def test_weights_with_another_mask_do_not_start_a_run(home, tmp_path, refused):
    out = export(home / "run", tmp_path / "out", "--dtype", "float32")
    for file in out.glob("*token*"):
        file.unlink()
    config = json.loads((out / "config.json").read_text()) | {"mask_token_id": 7}
    (out / "config.json").write_text(json.dumps(config))
    argv = train_argv(home, tmp_path / "begun", f"checkpoint.init_from={out}")
    refused(argv, says=["another tokenizer"], creates=tmp_path / "begun")
