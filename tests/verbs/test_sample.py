"""The sample verb: what it prints where, what it refuses, and what it warns of."""

import dataclasses
import io
import json
import types

import jax
import pytest
from support.recital import BYTES, SENTENCE, letters, recite
from support.records import small_record

import llada_jax.sample
import llada_jax.verbs.sample
from llada_jax import __main__
from llada_jax.errors import UserError
from llada_jax.masks import CAUSAL
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture
from llada_jax.samplers.show import NUM_SNAPSHOTS


def fake_pretrained(text=SENTENCE, objective="masked_diffusion"):
    record = small_record()
    record.config["data"]["sequence_length"] = 48
    record.config["objective"]["name"] = objective
    return types.SimpleNamespace(
        tokenizer=BYTES,
        config=record.config,
        record=record,
        params=letters(text),
        step=1200,
        model=types.SimpleNamespace(logits_fn=recite),
    )


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls the verb on a model that recites; returns (exit status, stdout, stderr)."""

    def run_verb(*argv, pretrained=None, checkpoint="runs/fake"):
        loaded = []

        def load(path, **_):
            loaded.append(path)
            return pretrained or fake_pretrained()

        monkeypatch.setattr(llada_jax.verbs.sample, "load", load)
        status = __main__.main(["sample", "--checkpoint", checkpoint, *argv])
        out, err = capsys.readouterr()
        assert loaded in ([], [checkpoint])
        return status, out, err

    return run_verb


def test_the_text_is_on_stdout_and_the_rest_on_stderr(run):
    status, out, err = run("--prompt", "it is ", "--gen-length", "16")
    assert (status, out) == (0, "it is a truth universa\n")
    assert err.startswith("llada-jax: 1 texts, 16 tokens in ")
    assert err.count("\n") == 1


def test_without_a_prompt_text_comes_from_nothing(run):
    assert run("--gen-length", "13")[1] == "it is a truth\n"


def test_several_prompts_and_samples_are_separated(run):
    _, out, _ = run(
        "--prompt", "it", "IT IS", "--num-samples", "2", "--gen-length", "4", "--temperature", "0.1"
    )
    assert out == "\n---\n".join(["it is ", "it is ", "IT IS a t", "IT IS a t"]) + "\n"


def test_json_is_one_object_and_nothing_else(run):
    status, out, _ = run(
        "--prompt",
        "it is ",
        "--gen-length",
        "8",
        "--block-length",
        "4",
        "--steps",
        "4",
        "--seed",
        "7",
        "--json",
        "--show",
    )
    assert status == 0
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "checkpoint": "runs/fake",
        "step": 1200,
        "settings": {
            "gen_length": 8,
            "block_length": 4,
            "steps": 4,
            "temperature": 0.0,
            "cfg_scale": 0.0,
            "remasking": "low_confidence",
            "seed": 7,
            "batch_size": 16,
            "stop_at_eos": True,
        },
        "samples": [
            {
                "prompt": "it is ",
                "completion": "a truth ",
                "tokens": list(b"a truth "),
                "num_steps": 4,
            }
        ],
    }


@pytest.mark.slow
def test_a_text_ends_at_eos_unless_told_to_ignore_it(run):
    dot = fake_pretrained("the end.")
    _, out, _ = run("--gen-length", "16", "--block-length", "4", "--json", pretrained=dot)
    sample = json.loads(out)["samples"][0]
    assert (sample["completion"], sample["num_steps"]) == ("the end.", 12)
    _, out, _ = run(
        "--gen-length", "16", "--block-length", "4", "--json", "--ignore-eos", pretrained=dot
    )
    sample = json.loads(out)["samples"][0]
    assert (sample["completion"], sample["num_steps"]) == ("the end.the end", 16)
    assert sample["tokens"][8] == BYTES.eos_id


def test_prompts_come_from_a_file_or_stdin(run, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_bytes("it\r\n\nit is é\n".encode())
    _, out, _ = run(
        "--prompt-file", str(file), "--gen-length", "3"
    )  # the reciter counts the two bytes of é
    assert out == "it is\n---\nit is étru\n"
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"it is")))
    assert run("--prompt-file", "-", "--gen-length", "8")[1] == "it is a truth\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--gen-length", "10", "--block-length", "4"], "block_length=4 must divide gen_length=10"),
        (["--steps", "65"], "steps=65 must not exceed gen_length=64"),
        (["--remasking", "low-confidense"], "Did you mean 'low_confidence'?"),
        (["--remasking", "no_such_module:rule"], "there is no module 'no_such_module'"),
        (["--num-samples", "0"], "--num-samples 0 must be at least 1"),
        (["--temprature", "1"], "there is no '--temprature'. Did you mean '--temperature'?"),
        (["--gen-length", "many"], "invalid int value: 'many'"),
        (["--prompt", "a", "--prompt-file", "b"], "keep one"),
        (["--prompt-file", "/nowhere/prompts.txt"], "cannot be read (No such file"),
        (["--prompt", "caf\udce9"], "is not UTF-8"),
        (["--seed", "-1"], "seed=-1 must lie between"),
        (["--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["--best-of", "0"], "--best-of 0 must be at least 1"),
        (["--best-of", "3"], "3 times the same text; set --temperature"),
        (["--best-of", "3", "--remasking", "margin"], "3 times the same text"),
        (["--best-of", "3", "--commit", "threshold", "--revise", "wino"], "3 times the same text"),
        (["--commit", "treshold"], "Did you mean 'threshold'?"),
        (["--commit", "threshold=2"], "must be a number between 0 and 1"),
        (["--revise", "wino=2"], "between 0 and 1; the usual one is wino=0.9"),
        (["--revise", "wino", "--cache", "dual"], "leave cache=dual out"),
        (["--commit", "factor", "--remasking", "random"], "leave remasking out"),
        (["--top-p", "0.5"], "temperature=0 draws nothing"),
        (["--eos", "never", "--suppress", "-3"], "suppress=-3 is not the id of a token"),
        (["--cache", "dul"], "Did you mean 'dual'?"),
        (["--refresh", "2"], "there is none"),
        (["--infill", "no gap"], "has no gap"),
        (["--infill", "a[MASK:0]"], "has no token to fill in"),
        (["--infill", "a[MASK]", "--prompt", "b"], "--prompt is about texts that go on"),
        (["--infill", "a[MASK]", "--gen-length", "9"], "--gen-length is about texts that go on"),
        (["--infill", "a[MASK]", "--append"], "--append is about texts that go on"),
    ],
)
def test_mistakes_exit_2_with_one_line(run, argv, sentence):
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"\n\n", "holds no prompt"), (b"ok\ncaf\xe9\n", "not UTF-8 at byte 6")],
)
def test_unusable_prompt_files_exit_2(run, tmp_path, content, sentence):
    (tmp_path / "prompts.txt").write_bytes(content)
    status, _, err = run("--prompt-file", str(tmp_path / "prompts.txt"))
    assert status == 2
    assert sentence in err


def causal_pretrained():
    """An untrained autoregressive network over bytes."""
    shape = dict(vocab_size=260, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8)
    model = make_model(Architecture(**shape, d_ff=16), mask=CAUSAL)
    pretrained = fake_pretrained(objective="autoregressive")
    pretrained.model, pretrained.params = model, model.init(jax.random.key(0))
    return pretrained


@pytest.mark.slow
def test_an_autoregressive_model_writes_token_by_token(run):
    pretrained = causal_pretrained()
    status, out, _ = run(
        "--prompt", "it", "--gen-length", "5", "--json", "--ignore-eos", pretrained=pretrained
    )
    (sample,) = json.loads(out)["samples"]
    assert status == 0
    assert (len(sample["tokens"]), sample["num_steps"]) == (5, 5)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--steps", "8"], "steps=8 is about denoising"),
        (["--remasking", "random"], "remasking=random is about denoising"),
        (["--commit", "threshold"], "commit=threshold is about denoising"),
        (["--revise", "wino"], "revise=wino is about denoising"),
        (["--show"], "denoises nothing that --show could show"),
        (["--html", "page.html"], "denoises nothing that --html could show"),
        (["--infill", "a[MASK]"], "cannot fill in a gap"),
    ],
)
def test_an_autoregressive_model_refuses_what_is_about_denoising(run, argv, sentence):
    status, out, err = run(*argv, pretrained=causal_pretrained())
    assert (status, out) == (2, "")
    assert sentence in err


def test_gaps_are_filled_where_the_text_has_them(run):
    text = "it [MASK:2] a [MASK:5] universally"
    _, out, err = run("--infill", text, "it[MASK]is", "--commit", "threshold=0.5")
    assert out == "it is a truth universally\n---\nit is\n"
    assert "2 texts, 30 tokens in 2 passes of a row" in err
    _, out, _ = run("--infill", text, "--steps", "4", "--json")
    reply = json.loads(out)
    assert reply["samples"][0]["completion"] == "it is a truth universally"
    assert reply["samples"][0]["num_steps"] == 4
    assert "block_length" not in reply["settings"]


def test_the_best_of_several_texts_is_kept_for_each_prompt(run):
    pretrained = fake_pretrained()
    sizes = []

    def best_of(texts, num, *, seed, batch_size):
        sizes.append(batch_size)
        return texts[num - 1 :: num]

    pretrained.best_of = best_of
    words = ("--prompt", "it", "IT IS", "--gen-length", "4", "--best-of", "3", "--batch-size", "5")
    for drawing in (
        ("--temperature", "0.1"),
        ("--revise", "remdm-loop=0.9"),
        ("--remasking", "random"),
        ("--remasking", "llada_jax.samplers.remasking:random"),
    ):
        _, out, err = run(*words, *drawing, pretrained=pretrained)
        assert out == "it is \n---\nIT IS a t\n"
        assert "2 texts, 8 tokens in " in err
    assert "24 passes" in err
    assert sizes == [5] * 4


def test_options_that_were_asked_for_are_recorded(run):
    _, out, _ = run("--gen-length", "8", "--commit", "threshold=0.5", "--suppress", "7", "--json")
    reply = json.loads(out)
    assert reply["settings"]["commit"] == "threshold=0.5"
    assert reply["settings"]["suppress"] == [7]
    assert "top_k" not in reply["settings"]
    assert reply["samples"][0]["num_steps"] == 1


def test_surprises_are_announced_but_not_refused(run):
    status, out, err = run("--prompt", "it", "--gen-length", "48", "--num-samples", "2")
    assert status == 0
    assert "have 50 tokens together, and the model was trained on rows of 48" in err
    assert "repeats the same text; try --temperature" in err
    assert "letters" not in err
    more = ("--revise", "remdm-loop=0.9")
    assert "same text" not in run("--gen-length", "4", "--num-samples", "2", *more)[2]
    assert len(out.split("\n---\n")) == 2

    status, _, err = run("--infill", "it [MASK:47]", "--num-samples", "2", "--steps", "1")
    assert status == 0
    assert "have 50 tokens together, and the model was trained on rows of 48" in err
    assert "repeats the same text; try --temperature" in err
    assert "letters" not in err


def test_a_gap_in_a_prompt_is_announced_as_letters(run):
    status, out, err = run("--prompt", "it [MASK:3] a", "--gen-length", "4")
    assert status == 0
    assert out.startswith("it [MASK:3] a")
    assert "[MASK:3] in a prompt is read as letters" in err
    assert "sample --infill" in err


def test_a_generation_without_room_for_the_end_of_most_texts_is_announced(run):
    def said(*argv, **lengths):
        pretrained = fake_pretrained()
        pretrained.record = dataclasses.replace(pretrained.record, lengths=lengths)
        status, _, err = run("--prompt", "it", "it is", *argv, pretrained=pretrained)
        assert status == 0
        return err

    answers = {"median": 6, "most": 11, "longest": 30}
    hint = "99% of the answers in the training data have up to 11 tokens, their end included"
    assert hint in (err := said("--gen-length", "10", answers=answers))
    assert "a generation of 10 has no room for some of them; generate 11 tokens" in err
    assert "training data" not in said("--gen-length", "11", answers=answers)
    # of documents the prompt is a part
    err = said("--gen-length", "8", documents=answers)
    assert "documents in the training data have up to 11 tokens" in err
    assert "10 with the prompt has no room for some of them; generate 9 tokens" in err
    assert "training data" not in said("--gen-length", "9", documents=answers)
    # the rows of 48 tokens have hardly shown how such documents end
    assert "training data" not in said("--gen-length", "9", documents=answers | {"most": 49})


def test_the_help_fits_a_screen_and_ends_with_an_example(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = llada_jax.verbs.sample.make_parser().format_help().rstrip("\n").split("\n")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert lines[-1].startswith("  llada-jax sample --checkpoint")


def test_a_log_shows_the_denoising_in_a_handful_of_lines(run):
    _, out, err = run("--prompt", "it ", "--gen-length", "32", "--show")
    lines = [line for line in err.split("\n") if "| " in line]
    assert len(lines) == NUM_SNAPSHOTS
    masks = [line.count("░") + line.count("_") for line in lines]
    assert masks == [28, 24, 20, 16, 12, 8, 4, 0]
    assert lines[0].startswith("step  4/32  12% | it is a")
    assert lines[-1] == "step 32/32 100% | " + out.strip("\n")


def test_a_page_is_written_next_to_the_texts(run, tmp_path):
    words = ["--prompt", "it is ", "it", "--gen-length", "8", "--json"]
    plain = run(*words)
    status, out, err = run(*words, "--show", "--html", str(tmp_path / "sample.html"))
    assert (status, out) == plain[:2]
    assert "step 8/8" in err
    page = (tmp_path / "sample.html").read_text()
    assert "runs/fake" in page
    assert page.count('"prompt": "it') == 2
    assert page.count('"step": 8') == 2


def test_gaps_are_shown_and_recorded_while_they_are_filled(run, tmp_path):
    words = ["--infill", "it [MASK:2] a [MASK:5] universally", "it[MASK]is"]
    plain = run(*words)
    status, out, err = run(*words, "--show", "--html", str(tmp_path / "sample.html"))
    assert (status, out) == plain[:2]
    assert "sample 1/2, step 1/7  25% | it i" in err
    assert err.count("step 7/7 100% | it is a truth universally") == 1
    page = (tmp_path / "sample.html").read_text()
    assert page.count('" universally", "given"') == 1
    assert page.count('"num_steps": 7') == page.count('"num_steps": 1') == 1


def test_a_page_that_cannot_be_written_is_refused_before_the_model_is_loaded(run, tmp_path):
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "a" / "b.html", "does not exist")):
        status, _, err = run("--html", str(path))
        assert status == 2
        assert reason in err
        assert err.count("\n") == 1


def test_reading_prompts_refuses_two_sources():
    with pytest.raises(UserError, match="keep one"):
        llada_jax.verbs.sample.read_prompts([""], "-")


def test_a_byte_order_mark_is_not_part_of_the_first_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfIt is\nIt was\n")
    prompts = llada_jax.verbs.sample.read_prompts(None, str(tmp_path / "prompts.txt"))
    assert prompts == ["It is", "It was"]


def test_prompts_are_read_from_the_former_place_too():
    assert llada_jax.sample.read_prompts is llada_jax.verbs.sample.read_prompts
