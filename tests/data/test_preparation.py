"""What `prepare` writes: nothing is lost or doubled, whatever the files, formats and order."""

import gzip
import hashlib
import json
import random
import subprocess
import sys
import threading
import time

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.corpora import T, documents_of, refusal, stream, write_corpus
from support.paths import ROOT

from llada_jax.data import preparation
from llada_jax.data.build import UNIT_BYTES, Job, units_of
from llada_jax.data.inputs import Input
from llada_jax.data.preparation import prepare, sample_texts
from llada_jax.data.records import Records, read_dataset
from llada_jax.data.text import Cut
from llada_jax.data.tokenizer import load_tokenizer


def held_out(text: str, fraction: float) -> bool:
    return (
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        < fraction * 2**64
    )


@pytest.mark.slow
@given(
    files=st.lists(st.lists(st.text(max_size=60), max_size=8), min_size=1, max_size=4),
    sequence_length=st.integers(2, 50),
    heldout=st.sampled_from([0.0, 0.3, 0.7]),
    unit_bytes=st.sampled_from([1, 100, 10**9]),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        refusal([str(folder)], folder / "out", **kwargs)
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
        sorted(bytes(d) for d in documents_of(stream(tmp_path / out, "heldout")))
        for out in ("out_a", "out_b")
    ]
    assert documents[0] == documents[1]


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
        "train-00000.records"
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


@given(
    sizes=st.lists(st.lists(st.integers(1, 40), max_size=6), min_size=1, max_size=30),
    budget=st.integers(1, 400),
)
@settings(max_examples=40)
def test_the_tokenizer_sample_has_whole_documents_of_files_spread_over_all(
    tmp_path_factory, sizes, budget
):
    folder = tmp_path_factory.mktemp("sample")
    texts, inputs = {}, []
    for i, lengths in enumerate(sizes):
        path = folder / f"{i:02d}.jsonl"
        documents = [f"{i:02d}" + "x" * length for length in lengths]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        inputs.append(Input(str(path), path.stat().st_size, ""))
        texts.update(dict.fromkeys(documents, i))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llada_jax.data.preparation.SAMPLE_CHARS", budget)
        patch.setattr("llada_jax.data.preparation.SAMPLE_DOCUMENT_CHARS", 10**6)
        sample = list(sample_texts(inputs, Cut(), heldout=0.0))
    total = sum(2 + length for lengths in sizes for length in lengths)
    assert sum(map(len, sample)) <= budget
    # Only what ends the budget is cut.
    assert all(text in texts for text in sample[:-1])
    if total <= budget // len(sizes):
        assert sorted(sample) == sorted(
            f"{i:02d}" + "x" * length for i, lengths in enumerate(sizes) for length in lengths
        )


def test_files_with_small_shares_give_whole_documents_from_beginning_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr("llada_jax.data.preparation.SAMPLE_CHARS", 1_000)
    monkeypatch.setattr("llada_jax.data.preparation.SAMPLE_DOCUMENT_CHARS", 500)
    inputs = []
    for i in range(100):
        (tmp_path / f"{i:03d}.txt").write_text(f"{i:03d}" + "x" * 97)
        inputs.append(Input(str(tmp_path / f"{i:03d}.txt"), 100, ""))
    sample = list(sample_texts(inputs, Cut(), heldout=0.0))
    assert [len(text) for text in sample] == [100] * 10
    numbers = [int(text[:3]) for text in sample]
    assert numbers == list(range(0, 100, 10))


def test_prepare_says_that_training_its_tokenizer_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(preparation, "TRAINING_SECONDS", 0.01)
    train, seen = preparation.train_sentencepiece, []

    def slowly(texts, **settings):
        deadline = time.monotonic() + 60
        while not seen or " so far\n" not in seen[-1]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            seen.append(capsys.readouterr().err)
        return train(texts, **settings)

    monkeypatch.setattr(preparation, "train_sentencepiece", slowly)
    (tmp_path / "a.txt").write_text("it is a truth universally acknowledged\n" * 200)
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", sequence_length=T, tokenizer="spm-bpe:290")
    assert "prepare: training spm-bpe:290, " in "".join(seen)
    assert not [t for t in threading.enumerate() if "say" in t.name]


# ---- inputs of every kind


def test_formats_mix_and_remote_inputs_equal_local_ones(tmp_path):
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
    assert documents_of(stream(tmp_path / "local", "train")) == [
        list(b"from text"),
        list(b"from json"),
    ]
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


@pytest.mark.slow
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
