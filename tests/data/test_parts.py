"""One large file is read in parts, and nothing in the result shows where they meet."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpora import T, refusal, stream, tree, write_corpus
from support.errors import error_of

from llada_jax.data import assembly, build
from llada_jax.data.build import in_parts
from llada_jax.data.inputs import Input
from llada_jax.data.preparation import prepare
from llada_jax.data.text import Cut, read_documents

CUTS = {
    "line": Cut(documents="line"),
    "section": Cut(document_start="^#"),
    "record": Cut(form="jsonl"),
}


@settings(deadline=None, max_examples=150)
@given(
    lines=st.lists(st.text("a#é \ufeff\r", max_size=6), max_size=12),
    ends_in_a_line=st.booleans(),
    how=st.sampled_from(list(CUTS)),
    ends=st.lists(st.integers(0, 120), max_size=5),
)
def test_the_documents_of_all_parts_are_those_of_the_file(
    tmp_path_factory, lines, ends_in_a_line, how, ends
):
    if how == "record":
        lines = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    file = tmp_path_factory.getbasetemp() / "in-parts.txt"
    file.write_bytes(("\n".join(lines) + "\n" * ends_in_a_line).encode())
    size = file.stat().st_size
    bounds = [0, *sorted(min(end, size) for end in ends), size]
    parts = [
        list(read_documents(str(file), CUTS[how], span=span)) for span in zip(bounds, bounds[1:])
    ]
    whole = list(read_documents(str(file), CUTS[how]))
    if size:  # of an empty file no part has the one empty section
        assert [text for part in parts for text in part] == whole


def test_a_defect_is_named_with_its_line_in_the_file(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"line {number}"}) for number in range(1, 101)]
    lines[79] = '{"text": '
    file.write_text("\n".join(lines))
    size = file.stat().st_size

    def read(span) -> list[str]:
        return list(read_documents(str(file), Cut(), span=span))

    assert f"{file}:80 is not valid JSON" in error_of(read, (size // 2, size))
    assert len(read((0, size // 2))) > 40
    lines[79] = '{"text": "\udcff"}'
    file.write_text("\n".join(lines), errors="surrogateescape")
    whole = error_of(read, None)
    assert "(line 80)" in whole
    assert error_of(read, (size // 2, size)) == whole


def test_files_that_have_no_lines_or_are_compressed_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "UNIT_BYTES", 10)

    def spans(name: str, cut: Cut = Cut()) -> list:  # noqa: B008
        return [part.span for part in in_parts([Input(name, 25, "")], cut)]

    assert spans("a.jsonl") == [(0, 8), (8, 16), (16, 25)]
    assert spans("a.txt", Cut(documents="line")) == spans("a.jsonl")
    assert spans("a.txt", Cut(document_start="x")) == spans("a.jsonl")
    for name in ("a.txt", "a.parquet", "a.jsonl.gz", "gs://bucket/a.jsonl"):
        assert spans(name) == [None]
    assert [part.span for part in in_parts([Input("a.jsonl", 10, "")], Cut())] == [None]


@pytest.mark.slow
def test_a_large_file_gives_the_same_bytes_from_any_number_of_workers(tmp_path, monkeypatch):
    texts = write_corpus(tmp_path / "corpus", num_files=1, num_documents=600)
    monkeypatch.setattr(build, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(assembly, "SHARD_BYTES", 1)  # a shard for each unit
    args = {"sequence_length": T, "tokenizer": "bytes", "heldout": 0.2}
    alone = prepare([str(tmp_path / "corpus")], tmp_path / "alone", **args, workers=1)
    assert len(alone["splits"]["train"]["shards"]) >= 4
    assert prepare([str(tmp_path / "corpus")], tmp_path / "many", **args, workers=3) == alone
    assert tree(tmp_path / "many") == tree(tmp_path / "alone")
    # and the tokens are those of the file read in one go
    monkeypatch.setattr(build, "UNIT_BYTES", 10**9)
    whole = prepare([str(tmp_path / "corpus")], tmp_path / "whole", **args)
    assert len(whole["splits"]["train"]["shards"]) == 1
    for split in ("train", "heldout"):
        assert stream(tmp_path / "alone", split) == stream(tmp_path / "whole", split)
    assert sum(split["num_documents"] for split in alone["splits"].values()) == sum(
        map(bool, texts)
    )


def test_a_defect_in_a_part_leaves_the_other_parts_finished(tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus", num_files=1, num_documents=60)
    (file,) = (tmp_path / "corpus").iterdir()
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:50], "{", *lines[50:]]))
    monkeypatch.setattr(build, "UNIT_BYTES", 2000)
    args = {"sequence_length": T, "tokenizer": "bytes"}
    assert f"{file}:51 is not valid JSON" in refusal([str(file)], tmp_path / "out", **args)
    assert (tmp_path / "out" / "receipts" / "unit-00000.json").exists()
