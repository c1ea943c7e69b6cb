"""Where the texts of an instruct checkpoint end: at EOS or at the end of a turn, whichever comes
first.
"""

import json

import numpy as np
import pytest
from support.hf_directories import SMALL, our_config, random_params, write_tokenizer, write_weights

import llada_jax
from llada_jax.__main__ import main
from llada_jax.checkpoints.record import read_run

EOS, END_OF_TURN = 256, 258
PROMPTS = [f"question {n}" for n in range(6)]
REQUEST = {"gen_length": 16, "steps": 8, "temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A LLaDA directory whose network often proposes <|eot_id|> and <|endoftext|>."""
    directory = tmp_path_factory.mktemp("instruct") / "hf"
    directory.mkdir()
    params = random_params(SMALL)
    params["lm_head"][:, [EOS, END_OF_TURN]] *= 3.0
    (directory / "config.json").write_text(json.dumps(our_config("llada", SMALL)))
    write_weights(directory, "llada", SMALL, params)
    write_tokenizer(directory, "<|mdm_mask|>", "<|eot_id|>")
    return directory


@pytest.fixture(scope="module")
def model(directory):
    return llada_jax.load(str(directory))


def first_end(tokens) -> int:
    return min(n for n, token in enumerate([*tokens, EOS]) if token in (EOS, END_OF_TURN))


def test_texts_end_at_the_first_of_both_ends(model):
    assert model.tokenizer.end_ids == (EOS, END_OF_TURN)
    whole = model.complete(PROMPTS, stop_at_eos=False, **REQUEST)
    ended = model.complete(PROMPTS, **REQUEST)
    ends = set()
    for everything, completion in zip(whole, ended, strict=True):
        tokens = everything.tokens
        assert len(tokens) == REQUEST["gen_length"]
        assert completion.tokens == tokens[: first_end(tokens)]
        ends.add(tokens[first_end(tokens)] if first_end(tokens) < len(tokens) else None)
    assert END_OF_TURN in ends
    assert model.generate(PROMPTS, **REQUEST) == [completion.text for completion in ended]


def test_what_follows_an_end_of_turn_in_the_canvas_is_eos(model):
    prompt_BT = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    as_published = model.generate_tokens(prompt_BT, **REQUEST)[:, len(prompt_BT[0]) :]
    ended = model.generate_tokens(prompt_BT, eos_id=model.tokenizer.end_ids, **REQUEST)
    for row, tokens in zip(as_published, ended[:, len(prompt_BT[0]) :], strict=True):
        end = first_end(row)
        np.testing.assert_array_equal(tokens[: end + 1], row[: end + 1])
        assert set(tokens[end + 1 :].tolist()) <= {EOS}


def test_sample_cuts_texts_at_the_end_of_a_turn(directory, model, capsys):
    words = ["--checkpoint", str(directory), "--prompt", *PROMPTS, "--json", "--gen-length", "16"]
    words += ["--steps", "8", "--temperature", "1", "--seed", "1"]
    assert main(["sample", *words]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    expected = model.complete(PROMPTS, **REQUEST)
    assert [sample["tokens"] for sample in samples] == [c.tokens for c in expected]


def test_no_gap_is_filled_with_what_ends_a_text(model):
    request = {"temperature": 1.0, "steps": 4}
    texts = [f"it {n} [MASK:8] truth" for n in range(6)]
    for text in model.infill(texts, **request):
        encoded = text.removeprefix("it").removesuffix(" truth")
        assert "<|eot_id|>" not in encoded
    (filled,) = model.infill(["[MASK:24]"], temperature=1.0, steps=4)
    # each of the 24 tokens is a byte: an end would add no text
    assert len(filled.encode(errors="replace")) >= 24


def ends_after_a_round_trip(directory, tmp_path) -> tuple[int, ...]:
    """Returns what ends a text for the export of an imported directory."""
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["import", "--from", str(directory), "--output", str(run)]) == 0
    assert main(["export", "--checkpoint", str(run), "--output", str(out)]) == 0
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [EOS, END_OF_TURN]
    assert llada_jax.load(str(run)).tokenizer.end_ids == (EOS, END_OF_TURN)
    return llada_jax.load(str(out)).tokenizer.end_ids


def test_export_keeps_the_end_of_a_turn(directory, tmp_path):
    assert ends_after_a_round_trip(directory, tmp_path) == (EOS, END_OF_TURN)


@pytest.mark.slow
@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_an_end_of_turn_that_no_usual_name_says_is_that_of_the_config(
    directory, tmp_path, has_tokenizer
):
    other = tmp_path / "hf"
    other.mkdir()
    config = json.loads((directory / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "eot_token_id": END_OF_TURN}))
    write_weights(other, "llada", SMALL, random_params(SMALL))
    if has_tokenizer:
        write_tokenizer(other, "<|mdm_mask|>", "<|my_turn_is_over|>")
    assert ends_after_a_round_trip(other, tmp_path) == (EOS, END_OF_TURN)


def test_import_keeps_the_end_of_a_turn(directory, tmp_path):
    words = ["--from", str(directory), "--output", str(tmp_path / "run")]
    assert main(["import", *words]) == 0
    assert (read_run(tmp_path / "run").special_ids or {})["eot"] == END_OF_TURN
    assert llada_jax.load(str(tmp_path / "run")).tokenizer.end_ids == (EOS, END_OF_TURN)
