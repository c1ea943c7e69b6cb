"""The verb prepare: nothing lost or doubled, the same bytes after any interruption, and refusals
that touch nothing.
"""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.errors import error_of
from support.paths import ROOT

from llada_jax.__main__ import main as llada_jax
from llada_jax.data.build import UNIT_BYTES, Job, units_of
from llada_jax.data.preparation import prepare, sample_texts
from llada_jax.data.records import Records, read_dataset
from llada_jax.data.text import Cut, Input
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.verbs.prepare import main

T = 32


def write_corpus(folder: Path, *, num_files: int, num_documents: int, seed: int = 0) -> list[str]:
    """Writes .jsonl files of random sentences, some of them empty, and returns the texts in the
    order of the files.
    """
    rng = random.Random(seed)
    words = [
        "".join(rng.choice("bdfglmnprst") + rng.choice("aeiou") for _ in range(3))
        for _ in range(300)
    ]
    folder.mkdir(parents=True)
    texts = []
    for i in range(num_files):
        documents = [
            " ".join(rng.choices(words, k=rng.choice([0, 3, 40]))) for _ in range(num_documents)
        ]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (folder / f"part-{i:03d}.jsonl").write_text(lines)
        texts += documents
    return texts


def tree(directory: Path) -> dict[str, str]:
    """Returns {relative path: hash} of a data set, without the receipts."""
    files = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "receipts" not in path.parts
    ]
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def stream(directory: Path, split: str) -> list[int]:
    """Returns all tokens of a split without padding, its shards one after the other."""
    return [
        t
        for row in Records(read_dataset(directory), split=split)
        for t in row["tokens"][row["segment_ids"] > 0].tolist()
    ]


def held_out(text: str, fraction: float) -> bool:
    return (
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        < fraction * 2**64
    )


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr("llada_jax.data.build.UNIT_BYTES", 1)


def failing(*args, **kwargs) -> str:
    return error_of(prepare, *args, **kwargs)


# ---- nothing lost, nothing doubled


@given(
    files=st.lists(st.lists(st.text(max_size=60), max_size=8), min_size=1, max_size=4),
    sequence_length=st.integers(2, 50),
    heldout=st.sampled_from([0.0, 0.3, 0.7]),
    unit_bytes=st.sampled_from([1, 100, 10**9]),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_rows_of_all_shards_are_every_document_and_its_eos_once(
    tmp_path_factory, monkeypatch, files, sequence_length, heldout, unit_bytes
):
    monkeypatch.setattr("llada_jax.data.build.UNIT_BYTES", unit_bytes)
    folder = tmp_path_factory.mktemp("corpus")
    for i, texts in enumerate(files):
        (folder / f"{i}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    texts = [text for texts in files for text in texts]
    full = [text for text in texts if text.strip()]
    expected = {
        "train": [text for text in full if not held_out(text, heldout)],
        "heldout": [text for text in full if held_out(text, heldout)],
    }
    kwargs = {"sequence_length": sequence_length, "tokenizer": "bytes", "heldout": heldout}
    if not expected["train"]:
        failing([str(folder)], folder / "out", **kwargs)
        return
    content = prepare([str(folder)], folder / "out", **kwargs)
    tokenizer = load_tokenizer(folder / "out" / "tokenizer")
    for name, documents in expected.items():
        tokens = [i for text in documents for i in (*text.encode(), tokenizer.eos_id)]
        assert stream(folder / "out", name) == tokens
        split = content["splits"][name]
        assert split["num_tokens"] == len(tokens)
        assert split["num_documents"] == len(documents)
        assert split["num_bytes"] == sum(len(text.encode()) for text in documents)
        assert split["num_records"] * sequence_length == len(tokens) + split["num_padding"]
    assert content["source"]["num_empty_documents"] == len(texts) - len(full)
    assert content == json.loads((folder / "out" / "dataset.json").read_text())


def test_document_starts_are_kept(tmp_path):
    (tmp_path / "a.txt").write_text("abc\nde\n\nfghijk")
    prepare(
        [str(tmp_path / "a.txt")],
        tmp_path / "out",
        sequence_length=5,
        tokenizer="bytes",
        cut=Cut(documents="line"),
        heldout=0,
    )
    rows = list(Records(read_dataset(tmp_path / "out"), split="train"))
    assert [row["segment_ids"].tolist() for row in rows] == [
        [1, 1, 1, 1, 2],
        [1, 1, 2, 2, 2],
        [1, 1, 1, 1, 0],
    ]
    assert [row["positions"].tolist() for row in rows] == [
        [0, 1, 2, 3, 0],
        [0, 1, 0, 1, 2],
        [0, 1, 2, 3, 0],
    ]


@pytest.mark.parametrize("tokenizer", ["spm:320", "spm-bpe:320"])
def test_a_trained_tokenizer_decodes_every_document_again(tmp_path, tokenizer):
    texts = write_corpus(tmp_path / "corpus", num_files=3, num_documents=40)
    prepare(
        [str(tmp_path / "corpus")],
        tmp_path / "out",
        sequence_length=T,
        tokenizer=tokenizer,
        heldout=0,
    )
    loaded = load_tokenizer(tmp_path / "out" / "tokenizer")
    documents = np.array(stream(tmp_path / "out", "train"))
    ends = np.flatnonzero(documents == loaded.eos_id)
    decoded = [loaded.decode(ids) for ids in np.split(documents, ends + 1)[:-1]]
    assert decoded == [text for text in texts if text]


def test_the_split_depends_neither_on_order_nor_on_files(tmp_path):
    texts = [text for text in write_corpus(tmp_path / "a", num_files=3, num_documents=40) if text]
    random.Random(1).shuffle(texts)
    (tmp_path / "b.txt").write_text("\n".join(texts))
    args = {"sequence_length": T, "tokenizer": "bytes", "heldout": 0.2}
    a = prepare([str(tmp_path / "a")], tmp_path / "out_a", **args)
    b = prepare([str(tmp_path / "b.txt")], tmp_path / "out_b", cut=Cut(documents="line"), **args)
    for name in ("num_documents", "num_bytes", "num_tokens"):
        assert a["splits"]["heldout"][name] == b["splits"]["heldout"][name] > 0
    documents = [
        sorted(bytes(d) for d in bytes_of(stream(tmp_path / out, "heldout")))
        for out in ("out_a", "out_b")
    ]
    assert documents[0] == documents[1]


def bytes_of(tokens: list[int]) -> list[list[int]]:
    documents = [[]]
    for token in tokens:
        if token == 257:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents[:-1]


def test_small_files_share_a_unit_and_a_large_one_is_alone(tmp_path):
    inputs = [
        Input(f"{i}.txt", size, "")
        for i, size in enumerate([10, 20, UNIT_BYTES, 5, UNIT_BYTES - 5, 1])
    ]
    job = Job(output=tmp_path, sequence_length=T, cut=Cut(), heldout=0.0)
    groups = [
        [file.path[0] for file in unit.inputs] for unit in units_of(inputs, job, "fingerprint")
    ]
    assert groups == [["0", "1"], ["2"], ["3", "4"], ["5"]]


def test_a_thousand_small_files_become_one_shard(tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(1000):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"document {i}")
    content = prepare(
        [str(tmp_path / "corpus")], tmp_path / "out", sequence_length=T, tokenizer="bytes"
    )
    assert [shard["file"] for shard in content["splits"]["train"]["shards"]] == [
        "train-00000.arrayrecord"
    ]
    assert content["splits"]["train"]["num_padding"] < T
    assert sum(split["num_documents"] for split in content["splits"].values()) == 1000


def test_the_tokenizer_sample_takes_from_every_file_and_leaves_the_held_out_text_alone(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("llada_jax.data.preparation.SAMPLE_CHARS", 100)
    sizes = {"a.txt": 1000, "b.txt": 10, "c.txt": 40}
    inputs = []
    for name, size in sizes.items():
        (tmp_path / name).write_text(name[0] * size)
        inputs.append(Input(str(tmp_path / name), size, ""))
    sample = list(sample_texts(inputs, Cut(), heldout=0.0))
    assert sample == [
        "b" * 10,
        "c" * 40,
        "a" * 50,
    ]  # equal shares; what b leaves goes to the larger files
    fraction = 0.5
    sampled = "".join(sample_texts(inputs, Cut(), heldout=fraction))
    assert set(sampled) == {
        name[0] for name, size in sizes.items() if not held_out(name[0] * size, fraction)
    }


# ---- the same bytes however it is run


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path, small_units):
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
    build.UNIT_BYTES = 1
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

    (output / "train-00099.arrayrecord.partial").write_bytes(b"half")
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


def test_a_lost_shard_is_written_again_and_no_other(tmp_path, small_units):
    write_corpus(tmp_path / "corpus", num_files=3, num_documents=30)
    args = ([str(tmp_path / "corpus")], tmp_path / "out")
    prepare(*args, sequence_length=T, tokenizer="spm:320")
    before = tree(tmp_path / "out")
    other = (tmp_path / "out" / "train-00000.arrayrecord").stat().st_mtime_ns
    (tmp_path / "out" / "train-00001.arrayrecord").unlink()
    (tmp_path / "out" / "train-00002.arrayrecord").write_bytes(b"cut short")
    prepare(*args, sequence_length=T, tokenizer="spm:320")
    assert tree(tmp_path / "out") == before
    assert (tmp_path / "out" / "train-00000.arrayrecord").stat().st_mtime_ns == other


def test_a_file_mended_after_an_error_is_redone_and_the_finished_units_are_kept(
    tmp_path, small_units
):
    write_corpus(tmp_path / "corpus", num_files=3, num_documents=30)
    bad = tmp_path / "corpus" / "part-001.jsonl"
    good_text = bad.read_text()
    bad.write_text(good_text + "{")
    args = {"sequence_length": T, "tokenizer": "bytes"}
    assert "part-001.jsonl:31 is not valid JSON" in failing(
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


def test_an_error_in_a_worker_ends_the_command_with_its_sentence(tmp_path, small_units):
    write_corpus(tmp_path / "corpus", num_files=4, num_documents=30)
    (tmp_path / "corpus" / "part-002.jsonl").write_text('{"body": 1}')
    message = failing(
        [str(tmp_path / "corpus")],
        tmp_path / "out",
        sequence_length=T,
        tokenizer="bytes",
        workers=2,
    )
    assert "part-002.jsonl:1 has no field 'text'" in message
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_units_that_exist_no_more_leave_no_shard_behind(tmp_path, small_units):
    write_corpus(tmp_path / "corpus", num_files=3, num_documents=30)
    (tmp_path / "corpus" / "part-999.jsonl").write_text("{")
    args = {"sequence_length": T, "tokenizer": "bytes"}
    failing([str(tmp_path / "corpus")], tmp_path / "out", **args)
    for name in ("part-999.jsonl", "part-002.jsonl"):
        (tmp_path / "corpus" / name).unlink()
    content = prepare([str(tmp_path / "corpus")], tmp_path / "out", **args)
    shards = {shard["file"] for split in content["splits"].values() for shard in split["shards"]}
    assert {path.name for path in (tmp_path / "out").glob("*.arrayrecord")} == shards


def test_a_complete_data_set_says_so_and_is_left_alone(tmp_path, capsys):
    write_corpus(tmp_path / "corpus", num_files=1, num_documents=30)
    flags = [
        "--input",
        str(tmp_path / "corpus"),
        "--output",
        str(tmp_path / "out"),
        "--sequence-length",
        "32",
        "--tokenizer",
        "bytes",
    ]
    main(flags)
    first = capsys.readouterr().out
    stamps = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    main(flags)
    again = capsys.readouterr()
    assert "is complete" in again.err
    assert again.out == first
    assert stamps == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sequence_length": 16}, "--sequence-length 32"),
        ({"tokenizer": "spm:320"}, "--tokenizer 'bytes'"),
        ({"heldout": 0.5}, "--heldout 0.1"),
        ({"cut": Cut(text_field="body")}, "--text-field 'text'"),
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
    assert named in failing([str(tmp_path / "corpus")], tmp_path / "out", **{**args, **change})
    assert tree(tmp_path / "out") == before


def test_changed_inputs_of_a_complete_data_set_are_refused(tmp_path):
    write_corpus(tmp_path / "corpus", num_files=2, num_documents=30)
    args = {"sequence_length": T, "tokenizer": "bytes"}
    prepare([str(tmp_path / "corpus")], tmp_path / "out", **args)
    before = tree(tmp_path / "out")
    (tmp_path / "corpus" / "more.txt").write_text("more")
    assert "2 input files have changed since or others are given now (3)" in failing(
        [str(tmp_path / "corpus")], tmp_path / "out", **args
    )
    assert tree(tmp_path / "out") == before


def test_two_commands_do_not_write_into_one_directory(tmp_path, monkeypatch):
    import fcntl

    write_corpus(tmp_path / "corpus", num_files=1, num_documents=30)
    monkeypatch.setattr("llada_jax.data.preparation.LOCK_SECONDS", 0.1)
    (tmp_path / "out" / "receipts").mkdir(parents=True)
    with open(tmp_path / "out" / "receipts" / "lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # as a worker holds it
        message = failing(
            [str(tmp_path / "corpus")], tmp_path / "out", sequence_length=T, tokenizer="bytes"
        )
    assert "Another prepare is writing" in message
    prepare([str(tmp_path / "corpus")], tmp_path / "out", sequence_length=T, tokenizer="bytes")


# ---- inputs of every kind


def test_formats_mix_and_remote_inputs_equal_local_ones(tmp_path):
    import fsspec

    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"from text"))
    (folder / "b.jsonl").write_text('{"text": "from json"}\n')
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/prepare-test", recursive=True)
    try:
        args = {"sequence_length": T, "tokenizer": "bytes", "heldout": 0}
        local = prepare([str(folder)], tmp_path / "local", **args)
        url = prepare([f"file://{folder}"], tmp_path / "url", **args)
        remote = prepare(["memory://prepare-test"], tmp_path / "remote", **args)
    finally:
        memory.rm("/prepare-test", recursive=True)
    assert bytes_of(stream(tmp_path / "local", "train")) == [list(b"from text"), list(b"from json")]
    assert local["fingerprint"] == url["fingerprint"] == remote["fingerprint"]


def test_workers_do_not_import_jax(tmp_path):
    code = (
        "import sys, llada_jax.data.workers\n"
        "print({m.split('.')[0] for m in sys.modules} & {'jax', 'grain', 'flax'})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


# ---- refusals


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
    assert message in failing([str(tmp_path / "a.txt")], tmp_path / "out", **args)
    assert not (tmp_path / "out").exists() or not tree(tmp_path / "out")


@pytest.mark.parametrize("tokenizer", ["bytes", "spm:300"])
def test_a_corpus_without_text_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("")
    message = failing([str(tmp_path)], tmp_path / "out", sequence_length=T, tokenizer=tokenizer)
    assert "hold no text" in message or "empty corpus" in message
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_corpus_that_is_all_held_out_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one document")
    message = failing(
        [str(tmp_path / "a.txt")],
        tmp_path / "out",
        sequence_length=T,
        tokenizer="bytes",
        heldout=0.9999,
    )
    assert "All 1 documents fell into the held-out split" in message


def test_a_split_without_documents_is_told(tmp_path, capsys):
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
    assert "cannot be written" in failing([str(tmp_path / "a.txt")], tmp_path / "file", **args)
    assert "cannot be written" in failing(
        [str(tmp_path / "a.txt")], tmp_path / "file" / "below", **args
    )
    assert "mounted" in failing([str(tmp_path / "a.txt")], "gs://bucket/out", **args)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    assert "is not empty (it holds 'letter.txt')" in failing(
        [str(tmp_path / "a.txt")], tmp_path / "home", **args
    )
    assert os.listdir(tmp_path / "home") == ["letter.txt"]


@pytest.mark.parametrize(
    "heldout", [0.01, 0.9]
)  # full in a shard, full in the file in which held-out documents wait
def test_a_full_disk_is_one_sentence_and_the_next_run_continues(
    tmp_path, mount, heldout, small_units
):
    write_corpus(tmp_path / "corpus", num_files=3, num_documents=3000)
    args = {"sequence_length": T, "tokenizer": "bytes", "heldout": heldout}
    disk = mount("size=2m")
    message = failing([str(tmp_path / "corpus")], disk / "out", **args)
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


def test_a_disk_that_refuses_the_receipt_is_one_sentence(tmp_path, monkeypatch):
    """The same without rights to mount: fsync reports that the disk is full."""
    (tmp_path / "a.txt").write_text("a text")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = failing(
        [str(tmp_path / "a.txt")], tmp_path / "out", sequence_length=T, tokenizer="bytes"
    )
    assert "No space left on device" in message
    assert "free some space" in message


# ---- the face


def test_the_command_prints_a_summary_or_json_on_stdout_alone(tmp_path):
    write_corpus(tmp_path / "corpus", num_files=2, num_documents=30)
    flags = [
        "--input",
        str(tmp_path / "corpus"),
        "--output",
        str(tmp_path / "out"),
        "--sequence-length",
        "32",
        "--tokenizer",
        "bytes",
    ]
    run = [sys.executable, "-m", "llada_jax", "prepare", *flags]
    result = subprocess.run(run, capture_output=True, text=True, check=True)
    assert len(result.stdout.splitlines()) == 4  # the whole, two splits, the empty documents
    assert "bytes/token" in result.stdout
    assert "MB/s" in result.stderr
    assert "tokens/s" in result.stderr
    result = subprocess.run([*run, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "dataset.json").read_text())


def test_a_mistake_exits_with_2_and_one_line(tmp_path, capsys):
    flags = [
        "--input",
        str(tmp_path / "absent"),
        "--output",
        str(tmp_path / "out"),
        "--sequence-length",
        "32",
        "--tokenizer",
        "bytes",
    ]
    assert llada_jax(["prepare", *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert llada_jax(["prepare", *flags, "--hedlout", "0.1"]) == 2
    assert "Did you mean '--heldout'?" in capsys.readouterr().err


def test_the_help_fits_one_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100


def test_the_shipped_corpus_is_cut_at_the_269_chapters_of_six_novels(tmp_path):
    corpus = ROOT / "llada_jax" / "data" / "austen6.txt.xz"
    cut = Cut(document_start="^(CHAPTER|Chapter) ")
    content = prepare(
        [str(corpus)], tmp_path / "out", sequence_length=64, tokenizer="bytes", cut=cut
    )
    total = {
        name: sum(split[name] for split in content["splits"].values())
        for name in ("num_documents", "num_bytes")
    }
    assert total == {"num_documents": 1 + 55 + 48 + 31 + 24 + 61 + 50, "num_bytes": 4_025_035}


@pytest.mark.slow
def test_the_commands_of_the_data_documentation_run(tmp_path):
    root = ROOT
    blocks = re.findall(
        r"^```\n(.*?)^```", (root / "docs" / "data.md").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    commands = [block for block in blocks if block.startswith(("llada-jax", "mkdir", "python"))]
    assert len(commands) == 4
    (tmp_path / "llada_jax").symlink_to(root / "llada_jax")
    shims = (
        f'llada-jax() {{ "{sys.executable}" -m llada_jax "$@"; }}\n'
        f'python() {{ "{sys.executable}" "$@"; }}\n'
    )
    script = "set -e\n" + shims + "".join(commands)
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "runs/austen: 270 documents, 4,025,035 bytes" in result.stdout
    assert "By Jane Austen" in result.stdout
