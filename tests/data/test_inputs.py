"""What prepare finds and reads of odd names, links, formats and files with a byte order mark."""

import dataclasses
import errno
import gzip
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpora import T, refusal, stream

from llada_jax.data.inputs import Input, find_inputs, format_of, printable
from llada_jax.data.preparation import prepare
from llada_jax.data.text import Cut, read_documents
from llada_jax.errors import UserError

RECORD = b'{"text": "hello"}\n'


def found(*patterns, form: str = "") -> tuple[list[str], list[str]]:
    """Returns the names of the files that are found, and what is said."""
    notes = []
    inputs = find_inputs([str(p) for p in patterns], form, on_note=notes.append)
    return [os.path.basename(file.path) for file in inputs], notes


def interrupted(*_):
    raise KeyboardInterrupt


def prepared(*patterns, output, **more) -> dict:
    args = {"sequence_length": T, "tokenizer": "bytes", "heldout": 0, **more}
    return prepare([str(p) for p in patterns], output, **args)


# ---- directories


def test_a_directory_says_which_files_it_leaves_out_and_of_which_kinds(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl", "B.TXT", "c.Jsonl.BZ2", ".hidden.txt", "x.json.gz", "README.md", "no"):
        (folder / name).write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe.txt")
    names, notes = found(folder)
    assert names == [".hidden.txt", "B.TXT", "a.jsonl", "c.Jsonl.BZ2"]
    (note,) = notes
    assert note.startswith(f"{folder} holds 5 other files (")
    for word in ("README.md", "x.json.gz", "1 .md", "1 .json.gz", "1 link to a folder", "1 pipe"):
        assert word in note
    for name in ("x.json.gz", "README.md", "no"):
        (folder / name).unlink()
    (folder / "linked").unlink()
    (folder / "pipe.txt").unlink()
    assert found(folder) == (names, [])


@pytest.mark.parametrize("pattern", ["{}", "{}/**", "file://{}", "file://{}/**"])
def test_an_output_among_the_inputs_is_not_read_by_the_next_start(
    tmp_path, pattern, monkeypatch, capsys
):
    folder, output = tmp_path / "in", tmp_path / "in" / "out"
    folder.mkdir()
    (folder / "a.log").write_bytes(RECORD)
    args = {"output": output, "cut": Cut(form="jsonl")}
    with monkeypatch.context() as patch:
        patch.setattr("llada_jax.data.preparation.join_units", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepared(pattern.format(folder), **args)
    content = prepared(pattern.format(folder), **args)
    assert content["source"]["num_files"] == 1
    assert prepared(pattern.format(folder), **args) == content
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["{}", "{}/", "file://{}"])
def test_the_format_flag_leaves_hidden_files_and_folders_out(tmp_path, pattern):
    folder = tmp_path / ".in"  # hidden itself, and named
    for name in ("a", "below/b", ".git/config", "below/.cache/c", ".hidden"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("a text")
    names, (note,) = found(pattern.format(folder), form="txt")
    assert names == ["a", "b"]
    assert "3 other files (3 hidden: .hidden, c, config)" in note


def test_a_directory_without_readable_names_says_what_it_holds(tmp_path):
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(RECORD))
    with pytest.raises(UserError, match=r"matches no file.*c4\.json\.gz.*--format"):
        find_inputs([str(tmp_path)])


def test_a_remote_directory_says_what_it_leaves_out():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/left-out/a.txt", b"x")
    memory.pipe("/left-out/deep/b.json.gz", b"x")
    try:
        names, notes = found("memory://left-out")
    finally:
        memory.rm("/left-out", recursive=True)
    assert names == ["a.txt"]
    assert "1 other file (1 .json.gz: b.json.gz)" in notes[0]


def test_what_is_left_out_is_said_on_stderr(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.md").write_text("text")
    prepared(tmp_path, output=tmp_path / "out")
    assert "b.md" in capsys.readouterr().err


# ---- links and names


def test_a_file_that_is_named_twice_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to("a.txt")
    same = ("a.txt", "./a.txt", tmp_path / "a.txt", f"file://{tmp_path}/a.txt", "*.txt")
    names, notes = found(*same)
    assert len(names) == 1
    assert len(notes) == 3
    assert all("is the same file as" in note for note in notes)
    content = prepared(*same, output=tmp_path / "out")
    assert content["splits"]["train"]["num_documents"] == 1
    (tmp_path / "b.txt").write_text("text")
    assert found("*.txt")[0] == ["a.txt", "b.txt"]


@pytest.mark.parametrize("pattern", ["", "b.txt", "*.txt"])
def test_a_broken_link_is_refused_with_its_target(tmp_path, pattern):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.txt").symlink_to("/nonexistent/x.txt")
    with pytest.raises(UserError, match=r"b\.txt is a broken link \(to /nonexistent/x\.txt\)"):
        find_inputs([str(tmp_path / pattern)])


def test_a_pipe_is_refused_because_it_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt' is a pipe or device, .* to a file"):
        find_inputs([str(tmp_path / "pipe.txt")])


def test_a_glob_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError):
        find_inputs([str(tmp_path / "*.txt")])


def test_a_folder_that_cannot_be_read_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("hello")
    real = os.scandir

    def scandir(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    # root, who runs this in CI, may read everything
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"Permission denied.*closed.*check the path"):
        find_inputs([str(tmp_path)])


def test_parts_of_a_file_that_are_of_one_size_differ():
    file = Input("a.jsonl", 5, "1")
    parts = [dataclasses.replace(file, span=span) for span in ((0, 5), (5, 10), None)]
    assert len({json.dumps(part.identity) for part in parts}) == 3


def test_a_file_name_that_is_not_utf8_is_read_and_printed(tmp_path):
    name = os.fsencode(tmp_path) + b"/lat\xe9in.txt"
    with open(name, "wb") as file:
        file.write(b"hello\n")
    flags = [b"--output", b"out", b"--sequence-length", b"16", b"--tokenizer", b"bytes"]
    command = [sys.executable, "-m", "llada_jax", "prepare", b"--input", name, *flags]
    for more in ([], [b"--json"]):
        result = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True)
        assert result.returncode == 0, result.stderr
    assert r"lat\udce9in.txt" in json.loads(result.stdout)["source"]["input"][0]


def test_words_that_are_not_utf8_are_refused_before_any_work(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(RECORD)
    args = {"sequence_length": T, "tokenizer": "bytes"}
    odd = os.fsdecode(b"lat\xe9in")
    for output, more, flag in (
        (tmp_path / "out", {"cut": Cut(text_field=odd)}, "--text-field"),
        (tmp_path / "out", {"cut": Cut(document_start=odd)}, "--document-start"),
        (tmp_path / odd, {}, "--output"),
    ):
        message = refusal([str(tmp_path / "a.jsonl")], output, **{**args, **more})
        assert message.startswith(flag)
        assert "not valid UTF-8" in message
        assert printable(message) == message
    assert os.listdir(tmp_path) == ["a.jsonl"]


# ---- formats


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.json", "jsonl"),
        ("c4-train.00000.json.gz", "jsonl"),
        ("A.JSON.ZST", "jsonl"),
        ("a.jsonl.bz2", "jsonl"),
        ("a.TXT", "txt"),
        ("a.txt.XZ", "txt"),
        ("a.Parquet", "parquet"),
    ],
)
def test_names_tell_the_format_in_any_case(name, form):
    assert format_of(name) == form


def test_the_format_flag_reads_files_whatever_their_names_and_is_a_setting(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "part-0").write_bytes(RECORD)
    (folder / "part-1.gz").write_bytes(gzip.compress(RECORD))
    (folder / "part-2.json.gz").write_bytes(gzip.compress(RECORD))
    (folder / ".part-3").write_bytes(RECORD)
    names, notes = found(folder, form="jsonl")
    assert names == ["part-0", "part-1.gz", "part-2.json.gz"]
    assert "1 hidden: .part-3" in notes[0]
    cut = Cut(form="jsonl")
    assert prepared(folder, output=tmp_path / "out", cut=cut)["source"]["format"] == "jsonl"
    assert stream(tmp_path / "out", "train") == [*b"hello", 257] * 3
    message = refusal([str(folder)], tmp_path / "out", sequence_length=T, tokenizer="bytes")
    assert "matches no file" in message
    (folder / "a.txt").write_text("text")
    message = refusal(
        [str(folder)], tmp_path / "out", sequence_length=T, tokenizer="bytes", heldout=0
    )
    assert "--format 'jsonl'" in message


# ---- byte order marks and limits of JSON


@given(
    texts=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5),
    marks=st.lists(st.booleans(), min_size=5, max_size=5),
)
@settings(max_examples=50)
def test_json_lines_are_read_behind_any_byte_order_marks(tmp_path_factory, texts, marks):
    path = tmp_path_factory.mktemp("bom") / "a.jsonl"
    with open(path, "wb") as file:
        for text, has_mark in zip(texts, marks):
            file.write(b"\xef\xbb\xbf" * has_mark + json.dumps({"text": text}).encode() + b"\n")
    assert list(read_documents(str(path), Cut())) == texts


@pytest.mark.parametrize(
    "cut", [Cut(), Cut(documents="line"), Cut(document_start="^CHAPTER")], ids=lambda cut: repr(cut)
)
def test_a_byte_order_mark_is_dropped_where_a_text_begins_and_nowhere_else(tmp_path, cut):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfCHAPTER I\nCHAPTER II\n\xef\xbb\xbfx\n")
    documents = list(read_documents(str(path), cut))
    assert "".join(documents).replace("\n", "") == "CHAPTER ICHAPTER II\ufeffx"
    assert documents[0].startswith("CHAPTER I")
    path.write_bytes(b"\xef\xbb\xbfab\n\xff\n")
    with pytest.raises(UserError, match=r"at byte 6 \(line 2\)"):
        list(read_documents(str(path), cut))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "more brackets within brackets"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "more brackets within brackets"),
        ("[" * 100_000, "a.jsonl:2"),
        ("1" * 5_000, "not valid JSON"),
        ("01", "not valid JSON"),
    ],
    ids=["lists", "objects", "open", "digits", "number"],
)
def test_a_line_beyond_the_limits_of_json_is_refused_with_file_and_line(tmp_path, value, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "ok"}}\n{{"text": "ok", "meta": {value}}}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2 ") as caught:
        list(read_documents(str(path), Cut()))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
