"""Workdirs and records in object stores, on emulators that listen on loopback: a run there is the
run on a disk, kills included.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from support.buckets import EMULATORS, emulated
from support.records import small_record
from support.required import library
from support.runs import assert_same_run
from support.states import abstract_of, saved_steps, small_state

from llada_jax.__main__ import main
from llada_jax.checkpoints.workdir import Checkpoints, find_checkpoint
from llada_jax.data.preparation import prepare
from llada_jax.errors import UserError
from llada_jax.storage import remote
from llada_jax.storage.arrays import s3_spec
from llada_jax.storage.remote import upload
from llada_jax.verbs.rollback import roll_back


@pytest.mark.slow
def test_a_bucket_that_does_not_answer_is_named_within_seconds(tmp_path):
    """What a host without a network sees: connections are taken, and nothing comes back."""
    library("gcsfs")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "llada_jax", "sample", "--checkpoint", "gs://bucket/run"],
            env={**os.environ, "STORAGE_EMULATOR_HOST": url},
            stderr=subprocess.PIPE,
            text=True,
        )
        line = process.stderr.readline()
        assert process.poll() is None  # it still waits
        process.kill()
        process.communicate()
    assert line.startswith("waiting     3 s for gs://bucket to answer")


@pytest.fixture(scope="module", params=list(EMULATORS))
def bucket(request, tmp_path_factory) -> str:
    """The URL of an empty bucket."""
    with emulated(request.param, tmp_path_factory.mktemp("emulator") / "log") as url:
        yield url


RUN = small_record()


def files_of(folder: str) -> set[str]:
    top = epath.Path(folder)
    found, folders = set(), [top]
    while folders:
        for path in folders.pop().iterdir():
            (
                folders.append
                if path.is_dir()
                else lambda p: found.add(str(p).removeprefix(f"{top}/"))
            )(path)
    return found


@pytest.mark.slow
def test_checkpoints_come_back_and_old_ones_are_removed_to_the_last_object(bucket):
    checkpoints = saved_steps(f"{bucket}/kept", 10, 20, 30)
    assert checkpoints.steps == [20, 30]
    assert {name.split("/")[0] for name in files_of(f"{bucket}/kept/checkpoints")} == {"20", "30"}
    state = Checkpoints(f"{bucket}/kept", owned=False).restore(30, abstract_of(small_state(0)))
    for actual, expected in zip(jax.tree.leaves(state), jax.tree.leaves(small_state(30))):
        np.testing.assert_array_equal(actual, expected)
    checkpoints.close()


@pytest.mark.slow
def test_a_step_whose_last_object_is_missing_was_never_saved(bucket):
    saved_steps(f"{bucket}/torn", 10, 20).close()
    (epath.Path(f"{bucket}/torn/checkpoints/20") / "commit_success.txt").unlink()
    assert find_checkpoint(f"{bucket}/torn")[1] == 10
    assert files_of(
        f"{bucket}/torn/checkpoints/20"
    )  # a reader removes nothing: it may be on its way
    again = Checkpoints(f"{bucket}/torn")
    assert again.steps == [10]
    again.save(small_state(20), RUN)
    again.close()
    assert find_checkpoint(f"{bucket}/torn@20")[1] == 20


@pytest.mark.slow
def test_nothing_is_renamed_because_a_folder_of_objects_cannot_be(bucket):
    saved_steps(f"{bucket}/names", 10).close()
    assert not [name for name in files_of(f"{bucket}/names") if "tmp" in name or "partial" in name]


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_back_also_when_the_call_before_was_interrupted(bucket, monkeypatch):
    run = f"{bucket}/back"
    saved_steps(run, 10, 20, 30, keep=9).close()
    epath.Path(f"{run}/metrics.jsonl").write_text('{"step": 10}\n{"step": 30}\n')
    whole = {step: files_of(f"{run}/checkpoints/{step}") for step in (20, 30)}
    filesystem = library("fsspec.core").url_to_fs(run)[0]
    removed, rm = [], filesystem.rm

    def fails_later(names, **flags):
        removed.append(names)
        if len(removed) == 2:  # the step no longer counts, and its other objects are there
            raise OSError("the network is gone")
        rm(names, **flags)

    monkeypatch.setattr(filesystem, "rm", fails_later)
    with pytest.raises(UserError, match="the network is gone"):
        roll_back(run, to=10)
    assert Checkpoints(run, owned=False).steps == [10, 20]
    assert files_of(f"{run}/checkpoints/30")
    # metrics.jsonl and rolled-back say that the run had come to step 30
    assert "back at step 10; the 20 batches after it" in roll_back(run, to=10)
    assert files_of(f"{run}/rolled-back/1") == {
        "metrics.jsonl",
        *(f"30/{name}" for name in whole[30]),
    }
    assert files_of(f"{run}/rolled-back/2") == {
        "metrics.jsonl",
        *(f"20/{name}" for name in whole[20]),
    }
    assert Checkpoints(run).steps == [10]
    assert epath.Path(f"{run}/metrics.jsonl").read_text() == '{"step": 10}\n'


def test_a_move_that_is_cut_short_leaves_one_folder_that_is_whole(monkeypatch):
    # fsspec's file system in memory stands in for a bucket
    source, target, mark = "memory://run/30", "memory://run/rolled-back/30", "mark"
    filesystem = library("fsspec.core").url_to_fs(source)[0]
    left = []

    def object_by_object(method):
        def call(*lists):
            for names in zip(*lists, strict=True):
                if not left:
                    raise OSError("the network is gone")
                left.pop()
                method(*names)

        return call

    for name in ("copy", "rm"):
        monkeypatch.setattr(filesystem, name, object_by_object(getattr(filesystem, name)))
    whole = {"a", "below/b", mark}
    for number in range(2 * len(whole) + 1):
        filesystem.store.clear()
        for name in whole:
            filesystem.pipe_file(f"{source}/{name}", b"content")
        left[:] = range(number)
        is_cut = number < 2 * len(whole)
        with pytest.raises(OSError, match="gone") if is_cut else contextlib.nullcontext():
            remote.move(source, target, mark=mark)
        found = [
            {name.removeprefix(top.removeprefix("memory:/") + "/") for name in filesystem.find(top)}
            for top in (source, target)
        ]
        marked = [names for names in found if mark in names]
        assert marked
        assert all(names == whole for names in marked)
    assert found == [set(), whole]


def test_a_folder_is_uploaded_with_its_subfolders(tmp_path):
    for name in ("a", "below/b"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text(name)
        (tmp_path / "to" / name).parent.mkdir(parents=True, exist_ok=True)
    upload(tmp_path / "from", tmp_path / "to")
    for name in ("a", "below/b"):
        assert (tmp_path / "to" / name).read_text() == name


@pytest.mark.slow
def test_the_older_of_two_writers_is_refused_at_its_next_save(bucket):
    older = saved_steps(f"{bucket}/claimed", 10)
    newer = Checkpoints(f"{bucket}/claimed")
    with pytest.raises(UserError, match="Another train has started"):
        older.save(small_state(20), RUN)
    newer.save(small_state(20), RUN)
    newer.close()


@pytest.mark.slow
def test_a_train_that_still_runs_is_refused_after_a_rollback(bucket):
    running = saved_steps(f"{bucket}/went-back", 10, 20)
    roll_back(f"{bucket}/went-back", to=10)
    with pytest.raises(UserError, match="or it was rolled back"):
        running.save(small_state(30), RUN)
    assert find_checkpoint(f"{bucket}/went-back")[1] == 10


def test_a_bucket_that_is_not_there_is_refused_in_a_sentence(bucket):
    with pytest.raises(UserError, match="create it, or check its name"):
        find_checkpoint(f"{bucket}-that-is-not-there/run")


def test_a_workdir_without_checkpoints_is_refused(bucket):
    with pytest.raises(UserError, match="holds no checkpoints"):
        find_checkpoint(f"{bucket}/nothing")


def test_a_corpus_in_a_bucket_becomes_the_dataset_of_the_same_files_on_a_disk(bucket, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, text in {"a.txt": "the first letter", "b.txt": "and the second"}.items():
        (corpus / name).write_text(text)
        epath.Path(f"{bucket}/corpus/{name}").write_text(text)
    settings = {"sequence_length": 8, "tokenizer": "bytes", "heldout": 0}
    on_disk = prepare([str(corpus)], tmp_path / "disk", **settings)
    for number, urls in enumerate((["corpus"], ["corpus/*.txt"], ["corpus/a.txt", "corpus/b.txt"])):
        remote = prepare(
            [f"{bucket}/{url}" for url in urls], tmp_path / f"remote{number}", **settings
        )
        assert remote["fingerprint"] == on_disk["fingerprint"]
        assert remote["splits"]["train"]["num_bytes"] == len("the first letterand the second")


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_killed_and_resumed_is_the_run_on_a_disk(
    bucket, runs, tmp_path, capsys
):
    words = [
        "num_steps=12",
        "schedule.name=cosine",
        "checkpoint.every_steps=3",
        "optimizer.ema_decay=0.9",
        "log.tensorboard=true",
    ]
    on_disk, workdir = runs.directory / "on-disk", f"{bucket}/run"
    if not on_disk.exists():
        runs.train(on_disk, *words)
    upload(runs.dataset, f"{bucket}/data")
    words += [f"data.path={bucket}/data"]
    process = runs.start(workdir, *words)
    log = ""
    while "step 10/12" not in log:  # the save of step 9 has waited for the one of step 6
        line = process.stderr.readline()
        assert line, log
        log += line
    process.kill()
    process.communicate()
    process = runs.start(workdir, *words)
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert f"start       step 6 of {workdir}" in log or f"start       step 9 of {workdir}" in log

    copy = tmp_path / "copy"
    for name in files_of(workdir):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(epath.Path(f"{workdir}/{name}").read_bytes())
    assert_same_run(copy, on_disk, step=12)
    assert json.loads((copy / "run.json").read_text())["config"]["num_steps"] == 12
    assert list((copy / "tensorboard").iterdir())

    texts = []
    for place in (workdir, on_disk):
        assert main(["sample", "--gen-length=8", "--steps=8", "--checkpoint", str(place)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_urls_are_remote_and_paths_are_not():
    assert remote.is_remote("gs://bucket/run")
    assert not remote.is_remote(Path("runs/tiny"))
    assert not remote.is_remote("runs/tiny")


def test_an_unknown_kind_of_url_names_those_that_are_known():
    with pytest.raises(UserError, match="'ftp'.* Known: gs, s3"):
        remote.path_of("ftp://host/run")


def test_a_missing_library_is_answered_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"pip install 'llada_jax\[s3\]'"):
        remote.path_of("s3://another-bucket/run")


def test_s3_goes_where_the_environment_says(monkeypatch):
    for name in (
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ACCESS_KEY_ID",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
    ):
        monkeypatch.delenv(name, raising=False)
    plain = {"driver": "s3", "bucket": "bucket", "path": "run/checkpoints/10"}
    assert s3_spec("s3:/bucket/run/checkpoints/10") == plain
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert s3_spec("s3://bucket/run/checkpoints/10") == plain | {
        "endpoint": "http://store:9000",
        "aws_region": "eu-west-1",
    }
