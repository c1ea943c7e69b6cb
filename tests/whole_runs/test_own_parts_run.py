"""Runs with an objective, an optimizer and a schedule of the user's own: docs/examples."""

import hashlib
import json
import sys

import jax
import numpy as np
import pytest
from support.paths import ROOT
from support.runs import metric_lines, saved_arrays

import llada_jax
from llada_jax.__main__ import main

EXAMPLES = ROOT / "docs/examples"


@pytest.fixture(scope="module")
def own(runs):
    """The workdir of the example, continued from its middle."""
    workdir = runs.directory / "own"
    config = EXAMPLES / "own_parts.py"
    runs.train(workdir, "num_steps=4", config=config)
    runs.train(workdir, config=config)
    return workdir


@pytest.mark.slow
def test_the_metrics_of_an_own_objective_are_logged_and_its_bound_is_scored(own):
    lines = metric_lines(own, "train")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[0]["train"]["drift"] == pytest.approx(0.0, abs=1e-6)  # it starts at its reference
    assert lines[-1]["train"]["drift"] > 1e-3
    assert all("bits_per_byte" in line["train"] for line in lines)
    assert metric_lines(own, "final")[0]["final"]["nelbo"] > 0


@pytest.mark.slow
def test_the_reference_is_saved_frozen_and_survives_a_restart(own):
    middle, last = saved_arrays(own, 4), saved_arrays(own, 8)
    frozen = [path for path in last if path.startswith("['frozen']")]
    trained = [path.replace("frozen", "params", 1) for path in frozen]
    assert len(frozen) > 5
    assert set(trained) <= set(last)
    for path in frozen:
        np.testing.assert_array_equal(last[path], middle[path])
    assert any((last[p] != last[o]).any() for p, o in zip(frozen, trained))
    assert any((last[path] != middle[path]).any() for path in trained)


@pytest.mark.slow
def test_the_workdir_says_which_parts_it_was_made_with(own):
    run = json.loads((own / "run.json").read_text())
    assert run["config"]["objective"]["name"] == "anchored:anchored"
    assert run["config"]["objective"]["arguments"] == [["strength", 0.5]]
    assert run["mask"] == {"causal": False, "block_length": 0}
    assert set(run["parts"]) == {"objective.name", "optimizer.name", "schedule.name"}
    for part in run["parts"].values():
        file = EXAMPLES / f"{part['name'].partition(':')[0]}.py"
        assert part["file"] == str(file)
        assert part["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (own / "config.py").read_text() == (EXAMPLES / "own_parts.py").read_text()


@pytest.mark.slow
def test_a_checkpoint_loads_without_the_module_of_its_objective(own, monkeypatch):
    monkeypatch.setitem(sys.modules, "anchored", None)  # an import of it fails
    model = llada_jax.load(own)
    assert model.step == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))


@pytest.mark.slow
def test_an_annealed_objective_trains_and_takes_another_config(runs):
    workdir = runs.directory / "annealed"
    changes = ["num_steps=4", "objective.name=annealed:annealed"]
    changes += ["objective.arguments=(('anneal_steps', 4),)", "optimizer.name=lion"]
    runs.train(workdir, *changes, config=EXAMPLES / "own_parts.py")
    shares = [line["train"]["annealed_share"] for line in metric_lines(workdir, "train")]
    assert shares == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.name=no_such_file:loss", "no module 'no_such_file' in the current directory"),
        ("objective.name=anchored:anchord", "has no 'anchord'. Did you mean 'anchored'"),
        ("objective.arguments=(('strenth', 1.0),)", "unexpected keyword argument 'strenth'"),
        ("objective.name=lost_bound:lost_bound", "returns no metric 'nelbo', only loss"),
        ("optimizer.name=staircase:staircase", "(b1=, b2=, eps=), which its signature"),
        ("schedule.name=annealed:annealed", "does not take"),
    ],
)
def test_a_part_that_breaks_its_contract_ends_train_before_it_compiles(
    runs, tmp_path, monkeypatch, capsys, override, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lost_bound.py").write_text(
        "import dataclasses\n"
        "from llada_jax.objectives.masked_diffusion import masked_diffusion\n\n"
        "def lost_bound(*, mask_id, bos_id, vocab_size, strength):\n"
        "    ours = masked_diffusion(mask_id=mask_id)\n\n"
        "    def loss(*args, **kwargs):\n"
        "        total, count, metrics = ours.loss(*args, **kwargs)\n"
        "        return total, count, {'loss': metrics['loss']}\n\n"
        "    return dataclasses.replace(ours, loss=loss)\n"
    )
    words = ["--config", str(EXAMPLES / "own_parts.py"), "--workdir", str(tmp_path / "run")]
    data = f"--config.data.path={runs.dataset}"
    assert main(["train", *words, data, f"--config.{override}"]) == 2
    said_here = capsys.readouterr().err
    assert said in said_here
    assert len(said_here.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
