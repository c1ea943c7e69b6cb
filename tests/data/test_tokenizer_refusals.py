"""Paths, files and special ids that cannot be a tokenizer, each refused by name."""

import json
import subprocess
import sys

import pytest

from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.data.tokenizer_training import train_sentencepiece
from llada_jax.errors import UserError


@pytest.fixture(scope="module")
def bpe():
    return train_sentencepiece(
        ["A text to learn pieces from.\n"] * 9, vocab_size=285, model_type="bpe"
    )


def test_a_path_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent.model")


def test_a_url_that_cannot_be_read_is_refused():
    with pytest.raises(UserError, match="Unknown kind of URL 'http'. Known: gs, s3"):
        load_tokenizer("http://host/tokenizer")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tokenizer.json", "is a file of a tokenizer that has several; give its folder"),
        ("special_ids.json", "give its folder"),
        ("merges.txt", "is not taken as a tokenizer, because its name does not end with .model"),
    ],
)
def test_a_file_that_is_there_is_not_called_missing(tmp_path, name, says):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError) as refused:
        load_tokenizer(tmp_path / name)
    assert says in str(refused.value)
    assert "There is no tokenizer" not in str(refused.value)


def test_damaged_files_are_refused_by_name(tmp_path, bpe):
    model = next(iter(bpe.files.values()))
    # nothing, as of a download that was cut short, and a piece that is not text
    for content in (b"no model", b"", model.replace("\u2581".encode(), b"\xff\xff\xff")):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match="bad.model is not a SentencePiece model"):
            load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "hf").mkdir()
    for content in ("{", '{"model": {"vocab": {"\\ud800": 0}}}'):
        (tmp_path / "hf" / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="not valid JSON"):
            load_tokenizer(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="has no model"):
        load_tokenizer(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="cannot be used"):
        load_tokenizer(tmp_path / "hf")
    bpe.save(tmp_path / "saved")
    (tmp_path / "saved" / "sentencepiece.model").unlink()
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path / "saved")


@pytest.mark.parametrize(
    "special_ids",
    [
        {"mask": -1, "eos": 257},
        {"mask": 256, "eos": -1},
        {"mask": 256, "eos": 256},
        {"mask": 256, "eos": 257, "pad": 256},
        {"mask": 256, "eos": 257, "bos": -1},
        {"mask": True, "eos": 257},
        {"mask": "256", "eos": 257},
        {"mask": 256.0, "eos": 257},
        {"mask": 10**15, "eos": 257},  # a row of the vocabulary for each id up to it
        {"mask": None, "eos": 257},
        {"eos": 257},
        [256, 257],
    ],
)
def test_special_ids_that_no_tokenizer_can_have_are_refused(tmp_path, special_ids):
    load_tokenizer("bytes").save(tmp_path / "saved")
    file = tmp_path / "saved" / "special_ids.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"special_ids": special_ids}))
    with pytest.raises(UserError, match=r"saved' is damaged \(.* has "):
        load_tokenizer(tmp_path / "saved")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "special_ids.json is [], which must be an object"),
        ("{", "Expecting property name"),
        ('{"kind": "bytes"}', "has no field 'special_ids'"),
        ('{"kind": "letters", "special_ids": {}}', "kind='letters', which must be"),
        ('{"kind": "bytes", "special_ids": {"end": 3}}', "special_ids.end=3, which must be"),
    ],
)
def test_what_prepare_has_not_saved_is_refused(tmp_path, content, says):
    load_tokenizer("bytes").save(tmp_path / "saved")
    (tmp_path / "saved" / "special_ids.json").write_text(content)
    with pytest.raises(UserError, match="restore the folder or prepare the data again") as refused:
        load_tokenizer(tmp_path / "saved")
    assert says in str(refused.value)


def test_a_model_whose_mask_ends_texts_too_is_refused(tmp_path, bpe):
    bpe.save(tmp_path / "saved")
    model = tmp_path / "saved" / "sentencepiece.model"
    with pytest.raises(UserError, match="sentencepiece.model' has one id, 2, for mask and eos"):
        load_tokenizer(model, mask_token="</s>")


def test_the_module_needs_no_tokenizer_library_and_says_how_to_install_one(tmp_path):
    code = """
import sys
# what a missing library looks like to an import
sys.modules["sentencepiece"] = sys.modules["tokenizers"] = None
from llada_jax.errors import UserError
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.data.tokenizer_training import train_sentencepiece
assert load_tokenizer("bytes").encode("a") == [97]
try:
    train_sentencepiece(["a"], vocab_size=300, model_type="bpe")
except UserError as error:
    print(error)
assert "jax" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "pip install 'llada_jax'" in result.stdout
