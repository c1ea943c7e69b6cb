"""`evaluate` reads the model as it was trained, and the bytes of the text that it scored."""

import json
import math

import pytest
from support.datasets import lines_dataset
from support.exports import LLADA, write_checkpoint
from support.hf_directories import random_params

from llada_jax.__main__ import main
from llada_jax.config import default_config
from llada_jax.verbs import evaluate


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A dataset whose rows hold several documents each."""
    return lines_dataset(tmp_path_factory.mktemp("lines"), num_lines=200, sequence_length=48)


def evaluated(tmp_path, lines, capsys, *, attend_across_documents: bool) -> dict:
    config = default_config()
    config.data.attend_across_documents = attend_across_documents
    workdir = tmp_path / str(attend_across_documents)
    write_checkpoint(workdir, LLADA, random_params(LLADA), config=config.to_dict())
    capsys.readouterr()
    words = ["--checkpoint", str(workdir), "--data", str(lines), "--batch-size", "16", "--json"]
    assert main(["evaluate", *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_batch_that_is_larger_than_the_split_is_cut_to_it(
    random_checkpoint, lines, capsys, monkeypatch
):
    sizes = []
    real = evaluate.bound_of_split
    monkeypatch.setattr(
        evaluate, "bound_of_split", lambda *a, **k: sizes.append(k["batch_size"]) or real(*a, **k)
    )
    words = ["--checkpoint", str(random_checkpoint), "--data", str(lines), "--json"]
    results = []
    for size in ("128", str(2**24)):
        capsys.readouterr()
        assert main(["evaluate", *words, "--batch-size", size]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]
    rows = json.loads((lines / "dataset.json").read_text())["splits"]["heldout"]["num_records"]
    assert rows <= sizes[1] < 2 * rows


@pytest.mark.slow
def test_documents_are_kept_apart_where_the_run_kept_them_apart(tmp_path, lines, capsys):
    across = evaluated(tmp_path, lines, capsys, attend_across_documents=True)
    apart = evaluated(tmp_path, lines, capsys, attend_across_documents=False)
    assert across["num_tokens"] == apart["num_tokens"]
    assert across["nelbo_nats_per_token"] != pytest.approx(apart["nelbo_nats_per_token"], rel=1e-4)
    # a token ends each line, so that there are fewer bytes than tokens
    split = json.loads((lines / "dataset.json").read_text())["splits"]["heldout"]
    assert split["num_bytes"] < 0.97 * split["num_tokens"]
    bits = across["nelbo_nats_per_token"] / math.log(2) * split["num_tokens"] / split["num_bytes"]
    assert across["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_a_split_without_records_is_refused(tmp_path, random_checkpoint, capfd):
    (tmp_path / "a.txt").write_text("one document\n")
    words = ["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "data")]
    words += ["--sequence-length", "48", "--tokenizer", "bytes", "--heldout", "0"]
    assert main(["prepare", *words]) == 0
    words = ["--checkpoint", str(random_checkpoint), "--data", str(tmp_path / "data")]
    for more in ([], ["--baselines", "--breakdown", "--speed"]):
        assert main(["evaluate", *words, *more]) == 2
        assert "The heldout split of" in (err := capfd.readouterr().err)
        assert "holds no records: prepare more text, with --heldout above 0" in err
