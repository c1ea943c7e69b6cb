"""Experiment trackers: what a run sends them, through the libraries themselves where they are."""

import json
import os
import subprocess
import sys

import pytest
from support.errors import error_of
from support.required import library, python_with
from support.trackers import StandIn

from llada_jax.config import default_config
from llada_jax.errors import UserError
from llada_jax.run.metrics_file import MetricsWriter
from llada_jax.run.trackers import TRACKERS, Tracker
from llada_jax.validation import CHOICES, NO_TRACKER

GROUPS = {"train": {"loss": 1.5}, "speed": {"tokens_per_s": 10}}


@pytest.fixture
def stand_in(monkeypatch):
    def put(name: str) -> StandIn:
        module = StandIn(name)
        monkeypatch.setitem(sys.modules, name, module)
        for variable in TRACKERS.values():
            monkeypatch.delenv(variable, raising=False)
        return module

    return put


def test_the_knob_and_the_table_agree():
    assert set(CHOICES["log.tracker"]) == {NO_TRACKER, *TRACKERS}
    assert default_config().log.tracker == NO_TRACKER


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_the_lines_of_metrics_and_is_closed(tmp_path, stand_in, name):
    module = stand_in(name)
    tracker = Tracker(name, workdir=str(tmp_path / "run"), config={"seed": 0})
    writer = MetricsWriter(tmp_path / "run", tracker=tracker)
    writer.write(10, GROUPS)
    writer.close()
    logged = [given for call, given in module.calls if call == "log"]
    assert logged == [{"step": 10, "train/loss": 1.5, "speed/tokens_per_s": 10.0}]
    assert module.calls[-1] == ("finish", None)
    (started,) = [given for call, given in module.calls if call == "init"]
    assert started["project"] == "llada_jax"
    assert started["name"].startswith("run-")
    assert started["resume"] == "allow"
    assert started["config"] == {"seed": 0}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_later_start_in_the_same_workdir_continues_the_run(tmp_path, stand_in, name, monkeypatch):
    module = stand_in(name)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    bucket = "gs://bucket/run"
    starts = (
        ("a", "run"),
        ("b", "../a/run"),
        ("b", str(tmp_path / "a/run")),
        ("b", "run"),
        ("a", bucket),
        ("b", bucket),
    )
    for folder, workdir in starts:
        monkeypatch.chdir(tmp_path / folder)
        Tracker(name, workdir=workdir, config={})
    started = [given for call, given in module.calls if call == "init"]
    identities = [(given["name"], given["id"]) for given in started]
    assert identities[0] == identities[1] == identities[2]
    assert identities[4] == identities[5]
    assert len(set(identities)) == 3
    # wandb continues the run of an id, and trackio that of a name; it knows no id
    assert all((known is not None) == (name == "wandb") for _, known in identities)


@pytest.mark.parametrize("name", TRACKERS)
def test_the_project_is_that_of_the_environment(stand_in, monkeypatch, tmp_path, name):
    module = stand_in(name)
    for value in ("mine", ""):
        monkeypatch.setenv(TRACKERS[name], value)
        Tracker(name, workdir=str(tmp_path), config={})
    started = [given["project"] for call, given in module.calls if call == "init"]
    assert started == ["mine", "llada_jax"]


def test_what_a_tracker_refuses_is_one_sentence(stand_in, monkeypatch, tmp_path):
    stand_in("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "forbidden")
    message = error_of(Tracker, "wandb", workdir=str(tmp_path), config={})
    assert "The tracker wandb refuses the run (no permission for this project)" in message


def test_a_tracker_that_is_not_installed_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"llada_jax\[trackio\]"):
        Tracker("trackio", workdir=str(tmp_path), config={})


@pytest.mark.slow
def test_wandb_itself_keeps_a_run_offline(monkeypatch, tmp_path):
    wandb = library("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for step in (10, 20, 10):  # the last one after a restart from an earlier checkpoint
        tracker = Tracker("wandb", workdir=str(tmp_path / "run"), config={"seed": 3})
        tracker.log(step, GROUPS)
        summary = dict(wandb.run.summary)
        assert wandb.run.config["seed"] == 3
        tracker.close()
        assert (summary["step"], summary["train/loss"]) == (step, 1.5)
    kept = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(kept) == 3
    assert len({path.stem for path in kept}) == 1


def test_trackio_itself_keeps_a_run(tmp_path):
    code = f"""
import json
from llada_jax.run.trackers import Tracker
from trackio.sqlite_storage import SQLiteStorage

for step in (10, 20):
    tracker = Tracker("trackio", workdir={str(tmp_path / "run")!r}, config={{"seed": 3}})
    tracker.log(step, {GROUPS})
    tracker.close()
(name,) = SQLiteStorage.get_runs("llada_jax")
print(json.dumps([name, SQLiteStorage.get_logs("llada_jax", name)]))
"""
    # it reads this variable when it is imported
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "kept")}
    done = subprocess.run(
        [python_with("trackio", environment="trackio"), "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    name, kept = json.loads(done.stdout.splitlines()[-1])
    assert name.startswith("run-")
    assert [(line["step"], line["train/loss"]) for line in kept] == [(10, 1.5), (20, 1.5)]


def test_a_tracker_that_fails_later_does_not_end_the_run(stand_in, tmp_path, capsys):
    module = stand_in("wandb")
    tracker = Tracker("wandb", workdir=str(tmp_path), config={})

    def fail(metrics):
        raise ConnectionError("the service is down")

    module.log = fail
    tracker.log(10, GROUPS)
    del module.log
    tracker.log(20, GROUPS)
    tracker.close()
    said = capsys.readouterr().err
    assert "wandb takes no more metrics (the service is down)" in said
    assert len(said.splitlines()) == 1
    assert [call for call, _ in module.calls] == ["init", "define_metric"]
