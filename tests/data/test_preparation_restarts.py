"""The same bytes however `prepare` is run: with any number of processes, after kills, after full
disks and damaged files.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.corpora import T, refusal, tree, write_corpus

from llada_jax.data.dialogue_units import ChatSettings
from llada_jax.data.preparation import prepare


@pytest.fixture
def small_units(monkeypatch):
    """Makes every file of 30 documents a unit of its own: two are larger than this, one is not."""
    monkeypatch.setattr("llada_jax.data.build.UNIT_BYTES", 5_000)


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path, small_units, monkeypatch):
    monkeypatch.setattr("llada_jax.data.assembly.SHARD_BYTES", 1)  # a shard for each unit
    write_corpus(tmp_path / "corpus", num_files=5, num_documents=30)
    for workers in (1, 2, 3):
        prepare(
            [str(tmp_path / "corpus")],
            tmp_path / f"out{workers}",
            sequence_length=T,
            tokenizer="spm-bpe:320",
            heldout=0.1,
            workers=workers,
        )
    assert len(tree(tmp_path / "out1")) > 10
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2") == tree(tmp_path / "out3")


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path):
    write_corpus(tmp_path / "a", num_files=2, num_documents=30)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    args = {"sequence_length": T, "tokenizer": "bytes"}
    a = prepare([str(tmp_path / "a")], tmp_path / "out_a", **args)
    b = prepare([str(tmp_path / "b")], tmp_path / "out_b", **args)
    assert a["fingerprint"] == b["fingerprint"]
    shorter = prepare(
        [str(tmp_path / "b")], tmp_path / "out_c", **{**args, "sequence_length": T - 1}
    )
    assert shorter["fingerprint"] != a["fingerprint"]


def command(corpus: Path, output: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        RUN_WITH_SMALL_UNITS,
        "--input",
        str(corpus),
        "--output",
        str(output),
        "--sequence-length",
        str(T),
        "--tokenizer",
        "spm:320",
        "--heldout",
        "0.1",
        *flags,
    ]


RUN_WITH_SMALL_UNITS = """
import sys
from llada_jax.data import build
from llada_jax.verbs import prepare
if __name__ == "__main__":
    build.UNIT_BYTES = 500_000  # a file of 3,000 documents is a unit
    prepare.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_run_continues_to_the_bytes_of_an_undisturbed_one(tmp_path, workers):
    """SIGKILL after the first receipts; the next run keeps their shards, does the rest, and all
    bytes agree.
    """
    write_corpus(tmp_path / "corpus", num_files=12, num_documents=3_000)
    subprocess.run(
        command(tmp_path / "corpus", tmp_path / "whole"), check=True, capture_output=True
    )

    output = tmp_path / "killed"
    process = subprocess.Popen(
        command(tmp_path / "corpus", output, "--workers", workers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(output.glob("receipts/unit-*.json"))) < 2:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("receipts/unit-*.json")}
    assert len(kept) < 12
    assert not (output / "dataset.json").exists()

    (output / "train-00099.records.partial").write_bytes(b"half")
    result = subprocess.run(
        command(tmp_path / "corpus", output, "--workers", workers),
        check=True,
        capture_output=True,
        text=True,
    )
    assert "documents" in result.stdout
    assert tree(output) == tree(tmp_path / "whole")
    assert not list(output.rglob("*.partial"))
    # The workers of the killed run may have finished a unit between the two looks, but none was
    # done twice.
    assert (
        kept.items()
        <= {
            path.name: path.stat().st_mtime_ns for path in output.glob("receipts/unit-*.json")
        }.items()
    )


def test_a_lost_shard_is_written_again_and_no_other(tmp_path, small_units, monkeypatch):
    monkeypatch.setattr("llada_jax.data.assembly.SHARD_BYTES", 1)  # a shard for each unit
    write_corpus(tmp_path / "corpus", num_files=3, num_documents=30)
    args = ([str(tmp_path / "corpus")], tmp_path / "out")
    prepare(*args, sequence_length=T, tokenizer="spm:320")
    before = tree(tmp_path / "out")
    other = (tmp_path / "out" / "train-00000.records").stat().st_mtime_ns
    (tmp_path / "out" / "train-00001.records").unlink()
    (tmp_path / "out" / "train-00002.records").write_bytes(b"cut short")
    prepare(*args, sequence_length=T, tokenizer="spm:320")
    assert tree(tmp_path / "out") == before
    assert (tmp_path / "out" / "train-00000.records").stat().st_mtime_ns == other


def test_a_file_fixed_after_an_error_is_redone_and_the_finished_units_are_kept(
    tmp_path, small_units
):
    write_corpus(tmp_path / "corpus", num_files=3, num_documents=30)
    bad = tmp_path / "corpus" / "part-001.jsonl"
    good_text = bad.read_text()
    bad.write_text(good_text + "{")
    args = {"sequence_length": T, "tokenizer": "bytes"}
    assert "part-001.jsonl:31 is not valid JSON" in refusal(
        [str(tmp_path / "corpus")], tmp_path / "out", **args
    )
    kept = (tmp_path / "out" / "receipts" / "unit-00000.json").stat().st_mtime_ns
    assert not (tmp_path / "out" / "receipts" / "unit-00001.json").exists()
    assert not list((tmp_path / "out").glob("train-00001*"))
    bad.write_text(good_text)
    prepare([str(tmp_path / "corpus")], tmp_path / "out", **args)
    prepare([str(tmp_path / "corpus")], tmp_path / "fresh", **args)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    assert (tmp_path / "out" / "receipts" / "unit-00000.json").stat().st_mtime_ns == kept


@pytest.mark.slow
def test_an_error_in_a_worker_ends_the_command_with_its_sentence(tmp_path, small_units):
    write_corpus(tmp_path / "corpus", num_files=4, num_documents=30)
    (tmp_path / "corpus" / "part-002.jsonl").write_text('{"body": 1}')
    message = refusal(
        [str(tmp_path / "corpus")],
        tmp_path / "out",
        sequence_length=T,
        tokenizer="bytes",
        workers=2,
    )
    assert "part-002.jsonl:1 has no field 'text'" in message
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_units_that_no_longer_exist_leave_no_shard_behind(tmp_path, small_units):
    write_corpus(tmp_path / "corpus", num_files=3, num_documents=30)
    (tmp_path / "corpus" / "part-999.jsonl").write_text("{")
    args = {"sequence_length": T, "tokenizer": "bytes"}
    refusal([str(tmp_path / "corpus")], tmp_path / "out", **args)
    for name in ("part-999.jsonl", "part-002.jsonl"):
        (tmp_path / "corpus" / name).unlink()
    content = prepare([str(tmp_path / "corpus")], tmp_path / "out", **args)
    shards = {shard["file"] for split in content["splits"].values() for shard in split["shards"]}
    assert {path.name for path in (tmp_path / "out").glob("*.records")} == shards
    assert not list((tmp_path / "out").rglob("unit-*.records"))


class Killed(BaseException):
    """Ends a preparation where a kill would."""


def kill_at(monkeypatch, name: str, *arguments, **keywords) -> None:
    """Prepares, and ends where the function `name` would be called."""

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(name, killed)
        with pytest.raises(Killed):
            prepare(*arguments, **keywords)


@pytest.mark.parametrize(
    ("place", "drop_duplicates"),
    [
        ("build.write_receipt", False),
        ("build.write_receipt", True),
        ("duplicates._write_duplicates", True),
        ("preparation.join_units", True),
    ],
)
def test_inputs_that_change_and_change_back_give_the_bytes_of_an_undisturbed_run(
    tmp_path, monkeypatch, place, drop_duplicates
):
    """Records, copies and their notes of the wrong inputs must not pass for those of the right
    ones, which have as many.
    """
    for name, word in (("right", "r"), ("wrong", "w")):
        texts = [f"{word} {number % (5 if name == 'right' else 7)}" for number in range(30)]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    right, wrong = ([str(tmp_path / f"{name}.jsonl")] for name in ("right", "wrong"))
    args = {"sequence_length": 16, "tokenizer": "bytes", "heldout": 0}
    args["drop_duplicates"] = drop_duplicates
    alone = prepare(right, tmp_path / "alone", **args)
    out = tmp_path / "out"
    kill_at(monkeypatch, "llada_jax.data.preparation.join_units", right, out, **args)
    kill_at(monkeypatch, f"llada_jax.data.{place}", wrong, out, **args)
    assert prepare(right, out, **args) == alone
    assert tree(out) == tree(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    "heldout", [0.01, 0.9]
)  # full in a shard, full in the file in which held-out documents wait
def test_a_full_disk_is_one_sentence_and_the_next_run_continues(
    tmp_path, mount, heldout, monkeypatch
):
    monkeypatch.setattr("llada_jax.data.build.UNIT_BYTES", 500_000)  # a file is a unit
    write_corpus(tmp_path / "corpus", num_files=3, num_documents=3000)
    args = {"sequence_length": T, "tokenizer": "bytes", "heldout": heldout}
    disk = mount("size=2m")
    message = refusal([str(tmp_path / "corpus")], disk / "out", **args)
    assert (
        "No space left" in message
        or "could not be written" in message
        or "cannot be written" in message
    )
    assert not (disk / "out" / "dataset.json").exists()
    assert not list((disk / "out").glob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    prepare([str(tmp_path / "corpus")], disk / "out", **args)
    prepare([str(tmp_path / "corpus")], tmp_path / "whole", **args)
    assert tree(disk / "out") == tree(tmp_path / "whole")
    # refused while a file is open for writing: no worker is left
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


@pytest.mark.parametrize("is_chat", [False, True])
def test_held_out_documents_that_the_disk_refuses_are_not_lost(tmp_path, is_chat):
    """They wait in a file with 4 bytes per token, while records have 2: a limit of the size of
    files lies between the two.
    """
    field = "response" if is_chat else "text"
    lines = [json.dumps({"prompt": "", field: f"{n} " * 99}) + "\n" for n in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    args = {"sequence_length": 1024, "tokenizer": "bytes", "heldout": 0.9}
    args["chat"] = ChatSettings(template="default") if is_chat else None
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "whole", **args)
    limit = 10_000 + (tmp_path / "whole" / "heldout-00000.records").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        message = refusal([str(tmp_path / "a.jsonl")], tmp_path / "out", **args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written (File too large: raise the limit" in message
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", **args)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_disk_that_refuses_the_receipt_is_one_sentence(tmp_path, monkeypatch):
    """The same without rights to mount: fsync reports that the disk is full."""
    (tmp_path / "a.txt").write_text("a text")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = refusal(
        [str(tmp_path / "a.txt")], tmp_path / "out", sequence_length=T, tokenizer="bytes"
    )
    assert "No space left on device" in message
    assert "free some space" in message
