"""`llada_jax.train`, `.evaluate` and `.evaluate_tasks`, called with values, return what the
commands print.
"""

import json
import os
import sys

import jax
import pytest
from support.mishaps import train_argv
from support.runs import losses, metric_lines
from support.trackers import StandIn

import llada_jax
from llada_jax.__main__ import main
from llada_jax.config import load_config
from llada_jax.errors import UserError
from llada_jax.verbs import train as verb


def printed(argv, capsys) -> dict:
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_train_returns_the_metrics_of_the_run_that_the_command_makes(home, tmp_path, monkeypatch):
    # what a user writes for a workdir, as `--workdir=~/other`, which no shell replaces
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    changes = {"data.path": str(home / "data"), "optimizer.b2": 0.9, "seed": 3}
    run = llada_jax.train(home / "tiny.py", "~/run", changes=changes)
    words = [f"{name}={value}" for name, value in changes.items()]
    assert main(train_argv(home, "~/other", *words)) == 0
    assert not (tmp_path / "~").exists()
    assert sorted(os.listdir("run")) == sorted(os.listdir("other"))
    assert losses(tmp_path / "run").tolist() == losses(tmp_path / "other").tolist()
    assert run.step == 4
    assert run.train == metric_lines(tmp_path / "run", "train")[-1]["train"]
    assert (
        run.final["final"]["nelbo"] == metric_lines(tmp_path / "run", "final")[0]["final"]["nelbo"]
    )
    assert llada_jax.load(run.workdir).step == 4
    assert (tmp_path / "run" / "config.py").read_text() == (home / "tiny.py").read_text()


@pytest.mark.slow
def test_train_takes_a_config_that_was_changed_in_python_and_leaves_it_alone(home, tmp_path):
    config = load_config(str(home / "tiny.py"), [f"data.path={home / 'data'}"])
    config.num_steps = 2
    run = llada_jax.train(config, str(tmp_path / "run"), changes={"seed": 7})
    assert (run.step, config.seed) == (2, load_config(str(home / "tiny.py")).seed)
    assert llada_jax.load(run.workdir).config["seed"] == 7
    assert not (tmp_path / "run" / "config.py").exists()
    rows = config.data.batch_size * config.data.sequence_length
    longer = {"num_steps": 0, "num_tokens": 3 * rows, "seed": 7}
    assert llada_jax.train(config, str(tmp_path / "run"), changes=longer).step == 3


@pytest.mark.slow
def test_time_is_counted_for_what_it_is_spent_on(home, tmp_path, monkeypatch):
    """Steps in flight are not time of the samples, nor is the final evaluation time of steps."""
    are_done = []

    def sample(config, model, data, params, beat):
        are_done.append(all(leaf.is_ready() for leaf in jax.tree.leaves(params)))
        return []

    monkeypatch.setattr(verb, "sample", sample)
    changes = {"data.path": str(home / "data"), "data.batch_size": 256, "log.every_steps": 4}
    changes |= {"samples.every_steps": 1, "evaluation.every_steps": 0}
    run = llada_jax.train(home / "tiny.py", tmp_path / "run", changes=changes)
    assert "final" in run.final
    assert are_done == [True] * 4
    assert json.loads((tmp_path / "run/goodput.json").read_text())["seconds"]["evaluation"] > 0


@pytest.mark.slow
def test_a_run_sends_what_it_measures_to_the_tracker_of_its_config(home, tmp_path, monkeypatch):
    tracker = StandIn("wandb")
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    changes = {"data.path": str(home / "data"), "log.tracker": "wandb"}
    run = llada_jax.train(home / "tiny.py", tmp_path / "run", changes=changes)
    assert [name for name, _ in tracker.calls if name in ("init", "finish")] == ["init", "finish"]
    sent = [metrics for name, metrics in tracker.calls if name == "log"]
    losses = {metrics["step"]: metrics["train/loss"] for metrics in sent if "train/loss" in metrics}
    written = metric_lines(tmp_path / "run", "train")
    assert losses == {line["step"]: line["train"]["loss"] for line in written}
    assert max(losses) == run.step
    assert any("final/nelbo" in metrics for metrics in sent)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_step": 3}, "has no knob 'num_step'. Did you mean 'num_steps'"),
        ({"optimiser.b2": 0.9}, r"no group 'optimiser' \(in 'optimiser.b2'\)"),
        ({"num_steps": "3"}, "num_steps='3' is not of type int"),
        ({"seed": True}, "seed=True is not of type int"),
        ({"optimizer.b2": 2.0}, "optimizer.b2"),
    ],
)
def test_a_wrong_change_is_named_as_it_was_written(changes, says, home, tmp_path):
    with pytest.raises(UserError, match=says):
        llada_jax.train(home / "tiny.py", tmp_path / "run", changes=changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_evaluate_returns_what_the_command_prints(home, capsys):
    run, data = home / "run", home / "data"
    expected = printed(["evaluate", "--checkpoint", run, "--data", data], capsys)
    assert llada_jax.evaluate(str(run), data) == expected
    tasks = home / "questions.jsonl"
    tasks.write_text(json.dumps({"prompt": "it", "answer": " is"}) + "\n")
    words = ["--tasks", tasks, "--ask", "forwards", "--mc-samples", "4"]
    expected = printed(["evaluate", "--checkpoint", run, *words], capsys)
    found = llada_jax.evaluate_tasks(str(run), tasks, ask=["forwards"], mc_samples=4)
    # JSON has no NaN
    assert found["forwards"]["log_likelihood"] == expected["forwards"]["log_likelihood"]
    assert found.keys() == expected.keys()
