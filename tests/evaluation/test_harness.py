"""The adapter in the real lm-evaluation-harness, on local tasks, in a process of its own."""

import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
from support.exports import LLADA, write_checkpoint
from support.hf_directories import random_params
from support.required import python_with
from support.runs import free_port

import llada_jax

CHECKS = Path(__file__).parent / "harness_checks" / "local_tasks.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("harness") / "run", LLADA, random_params(LLADA))


def start(checkpoint, home, **more: str) -> subprocess.Popen:
    """Starts the checks in a folder of their own."""
    home.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(llada_jax.__file__).parent.parent),
        "HF_HOME": str(home / "hf"),
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }
    return subprocess.Popen(
        [python_with("lm_eval", environment="harness"), str(CHECKS), str(checkpoint), str(home)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=(home / "log").open("w"),
        text=True,
    )


def result_of(process: subprocess.Popen) -> dict:
    """Returns what the checks print."""
    out, _ = process.communicate(timeout=600)
    log = (Path(process.args[-1]) / "log").read_text()
    assert process.returncode == 0, log[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory) -> dict:
    return result_of(start(checkpoint, tmp_path_factory.mktemp("tasks") / "home"))


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
    assert math.isnan(found["error_again"])
    assert found["is_other"]
    # of seven answers, asked two by two
    assert found["interrupted"] == {"before": 2, "after": 5, "is_same": True}


@pytest.mark.slow
def test_the_command_line_has_the_results_of_python_and_the_published_ones(found):
    said = found["verbs"]
    named = json.loads(said["named"]["out"])["tasks"]["outer"]
    assert "published_percent" not in named
    expected, metrics = found["results"]["ranked"], named["results"]["ranked"]
    for name in ("acc,none", "acc_norm,none", "acc_mc_stderr,none", "acc_norm_mc_stderr,none"):
        assert metrics[name] == expected[name]
    of_sample, of_noise = metrics["acc_norm_stderr,none"], metrics["acc_norm_mc_stderr,none"]
    lines = said["preset"]["out"].splitlines()
    assert lines[2] == (
        f"  ranked  acc_norm  {metrics['acc_norm,none']:.4f}  +- {of_sample:.4f} (sample)"
        f"  +- {of_noise:.4f} (Monte Carlo)"
    )
    assert lines[3] == "  ranked  published  0.5000"


@pytest.mark.slow
def test_tasks_that_cannot_be_asked_are_refused_before_the_first_is(found):
    said = found["verbs"]
    for name, message in (
        ("unsafe", "The task unsafe runs code on this machine that the model has written; add"),
        ("unknown", "The task rankled of lm-evaluation-harness cannot be loaded ("),
        (
            "too few",
            "lm-evaluation-harness fails on ranked before it asks the model (Sample larger",
        ),
        ("unbounded", "is not a bound, and the task rolled asks for bounds of texts"),
    ):
        assert said[name]["status"] == 2
        assert message in said[name]["err"]
        assert "  ranked  acc" not in said[name]["err"]
    assert "exact_match" in said["confirmed"]["out"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds_and_only_the_first_writes(found, checkpoint, tmp_path):
    team = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "2",
    }
    homes = [tmp_path / "first", tmp_path / "second"]
    processes = [
        start(checkpoint, home, **team, JAX_PROCESS_ID=str(number))
        for number, home in enumerate(homes)
    ]
    for together in map(result_of, processes):
        # the second time every answer came from the cache
        assert together["again"]
        assert "what the harness asks for (loglikelihood) is" in together["refused"]
        assert together["written"] == found["written"]
        assert together["rolled"] == pytest.approx(found["rolled"], rel=1e-4)
        for (*question, value), (*same, expected) in zip(together["answers"], found["answers"]):
            assert question == same
            assert value == pytest.approx(expected, rel=1e-4)
    # of two models
    names = [[path.name for path in home.glob("cache*")] for home in homes]
    assert [len(found) for found in names] == [2, 0]
    assert all(re.fullmatch("cache_[0-9a-f]{16}_rank0.db", name) for name in names[0])
