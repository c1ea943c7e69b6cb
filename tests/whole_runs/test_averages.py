"""Who reads the moving average of a run and who its parameters: each reader takes what is asked
for.
"""

import json

import jax
import numpy as np
import pytest
from support.mishaps import train_argv
from support.runs import metric_lines

import llada_jax
from llada_jax.__main__ import main
from llada_jax.errors import UserError
from llada_jax.run.metrics_file import read_samples

# a rate so high that parameters and average differ by far more than rounding
AVERAGED = ("optimizer.ema_decay=0.9", "schedule.learning_rate=0.03")


def evaluated(workdir, home, flag: str, capsys) -> float:
    words = ["--checkpoint", str(workdir), "--data", str(home / "data"), "--batch-size", "8"]
    capsys.readouterr()
    assert main(["evaluate", *words, flag, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["nelbo_nats_per_token"]


@pytest.mark.slow
def test_evaluations_load_and_init_from_read_what_they_are_asked_to(home, tmp_path, capsys):
    during = ("evaluation.every_steps=2", "evaluation.num_batches=0", "samples.every_steps=2")
    shown = ("samples.gen_length=8", "samples.block_length=8", "samples.steps=4")
    whole = (
        *AVERAGED,
        *during,
        *shown,
        "samples.temperature=1.0",
        "evaluation.final_num_batches=0",
    )
    for weights, flag, other in (("raw", "--no-ema", "--ema"), ("auto", "--ema", "--no-ema")):
        workdir = tmp_path / weights
        assert main(train_argv(home, workdir, *whole, f"evaluation.weights={weights}")) == 0
        final = metric_lines(workdir, "final")[0]["final"]["nelbo"]
        assert evaluated(workdir, home, flag, capsys) == pytest.approx(final, rel=1e-5)
        assert evaluated(workdir, home, other, capsys) != pytest.approx(final, rel=1e-3)
        # and during training, where the same weights are scored and write the samples
        early = f"{workdir}@2"
        heldout = metric_lines(workdir, "heldout")[0]
        assert heldout["step"] == 2
        score = evaluated(early, home, flag, capsys)
        assert heldout["heldout"]["nelbo"] == pytest.approx(score, rel=1e-5)
        text = read_samples(workdir)[0]["text"]
        written = {
            ema: llada_jax.load(early, ema=ema).generate(
                [""], gen_length=8, steps=4, temperature=1.0
            )[0]
            for ema in (False, True)
        }
        assert text == written[flag == "--ema"] != written[other == "--ema"]
    read = {ema: llada_jax.load(workdir, ema=ema).params for ema in (None, True, False)}
    leaves = {ema: jax.tree.leaves(params) for ema, params in read.items()}
    for default, average in zip(leaves[None], leaves[True]):
        np.testing.assert_array_equal(default, average)
    assert any(not np.allclose(a, b) for a, b in zip(leaves[True], leaves[False]))
    for weights, ema in (("raw", False), ("ema", True), ("auto", True)):
        begun = tmp_path / f"from {weights}"
        frozen = ("schedule.learning_rate=0.0", "num_steps=1", "checkpoint.every_steps=1")
        asked = f"checkpoint.init_from_weights={weights}"
        knobs = (f"checkpoint.init_from={workdir}", asked, *frozen)
        assert main(train_argv(home, begun, *knobs)) == 0
        for start, expected in zip(jax.tree.leaves(llada_jax.load(begun).params), leaves[ema]):
            np.testing.assert_array_equal(start, expected)


def test_a_moving_average_that_was_not_kept_is_refused(home, tmp_path, refused):
    with pytest.raises(UserError, match="kept none .*ask for the raw parameters"):
        llada_jax.load(home / "run", ema=True)
    argv = train_argv(home, tmp_path / "run", "evaluation.weights=ema")
    refused(argv, says=["config.evaluation.weights='ema' needs a moving average"])
