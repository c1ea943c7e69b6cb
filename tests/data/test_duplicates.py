"""Documents that are exact copies: how many there are, and what is left when they are left out."""

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.corpora import T, documents_of, refusal, stream, tree

from llada_jax.__main__ import main
from llada_jax.data import build, duplicates
from llada_jax.data.preparation import prepare

ARGS = {"sequence_length": T, "tokenizer": "bytes", "heldout": 0.3}


def write(folder, files: list[list[str]]) -> list[str]:
    folder.mkdir(exist_ok=True)
    for number, texts in enumerate(files):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl").write_text(lines)
    return [str(folder)]


def texts_of(out) -> list[str]:
    """The documents of both splits."""
    tokens = [stream(out, split) for split in ("train", "heldout")]
    return [bytes(document).decode() for part in tokens for document in documents_of(part)]


@pytest.mark.slow
@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    files=st.lists(
        st.lists(st.sampled_from(["", " ", "a", "b", "c d", "é"]), max_size=8),
        min_size=1,
        max_size=4,
    ),
    unit_bytes=st.sampled_from([1, 60, 10**9]),
)
def test_the_first_copy_of_each_text_is_left(tmp_path_factory, monkeypatch, files, unit_bytes):
    monkeypatch.setattr(build, "UNIT_BYTES", unit_bytes)
    home = tmp_path_factory.mktemp("copies")
    # a text that is never held out, so that there is something to train on
    inputs = write(home / "in", [*files, ["something to train on"]])
    full = [text for texts in files for text in texts if text.strip()] + ["something to train on"]
    args = {**ARGS, "heldout": 0.0}
    kept = prepare(inputs, home / "kept", **args)
    assert kept["source"]["num_duplicate_documents"] == len(full) - len(set(full))
    assert texts_of(home / "kept") == full
    dropped = prepare(inputs, home / "dropped", **args, drop_duplicates=True)
    assert dropped["source"]["num_duplicate_documents"] == len(full) - len(set(full))
    assert texts_of(home / "dropped") == list(dict.fromkeys(full))
    assert dropped["splits"]["train"]["num_documents"] == len(set(full))


def test_copies_are_found_in_other_units_and_across_blocks_of_hashes(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "UNIT_BYTES", 30)
    monkeypatch.setattr(duplicates, "BLOCK", 2)
    files = [["a", "b", "a"], ["c", "b", "a"], ["d", "d", "e", "c"]]
    args = {**ARGS, "heldout": 0.0, "drop_duplicates": True}
    found = prepare(write(tmp_path / "in", files), tmp_path / "out", **args)
    assert found["source"]["num_duplicate_documents"] == 5
    assert texts_of(tmp_path / "out") == ["a", "b", "c", "d", "e"]


def test_a_text_whose_first_copy_is_gone_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "UNIT_BYTES", 30)
    out, args = tmp_path / "out", {**ARGS, "heldout": 0.0, "drop_duplicates": True}
    inputs = write(tmp_path / "in", [["a", "b"], ["b", "c"]])
    # the second file and its records stay as they are
    for texts in (["a", "b"], ["a"], ["a", "b"]):
        write(tmp_path / "in", [texts])
        (out / "dataset.json").unlink(missing_ok=True)
        prepare(inputs, out, **args)
        assert texts_of(out) == ["a", "b", "c"]


def test_a_call_with_other_inputs_that_was_killed_loses_no_text(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "UNIT_BYTES", 30)
    write(tmp_path / "in", [["x", "a"], ["a", "a", "c"], ["d", "e"]])
    first, second, third = (str(tmp_path / "in" / f"{number}.jsonl") for number in range(3))
    out, args = tmp_path / "out", {**ARGS, "heldout": 0.0, "drop_duplicates": True}
    prepare([first, second], out, **args)
    (out / "dataset.json").unlink()
    with monkeypatch.context() as patch:
        # once it is written which texts are copies, and before it is noted of which inputs
        patch.setattr(duplicates, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare([second, third], out, **args)
    prepare([first, second], out, **args)
    assert texts_of(out) == ["x", "a", "c"]


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(0)
    return write(
        tmp_path / "in", [[f"text {rng.randrange(60)}" for _ in range(50)] for _ in range(4)]
    )


@pytest.mark.slow
def test_what_is_left_does_not_depend_on_workers_or_interruptions(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "UNIT_BYTES", 1500)
    alone = prepare(corpus, tmp_path / "alone", **ARGS, drop_duplicates=True)
    many = prepare(corpus, tmp_path / "many", **ARGS, drop_duplicates=True, workers=3)
    assert many == alone
    assert tree(tmp_path / "many") == tree(tmp_path / "alone")
    (tmp_path / "many" / "dataset.json").unlink()
    (tmp_path / "many" / "receipts" / "unit-00001.json").unlink()
    assert prepare(corpus, tmp_path / "many", **ARGS, drop_duplicates=True) == alone
    assert tree(tmp_path / "many") == tree(tmp_path / "alone")
    # complete: nothing is read again
    monkeypatch.setattr(build, "write_hashes", None)
    assert prepare(corpus, tmp_path / "many", **ARGS, drop_duplicates=True) == alone


def test_a_directory_does_not_mix_texts_with_and_without_copies(corpus, tmp_path):
    prepare(corpus, tmp_path / "out", **ARGS)
    assert "no --drop-duplicates" in refusal(corpus, tmp_path / "out", **ARGS, drop_duplicates=True)


def test_the_summary_says_how_many_copies_there_are_and_what_became_of_them(tmp_path, capsys):
    inputs = write(tmp_path / "in", [["a", "b", "a", "a"]])
    words = ["prepare", "--input", *inputs, "--sequence-length", "8", "--tokenizer", "bytes"]
    assert main([*words, "--output", str(tmp_path / "kept"), "--heldout", "0"]) == 0
    assert "2 documents are exact copies of an earlier one and are kept" in capsys.readouterr().out
    words += ["--output", str(tmp_path / "dropped"), "--heldout", "0", "--drop-duplicates"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "2 documents are exact copies of an earlier one and were left out" in out
    assert "2 documents, 2 bytes" in out
