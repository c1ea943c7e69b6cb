"""The command line of prepare: its summary, --json, --help and exit status, and the commands of the
docs.
"""

import json
import re
import subprocess
import sys

import pytest
from support.corpora import write_corpus
from support.paths import ROOT

from llada_jax.__main__ import main as llada_jax
from llada_jax.verbs.prepare import main


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["a,b", "lr=3", "a,b/c", "lr=3/"])
def test_an_output_that_a_config_would_read_as_a_mixture_is_refused(tmp_path, capsys, name):
    (tmp_path / "a.txt").write_text("text")
    flags = ["--input", str(tmp_path / "a.txt"), "--sequence-length", "8", "--tokenizer", "bytes"]
    assert llada_jax(["prepare", *flags, "--output", f"{tmp_path}/{name}"]) == 2
    assert "would read as a mixture of data sets" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_help_fits_one_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100


@pytest.mark.slow
def test_the_commands_of_the_data_documentation_run(tmp_path):
    root = ROOT
    blocks = re.findall(
        r"^```\n(.*?)^```", (root / "docs" / "data.md").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    commands = [block for block in blocks if block.startswith(("llada-jax", "mkdir", "python"))]
    assert len(commands) == 5
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
    assert (tmp_path / "runs/try/parts/dataset.json").exists()


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
