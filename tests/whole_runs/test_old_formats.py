"""What version 0.1 wrote before the package had folders is read, continued and scored as ever.

tests/fixtures/version_0.1 holds the config, data set, workdir and export of a run of four steps,
and the version that wrote them trained two steps more to the losses below.
"""

import json
import shutil

import numpy as np
import pytest
from support.paths import ROOT

import llada_jax
from llada_jax.__main__ import main
from llada_jax.run.metrics_file import read_lines

LOSSES = {5: 5.459428310394287, 6: 5.706697463989258}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A copy of what the old version wrote, in the current directory: its paths are relative."""
    shutil.copytree(ROOT / "tests/fixtures/version_0.1", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_an_old_workdir_is_continued_to_the_losses_that_the_old_version_had(written):
    words = ("--config", "tiny.py", "--workdir", "run", "--config.num_steps=6")
    assert main(["train", *words]) == 0
    lines = {line["step"]: line["train"] for line in read_lines("run") if "train" in line}
    assert {step: lines[step]["loss"] for step in LOSSES} == pytest.approx(LOSSES, rel=1e-5)


@pytest.mark.slow
def test_an_old_workdir_and_its_old_export_give_the_same_logits(written):
    tokens = np.arange(32).reshape(2, 16)
    run, export = llada_jax.load("run", ema=False), llada_jax.load("export")
    assert export.tokenizer.vocab_size == run.tokenizer.vocab_size
    expected, found = run.logits(tokens), export.logits(tokens)
    # the weights of the export are bfloat16
    np.testing.assert_allclose(found[..., :256], expected[..., :256], atol=0.05)


@pytest.mark.slow
def test_an_old_workdir_is_scored_on_its_old_data_and_exported_again(written, capfd):
    assert main(["evaluate", "--checkpoint", "run", "--data", "data", "--json"]) == 0
    score = json.loads(capfd.readouterr().out)
    # the old version's, whose moving average had no correction for its start
    assert score["bits_per_byte"] == pytest.approx(9.050, abs=4 * 0.061)
    assert main(["export", "--checkpoint", "run", "--output", "again"]) == 0
    old, new = (
        (written / folder / "model.safetensors").read_bytes() for folder in ("export", "again")
    )
    assert old == new
