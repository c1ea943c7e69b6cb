"""Disks that are full or read-only: nothing is lost, and with room the same command continues."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support.mishaps import check_sentence, copy, prepare_argv, train_argv, tree
from support.processes import run_without_privileges
from support.runs import metric_lines

import llada_jax
from llada_jax.__main__ import main


def test_a_workdir_or_output_below_a_file_is_refused(home, tmp_path, refused):
    (tmp_path / "file").write_text("keep me")
    below = tmp_path / "file" / "run"
    says = [str(below), "cannot be written", "Not a directory", "another --workdir"]
    refused(train_argv(home, below), says=says, keeps=[tmp_path])
    says = ["cannot be written", "another --output"]
    refused(prepare_argv(home / "text.txt", below), says=says, keeps=[tmp_path])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("train", "run.json"),
        ("train", "rollbacks.json"),
        ("sample", "checkpoints"),
        ("sample", "checkpoints/4/params"),
        ("export", "tokenizer"),
        ("export", "tokenizer/special_ids.json"),
        ("export", ""),
    ],
)
def test_what_another_user_has_hidden_is_named(verb, path, home, tmp_path):
    run = copy(home / "run", tmp_path / "run")
    argv = {
        "train": train_argv(home, run),
        "sample": ["sample", "--checkpoint", str(run), "--gen-length", "1", "--steps", "1"],
        "export": ["export", "--checkpoint", str(run), "--output", str(tmp_path / "export")],
    }
    command = [sys.executable, "-m", "llada_jax", *argv[verb]]
    hidden = run / path
    if not hidden.exists():
        hidden.touch()  # the run was not rolled back
    mode = hidden.stat().st_mode
    hidden.chmod(0)
    try:
        ended = run_without_privileges(command)
    finally:
        hidden.chmod(mode)
    assert ended.returncode == 2, ended.stderr
    sentence = ended.stderr.splitlines()[-1]
    check_sentence(sentence, [str(hidden), "Permission denied", "change its permissions"])


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-f", "-n"])
def test_a_limit_of_the_shell_is_named(flag, home, tmp_path):
    limited = f'ulimit {flag} 30 && exec "$@"'
    command = ["bash", "-c", limited, "bash", sys.executable, "-m", "llada_jax"]
    command += train_argv(home, tmp_path / "run")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 2, ended.stderr
    says = ["could not be saved", f"raise the limit of this shell with ulimit {flag}"]
    check_sentence(ended.stderr.splitlines()[-1], says)


def fill(disk: Path, *, leave: int) -> Path:
    """Fills a disk except for so many bytes; returns the file to delete for room."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    filler.write_bytes(b"\0" * (free - leave))
    return filler


def test_a_read_only_workdir_or_output_is_refused_and_can_be_read(home, tmp_path, mount, refused):
    run = copy(home / "run", tmp_path / "run")
    read_only = mount("bind", run)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(read_only)], check=True)
    says = [str(read_only), "cannot be written", "Read-only file system", "another --workdir"]
    refused(train_argv(home, read_only), says=says, keeps=[run])
    refused(train_argv(home, read_only / "new"), says=says[1:], keeps=[run])
    says = ["cannot be written", "Read-only file system", "another --output"]
    refused(prepare_argv(home / "text.txt", read_only / "data"), says=says, keeps=[run])
    assert llada_jax.load(read_only).step == 4


def test_a_full_disk_stops_prepare_and_the_same_command_finishes_with_room(
    home, tmp_path, mount, refused
):
    disk = mount("size=2m")
    filler = fill(disk, leave=24 * 1024)
    argv = prepare_argv(home / "text.txt", disk / "data", "--documents", "line", "--heldout", "0.1")
    sentence = refused(argv, says=["cannot be written", "run prepare again"], is_late=True)
    assert "space" in sentence
    assert not (disk / "data" / "dataset.json").exists()
    filler.unlink()
    assert main(argv) == 0
    ours, straight = (
        {n: b for n, b in tree(d).items() if "receipts" not in n}
        for d in (disk / "data", home / "data")
    )
    assert ours == straight


def test_a_full_disk_stops_the_first_start_of_a_run(home, mount, refused):
    disk = mount("size=64k")
    fill(disk, leave=0)
    refused(
        train_argv(home, disk / "run"), says=["disk0/run", "No space left", "free"], is_late=True
    )


@pytest.mark.slow
def test_a_full_disk_never_costs_the_run_its_tokenizer_or_record(home, mount, refused):
    disk = mount("size=2m")
    run = copy(home / "run", disk / "run")
    argv = train_argv(home, run, "num_steps=60", "checkpoint.every_steps=60", "log.every_steps=1")
    # Without any room the run cannot even begin again; with room for a new run.json, which is
    # written next to the old one, it can, and comes as far as the metrics.
    page = os.statvfs(disk).f_bsize
    record = -(-(run / "run.json").stat().st_size // page) * page
    cases = {
        0: ["No space left", "free"],
        record: ["The metrics in", "No space left", "free some space", "same command"],
    }
    for leave, says in cases.items():
        filler = fill(disk, leave=leave)
        refused(
            argv, says=["disk", *says], keeps=[run / "checkpoints", run / "tokenizer"], is_late=True
        )
        assert json.loads((run / "run.json").read_text())["tokenizer"]["kind"] == "bytes"
        filler.unlink()
    assert main(argv) == 0
    assert sorted({line["step"] for line in metric_lines(run)}) == [2, 4, *range(5, 61)]


@pytest.mark.slow
def test_a_full_disk_stops_a_save_and_the_same_command_continues_with_room(
    home, tmp_path, mount, refused
):
    straight = tmp_path / "straight"
    assert main(train_argv(home, straight, "num_steps=8")) == 0
    disk = mount("size=2m")
    run = copy(home / "run", disk / "run")
    filler = fill(disk, leave=40 * 1024)
    argv = train_argv(home, run, "num_steps=8")
    says = ["Step 6 could not be saved", "last good step is 4", "free space", "same command again"]
    refused(
        argv, says=says, keeps=[run / "checkpoints" / "4", run / "checkpoints" / "2"], is_late=True
    )
    assert llada_jax.load(run).step == 4
    filler.unlink()
    assert main(argv) == 0
    jax.tree.map(
        np.testing.assert_array_equal, llada_jax.load(run).params, llada_jax.load(straight).params
    )
