"""The evaluate verb: held-out bounds with their parts, and files of questions."""

import json
from types import SimpleNamespace

import pytest
from support.exports import LLADA, write_checkpoint
from support.hf_directories import random_params

import llada_jax
from llada_jax.__main__ import main
from llada_jax.config import default_config
from llada_jax.errors import UserError
from llada_jax.evaluation.reports import report_split, report_tasks
from llada_jax.storage import files
from llada_jax.verbs import evaluate
from llada_jax.verbs.evaluate import write_report


@pytest.fixture(scope="module")
def causal_checkpoint(tmp_path_factory):
    config = default_config()
    config.data.sequence_length = 48
    config.objective.name = "autoregressive"
    home = tmp_path_factory.mktemp("causal")
    return write_checkpoint(home / "run", LLADA, random_params(LLADA), config=config.to_dict())


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    file = tmp_path_factory.mktemp("questions") / "tasks.jsonl"
    row = {"prompt": "Ada", "answer": " is 1st", "choices": [" is last", " is 1st"]}
    file.write_text(2 * (json.dumps(row) + "\n"))
    return file


def said(capfd, *words, status=0):
    capfd.readouterr()
    assert main(["evaluate", *map(str, words)]) == status
    out, err = capfd.readouterr()
    return err if status else out


@pytest.mark.slow  # six programs are compiled, and two models loaded
def test_questions_are_answered_in_each_direction_that_fits(
    random_checkpoint, causal_checkpoint, questions, capfd
):
    words = ("--tasks", questions, "--mc-samples", "4")
    found = json.loads(said(capfd, "--checkpoint", random_checkpoint, *words, "--json"))
    assert set(found) >= {"forwards", "infill", "mc_samples", "cfg_scale", "step"}
    assert found["forwards"]["num_ranked"] == found["forwards"]["num_questions"] == 2
    assert "backwards" not in found
    text = report_tasks(found)
    assert "forwards   exact match 0.000" in text
    assert "(chance 0.500)" in text
    words = (*words, "--gen-length", "4")
    causal = json.loads(said(capfd, "--checkpoint", causal_checkpoint, *words, "--json"))
    assert "infill" not in causal
    assert causal["gen_length"] == 4
    assert "gen_length" not in found
    assert causal["forwards"]["mc_standard_error"] == 0
    assert (found["estimator"], causal["estimator"]) == ("exact_count", "exact")


@pytest.mark.slow
def test_answers_are_scored_by_the_estimator_that_is_named(random_checkpoint, questions, capfd):
    words = ("--tasks", questions, "--ask", "forwards", "--estimator", "confidence_order")
    found = json.loads(said(capfd, "--checkpoint", random_checkpoint, *words, "--json"))
    pair = ("Ada", " is 1st")
    (score,) = llada_jax.load(str(random_checkpoint)).score([pair], estimator="confidence_order")
    assert found["estimator"] == "confidence_order"
    assert found["forwards"]["log_likelihood"] == pytest.approx(score.log_likelihood, rel=1e-5)
    assert "nats per answer (not a bound)" in report_tasks(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "takes --data DIR, or --tasks or --preset"),
        (("--data", "d", "--tasks", "t.jsonl"), "takes --data DIR, or"),
        (("--tasks", "a.jsonl", "--tasks", "b.jsonl"), "takes one .jsonl file"),
        (("--data", "d", "--ask", "infill"), "it is for --tasks FILE.jsonl"),
        (("--data", "d", "--gen-length", "8"), "it is for --tasks FILE.jsonl"),
        (("--data", "d", "--gen-length", "0"), "it is for --tasks FILE.jsonl"),
        (("--tasks", "t.jsonl", "--gen-length", "0"), "gen_length=0 must be at least 1"),
        (("--tasks", "t.jsonl", "--baselines"), "it is for --data"),
        (("--tasks", "piqa", "--speed"), "--speed does not fit this evaluation; it is for --data"),
        (("--tasks", "t.jsonl", "--harness", "limit=3"), "it is for harness"),
        (("--preset", "llada-8b-base", "--mc-samples", "2"), "decides on --mc-samples"),
        (("--preset", "llada-1.5", "--estimator", "uniform_time"), "decides on --mc-samples"),
        (
            ("--data", "d", "--estimator", "uniform_time"),
            "it is for --tasks FILE.jsonl and harness",
        ),
        (("--tasks", "t.jsonl", "--estimator", "exact"), "Did you mean 'exact_count'?"),
        (("--tasks", "piqa", "--harness", "refresh=2"), "refresh=2 is about a cache"),
        (("--tasks", "piqa", "--harness", "steps=0"), "steps=0 must be at least 1"),
        (
            ("--tasks", "a", "--harness", "gen_length=100", "--harness", "block_length=32"),
            "block_length=32 must divide gen_length=100; nearest: 25",
        ),
        (("--tasks", "piqa", "--harness", "steps=few"), "steps='few' must be a number"),
        (("--tasks", "piqa", "--harness", "step=4"), "Did you mean 'steps'?"),
        (("--data", "d", "--mc-samples", "0"), "--mc-samples 0 must be at least 1"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(words, message, capfd):
    assert message in said(capfd, "--checkpoint", "c", *words, status=2)


@pytest.mark.slow
def test_a_direction_that_cannot_be_asked_is_refused(
    causal_checkpoint, random_checkpoint, questions, capfd
):
    words = ("--tasks", questions, "--ask")
    err = said(capfd, "--checkpoint", causal_checkpoint, *words, "infill", status=2)
    assert "cannot read what comes after a blank" in err
    err = said(capfd, "--checkpoint", random_checkpoint, *words, "backwards", status=2)
    assert 'has a question "backwards"' in err


@pytest.mark.slow
def test_the_parts_of_the_bound_and_the_speed_of_sampling_are_reported(
    random_checkpoint, small_dataset, capfd
):
    words = ("--checkpoint", random_checkpoint, "--data", small_dataset, "--breakdown", "--speed")
    found = json.loads(said(capfd, *words, "--json"))
    assert len(found["by_position"]["mean"]) == 8
    assert len(found["by_time"]["standard_error"]) == 10
    text = report_split(found)
    assert "nats per token, by position in the row\n  0.000 to 0.125  " in text
    assert set(found["speed"]) == {"schedule", "threshold", "frechet_and_dual_cache"}
    assert found["speed"]["schedule"]["passes_per_token"] == 1
    assert "  schedule  " in text.split("sampling speed, once it is compiled\n")[1]


def test_the_report_is_a_page_with_the_result(random_checkpoint, small_dataset, tmp_path, capfd):
    report = tmp_path / "new" / "report"
    words = ("--checkpoint", random_checkpoint, "--data", small_dataset, "--report", report)
    found = json.loads(said(capfd, *words, "--json"))
    page = (report / "report.html").read_text()
    assert f"<td>bits_per_byte</td><td>{found['bits_per_byte']:.5g}</td>" in page


def test_two_evaluations_that_end_together_write_one_whole_report(tmp_path, monkeypatch):
    args = SimpleNamespace(checkpoint=str(tmp_path / "run"), report=str(tmp_path / "report"))
    sync = files.sync

    def meanwhile(path):
        monkeypatch.setattr(files, "sync", sync)
        write_report(args, {"bits_per_byte": 1.5})
        sync(path)

    monkeypatch.setattr(files, "sync", meanwhile)
    write_report(args, {"bits_per_byte": 2.5})
    assert [file.name for file in (tmp_path / "report").iterdir()] == ["report.html"]
    assert "2.5" in (tmp_path / "report" / "report.html").read_text()


def test_the_result_is_printed_where_the_report_cannot_be_written(
    random_checkpoint, small_dataset, tmp_path, capfd
):
    (tmp_path / "file").touch()
    words = ["--checkpoint", str(random_checkpoint), "--data", str(small_dataset), "--json"]
    assert main(["evaluate", *words, "--report", str(tmp_path / "file" / "report")]) == 2
    printed = capfd.readouterr()
    assert json.loads(printed.out)["bits_per_byte"] > 0
    assert "report.html cannot be written" in printed.err


@pytest.fixture
def harness(monkeypatch):
    """Puts stand-ins where the model and the harness are, whose task "broken" fails, and which
    cannot write more than 512 tokens.

    Returns what they are asked: settings of the model and of the task, in turn.
    """
    asked = []

    def make(model, **settings):
        if settings.get("gen_length", 0) > 512:
            raise UserError("the rows are shorter.")
        asked.append(settings)
        return model

    def run(subject, tasks, **settings):
        asked.append(settings)
        if tasks[0].task_name == "broken":
            raise UserError("the device is gone.")
        return {"results": {tasks[0].task_name: {"acc,none": 0.5, "acc_stderr,none": 0.25}}}

    def load(names, **_):
        return [[SimpleNamespace(task_name=name, OUTPUT_TYPE="generate_until")] for name in names]

    monkeypatch.setattr(evaluate, "load_tasks", load)
    monkeypatch.setattr(evaluate.pretrained, "load", lambda *_, **__: SimpleNamespace(step=7))
    monkeypatch.setattr(evaluate, "harness", SimpleNamespace(HarnessModel=make, run=run))
    return asked


def test_what_is_done_is_said_before_a_later_task_of_the_harness_fails(harness, capfd):
    words = ("--checkpoint", "c", "--tasks", "first", "--tasks", "broken", "--json")
    err = said(capfd, *words, status=2)
    assert "  first  acc  0.5000  +- 0.2500 (sample)\n" in err
    assert "the device is gone" in err


def test_the_settings_of_all_tasks_of_the_harness_are_checked_before_the_first_is_asked(
    harness, capfd
):
    words = ("--checkpoint", "c", "--preset", "llada-1.5", "--tasks", "gsm8k")
    err = said(capfd, *words, "--tasks", "minerva_math", status=2)
    assert "The task minerva_math of --preset llada-1.5: the rows are shorter." in err
    assert [settings.get("gen_length") for settings in harness] == [256]


def test_the_sampler_of_a_harness_task_is_set_by_the_preset_and_by_key_and_value(harness, capfd):
    words = ("--checkpoint", "c", "--preset", "llada-8b-instruct", "--tasks", "gsm8k", "--json")
    faster = ("block_length=32", "commit=threshold=0.9", "cache=dual", "num_fewshot=4")
    pairs = [word for pair in faster for word in ("--harness", pair)]
    answered = json.loads(said(capfd, *words, *pairs))["tasks"]["gsm8k"]
    of_model, of_task = harness
    sampling = {"gen_length": 512, "block_length": 32, "commit": "threshold=0.9", "cache": "dual"}
    sampling |= {"eos": "last", "cfg_scale": 0.0}
    assert of_model == {**sampling, "batch_size": 64, "seed": 0}
    assert of_task == {"apply_chat_template": True, "num_fewshot": 4}
    assert answered.items() >= {**sampling, **of_task, "published_percent": 69.4}.items()


def test_a_frontier_that_lies_where_the_report_goes_is_shown_and_checked(tmp_path):
    args = SimpleNamespace(checkpoint=str(tmp_path / "run"), report=str(tmp_path))
    measures = {"bits_per_byte": 2.5, "repetition": 0.0, "unigram_distance": 0.25}
    cost = {"passes_per_token": 0.5, "columns_per_token": 32}
    row = {"family": "factor", "name": "factor=1", "is_no_worse": True, **cost, **measures}
    file = tmp_path / "frontier.json"
    file.write_text(json.dumps({"baselines": {"real text": measures}, "rows": [row]}))
    write_report(args, {})
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Speed and quality of the sampler</h2>" in page
    assert "<td>factor=1</td><td>0.500</td><td>32.000</td>" in page
    file.write_text(json.dumps({"baselines": {}, "rows": [row | {"passes_per_token": "few"}]}))
    with pytest.raises(UserError, match=r"frontier.json: rows\[0\].passes_per_token"):
        write_report(args, {})
    file.unlink()
    write_report(args, {})
    assert "Speed and quality" not in (tmp_path / "report.html").read_text()
