"""What `prepare` refuses, in one sentence and without touching what is there."""

import fcntl
import json
import os

import pytest
from support.corpora import T, refusal, tree, write_corpus

from llada_jax.data.dialogue_units import ChatSettings
from llada_jax.data.preparation import prepare
from llada_jax.data.text import Cut
from llada_jax.data.tokenizer import load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}. {% endfor %}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 1}, "--sequence-length 1 must be at least 2"),
        ({"heldout": 1.0}, "--heldout 1.0 must lie in"),
        ({"heldout": -0.1}, "--heldout -0.1 must lie in"),
        ({"heldout": float("nan")}, "--heldout nan must lie in"),
        ({"workers": 0}, "--workers 0 must be at least 1"),
        ({"tokenizer": "spm:many"}, "'many' is not a vocabulary size"),
        ({"tokenizer": "spm:100000"}, "use --tokenizer spm:"),
        ({"tokenizer": "absent.model"}, "no tokenizer at 'absent.model'"),
        ({"cut": Cut(documents="record")}, "does not fit .txt"),
    ],
)
def test_unusable_settings_are_refused_before_anything_is_written(tmp_path, change, message):
    (tmp_path / "a.txt").write_text("a text")
    args = {"sequence_length": T, "tokenizer": "bytes", "heldout": 0.01, **change}
    assert message in refusal([str(tmp_path / "a.txt")], tmp_path / "out", **args)
    assert not (tmp_path / "out").exists() or not tree(tmp_path / "out")


@pytest.mark.parametrize("tokenizer", ["bytes", "spm:300"])
def test_a_corpus_without_text_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("")
    message = refusal([str(tmp_path)], tmp_path / "out", sequence_length=T, tokenizer=tokenizer)
    assert "hold no text" in message or "empty corpus" in message
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_corpus_that_is_all_held_out_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one document")
    message = refusal(
        [str(tmp_path / "a.txt")],
        tmp_path / "out",
        sequence_length=T,
        tokenizer="bytes",
        heldout=0.9999,
    )
    assert "All 1 documents fell into the held-out split" in message


def test_a_split_without_documents_is_reported(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one document")
    prepare(
        [str(tmp_path / "a.txt")],
        tmp_path / "out",
        sequence_length=T,
        tokenizer="bytes",
        heldout=1e-9,
    )
    assert "none of 1 documents fell into the held-out split" in capsys.readouterr().err


def test_outputs_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    args = {"sequence_length": T, "tokenizer": "bytes"}
    (tmp_path / "file").write_text("mine")
    assert "cannot be written" in refusal([str(tmp_path / "a.txt")], tmp_path / "file", **args)
    assert "cannot be written" in refusal(
        [str(tmp_path / "a.txt")], tmp_path / "file" / "below", **args
    )
    assert "mounted" in refusal([str(tmp_path / "a.txt")], "gs://bucket/out", **args)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    assert "is not empty (it holds 'letter.txt')" in refusal(
        [str(tmp_path / "a.txt")], tmp_path / "home", **args
    )
    assert os.listdir(tmp_path / "home") == ["letter.txt"]


# ---- a directory that is in use or was begun with other settings


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sequence_length": 16}, "--sequence-length 32"),
        ({"tokenizer": "spm:320"}, "--tokenizer 'bytes'"),
        ({"heldout": 0.5}, "--heldout 0.1"),
        ({"cut": Cut(text_field="body")}, "--text-field 'text'"),
        ({"drop_duplicates": True}, "with no --drop-duplicates and this command has --drop-dupl"),
        ({"cut": Cut(form="txt")}, "with no --format and this command has --format 'txt'"),
        ({"chat": ChatSettings(template="default", turns="all")}, "no --chat and this command has"),
    ],
)
@pytest.mark.parametrize("is_complete", [True, False])
def test_other_settings_are_refused_by_name_and_nothing_is_overwritten(
    tmp_path, change, named, is_complete
):
    write_corpus(tmp_path / "corpus", num_files=1, num_documents=30)
    args = {"sequence_length": T, "tokenizer": "bytes", "heldout": 0.1}
    prepare([str(tmp_path / "corpus")], tmp_path / "out", **args)
    if not is_complete:
        (tmp_path / "out" / "dataset.json").unlink()
    before = tree(tmp_path / "out")
    assert named in refusal([str(tmp_path / "corpus")], tmp_path / "out", **{**args, **change})
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("failing", "message", "right"),
    [
        ({"cut": Cut(text_field="body")}, "name one with --text-field", {}),
        ({"heldout": 0.9999}, "lower --heldout 0.9999", {"heldout": 0.01}),
    ],
)
def test_the_settings_that_a_refusal_names_are_taken_by_the_next_command(
    tmp_path, failing, message, right
):
    write_corpus(tmp_path / "corpus", num_files=1, num_documents=30)
    corpus, args = [str(tmp_path / "corpus")], {"sequence_length": T, "tokenizer": "bytes"}
    assert message in refusal(corpus, tmp_path / "out", **args, **failing)
    prepare(corpus, tmp_path / "out", **args, **right)
    prepare(corpus, tmp_path / "fresh", **args, **right)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("failing", "message", "right"),
    [
        ({}, "choose --chat too_long=drop", {"too_long": "drop"}),
        ({"too_long": "drop"}, "with --chat malformed=skip", {"malformed": "skip"}),
        ({}, "choose --chat too_long=drop", {"template": "mine.jinja"}),
    ],
)
def test_the_words_of_chat_that_a_refusal_names_are_taken_by_the_next_command(
    tmp_path, monkeypatch, failing, message, right
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    records = [{"prompt": "a", "response": text} for text in ("b", "c" * T, "")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    corpus, args = [str(tmp_path / "a.jsonl")], {"sequence_length": T, "tokenizer": "bytes"}
    words = {"template": "default", **failing}
    assert message in refusal(corpus, tmp_path / "out", **args, chat=ChatSettings(**words))
    settings = ChatSettings(**{"too_long": "drop", **words, "malformed": "skip", **right})
    prepare(corpus, tmp_path / "out", **args, chat=settings)
    prepare(corpus, tmp_path / "fresh", **args, chat=settings)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


@pytest.mark.parametrize("is_old", [True, False])
def test_another_template_is_refused_be_it_named_or_that_of_the_tokenizer(tmp_path, is_old):
    load_tokenizer("bytes").with_chat_template(TEMPLATE).save(tmp_path / "tokenizer")
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    corpus, out = [str(tmp_path / "chat.jsonl")], tmp_path / "out"
    args = {"sequence_length": T, "tokenizer": str(tmp_path / "tokenizer"), "heldout": 0}
    content = prepare(corpus, out, **args, chat=ChatSettings())
    if is_old:
        # older versions did not write down which template it was
        content["source"]["chat"]["template"] = ""
        (out / "dataset.json").write_text(json.dumps(content))
    prepare(corpus, out, **args, chat=ChatSettings())
    assert "--chat" in refusal(corpus, out, **args, chat=ChatSettings(template="default"))
    words = "with --chat turns=one and this command has --chat turns=all;"
    assert words in refusal(corpus, out, **args, chat=ChatSettings(turns="all"))
    if not is_old:
        file = tmp_path / "tokenizer" / "chat_template.jinja"
        file.write_text(file.read_text().replace(".", "!"))
        assert "--chat" in refusal(corpus, out, **args, chat=ChatSettings())


def test_changed_inputs_of_a_complete_data_set_are_refused(tmp_path):
    write_corpus(tmp_path / "corpus", num_files=2, num_documents=30)
    args = {"sequence_length": T, "tokenizer": "bytes"}
    prepare([str(tmp_path / "corpus")], tmp_path / "out", **args)
    before = tree(tmp_path / "out")
    (tmp_path / "corpus" / "more.txt").write_text("more")
    assert "2 input files have changed since or others are given now (3)" in refusal(
        [str(tmp_path / "corpus")], tmp_path / "out", **args
    )
    assert tree(tmp_path / "out") == before


def test_two_commands_do_not_write_into_one_directory(tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus", num_files=1, num_documents=30)
    monkeypatch.setattr("llada_jax.data.preparation.LOCK_SECONDS", 0.1)
    (tmp_path / "out" / "receipts").mkdir(parents=True)
    with open(tmp_path / "out" / "receipts" / "lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # as a worker holds it
        message = refusal(
            [str(tmp_path / "corpus")], tmp_path / "out", sequence_length=T, tokenizer="bytes"
        )
    assert "Another prepare is writing" in message
    prepare([str(tmp_path / "corpus")], tmp_path / "out", sequence_length=T, tokenizer="bytes")
