"""Readers of raw text (.txt, .jsonl, .parquet; plain or compressed; local or behind a URL) as
streams of documents.

Nothing here holds more than one document and one block of BLOCK_BYTES of a file in memory.
"""

import contextlib
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from llada_jax.data.compression import (
    BLOCK_BYTES,
    Damaged,
    compression_of,
    decompressed,
    plain_blocks,
)
from llada_jax.data.inputs import Input, format_of, unreadable
from llada_jax.errors import UserError, reason, require

# Some editors write it where a file begins, to say that it is UTF-8. It is not of the text.
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How files are cut into documents.

    Attributes:
        documents: "file", "line" or "record"; "": .txt by file, .jsonl and .parquet by record.
        text_field: the field of a .jsonl record, or column of a .parquet file, that holds the text.
        document_start: in .txt, a line in which this regular expression is found begins a new
            document; "" for none.
        form: "txt", "jsonl" or "parquet", what all files hold; "": what their names say.
    """

    documents: str = ""
    text_field: str = "text"
    document_start: str = ""
    form: str = ""


def check_cut(inputs: list[Input], cut: Cut) -> None:
    """Raises UserError when files of these formats cannot be cut into documents that way."""
    with_text = any(format_of(i.path, cut.form) == "txt" for i in inputs)
    other = next((i.path for i in inputs if format_of(i.path, cut.form) != "txt"), None)
    if cut.document_start:
        try:
            re.compile(cut.document_start)
        except re.error as error:
            raise UserError(
                f"--document-start {cut.document_start!r} is not a regular expression: {error}."
            ) from error
        if cut.documents:
            raise UserError(
                f"--document-start {cut.document_start!r} and --documents {cut.documents} "
                "contradict each other; keep one."
            )
        if other:
            raise UserError(
                f"--document-start does not fit {other!r}, which holds records; prepare it without."
            )
    if cut.documents == "record" and with_text:
        raise UserError(
            "--documents record does not fit .txt files, which have no records; use file or line."
        )
    if cut.documents in ("file", "line") and other:
        raise UserError(
            f"--documents {cut.documents} does not fit {other!r}, which holds records; use record."
        )


# ---- reading documents


class _Place(NamedTuple):
    """Where reading begins: the byte of the file, and the number of its line."""

    offset: int = 0
    line: int = 1


def is_seekable(path: str, cut: Cut) -> bool:
    """Whether a part of a file can be read without what stands before it: lines of plain text."""
    is_plain = "://" not in path and not compression_of(path)
    form = format_of(path, cut.form)
    has_lines = cut.documents == "line" or bool(cut.document_start)
    return is_plain and (form == "jsonl" or (form == "txt" and has_lines))


def read_documents(
    path: str,
    cut: Cut,
    on_read: Callable[[int], None] = lambda num_bytes: None,
    span: tuple[int, int] | None = None,
) -> Iterator[str]:
    """Yields the documents of one file in order, empty ones included.

    The documents of a .txt joined are the file again, without a byte order mark at its start, and
    with documents="line" without the line ends.

    Args:
        path: local path or URL.
        cut: how the file is cut.
        on_read: called with the bytes of the file (as stored) read since the last call.
        span: (start, end) in bytes: only the documents that begin there; the file is_seekable.

    Raises:
        UserError: the file is unreadable or truncated, is not valid UTF-8, has a line that is not
            JSON or a record without the field; the message names the place.
    """
    form = format_of(path, cut.form)
    if form == "parquet":
        return _parquet_documents(path, cut.text_field, on_read)
    if form == "txt" and not (cut.document_start or cut.documents == "line"):
        return _whole(path, _blocks(path, on_read))
    if span is None:
        return _documents_in_lines(path, form, cut, _blocks(path, on_read), _Place())
    return _documents_of_part(path, form, cut, on_read, span)


def _documents_in_lines(
    path: str, form: str, cut: Cut, blocks: Iterator[bytes], place: _Place
) -> Iterator[str]:
    lines = _text_lines(path, blocks, place)
    if form == "jsonl":
        return _jsonl_documents(path, lines, cut.text_field, place)
    if cut.document_start:
        return _sections(lines, re.compile(cut.document_start))
    return (line.removesuffix("\n").removesuffix("\r") for line in lines)


def _documents_of_part(
    path: str, form: str, cut: Cut, on_read: Callable[[int], None], span: tuple[int, int]
) -> Iterator[str]:
    start, end = (_first_document(path, cut, offset) for offset in span)
    # One document is longer than the part.
    if start >= end:
        return
    part = lambda: _blocks(path, on_read, (start, end))  # noqa: E731
    try:
        yield from _documents_in_lines(path, form, cut, part(), _Place(start))
    except UserError:
        # Which line it is takes counting all lines before, and so is found out only now.
        with _open(path) as file:
            number = 1 + sum(block.count(b"\n") for block in plain_blocks(file, end=start))
        for _ in _documents_in_lines(path, form, cut, part(), _Place(start, number)):
            pass
        raise


def _first_document(path: str, cut: Cut, offset: int) -> int:
    """Returns the byte at which the first document begins that does so at `offset` or later; the
    length of the file when there is none.
    """
    if not offset:
        return 0
    with _open(path) as file, _reading(path):
        # A document may begin right there, after the end of a line.
        file.seek(offset - 1)
        file.readline()
        if cut.document_start:
            begins, position = re.compile(cut.document_start), file.tell()
            while line := file.readline():
                if begins.search(line.decode(errors="replace").rstrip("\r\n")):
                    return position
                position = file.tell()
        return file.tell()


def read_records(
    path: str, form: str = "", on_read: Callable[[int], None] = lambda num_bytes: None
) -> Iterator[tuple[str, Any]]:
    """Yields (the place in words, the value) of each record of a .jsonl or .parquet file, whole.

    A value of a .jsonl file may be anything that JSON can say. Takes the arguments of
    `read_documents`; a .txt file, which has no records, is a UserError.
    """
    kind = format_of(path, form)
    if kind == "parquet":
        return _parquet_rows(path, "", on_read)
    if kind == "jsonl":
        return _jsonl_values(path, _text_lines(path, _blocks(path, on_read), _Place()), _Place())
    raise UserError(
        f"{path} is text, which has no records; give .jsonl or .parquet files, or say with "
        "--format what it holds."
    )


def _whole(path: str, blocks: Iterator[bytes]) -> Iterator[str]:
    data = b"".join(blocks)
    yield _decode(data, path=path, line=1, offset=0).removeprefix(BYTE_ORDER_MARK)


def _text_lines(path: str, blocks: Iterator[bytes], place: _Place) -> Iterator[str]:
    offset = place.offset
    for number, line in enumerate(_lines(blocks), start=place.line):
        text = _decode(line, path=path, line=number, offset=offset)
        yield text if offset else text.removeprefix(BYTE_ORDER_MARK)
        offset += len(line)


def _sections(text_lines: Iterator[str], document_start: re.Pattern) -> Iterator[str]:
    lines = []
    for line in text_lines:
        if lines and document_start.search(line.rstrip("\r\n")):
            yield "".join(lines)
            lines = []
        lines.append(line)
    yield "".join(lines)


def _jsonl_documents(path: str, lines: Iterator[str], field: str, place: _Place) -> Iterator[str]:
    for where, record in _jsonl_values(path, lines, place):
        if not isinstance(record, dict) or field not in record:
            fields = (
                ", ".join(record) if isinstance(record, dict) else "none, it is not a JSON object"
            )
            raise UserError(
                f"{where} has no field {field!r} (its fields: {fields}); name one with "
                "--text-field."
            )
        yield _checked_text(record[field], where=where, field=field)


def _jsonl_values(path: str, lines: Iterator[str], place: _Place) -> Iterator[tuple[str, Any]]:
    """Yields (path:line, what the line holds) for each line that is not blank."""
    for number, line in enumerate(lines, start=place.line):
        # Also within a file: behind each of several files that were joined.
        line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{where} is not valid JSON ({error}); a .json or .jsonl file has one object "
                "per line: fix or remove the line."
            ) from error
        except RecursionError as error:
            raise UserError(
                f"{where} has more brackets within brackets than Python can read; fix or remove "
                "the line."
            ) from error
        yield where, value


def _parquet_documents(path: str, field: str, on_read: Callable[[int], None]) -> Iterator[str]:
    for where, row in _parquet_rows(path, field, on_read):
        yield _checked_text(row[field], where=where, field=field)


def _parquet_rows(
    path: str, field: str, on_read: Callable[[int], None]
) -> Iterator[tuple[str, dict]]:
    """Yields (the place, {column: value}) of each row: of one column, or of all for ""."""
    parquet = require("pyarrow.parquet", extra="data")
    with _open(path) as file, _reading(path):
        size = file.seek(0, os.SEEK_END)
        # Read page by page: pre-buffering would load whole row groups, which may be as large as the
        # file.
        table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK_BYTES)
        if field and field not in table.schema_arrow.names:
            raise UserError(
                f"{path} has no column {field!r} (its columns: "
                f"{', '.join(table.schema_arrow.names)}); name one with --text-field."
            )
        done = 0
        for batch in table.iter_batches(batch_size=256, columns=[field] if field else None):
            for i, row in enumerate(batch.to_pylist(), start=done):
                yield f"{path}, row {i}", row
            before, done = done, done + batch.num_rows
            on_read(
                size * done // table.metadata.num_rows - size * before // table.metadata.num_rows
            )


def _checked_text(value, *, where: str, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {field!r} is a {type(value).__name__}, not text; name another with "
            "--text-field."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {field!r} holds half of a surrogate pair at character {error.start}, which "
            "is not Unicode text; fix or remove the record."
        ) from error
    return value


def _decode(data: bytes, *, path: str, line: int, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(
            f"{path} is not valid UTF-8 at byte {offset + error.start} (line {line}): "
            f"{error.reason}; convert the file, for example with iconv -t UTF-8."
        ) from error


# ---- bytes


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yields lines with their line feed; a line may span any number of blocks."""
    parts = []
    for block in blocks:
        first, *rest = block.split(b"\n")
        parts.append(first)
        if not rest:
            continue
        yield b"".join(parts) + b"\n"
        for line in rest[:-1]:
            yield line + b"\n"
        parts = [rest[-1]]
    last = b"".join(parts)
    if last:
        yield last


def _blocks(
    path: str, on_read: Callable[[int], None], span: tuple[int, int] | None = None
) -> Iterator[bytes]:
    """Yields the decompressed content of a file in blocks, or these bytes of a plain one."""
    with _open(path) as file, _reading(path):
        position = file.seek(span[0]) if span else 0
        for block in plain_blocks(file, end=span[1]) if span else decompressed(file, path):
            on_read(file.tell() - position)
            position = file.tell()
            yield block


@contextlib.contextmanager
def _open(path: str):
    """Opens a path or URL for reading bytes."""
    with contextlib.ExitStack() as stack:
        with _reading(path):
            if "://" in path:
                file = stack.enter_context(require("fsspec", extra="data").open(path, "rb"))
            else:
                file = stack.enter_context(open(path, "rb"))
        yield file


@contextlib.contextmanager
def _reading(path: str):
    """Turns whatever the readers raise for an unreadable file into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except EOFError as error:
        raise UserError(f"{path} is truncated ({error}); fetch or compress it again.") from error
    except (Damaged, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); fetch or compress it again.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid UTF-8 ({error}); write it again as UTF-8.") from error
    except Exception as error:
        library = type(error).__module__.split(".")[0]
        # pyarrow raises OSError, too; what the system refuses has a number
        is_of_pyarrow = isinstance(error, OSError) and error.errno is None and "://" not in path
        if library in ("pyarrow", "zstandard") or is_of_pyarrow:
            raise UserError(
                f"{path} is damaged ({reason(error)}); fetch or write it again."
            ) from error
        if (refusal := unreadable(path, error)) is None:
            raise
        raise refusal from error
