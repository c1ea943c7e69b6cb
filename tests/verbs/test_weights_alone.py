"""Weights without a tokenizer: what works on ids, what asks for a tokenizer, and what `--tokenizer`
gives; and the size of the vocabulary on the way through import and export.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.exports import LLADA, export, write_checkpoint
from support.hf_directories import SMALL, random_params, write_huggingface
from support.imports import QWEN

import llada_jax
from llada_jax.__main__ import main
from llada_jax.checkpoints.record import read_run
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.errors import UserError

TOKENS = [[1, 2, 3]]
NO_TOKENIZER = r"no tokenizer.* name it with --tokenizer"
# the ids of write_tokenizer: 256 bytes, EOS, mask and end of turn
NUM_IDS = 259


def without_tokenizer(directory: Path, copy: Path, **changes) -> Path:
    """Copies a Hugging Face directory without its tokenizer; changes are of config.json."""
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("*token*", "special*"))
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def imported(source: Path, workdir: Path, *more) -> Path:
    words = ["--from", str(source), "--output", str(workdir), *map(str, more)]
    assert main(["import", *words]) == 0
    return workdir


def hf_config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.fixture(scope="module", params=["llada", "illada"])
def layout(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(layout, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "hf"
    write_huggingface(directory, layout, SMALL)
    return directory


@pytest.fixture(scope="module")
def bare(whole, layout, tmp_path_factory) -> Path:
    """The weights of `whole` alone, whose config.json says how many of the rows are ids."""
    key = {"llada": "vocab_size", "illada": "unpadded_vocab_size"}[layout]
    return without_tokenizer(whole, tmp_path_factory.mktemp("bare") / "hf", **{key: NUM_IDS})


# ---- what works on ids


def test_ids_have_the_logits_and_the_texts_that_they_have_with_a_tokenizer(whole, bare):
    with_words, alone = llada_jax.load(str(whole)), llada_jax.load(str(bare))
    np.testing.assert_array_equal(alone.logits(TOKENS), with_words.logits(TOKENS))
    request = {"gen_length": 8, "steps": 4, "temperature": 1.0, "seed": 3}
    np.testing.assert_array_equal(
        alone.generate_tokens(TOKENS, **request), with_words.generate_tokens(TOKENS, **request)
    )
    pairs = [([1, 2], [3, 4, 5])]
    assert alone.score(pairs, mc_samples=4) == with_words.score(pairs, mc_samples=4)


def test_what_needs_text_says_that_there_is_no_tokenizer(bare, capfd):
    model = llada_jax.load(str(bare))
    for needs_text in (
        lambda: model.generate(["it is"]),
        lambda: model.generate([""]),
        lambda: model.infill(["it [MASK:2]"]),
        lambda: model.score([("it", "is")]),
        lambda: model.score_text(["it is"]),
    ):
        with pytest.raises(UserError, match=NO_TOKENIZER):
            needs_text()
    for argv in (["sample"], ["chat"], ["evaluate", "--data", "runs/absent"]):
        assert main([*argv, "--checkpoint", str(bare)]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert "no tokenizer" in line
        assert "--tokenizer" in line


def test_no_data_are_prepared_with_the_tokenizer_that_is_not_there(bare, tmp_path, capfd):
    workdir = imported(bare, tmp_path / "run")
    assert "It has no tokenizer; import it with --tokenizer" in capfd.readouterr().out
    (tmp_path / "text.txt").write_text("it is\n")
    words = ["--input", tmp_path / "text.txt", "--output", tmp_path / "data"]
    words += ["--sequence-length", "8", "--tokenizer", workdir / "tokenizer"]
    assert main(["prepare", *map(str, words)]) == 2
    assert "no tokenizer" in capfd.readouterr().err
    assert not (tmp_path / "data" / "dataset.json").exists()


@pytest.mark.parametrize("key", ["mask_token_id", "eos_token_id"])
def test_weights_that_do_not_name_mask_and_eos_need_a_tokenizer(key, whole, tmp_path):
    unnamed = without_tokenizer(whole, tmp_path / "hf", **{key: None})
    with pytest.raises(UserError, match=f"no {key} is stated .*--tokenizer"):
        llada_jax.load(str(unnamed))
    assert llada_jax.load(str(unnamed), tokenizer=str(whole)).tokenizer.eos_id == 256


def test_of_several_ends_that_are_stated_the_second_ends_a_text_too(whole, tmp_path):
    two = without_tokenizer(whole, tmp_path / "hf", eos_token_id=[256, 258])
    assert llada_jax.load(str(two)).tokenizer.end_ids == (256, 258)
    assert llada_jax.load(str(imported(two, tmp_path / "run"))).tokenizer.end_ids == (256, 258)


# ---- import, export and import again


@pytest.mark.slow
def test_vocabulary_rows_and_special_ids_survive_import_and_export(bare, layout, tmp_path):
    workdir = imported(bare, tmp_path / "run")
    out = export(workdir, tmp_path / "out", "--dtype", "float32", "--layout", layout)
    assert not any("token" in file.name for file in out.iterdir())
    assert "without a tokenizer" in (out / "README.md").read_text()
    again = imported(out, tmp_path / "again")
    twice = export(again, tmp_path / "twice", "--layout", layout)
    rows = {"llada": "embedding_size", "illada": "vocab_size"}[layout]
    ids = {"llada": "vocab_size", "illada": "unpadded_vocab_size"}[layout]
    for directory in (out, twice):
        config = hf_config_of(directory)
        assert (config[rows], config[ids]) == (320, NUM_IDS)
        assert (config["mask_token_id"], config["eos_token_id"]) == (257, 256)
    first, second = (llada_jax.load(str(directory)) for directory in (bare, again))
    assert second.tokenizer.vocab_size == first.tokenizer.vocab_size == NUM_IDS
    np.testing.assert_array_equal(first.logits(TOKENS), second.logits(TOKENS))


@pytest.mark.slow
def test_the_two_sizes_of_a_published_vocabulary_survive_with_a_tokenizer(tmp_path):
    source = tmp_path / "hf"
    write_huggingface(source, "llada", SMALL)
    config = hf_config_of(source) | {"vocab_size": 300}
    (source / "config.json").write_text(json.dumps(config))
    out = export(imported(source, tmp_path / "run"), tmp_path / "out")
    again = export(imported(out, tmp_path / "again"), tmp_path / "twice")
    for directory in (out, again):
        config = hf_config_of(directory)
        assert (config["vocab_size"], config["embedding_size"]) == (300, 320)


@pytest.mark.slow
def test_llama_weights_alone_get_a_mask_after_their_last_id(tmp_path):
    source = tmp_path / "hf"
    write_huggingface(source, "qwen2", QWEN)
    bare = without_tokenizer(source, tmp_path / "bare")
    expected = imported(source, tmp_path / "with"), imported(bare, tmp_path / "without")
    ids = [read_run(workdir).special_ids for workdir in expected]
    assert ids[0] == ids[1]
    assert ids[1]["mask"] == QWEN.vocab_size
    models = [llada_jax.load(str(workdir)) for workdir in expected]
    np.testing.assert_array_equal(models[0].logits(TOKENS), models[1].logits(TOKENS))


# ---- the tokenizer that is given


@pytest.mark.slow
def test_a_tokenizer_that_is_given_makes_the_checkpoint_whole(whole, bare, tmp_path, capsys):
    def sampled(*words) -> list:
        request = ["--prompt", "it is", "--gen-length", "8", "--steps", "4", "--json"]
        capsys.readouterr()
        assert main(["sample", *map(str, words), *request]) == 0
        return json.loads(capsys.readouterr().out)["samples"]

    given = ("--tokenizer", whole)
    expected = sampled("--checkpoint", whole)
    assert sampled("--checkpoint", bare, *given) == expected
    alone = imported(bare, tmp_path / "alone")
    assert sampled("--checkpoint", alone, *given) == expected
    assert sampled("--checkpoint", imported(bare, tmp_path / "run", *given)) == expected
    out = export(alone, tmp_path / "out", "--dtype", "float32", *given)
    assert (out / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    assert sampled("--checkpoint", out) == expected


def test_another_tokenizer_than_that_of_the_weights_is_refused(whole, bare, tmp_path):
    with pytest.raises(UserError, match="has the mask id 256, and the model was trained with 257"):
        llada_jax.load(str(bare), tokenizer="bytes")
    with pytest.raises(UserError, match="There is no tokenizer at"):
        llada_jax.load(str(bare), tokenizer=str(tmp_path / "absent"))
    run = write_checkpoint(tmp_path / "run", LLADA, random_params(LLADA))
    with pytest.raises(UserError, match=r"is not the tokenizer of .*run .*give that one"):
        llada_jax.load(str(run), tokenizer=str(whole))


# ---- workdirs whose tokenizer is lost


def lost_tokenizer(workdir: Path, **changes) -> Path:
    write_checkpoint(workdir, LLADA, random_params(LLADA), **changes)
    shutil.rmtree(workdir / "tokenizer")
    return workdir


def test_a_workdir_without_its_tokenizer_works_on_ids_where_its_record_has_them(tmp_path):
    ids = load_tokenizer("bytes").special_ids
    lost = lost_tokenizer(tmp_path / "lost", special_ids=ids)
    complete = write_checkpoint(tmp_path / "whole", LLADA, random_params(LLADA))
    models = [llada_jax.load(str(workdir)) for workdir in (lost, complete)]
    generated = [model.generate_tokens(TOKENS, gen_length=4) for model in models]
    np.testing.assert_array_equal(*generated)
    with pytest.raises(UserError, match=NO_TOKENIZER):
        models[0].generate(["it"])


def test_a_workdir_of_an_older_version_without_its_tokenizer_needs_one(tmp_path):
    lost = lost_tokenizer(tmp_path / "lost")
    with pytest.raises(UserError, match=r"has no tokenizer, and its run.json .*--tokenizer"):
        llada_jax.load(str(lost))
    complete = write_checkpoint(tmp_path / "whole", LLADA, random_params(LLADA))
    texts = [
        model.generate(["it"], gen_length=4)
        for model in (llada_jax.load(str(lost), tokenizer="bytes"), llada_jax.load(str(complete)))
    ]
    assert texts[0] == texts[1]
