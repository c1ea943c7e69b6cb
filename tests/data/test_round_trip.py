"""Tokenizers that lose text: what is lost is said, and its bytes are not counted."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpora import T, stream

from llada_jax.data.dialogue_units import ChatSettings
from llada_jax.data.preparation import prepare
from llada_jax.data.round_trip import PROBE, describe_loss, is_lossless, num_encoded_bytes
from llada_jax.data.tokenizer import Tokenizer, load_tokenizer
from llada_jax.verbs.prepare import summary


@pytest.fixture(scope="module")
def sentencepiece_defaults(tmp_path_factory) -> str:
    """A model with that library's defaults: NFKC, single spaces, no line ends, no byte pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"hello world {i}" for i in range(500)]),
        model_writer=model,
        vocab_size=40,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("model") / "lossy.model"
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.fixture(scope="module")
def lower_casing(tmp_path_factory) -> str:
    """A byte-level tokenizer.json that loses nothing but the case of letters."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.normalizer = tokenizers.normalizers.Lowercase()
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["hello world"] * 9, trainer)
    folder = tmp_path_factory.mktemp("lower")
    model.save(str(folder / "tokenizer.json"))
    return str(folder)


def loaded(path: str) -> Tokenizer:
    return load_tokenizer(path, add_mask_token=True)


# ---- what is said


def test_lost_characters_and_normalisations_are_named(sentencepiece_defaults, lower_casing):
    text = "hello   world\n\n\thello\n"
    loss = describe_loss([text, "hello world", text], loaded(sentencepiece_defaults))
    assert loss.startswith("in 2 of 3 sampled documents ")
    for words in (r"'\n' (6 times)", r"'\t' (2 times)", "the space", "single spaces"):
        assert words in loss
    assert "NFKC" in describe_loss(["hello \ufb01"], loaded(sentencepiece_defaults))
    assert describe_loss(["Hello\nWORLD"], loaded(lower_casing)) == (
        "in 1 of 1 sampled documents 'H' (1 times), 'W' (1 times), 'O' (1 times), 'R' (1 times), "
        "'L' (1 times), 'D' (1 times) are lost or changed; the text comes back in lower case"
    )


@given(texts=st.lists(st.text(max_size=40), max_size=5))
@settings(max_examples=50)
def test_a_tokenizer_that_loses_nothing_is_said_to_lose_nothing(texts):
    assert is_lossless(texts, load_tokenizer("bytes"))
    assert describe_loss(texts, load_tokenizer("bytes")) == ""


def test_the_probe_finds_tokenizers_whose_sample_happens_to_come_back(
    sentencepiece_defaults, lower_casing
):
    for path in (sentencepiece_defaults, lower_casing):
        assert describe_loss(["hello world"], loaded(path)) == ""
        assert not is_lossless(["hello world"], loaded(path))
    assert {" a", "  ", "\n\n", "\t", "\r\n", "\ufb01", "e\u0301"} <= {
        PROBE[i : i + n] for n in (1, 2) for i in range(len(PROBE))
    }


# ---- what is counted


@given(text=st.text(max_size=30), decoded=st.text(max_size=30))
@settings(max_examples=200)
def test_counted_bytes_are_never_more_than_the_text_has(text, decoded):
    assert 0 <= num_encoded_bytes(text, decoded) <= len(text.encode())
    assert num_encoded_bytes(text, text) == len(text.encode())
    assert num_encoded_bytes("h\u00e9llo", "h\ufffdllo") == 4


@pytest.mark.parametrize("kind", ["sentencepiece_defaults", "lower_casing"])
def test_prepare_says_what_is_lost_and_counts_the_bytes_that_tokens_stand_for(
    tmp_path, capsys, request, kind
):
    texts = ["Hello   world\n\n\thello\n", "hello world", "WORLD \u2603", "  "]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    content = prepare(
        [str(tmp_path / "a.jsonl")],
        tmp_path / "out",
        sequence_length=T,
        tokenizer=request.getfixturevalue(kind),
        heldout=0,
        add_mask_token=True,
    )
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    documents = [[]]
    for i in stream(tmp_path / "out", "train"):
        documents[-1].append(i)
        if i == tokenizer.eos_id:
            documents.append([])
    stood_for = [tokenizer.decode(ids).replace("\ufffd", "") for ids in documents[:-1]]
    num_bytes = sum(len(text.encode()) for text in stood_for)
    whole = sum(len(text.encode()) for text in texts[:3])
    assert content["splits"]["train"]["num_bytes"] == num_bytes <= whole
    assert content["source"]["num_lossy_documents"] == 2
    assert content["source"]["num_lost_bytes"] == whole - num_bytes
    assert (kind == "lower_casing") == (num_bytes == whole)
    error = capsys.readouterr().err
    assert "the tokenizer cannot give back the text: in 2 of 3 sampled documents" in error
    assert "2 documents lose text in the tokenizer" in summary("out", content)


def test_nothing_changes_where_nothing_is_lost(tmp_path, capsys, lower_casing):
    """Neither in what is said nor in dataset.json, even where other text would lose something."""
    (tmp_path / "a.txt").write_text("hello world\n")
    for number, tokenizer in enumerate(["bytes", lower_casing]):
        content = prepare(
            [str(tmp_path / "a.txt")],
            tmp_path / f"out{number}",
            sequence_length=T,
            tokenizer=tokenizer,
            heldout=0,
            add_mask_token=True,
        )
        assert content["splits"]["train"]["num_bytes"] == 12
        assert not {"num_lossy_documents", "num_lost_bytes"} & set(content["source"])
    assert "cannot give back" not in capsys.readouterr().err


def test_what_dialogues_lose_is_said_too(tmp_path, capsys, sentencepiece_defaults):
    dialogue = {"prompt": "hello\n\nworld", "response": "hello   world"}
    (tmp_path / "a.jsonl").write_text(json.dumps(dialogue) + "\n")
    content = prepare(
        [str(tmp_path / "a.jsonl")],
        tmp_path / "out",
        sequence_length=256,
        tokenizer=sentencepiece_defaults,
        heldout=0,
        add_mask_token=True,
        chat=ChatSettings(template="default"),
    )
    assert "the tokenizer cannot give back the text: in 1 of 1 sampled" in capsys.readouterr().err
    decoded = load_tokenizer(tmp_path / "out" / "tokenizer").decode
    document = stream(tmp_path / "out", "train")
    assert content["splits"]["train"]["num_bytes"] == len(decoded(document).encode())
