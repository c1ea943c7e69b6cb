"""Checkpoints of other runs, and damaged ones: refused, and never replaced by a fresh start."""

import shutil

import jax
import numpy as np
import pytest
from support.mishaps import (
    copy,
    damaged_step,
    deleted,
    emptied,
    flip,
    prepare_argv,
    train_argv,
    tree,
    truncate,
)

import llada_jax
from llada_jax.__main__ import main
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.errors import UserError

ANOTHER_RUN = {
    "width": (
        ["model.d_ff=32"],
        ["another architecture", "d_ff is 32 here and 16 there", "config.model"],
    ),
    "layers": (
        ["model.num_layers=2"],
        ["another architecture", "num_layers is 2 here and 1 there", "--workdir"],
    ),
    "batch": (
        ["data.batch_size=16"],
        ["config.data.batch_size is 16 here and 8 there", "undo the change"],
    ),
    "seed": (["seed=1"], ["config.seed is 1 here and 0 there", "undo the change"]),
    "optimizer": (
        ["optimizer.name=lion"],
        ["config.optimizer.name is 'lion' here and 'adamw' there"],
    ),
    "average": (["optimizer.ema_decay=0.9"], ["EMA is True here and False there"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ANOTHER_RUN)
def test_a_checkpoint_of_another_architecture_or_run_is_refused(case, home, refused):
    overrides, says = ANOTHER_RUN[case]
    refused(train_argv(home, home / "run", *overrides), says=says, keeps=[home / "run"])


@pytest.mark.slow
def test_a_checkpoint_of_another_tokenizer_is_refused(home, tmp_path, refused):
    other = [f"data.path={home / 'spm'}", "model.vocab_size=320"]
    says = ["another tokenizer", "sentencepiece", "bytes", "WORKDIR/tokenizer"]
    refused(train_argv(home, home / "run", *other), says=says, keeps=[home / "run", home / "spm"])
    for knob in ("restore", "init_from"):
        argv = train_argv(home, tmp_path / "new", *other, f"checkpoint.{knob}={home / 'run'}")
        refused(argv, says=says, keeps=[home / "run", home / "spm"])
        assert tree(tmp_path / "new") == {}


@pytest.mark.slow
def test_other_data_of_the_same_tokenizer_does_not_continue_a_run(home, tmp_path, refused):
    (tmp_path / "more.txt").write_text("Another book.\n" * 400)
    assert main(prepare_argv(tmp_path / "more.txt", tmp_path / "data", "--documents", "line")) == 0
    argv = train_argv(home, home / "run", f"data.path={tmp_path / 'data'}")
    refused(argv, says=["other data", "init_from"], keeps=[home / "run", tmp_path / "data"])


@pytest.mark.slow
def test_a_replaced_tokenizer_in_the_workdir_is_refused_by_load_and_sample(home, tmp_path, refused):
    run = copy(home / "run", tmp_path / "run")
    shutil.rmtree(run / "tokenizer")
    copy(home / "spm" / "tokenizer", run / "tokenizer")
    says = ["tokenizer", str(run), load_tokenizer(home / "data" / "tokenizer").fingerprint[:12]]
    refused(["sample", "--checkpoint", run, "--gen-length", "4"], says=says, keeps=[run])
    with pytest.raises(UserError, match="tokenizer"):
        llada_jax.load(run)


def test_a_replaced_tokenizer_in_the_workdir_stops_train(home, tmp_path, refused):
    run = copy(home / "run", tmp_path / "run")
    shutil.rmtree(run / "tokenizer")
    copy(home / "spm" / "tokenizer", run / "tokenizer")
    refused(
        train_argv(home, run, "num_steps=8"),
        says=[f"{run}/tokenizer", "not the tokenizer of the records"],
        keeps=[run],
    )


def test_a_workdir_without_the_wanted_checkpoint_is_refused(home, tmp_path, refused):
    cases = {
        str(tmp_path / "absent"): ["absent", "holds no checkpoints", "llada-jax train"],
        str(home / "data"): ["data", "holds no checkpoints", "llada-jax train"],
        f"{home / 'run'}@3": ["no checkpoint of step 3", "it has 2, 4"],
        f"{home / 'run'}@last": ["must be a step number", "@1000"],
    }
    for checkpoint, says in cases.items():
        refused(
            ["sample", "--checkpoint", checkpoint, "--gen-length", "4"],
            says=says,
            keeps=[home / "run"],
        )
        argv = train_argv(home, tmp_path / "new", f"checkpoint.init_from={checkpoint}")
        refused(argv, says=says, keeps=[home / "run"])
        assert tree(tmp_path / "new") == {}


DAMAGES = {
    ("metadata", flip),
    ("metadata", truncate),
    ("metadata", deleted),
    ("metadata", emptied),
    ("tree", truncate),
    ("tree", deleted),
    ("manifest", truncate),
    ("manifest", flip),
    ("manifest", deleted),
    ("index", flip),
    ("index", deleted),
    ("numbers", flip),
    ("numbers", truncate),
    ("numbers", deleted),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "damage"), sorted(DAMAGES, key=str), ids=lambda x: getattr(x, "__name__", x)
)
def test_a_damaged_checkpoint_is_refused_and_the_step_before_it_continues(
    file, damage, home, tmp_path, refused
):
    run = copy(home / "run", tmp_path / "run")
    damaged_step(run, file, "params", damage)
    says = [str(run / "checkpoints" / "4"), "move that folder away"]
    refused(train_argv(home, run), says=[*says, "step 2"], keeps=[run])
    refused(["sample", "--checkpoint", run, "--gen-length", "4"], says=says, keeps=[run])
    with pytest.raises(UserError, match="checkpoints/4"):
        llada_jax.load(run)


@pytest.mark.slow
def test_the_remedy_for_a_damaged_checkpoint_gives_the_run_that_was_lost(home, tmp_path, capfd):
    run = copy(home / "run", tmp_path / "run")
    damaged_step(run, "numbers", "params", truncate)
    shutil.move(run / "checkpoints" / "4", tmp_path / "damaged")
    assert main(train_argv(home, run)) == 0
    assert f"start       step 2 of {run}" in capfd.readouterr().err
    again, before = llada_jax.load(run).params, llada_jax.load(home / "run").params
    jax.tree.map(np.testing.assert_array_equal, again, before)


@pytest.mark.parametrize("damage", [flip, truncate], ids=lambda damage: damage.__name__)
def test_damaged_optimizer_state_stops_training(damage, home, tmp_path, refused):
    run = copy(home / "run", tmp_path / "run")
    damaged_step(run, "numbers", "train", damage)
    says = [str(run / "checkpoints" / "4"), "move that folder away", "step 2"]
    refused(train_argv(home, run), says=says, keeps=[run])


def test_a_damaged_only_checkpoint_is_never_replaced_by_a_fresh_start(home, tmp_path, refused):
    run = copy(home / "run", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "2")
    damaged_step(run, "manifest", "params", truncate)
    refused(
        train_argv(home, run),
        says=["checkpoints/4", "move that folder away to train again"],
        keeps=[run],
    )


@pytest.mark.slow
def test_reading_a_workdir_leaves_the_save_of_a_running_train_alone(home, tmp_path, capfd):
    run = copy(home / "run", tmp_path / "run")
    half_written = run / "checkpoints" / "6.orbax-checkpoint-tmp"
    half_written.mkdir()
    (half_written / "params").write_text("on its way")
    before = tree(run)
    assert main(["sample", "--checkpoint", str(run), "--gen-length", "4"]) == 0
    assert main(train_argv(home, tmp_path / "new", f"checkpoint.init_from={run}")) == 0
    assert tree(run) == before


@pytest.mark.slow
def test_a_half_written_step_is_never_read(home, tmp_path, capfd):
    run = copy(home / "run", tmp_path / "run")
    copy(run / "checkpoints" / "4", run / "checkpoints" / "6.orbax-checkpoint-tmp")
    shutil.rmtree(run / "checkpoints" / "4")
    assert llada_jax.load(run).step == 2
    assert main(train_argv(home, run)) == 0
    assert f"start       step 2 of {run}" in capfd.readouterr().err


@pytest.mark.slow
def test_train_gives_back_the_mesh_of_its_caller(home, tmp_path):
    assert main(train_argv(home, home / "run")) == 0
    assert jax.sharding.get_abstract_mesh().empty
    assert llada_jax.load(home / "run").logits(np.zeros((1, 8), np.int32)).shape == (1, 8, 320)


def test_metrics_of_something_else_in_the_workdir_are_kept(home, tmp_path, refused):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("my own notes\n")
    refused(
        train_argv(home, run), says=["metrics.jsonl line 1", "move it away", "another --workdir"]
    )
    assert (run / "metrics.jsonl").read_text() == "my own notes\n"
