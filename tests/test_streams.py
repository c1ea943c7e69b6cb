"""Lines of several threads on one stream, and results that a stream cannot hold."""

import ast
import io
import os
import sys
import threading
from pathlib import Path

import pytest

import llada_jax
from llada_jax.errors import UserError
from llada_jax.streams import Result, write_line

# As many as a pipe holds, so that no reader is needed meanwhile.
NUM_LINES = 300


@pytest.fixture
def eager_switches():
    """Lets threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_lines_of_several_threads_stay_whole(eager_switches):
    reader, writer = os.pipe()
    # as stderr is under PYTHONUNBUFFERED, which the launchers of GKE and of TPU VMs set
    with (
        open(reader) as result,
        io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True) as stream,
    ):
        start = threading.Barrier(4)

        def work(name: str) -> None:
            start.wait()
            for number in range(NUM_LINES):
                write_line(f"{name} says {number}", stream)

        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stream.close()
        lines = result.read().splitlines()
    assert sorted(lines) == sorted(f"{name} says {n}" for name in "abcd" for n in range(NUM_LINES))


def test_nothing_else_writes_lines_to_stderr():
    package = Path(llada_jax.__file__).parent
    found = {
        f"{file.relative_to(package)}:{node.lineno}"
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "print"
        # the prompt of `chat`, which is not a line, and the line that its end leaves open
        and file.name != "chat.py"
        and any(
            keyword.arg == "file" and ast.unparse(keyword.value) == "sys.stderr"
            for keyword in node.keywords
        )
    }
    assert not found, f"use streams.write_line: {sorted(found)}"


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "ö"), ("latin-1", "€")])
def test_a_result_that_the_encoding_of_stdout_does_not_have_is_refused(encoding, shown):
    stdout = Result(io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert stdout.write("fine") == 4
    sentence = f"encoding {encoding} does not have"
    with pytest.raises(UserError, match=f"{sentence} '{shown}'; set PYTHONIOENCODING=utf-8"):
        stdout.write(f"of 1 {shown}")
