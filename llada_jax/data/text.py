"""Readers of raw text (.txt, .jsonl, .parquet; plain or compressed; local or behind a URL) as
streams of documents.

Nothing here holds more than one document and one block of BLOCK_BYTES of a file in memory.
"""

import contextlib
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llada_jax.data.compression import BLOCK_BYTES, READERS, Damaged, decompressed
from llada_jax.errors import UserError, require

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = ("", *READERS)
SUFFIXES = tuple(f + c for f in FORMATS for c in COMPRESSIONS if f != ".parquet" or not c)


@dataclass(frozen=True)
class Input:
    """One file to read.

    Attributes:
        path: path or URL.
        size: bytes, as it is stored.
        version: changes when the file is rewritten: a modification time, or what a store has for
            it.
    """

    path: str
    size: int
    version: str

    @property
    def identity(self) -> list:
        """What distinguishes two inputs, for the fingerprints of what was made from them."""
        return [
            self.path if "://" in self.path else os.path.abspath(self.path),
            self.size,
            self.version,
        ]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How files are cut into documents.

    Attributes:
        documents: "file", "line" or "record"; "": .txt by file, .jsonl and .parquet by record.
        text_field: the field of a .jsonl record, or column of a .parquet file, that holds the text.
        document_start: in .txt, a line in which this regular expression is found begins a new
            document; "" for none.
    """

    documents: str = ""
    text_field: str = "text"
    document_start: str = ""


# ---- finding files


def find_inputs(patterns: list[str]) -> list[Input]:
    """Returns the files that paths, globs and directories (searched recursively) name, sorted, each
    once.

    Raises:
        UserError: a pattern names no file, or a file whose name ends in none of SUFFIXES.
    """
    found = {}
    for pattern in patterns:
        matches = _find_remote(pattern) if "://" in pattern else _find_local(pattern)
        if not matches:
            raise UserError(
                f"--input {pattern!r} matches no file; give files, globs or directories with files "
                f"that end in {', '.join(FORMATS)} (text also {', '.join(COMPRESSIONS[1:])})."
            )
        found.update({match.path: match for match in matches})
    for path in found:
        _format_of(path)
    return [found[path] for path in sorted(found)]


def _find_local(pattern: str) -> list[Input]:
    if os.path.isdir(pattern):
        with _reading(pattern):
            paths = [
                os.path.join(folder, name)
                for folder, _, names in os.walk(pattern, onerror=_raise)
                for name in names
            ]
        paths = [path for path in paths if path.endswith(SUFFIXES)]
    elif os.path.isfile(pattern):
        paths = [pattern]
    else:
        paths = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    inputs = []
    for path in paths:
        stat = os.stat(path)
        inputs.append(Input(os.path.normpath(path), stat.st_size, str(stat.st_mtime_ns)))
    return inputs


def _raise(error: OSError):
    raise error


def _find_remote(pattern: str) -> list[Input]:
    with _reading(pattern):
        fs, path = require("fsspec", extra="data").core.url_to_fs(pattern)
        # Asked first: a "?" in a web address is not a wildcard, and a web page not a directory.
        if fs.isfile(path):
            infos = [fs.info(path)]
        elif fs.isdir(path):
            infos = [i for i in fs.find(path, detail=True).values() if i["name"].endswith(SUFFIXES)]
        else:
            infos = [i for i in fs.glob(path, detail=True).values() if i["type"] == "file"]
    inputs = []
    for info in infos:
        # Every file system has its own name for the version. Where it has none, only the size shows
        # that a file has changed.
        marks = [
            str(info[key])
            for key in ("ETag", "etag", "mtime", "LastModified", "created")
            if key in info
        ]
        inputs.append(
            Input(fs.unstrip_protocol(info["name"]), info["size"] or 0, "".join(marks[:1]))
        )
    return inputs


def _format_of(path: str) -> str:
    for suffix in SUFFIXES:
        if path.endswith(suffix):
            return "." + suffix.split(".")[1]
    raise UserError(
        f"Input file {path!r} has an unknown format; its name must end in one of "
        f"{', '.join(SUFFIXES)}."
    )


def check_cut(inputs: list[Input], cut: Cut) -> None:
    """Raises UserError when files of these formats cannot be cut into documents that way."""
    with_text = any(_format_of(i.path) == ".txt" for i in inputs)
    other = next((i.path for i in inputs if _format_of(i.path) != ".txt"), None)
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


def read_documents(
    path: str, cut: Cut, on_read: Callable[[int], None] = lambda num_bytes: None
) -> Iterator[str]:
    """Yields the documents of one file in order, empty ones included.

    The documents of a .txt joined are the file again, except that with documents="line" the line
    ends are gone.

    Args:
        path: local path or URL.
        cut: how the file is cut.
        on_read: called with the bytes of the file (as stored) read since the last call.

    Raises:
        UserError: the file is unreadable or truncated, is not valid UTF-8, has a line that is not
            JSON or a record without the field; the message names the place.
    """
    form = _format_of(path)
    if form == ".parquet":
        return _parquet_documents(path, cut.text_field, on_read)
    blocks = _blocks(path, on_read)
    if form == ".jsonl":
        return _jsonl_documents(path, blocks, cut.text_field)
    if cut.document_start:
        return _sections(path, blocks, re.compile(cut.document_start))
    if cut.documents == "line":
        return (line.removesuffix("\n").removesuffix("\r") for line in _text_lines(path, blocks))
    return _whole(path, blocks)


def _whole(path: str, blocks: Iterator[bytes]) -> Iterator[str]:
    data = b"".join(blocks)
    yield _decode(data, path=path, line=1, offset=0)


def _text_lines(path: str, blocks: Iterator[bytes]) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(_lines(blocks), start=1):
        yield _decode(line, path=path, line=number, offset=offset)
        offset += len(line)


def _sections(path: str, blocks: Iterator[bytes], document_start: re.Pattern) -> Iterator[str]:
    lines = []
    for line in _text_lines(path, blocks):
        if lines and document_start.search(line.rstrip("\r\n")):
            yield "".join(lines)
            lines = []
        lines.append(line)
    yield "".join(lines)


def _jsonl_documents(path: str, blocks: Iterator[bytes], field: str) -> Iterator[str]:
    for number, line in enumerate(_text_lines(path, blocks), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{where} is not valid JSON ({error}); fix or remove the line."
            ) from error
        if not isinstance(record, dict) or field not in record:
            fields = (
                ", ".join(record) if isinstance(record, dict) else "none, it is not a JSON object"
            )
            raise UserError(
                f"{where} has no field {field!r} (its fields: {fields}); name one with "
                "--text-field."
            )
        yield _checked_text(record[field], where=where, field=field)


def _parquet_documents(path: str, field: str, on_read: Callable[[int], None]) -> Iterator[str]:
    parquet = require("pyarrow.parquet", extra="data")
    with _open(path) as file, _reading(path):
        size = file.seek(0, os.SEEK_END)
        # Read page by page: pre-buffering would load whole row groups, which may be as large as the
        # file.
        table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK_BYTES)
        if field not in table.schema_arrow.names:
            raise UserError(
                f"{path} has no column {field!r} (its columns: "
                f"{', '.join(table.schema_arrow.names)}); name one with --text-field."
            )
        done = 0
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for i, text in enumerate(batch.column(0).to_pylist(), start=done):
                yield _checked_text(text, where=f"{path}, row {i}", field=field)
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


def _blocks(path: str, on_read: Callable[[int], None]) -> Iterator[bytes]:
    """Yields the decompressed content of a file in blocks."""
    with _open(path) as file, _reading(path):
        position = 0
        for block in decompressed(file, path):
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
    except (OSError, ImportError) as error:
        raise UserError(
            f"{path} cannot be read: {error}; check the path and its permissions."
        ) from error
    except Exception as error:
        library = type(error).__module__.split(".")[0]
        if library in ("pyarrow", "zstandard"):
            raise UserError(f"{path} is damaged ({error}); fetch or write it again.") from error
        # The file systems behind URLs share no class of errors.
        if "://" in path:
            raise UserError(
                f"{path} cannot be read: {library}: {error}; check the address and credentials."
            ) from error
        raise
