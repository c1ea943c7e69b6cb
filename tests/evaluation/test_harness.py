"""The adapter in the real lm-evaluation-harness, on local tasks, in a process of its own."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.exports import LLADA, write_checkpoint
from support.hf_directories import random_params
from support.required import python_with

import llada_jax

CHECKS = Path(__file__).parent / "harness_checks" / "local_tasks.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("harness") / "run", LLADA, random_params(LLADA))


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory) -> dict:
    home = tmp_path_factory.mktemp("tasks")
    root = Path(llada_jax.__file__).parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "HF_HOME": str(home / "hf"),
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [python_with("lm_eval", environment="harness"), str(CHECKS), str(checkpoint), str(home)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow  # it imports datasets, and loads two more copies of JAX's programs
def test_answers_have_the_scores_of_the_model_and_metrics_have_both_errors(found, checkpoint):
    model = llada_jax.load(str(checkpoint))
    expected = model.score(
        [(context, continuation) for context, continuation, _ in found["answers"]],
        mc_samples=4,
        seed=3,
    )
    assert len(expected) == 7
    for (_, _, value), score in zip(found["answers"], expected, strict=True):
        assert value == pytest.approx(score.log_likelihood, rel=1e-4)
    ranked = found["results"]["ranked"]
    assert 0 <= ranked["acc,none"] <= 1
    assert 0 <= ranked["acc_mc_stderr,none"] < 0.6
    assert found["results"]["rolled"]["bits_per_byte_mc_stderr,none"] > 0
    assert "exact_match_mc_stderr,none" not in found["results"]["written"]


@pytest.mark.slow
def test_whole_texts_are_scored_with_windows(found, checkpoint):
    model = llada_jax.load(str(checkpoint))
    texts = [f"{name} " + "is a truth " * 6 for name in ("Ada", "Bob was", "Eve")]
    bounds = model.score_text(texts, mc_samples=4, seed=3)
    for value, bound in zip(found["rolled"], bounds, strict=True):
        assert value == pytest.approx(-bound.nats_per_token * bound.num_tokens, rel=1e-4)


@pytest.mark.slow
def test_texts_are_written_up_to_the_stop_string(found, checkpoint):
    model = llada_jax.load(str(checkpoint))
    prompts = [prompt for prompt, _ in found["written"]]
    whole = model.generate(prompts, gen_length=8, block_length=4, seed=3)
    assert any("D" in text for text in whole)
    assert [text for _, text in found["written"]] == [text.split("D")[0] for text in whole]


@pytest.mark.slow
def test_chats_are_written_with_the_template_and_interrupted_evaluations_continue(found):
    assert found["prompt_of_chat"] == "[user] Ada\n"
    assert found["again"]
