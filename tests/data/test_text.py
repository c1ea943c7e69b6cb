"""Readers: all formats and compressions give the same documents, memory stays flat, and a defect
names its place.
"""

import bz2
import gzip
import json
import lzma
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.data.inputs import find_inputs
from llada_jax.data.text import BLOCK_BYTES, Cut, _lines, check_cut, read_documents
from llada_jax.errors import UserError

TEXTS = ["first\nof two lines\n", "", "third: é \u2581 \U0001f600\r\n", "last without line feed"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
COMPRESS |= {".bz2": bz2.compress, ".zst": zstandard.compress}
AS_FILES, AS_LINES = Cut(), Cut(documents="line")


def write(path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESS["" if path.suffix in (".txt", ".jsonl") else path.suffix](data))
    return str(path)


def jsonl(records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


# ---- formats


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, compression):
    path = write(tmp_path / f"a.txt{compression}", TEXTS[2].encode())
    assert list(read_documents(path, AS_FILES)) == [TEXTS[2]]


@pytest.mark.parametrize("compression", COMPRESS)
def test_lines_are_documents_without_their_ends(tmp_path, compression):
    path = write(tmp_path / f"a.txt{compression}", b"one\ntwo\r\n\nfour\rstill four")
    assert list(read_documents(path, AS_LINES)) == ["one", "two", "", "four\rstill four"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_jsonl_records_are_documents(tmp_path, compression):
    data = jsonl({"id": i, "body": text} for i, text in enumerate(TEXTS)) + b'\n  \n{"body": null}'
    path = write(tmp_path / f"a.jsonl{compression}", data)
    assert list(read_documents(path, Cut(text_field="body"))) == [*TEXTS, ""]


def test_parquet_rows_are_documents(tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"id": [0, 1, 2, 3, 4], "body": [*TEXTS, None]}), path, row_group_size=2
    )
    assert list(read_documents(path, Cut(text_field="body"))) == [*TEXTS, ""]


def test_several_frames_and_members_are_one_file(tmp_path):
    for suffix in (".gz", ".xz", ".bz2", ".zst"):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(COMPRESS[suffix](b"one ") + COMPRESS[suffix](b"two"))
        assert list(read_documents(str(path), AS_FILES)) == ["one two"]


def test_a_matching_line_begins_a_document_and_nothing_is_lost(tmp_path):
    text = "title\n\nCHAPTER I\nCHAPTERS are not a match\r\nCHAPTER II\r\nend"
    path = write(tmp_path / "a.txt", text.encode())
    documents = list(read_documents(path, Cut(document_start="^CHAPTER [IVX]+$")))
    assert documents == [
        "title\n\n",
        "CHAPTER I\nCHAPTERS are not a match\r\n",
        "CHAPTER II\r\nend",
    ]
    starts_at_once = write(tmp_path / "b.txt", b"CHAPTER I\na\nCHAPTER II\n")
    assert list(read_documents(starts_at_once, Cut(document_start="^CHAPTER"))) == [
        "CHAPTER I\na\n",
        "CHAPTER II\n",
    ]


@given(
    data=st.binary(max_size=60).map(lambda b: b.replace(b"x", b"\n")),
    sizes=st.lists(st.integers(0, 7), min_size=1),
)
@settings(max_examples=200)
def test_lines_do_not_depend_on_the_blocks(data, sizes):
    blocks, position = [], 0
    while position < len(data):
        size = sizes[len(blocks) % len(sizes)] or 1
        blocks.append(data[position : position + size])
        position += size
    assert list(_lines(iter(blocks))) == [line + b"\n" for line in data.split(b"\n")[:-1]] + (
        [data.split(b"\n")[-1]] if data.split(b"\n")[-1] else []
    )


@pytest.mark.parametrize("compression", COMPRESS)
def test_the_bytes_reported_as_read_add_up_to_the_file(tmp_path, compression):
    path = write(tmp_path / f"a.txt{compression}", bytes(range(32, 127)) * 40_000)
    read = []
    for _ in read_documents(path, AS_FILES, read.append):
        pass
    assert sum(read) == find_inputs([path])[0].size


def test_the_rows_reported_as_read_add_up_to_the_parquet_file(tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["row"] * 1000}), path)
    read = []
    assert len(list(read_documents(path, AS_FILES, read.append))) == 1000
    assert sum(read) == find_inputs([path])[0].size


# ---- memory


def peak_bytes(path: str, cut: Cut) -> int:
    tracemalloc.start()
    try:
        for _ in read_documents(path, cut):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def lines() -> bytes:
    """50,000 JSON records of 333 bytes, 17 MB, which no compression shortens below half."""
    digits = random.Random(0).randbytes(160 * 50_000).hex().encode()
    return b"".join(b'{"text": "%s"}\n' % digits[i : i + 320] for i in range(0, len(digits), 320))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cut"), [("a.txt", AS_LINES), ("a.txt.zst", AS_LINES), ("a.jsonl.gz", AS_FILES)]
)
def test_memory_does_not_grow_with_the_file(tmp_path, lines, name, cut):
    path = write(tmp_path / name, lines)
    assert peak_bytes(path, cut) < 5 * BLOCK_BYTES < len(lines) / 3


def test_memory_does_not_grow_with_the_sections_of_a_file(tmp_path, lines):
    path = write(tmp_path / "a.txt", lines)
    assert peak_bytes(path, Cut(document_start="0000")) < 5 * BLOCK_BYTES < len(lines) / 3


def test_a_line_of_many_blocks_is_read_in_linear_time_and_memory(tmp_path):
    path = write(tmp_path / "a.txt", b"x" * (32 * BLOCK_BYTES))
    assert peak_bytes(path, AS_LINES) < 5 * 32 * BLOCK_BYTES


# ---- finding files


def names(inputs) -> list[str]:
    return [input_.path.rsplit("/", 1)[-1] for input_ in inputs]


def test_directories_globs_and_files_are_found_sorted_and_once(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.jsonl.zst", "deep/README.md", "weird[1].txt"):
        write(tmp_path / name, b"x") if name[-3:] != ".md" else (tmp_path / name).write_text("x")
    assert names(find_inputs([str(tmp_path)])) == ["a.txt", "b.txt", "c.jsonl.zst", "weird[1].txt"]
    assert names(find_inputs([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")])) == [
        "a.txt",
        "b.txt",
        "weird[1].txt",
    ]
    assert names(find_inputs([str(tmp_path / "**" / "*.zst")])) == ["c.jsonl.zst"]
    assert names(find_inputs([str(tmp_path / "weird[1].txt")])) == ["weird[1].txt"]


@pytest.mark.parametrize("pattern", ["absent.txt", "*.absent", "empty"])
def test_a_pattern_without_files_is_refused(tmp_path, pattern):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="matches no file"):
        find_inputs([str(tmp_path / pattern)])


@pytest.mark.parametrize("name", ["a.md", "a.txt.lz4", "a.parquet.gz", "txt"])
def test_a_file_of_unknown_format_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(bz2.compress(b"x"))
    with pytest.raises(UserError, match="has an unknown format"):
        find_inputs([str(tmp_path / name)])


def test_a_rewritten_file_has_another_identity(tmp_path):
    path = write(tmp_path / "a.txt", b"one")
    before = find_inputs([path])[0].identity
    assert find_inputs([path])[0].identity == before
    write(tmp_path / "a.txt", b"two!")
    assert find_inputs([path])[0].identity != before


# ---- URLs


def test_remote_files_globs_and_directories_are_read_through_fsspec(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.txt", b"in memory")
    memory.pipe("/corpus/deep/b.jsonl.gz", gzip.compress(jsonl([{"text": "packed"}])))
    memory.pipe("/corpus/c.md", b"skipped")
    try:
        found = find_inputs(["memory://corpus"])
        assert names(found) == ["a.txt", "b.jsonl.gz"]
        assert names(find_inputs(["memory://corpus/*.txt"])) == ["a.txt"]
        assert [list(read_documents(i.path, AS_FILES)) for i in found] == [
            ["in memory"],
            ["packed"],
        ]
        with pytest.raises(UserError, match="matches no file"):
            find_inputs(["memory://corpus/absent.txt"])
    finally:
        memory.rm("/corpus", recursive=True)


def test_a_file_url_gives_what_the_path_gives(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    (found,) = find_inputs([f"file://{tmp_path}/a.parquet"])
    assert list(read_documents(found.path, AS_FILES)) == TEXTS


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UserError, match="nowhere"):
        find_inputs(["nowhere://bucket/a.txt"])


# ---- defects


@pytest.mark.parametrize("cut", [AS_FILES, AS_LINES, Cut(document_start="^b")])
def test_invalid_utf8_names_file_byte_and_line(tmp_path, cut):
    path = write(tmp_path / "a.txt", "é\nbb\n".encode() + b"c\xff\n")
    with pytest.raises(UserError, match=r"a\.txt is not valid UTF-8 at byte 7 \(line 3\)"):
        list(read_documents(path, cut))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", r"a\.jsonl:2 is not valid JSON"),
        ('{"body": "x", "id": 3}', r"a\.jsonl:2 has no field 'text' \(its fields: body, id\)"),
        ('["text"]', r"a\.jsonl:2 has no field 'text' .*not a JSON object"),
        ('{"text": 5}', r"a\.jsonl:2: 'text' is a int, not text"),
        ('{"text": "\\ud800"}', r"a\.jsonl:2: 'text' holds half of a surrogate pair"),
    ],
)
def test_a_bad_record_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + line.encode() + b"\n")
    with pytest.raises(UserError, match=message):
        list(read_documents(path, AS_FILES))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_truncated_and_damaged_compression_is_refused(tmp_path, suffix):
    whole = COMPRESS[suffix](bytes(range(32, 127)) * 1000)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(whole[:-7])
    with pytest.raises(UserError, match=r"a\.txt\S+ is truncated"):
        list(read_documents(str(path), AS_FILES))
    path.write_bytes(b"no such magic" + whole)
    with pytest.raises(UserError, match=r"a\.txt\S+ is damaged"):
        list(read_documents(str(path), AS_FILES))


def test_a_missing_or_wrong_column_and_a_cut_parquet_file_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    with pytest.raises(UserError, match=r"no column 'text' \(its columns: body, id\)"):
        list(read_documents(str(path), AS_FILES))
    with pytest.raises(UserError, match="row 0: 'id' is a int"):
        list(read_documents(str(path), Cut(text_field="id")))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        list(read_documents(str(path), AS_FILES))


def test_a_parquet_file_without_content_is_damaged_and_not_unreadable(tmp_path):
    path = tmp_path / "a.parquet"
    # the marks at both ends, as of a copy that was interrupted; pyarrow raises OSError
    path.write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    with pytest.raises(UserError, match=r"a.parquet is damaged \(.*\); fetch or write") as refused:
        list(read_documents(str(path), AS_FILES))
    assert "\n" not in str(refused.value)


def test_a_file_that_vanished_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt.* cannot be read"):
        list(read_documents(str(tmp_path / "gone.txt"), AS_FILES))


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    [
        ("a.txt", Cut(documents="record"), "does not fit .txt"),
        ("a.jsonl", Cut(documents="line"), "--documents line does not fit"),
        ("a.jsonl", Cut(document_start="^x"), "--document-start does not fit"),
        ("a.txt", Cut(document_start="(", documents=""), "not a regular expression"),
        ("a.txt", Cut(document_start="^x", documents="line"), "contradict"),
    ],
)
def test_a_cut_that_does_not_fit_the_format_is_refused(tmp_path, name, cut, message):
    inputs = find_inputs([write(tmp_path / name, b"")])
    with pytest.raises(UserError, match=message):
        check_cut(inputs, cut)


def test_optional_libraries_are_named_with_their_extra(tmp_path, monkeypatch):
    import sys

    path = write(tmp_path / "a.txt.zst", b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match=r"llada_jax\[data\]"):
        list(read_documents(path, AS_FILES))
