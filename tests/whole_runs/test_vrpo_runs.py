"""Training on preferences keeps the promises of pretraining, and learns what was preferred."""

import json

import numpy as np
import pytest
from support.mishaps import train_argv
from support.runs import (
    assert_same_run,
    is_committed,
    kill_when,
    last_logged_step,
    losses,
    metric_lines,
    saved_arrays,
)

from llada_jax.__main__ import main

VRPO = (
    "objective.name=vrpo",
    "objective.num_times=2",
    "objective.beta=1.0",
    "data.random_length_probability=0.0",
    "data.attend_across_documents=False",
    "log.tensorboard=False",
)


@pytest.fixture(scope="module")
def base(runs, dialogues):
    """A network that has seen a little text."""
    workdir = runs.directory / "vrpo-base"
    runs.train(workdir, "num_steps=5", "evaluation.every_steps=0", "log.tensorboard=False")
    return workdir


@pytest.fixture(scope="module")
def words(pairs, base):
    return (f"data.path={pairs('packed')}", f"checkpoint.init_from={base}", *VRPO)


@pytest.fixture(scope="module")
def straight(runs, words):
    """The run on one device."""
    workdir = runs.directory / "vrpo"
    runs.train(workdir, *words)
    return workdir


@pytest.mark.slow
def test_the_margin_grows_on_held_out_pairs_and_the_reference_stays(base, straight):
    curve = losses(straight)
    assert len(curve) == 20
    # policy and reference are equal before the first update
    assert curve[0] == pytest.approx(np.log(2), rel=1e-6)
    assert np.mean(curve[-5:]) < 0.5
    heldout = [line["heldout"] for line in metric_lines(straight, "heldout")]
    (final,) = metric_lines(straight, "final")
    assert 0 < heldout[0]["reward_margin"] < final["final"]["reward_margin"]
    assert final["final"]["reward_accuracy"] > 0.8
    before, after = saved_arrays(base, 5), saved_arrays(straight, 20)
    frozen = {name: array for name, array in after.items() if name.startswith("['frozen']")}
    assert len(frozen) == sum(name.startswith("['params']") for name in after)
    for name, array in frozen.items():
        np.testing.assert_array_equal(array, before[name.replace("frozen", "params")])


@pytest.mark.slow
def test_adapters_learn_a_preference_over_a_reference_that_costs_nothing(runs, words, base):
    workdir = runs.directory / "vrpo-adapters"
    lora = ("lora.rank=4", "lora.targets=blocks/", "evaluation.every_steps=0")
    runs.train(workdir, *words, *lora)
    assert losses(workdir)[0] == pytest.approx(np.log(2), rel=1e-6)
    (final,) = metric_lines(workdir, "final")
    assert final["final"]["reward_margin"] > 0.2
    arrays, before = saved_arrays(workdir, 20), saved_arrays(base, 5)
    trained = [name for name in arrays if name.startswith("['params']")]
    assert len(trained) == 2 * 7
    frozen = {name: array for name, array in arrays.items() if name.startswith("['frozen']")}
    assert len(frozen) == sum(name.startswith("['params']") for name in before)
    for name, array in frozen.items():
        np.testing.assert_array_equal(array, before[name.replace("frozen", "params")])


@pytest.mark.slow
def test_a_killed_run_equals_the_straight_one(runs, words, straight):
    workdir = runs.directory / "vrpo-killed"
    process = runs.start(workdir, *words)
    kill_when(process, lambda: is_committed(workdir, 10) and last_logged_step(workdir) >= 11)
    assert "start       step 10 of" in runs.train(workdir, *words)
    assert_same_run(workdir, straight, step=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_devices", "num_processes", "overrides"),
    [
        ("mesh", 8, 1, ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]),
        ("processes", 4, 2, ["optimizer.gradient_accumulation=2"]),
    ],
)
def test_the_curve_depends_neither_on_mesh_nor_on_hosts_nor_on_microbatches(
    runs, words, straight, name, num_devices, num_processes, overrides
):
    workdir = runs.directory / f"vrpo-{name}"
    runs.train(
        workdir,
        *words,
        "evaluation.every_steps=0",
        *overrides,
        num_devices=num_devices,
        num_processes=num_processes,
    )
    np.testing.assert_allclose(losses(workdir), losses(straight), rtol=1e-4)


@pytest.mark.slow
def test_a_finished_run_is_evaluated_without_its_reference(straight, pairs, capsys):
    words = ["--data", str(pairs("packed")), "--json", "--batch-size", "16"]
    assert main(["evaluate", "--checkpoint", str(straight), *words]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    (final,) = metric_lines(straight, "final")
    nelbo = evaluated["nelbo_nats_per_token"]
    assert nelbo == pytest.approx(final["final"]["nelbo"], rel=1e-4)


def test_data_and_objective_must_fit_each_other(home, pairs, refused):
    argv = train_argv(home, home / "vrpo-refused", *VRPO)
    refused(argv, says="needs the batch field 'is_chosen'", creates=home / "vrpo-refused")
    of_pairs = [f"data.path={pairs('packed')}", "data.sequence_length=32", *VRPO[3:]]
    argv = train_argv(home, home / "vrpo-refused", *of_pairs, "objective.name=sft")
    refused(argv, says="would train on both", creates=home / "vrpo-refused")
