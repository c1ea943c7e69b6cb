"""The records of many units share a shard, and a kill at any moment of the joining loses none."""

import itertools
import os
import re
import shutil
from pathlib import Path

import pytest
from support.corpora import T, refusal, stream, tree, write_corpus
from support.paths import ROOT

from llada_jax.data import assembly, build
from llada_jax.data.preparation import prepare

# before a test makes it smaller
SHARD_BYTES = assembly.SHARD_BYTES
ARGS = {"sequence_length": T, "tokenizer": "bytes", "heldout": 0.2}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Makes every file of the corpora here a unit, of which about three share a shard."""
    monkeypatch.setattr(build, "UNIT_BYTES", 6_000)
    monkeypatch.setattr(assembly, "SHARD_BYTES", 20_000)


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus", num_files=8, num_documents=30)
    return [str(tmp_path / "corpus")]


def test_a_shard_holds_as_much_as_the_page_says():
    page = (ROOT / "docs/data.md").read_text()
    sizes = re.findall(r"up to (\d+) GiB", page)
    assert len(sizes) == 2
    assert SHARD_BYTES == 2 << 30 == int(sizes[0]) << 30 == int(sizes[1]) << 30


def shards_of(content: dict, split: str = "train") -> list[dict]:
    return content["splits"][split]["shards"]


def test_consecutive_units_share_a_shard_and_no_token_moves(tmp_path, corpus, monkeypatch):
    joined = prepare(corpus, tmp_path / "joined", **ARGS)
    monkeypatch.setattr(assembly, "SHARD_BYTES", 1)
    apart = prepare(corpus, tmp_path / "apart", **ARGS)
    assert len(shards_of(apart)) > 5
    assert 2 < len(shards_of(joined)) < len(shards_of(apart))
    assert len(shards_of(joined, "heldout")) < len(shards_of(apart, "heldout"))
    assert joined["fingerprint"] == apart["fingerprint"]
    for split in ("train", "heldout"):
        assert stream(tmp_path / "joined", split) == stream(tmp_path / "apart", split)
        assert sum(shard["num_records"] for shard in shards_of(joined, split)) == sum(
            shard["num_records"] for shard in shards_of(apart, split)
        )
    sizes = [(tmp_path / "joined" / s["file"]).stat().st_size for s in shards_of(joined)]
    assert max(sizes) <= 20_000
    assert not list((tmp_path / "joined" / "receipts").glob("*.records"))


class Killed(BaseException):
    pass


def killed_at(moment: int, patch: pytest.MonkeyPatch) -> None:
    """Makes the call with this number fail, counted from 0, of those that change a file while units
    are joined.
    """
    num_calls = 0

    def counted(call):
        def run(*args, **kwargs):
            nonlocal num_calls
            num_calls += 1
            if num_calls > moment:
                raise Killed
            return call(*args, **kwargs)

        return run

    patch.setattr(assembly, "write_json", counted(assembly.write_json))
    patch.setattr(assembly.shutil, "copyfileobj", counted(shutil.copyfileobj))
    patch.setattr(assembly, "_remove_parts", counted(assembly._remove_parts))


@pytest.mark.slow
def test_a_kill_at_any_moment_of_the_joining_is_made_up_for(tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus", num_files=4, num_documents=30)
    corpus = [str(tmp_path / "corpus")]
    prepare(corpus, tmp_path / "whole", **ARGS)
    with monkeypatch.context() as patch:
        killed_at(0, patch)
        with pytest.raises(Killed):
            prepare(corpus, tmp_path / "begun", **ARGS)
    num_kills = 0
    for moment in itertools.count():
        out = shutil.copytree(tmp_path / "begun", tmp_path / f"out{moment}")
        with monkeypatch.context() as patch:
            killed_at(moment, patch)
            try:
                prepare(corpus, out, **ARGS)
                break
            except Killed:
                num_kills += 1
        assert not (out / "dataset.json").exists()
        receipts = tree_of_receipts(out)
        prepare(corpus, out, **ARGS)
        assert tree(out) == tree(tmp_path / "whole")
        # no unit was tokenized again
        assert receipts == tree_of_receipts(out)
    assert num_kills > 12


def tree_of_receipts(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "receipts").glob("unit-*.json")}


def test_when_an_input_has_changed_the_shards_are_what_they_would_have_been(
    tmp_path, corpus, monkeypatch
):
    """The units that stay have given their records to shards that now hold others."""
    with monkeypatch.context() as patch:
        killed_at(12, patch)
        with pytest.raises(Killed):
            prepare(corpus, tmp_path / "out", **ARGS)
    assert list((tmp_path / "out").glob("*.records"))
    (tmp_path / "corpus" / "part-000.jsonl").write_text('{"text": "short"}\n')
    prepare(corpus, tmp_path / "out", **ARGS)
    prepare(corpus, tmp_path / "fresh", **ARGS)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_lost_shard_is_made_of_its_units_alone(tmp_path, corpus, capfd):
    content = prepare(corpus, tmp_path / "out", **ARGS)
    before = tree(tmp_path / "out")
    times = tree_of_receipts(tmp_path / "out")
    os.truncate(tmp_path / "out" / shards_of(content)[1]["file"], 100)
    assert prepare(corpus, tmp_path / "out", **ARGS) == content
    assert tree(tmp_path / "out") == before
    redone = times.items() - tree_of_receipts(tmp_path / "out").items()
    assert 0 < len(redone) < 8
    capfd.readouterr()
    assert prepare(corpus, tmp_path / "out", **ARGS) == content
    assert "nothing to do" in capfd.readouterr().err


def test_a_directory_that_version_0_1_has_written_is_refused(tmp_path, corpus):
    shutil.copytree(ROOT / "tests/fixtures/version_0.1/data", tmp_path / "out")
    message = refusal(corpus, tmp_path / "out", **ARGS)
    assert f"{tmp_path / 'out'} was written by version 0.1" in message
    assert "another --output" in message


def test_a_shard_whose_replacement_was_killed_is_not_taken_for_the_new_one(
    tmp_path, corpus, monkeypatch
):
    args = {**ARGS, "heldout": 0}  # where a document goes depends on its text
    prepare(corpus, tmp_path / "out", **args)
    (tmp_path / "out/dataset.json").unlink()  # so that the inputs may change
    file = tmp_path / "corpus/part-000.jsonl"
    file.write_text(file.read_text().replace("a", "e"))
    size = (tmp_path / "out/train-00000.records").stat().st_size
    with monkeypatch.context() as patch:
        killed_at(1, patch)
        with pytest.raises(Killed):
            prepare(corpus, tmp_path / "out", **args)
    prepare(corpus, tmp_path / "out", **args)
    prepare(corpus, tmp_path / "fresh", **args)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    assert (tmp_path / "out/train-00000.records").stat().st_size == size
