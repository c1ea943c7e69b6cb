"""The files that prepare reads: found through paths, globs, directories and URLs, each once, with
what is left out.
"""

import contextlib
import glob
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from llada_jax.data.compression import READERS, compression_of
from llada_jax.errors import UserError, one_line, require

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = ("", *READERS)
# What a directory is searched for; upper case counts too.
SUFFIXES = tuple(f + c for f in FORMATS for c in COMPRESSIONS if f != ".parquet" or not c)
# Read as JSON lines when a file is named, as C4 and Dolma are published. In a directory .json is as
# often something else, such as a list of labels, and is left out.
NAMED_SUFFIXES = tuple(f".json{c}" for c in COMPRESSIONS)
# So many names are listed of what is left out.
_NUM_LISTED = 5


@dataclass(frozen=True)
class Input:
    """One file to read.

    Attributes:
        path: path or URL.
        size: bytes, as it is stored.
        version: changes when the file is rewritten: a modification time, or what a store has for
            it.
        span: (start, end) of the part of the file that this is, in bytes; None: all of it. `size`
            is then that of the part.
    """

    path: str
    size: int
    version: str
    span: tuple[int, int] | None = None

    @property
    def identity(self) -> list:
        """What distinguishes two inputs, for the fingerprints of what was made from them."""
        return [
            self.path if "://" in self.path else os.path.abspath(self.path),
            self.size,
            self.version,
            *([list(self.span)] if self.span else []),
        ]


def printable(text: str) -> str:
    r"""Returns a text that can be written as UTF-8: a byte of a file name that is not UTF-8 becomes
    \udce9, for example.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def format_of(path: str, form: str = "") -> str:
    """Returns "txt", "jsonl" or "parquet": what is given, or else what the name says.

    Raises:
        UserError: nothing is given and the name ends in no known suffix.
    """
    if form:
        return form
    for suffix in SUFFIXES + NAMED_SUFFIXES:
        if path.lower().endswith(suffix):
            return {"json": "jsonl"}.get(suffix.split(".")[1], suffix.split(".")[1])
    raise UserError(
        f"Input file {path!r} has an unknown format; its name must end in one of "
        f"{', '.join(SUFFIXES + NAMED_SUFFIXES)}, or --format must say what it holds."
    )


def find_inputs(
    patterns: list[str],
    form: str = "",
    on_note: Callable[[str], None] = lambda note: None,
    *,
    output: str = "",
) -> list[Input]:
    """Returns the files that paths, globs and directories (searched recursively) name, sorted, each
    once.

    Args:
        form: what all files hold, whatever their names say; all files of a directory that are not
            hidden, nor in a hidden folder, are then read.
        on_note: called with a sentence for each directory of which files are left out, and for each
            file that is named twice.
        output: a folder of which directories and globs give no file; "" for none.

    Raises:
        UserError: a pattern names no file, a broken link, a pipe or device, or a file whose name
            ends in none of SUFFIXES and NAMED_SUFFIXES.
    """
    found = {}
    own = os.path.realpath(output) if output else ""
    for pattern in patterns:
        find = _find_remote if "://" in pattern else _find_local
        matches, left_out = find(pattern, form, own)
        if not matches:
            others = f"; it holds {_listed(left_out)}, which need --format" if left_out else ""
            raise UserError(
                f"--input {pattern!r} matches no file; give files, globs or directories with files "
                f"that end in {', '.join(FORMATS)} (text also {', '.join(COMPRESSIONS[1:])})"
                f"{others}."
            )
        if left_out:
            on_note(
                f"{pattern} holds {_listed(left_out)}, which {_are(left_out)} skipped; name the "
                "files, or say with --format what they hold, to read them"
            )
        found.update({match.path: match for match in matches})
    return _each_once([found[path] for path in sorted(found)], form, on_note)


def _each_once(inputs: list[Input], form: str, on_note: Callable[[str], None]) -> list[Input]:
    """Leaves out files that are there under another name, such as through a link."""
    kept = {}
    for file in inputs:
        format_of(file.path, form)
        place = _place_of(file.path)
        if place in kept:
            on_note(f"{file.path} is the same file as {kept[place].path}, which is read once")
        kept.setdefault(place, file)
    return list(kept.values())


def _place_of(path: str) -> str:
    """Returns the one path of a file that may have several through links, or its URL."""
    path = path.removeprefix("file://")
    return path if "://" in path else os.path.realpath(path)


def _is_in(path: str, folder: str) -> bool:
    """Whether a path or URL lies in a folder or is it; `folder` is a real path, or "" for none."""
    return bool(folder) and f"{_place_of(path)}/".startswith(f"{folder}/")


def _listed(left_out: list[tuple[str, str]]) -> str:
    """Returns how many files of which kind are left out, with the names of the first."""
    kinds = Counter(why for _, why in left_out)
    count = f"{len(left_out):,} other file{'s' * (len(left_out) > 1)}"
    names = ", ".join(name for name, _ in left_out[:_NUM_LISTED])
    more = ", ..." if len(left_out) > _NUM_LISTED else ""
    whys = ", ".join(f"{number:,} {why}" for why, number in kinds.most_common(_NUM_LISTED))
    return f"{count} ({whys}: {names}{more})"


def _are(left_out: list) -> str:
    return "are" if len(left_out) > 1 else "is"


def _why_skipped(path: str, form: str) -> str:
    """Returns why a directory does not give the file of this path below it; "" when it does."""
    name = path.rsplit("/", 1)[-1]
    if form:
        return "hidden" if "/." in f"/{path}" else ""
    if name.lower().endswith(SUFFIXES):
        return ""
    suffixes = name.lstrip(".").split(".")[1:]
    compressed = compression_of(name) and len(suffixes) > 1
    return f".{'.'.join(suffixes[-2:] if compressed else suffixes[-1:])}" if suffixes else "unknown"


def _find_local(pattern: str, form: str, own: str) -> tuple[list[Input], list[tuple[str, str]]]:
    left_out = []
    with _looking_at(pattern):
        if os.path.isdir(pattern):
            paths = []
            for folder, folders, names in os.walk(pattern, onerror=_raise):
                folders[:] = [f for f in folders if not _is_in(os.path.join(folder, f), own)]
                for name in folders:
                    # Not entered, because a link may lead in a circle.
                    if os.path.islink(os.path.join(folder, name)):
                        left_out.append((name, "link to a folder"))
                for name in names:
                    path = os.path.join(folder, name)
                    why = _why_skipped(path.removeprefix(pattern).lstrip("/"), form)
                    if not why and not os.path.isfile(path) and not os.path.islink(path):
                        why = "pipe or device"
                    if why:
                        left_out.append((name, why))
                    else:
                        paths.append(path)
        elif os.path.lexists(pattern):
            paths = [pattern]
        else:
            matches = glob.glob(pattern, recursive=True)
            paths = [p for p in matches if not os.path.isdir(p) and not _is_in(p, own)]
        inputs = []
        for path in paths:
            if os.path.islink(path) and not os.path.exists(path):
                raise UserError(
                    f"{path} is a broken link (to {os.readlink(path)}); restore what it points to, "
                    "or remove the link."
                )
            status = os.stat(path)
            # Others cannot be read twice, and reading a pipe may wait forever.
            if stat.S_ISREG(status.st_mode):
                inputs.append(
                    Input(os.path.normpath(path), status.st_size, str(status.st_mtime_ns))
                )
            elif path == pattern:
                raise UserError(
                    f"--input {pattern!r} is a pipe or device, which cannot be read again after an "
                    "interruption; write its content to a file and name that."
                )
    return inputs, sorted(left_out)


def _raise(error: OSError):
    raise error


def _find_remote(pattern: str, form: str, own: str) -> tuple[list[Input], list[tuple[str, str]]]:
    left_out = []
    with _looking_at(pattern):
        fs, path = require("fsspec", extra="data").core.url_to_fs(pattern)
        # Asked first: a "?" in a web address is not a wildcard, and a web page not a directory.
        if fs.isfile(path):
            infos = [fs.info(path)]
        elif fs.isdir(path):
            infos = []
            for info in fs.find(path, detail=True).values():
                if _is_in(fs.unstrip_protocol(info["name"]), own):
                    continue
                why = _why_skipped(info["name"].removeprefix(path).lstrip("/"), form)
                left_out += [(info["name"].rsplit("/", 1)[-1], why)] if why else []
                infos += [] if why else [info]
        else:
            infos = [
                info
                for info in fs.glob(path, detail=True).values()
                if info["type"] == "file" and not _is_in(fs.unstrip_protocol(info["name"]), own)
            ]
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
    return inputs, sorted(left_out)


@contextlib.contextmanager
def _looking_at(pattern: str):
    """Turns whatever a file system raises for a path or URL into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (refusal := unreadable(pattern, error)) is None:
            raise
        raise refusal from error


def unreadable(path: str, error: Exception) -> UserError | None:
    """Returns the UserError for what was raised when a path or URL was read; None for a fault of
    this program.
    """
    if isinstance(error, (OSError, ImportError)):
        return UserError(
            f"{path} cannot be read: {one_line(str(error))}; check the path and its permissions."
        )
    # The file systems behind URLs share no class of errors.
    if "://" in path:
        library = type(error).__module__.split(".")[0]
        return UserError(
            f"{path} cannot be read: {library}: {one_line(str(error))}; check the address and "
            "credentials."
        )
    return None
