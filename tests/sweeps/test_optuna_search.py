"""Optuna drives a sweep."""

import json
import sys
from pathlib import Path

import pytest
from support.required import library
from support.runs import SMALL_RUN, metric_lines
from support.sweeps import error_of, stopped_under_way

SUGGEST = (
    "return {'num_steps': 20, "
    "'schedule.learning_rate': trial.suggest_float('rate', 1e-4, 1e-1, log=True)}"
)


@pytest.mark.slow
def test_optuna_minimizes_the_held_out_bits_per_byte(
    write_config, call_sweep, tmp_path, fake_train
):
    optuna = library("optuna")
    write_config(SUGGEST, head="def suggest(trial):")
    _, err = call_sweep("--optuna", "8")
    assert "best of 8 trials: " in err
    table = json.loads(call_sweep("--table", "--json")[0])
    backend = optuna.storages.journal.JournalFileBackend(f"{tmp_path}/runs/optuna.journal")
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))
    finished = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    of_run = {run["index"]: run for run in table["runs"]}
    for trial in finished:  # each trial is the run that its parameters describe
        run = of_run[trial.user_attrs["run"]]
        assert trial.value == run["bits_per_byte"] == pytest.approx(2 + 100 * trial.params["rate"])
    assert table["runs"][0]["bits_per_byte"] == study.best_value
    pruned = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.PRUNED]
    assert len(finished) + len(pruned) == 8
    assert sorted(run["state"] for run in table["runs"]) == ["complete"] * len(finished) + [
        "pruned"
    ] * len(pruned)


@pytest.mark.slow
def test_optuna_prunes_a_run_that_is_worse_than_the_median(write_config, call_sweep, fake_train):
    """The first five trials are never pruned (Optuna's default); the sixth is worse than all of
    them.
    """
    library("optuna")
    write_config(
        "rate, steps = (1e-1, 400) if trial.number == 5 else (1e-3, 60)",
        "return {'schedule.learning_rate': rate, 'num_steps': steps, 'seed': trial.number}",
        head="def suggest(trial):",
    )
    call_sweep("--optuna", "6")
    listed = json.loads(call_sweep("--list", "--json")[0])["runs"]
    assert [run["state"] for run in listed] == ["complete"] * 5 + ["pruned"]
    assert listed[5]["step"] < 400
    assert (
        "6 trials" in call_sweep("--optuna", "6")[1]
    )  # a pruned trial is over: nothing is started again


def test_a_trial_with_the_values_of_a_diverged_run_is_not_trained_and_counts(
    write_config, call_sweep, fake_train
):
    """A second attempt of FAKE_TRAIN would complete the run."""
    library("optuna")
    write_config("return {'seed': 14 if trial.number < 2 else 1}", head="def suggest(trial):")
    _, err = call_sweep("--optuna", "3")
    assert "trial 1 is not run: 000, of the same values, ended as diverged" in err
    assert "best of 3 trials: 001" in err
    listed = json.loads(call_sweep("--list", "--json")[0])["runs"]
    assert [run["state"] for run in listed] == ["diverged", "complete"]


def test_a_search_in_which_everything_diverges_ends(write_config, call_sweep, fake_train):
    library("optuna")
    write_config("return {'seed': 14}", head="def suggest(trial):")
    assert "None of 3 trials has a result" in call_sweep("--optuna", "3", status=2)[1]
    (run,) = json.loads(call_sweep("--list", "--json")[0])["runs"]
    assert (run["state"], run["step"]) == ("diverged", 5)


@pytest.mark.slow
def test_optuna_continues_the_trial_that_was_stopped(
    write_config, call_sweep, tmp_path, fake_train
):
    library("optuna")
    write_config(SUGGEST.replace("20", "300"), head="def suggest(trial):")
    with stopped_under_way(tmp_path / "runs" / "000"):
        assert "asked to stop in trial 0" in call_sweep("--optuna", "2", status=42)[1]
    (stopped,) = json.loads(call_sweep("--list", "--json")[0])["runs"]
    assert stopped["state"] == "partial"
    call_sweep("--optuna", "2")
    first, second = json.loads(call_sweep("--list", "--json")[0])["runs"]
    assert first["knobs"] == stopped["knobs"]
    assert first["state"] == second["state"] == "complete"
    assert (
        second["knobs"] != first["knobs"]
    )  # the sampler of the second process did not begin again
    assert [line["step"] for line in metric_lines(tmp_path / "runs" / "000", "train")] == list(
        range(1, 301)
    )


def test_a_suggestion_that_is_impossible_names_the_knob(write_config, call_sweep, fake_train):
    library("optuna")
    write_config("return {'schedule.laerning_rate': 1.0}", head="def suggest(trial):")
    assert "Did you mean 'schedule.learning_rate'?" in call_sweep("--optuna", "2", status=2)[1]
    write_config("return [1]", head="def suggest(trial):")
    assert "must be given a dict" in call_sweep("--optuna", "2", status=2)[1]
    write_config("return 1 / 0", head="def suggest(trial):")
    assert "suggest(trial) of" in (err := call_sweep("--optuna", "2", status=2)[1])
    assert "fails with ZeroDivisionError" in err


def test_optuna_that_is_not_installed_is_answered_by_the_line_that_installs_it(
    write_config, call_sweep, monkeypatch
):
    write_config(SUGGEST, head="def suggest(trial):")
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'llada_jax[optuna]'" in call_sweep("--optuna", "2", status=2)[1]


@pytest.mark.slow
def test_optuna_drives_real_training(start_sweep, call_sweep, write_config):
    library("optuna")
    write_config(
        "return {'optimizer.b2': trial.suggest_float('b2', 0.9, 0.99)}",
        head="def suggest(trial):",
        base=SMALL_RUN,
    )
    assert "best of 2 trials" in error_of(start_sweep("--optuna", "2"), status=0)
    listed = json.loads(call_sweep("--list", "--json", *start_sweep.words)[0])["runs"]
    assert [run["state"] for run in listed] == ["complete", "complete"]
    for run in listed:
        trained = json.loads((Path(run["workdir"]) / "run.json").read_text())["config"]
        assert trained["optimizer"]["b2"] == run["knobs"]["optimizer.b2"]
