"""Files and directories that appear whole or not at all, kills at every step included."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
from etils import epath
from support.required import library

from llada_jax.errors import UserError
from llada_jax.storage import files

# ---- files


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("concurrent", [True, False])
def test_a_whole_write_replaces_the_old_content_and_leaves_nothing_else(
    tmp_path, durable, concurrent
):
    path = tmp_path / "record.json"
    files.write_whole(path, "old", durable=durable, concurrent=concurrent)
    files.write_whole(path, "ünew", durable=durable, concurrent=concurrent)
    assert path.read_bytes() == "ünew".encode()
    assert os.listdir(tmp_path) == ["record.json"]


def test_bytes_are_written_as_they_are(tmp_path):
    files.write_whole(tmp_path / "raw", b"\xff\r\n\0")
    assert (tmp_path / "raw").read_bytes() == b"\xff\r\n\0"


def test_a_write_that_fails_keeps_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "shard"
    path.write_text("old")

    def interrupted():
        with files.whole_file(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["shard"]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("old")
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, sys\n"
            "from llada_jax.storage import files\n"
            "with files.whole_file(sys.argv[1]) as partial:\n"
            "    partial.write_text('half')\n"
            "    os.kill(os.getpid(), 9)\n",
            str(path),
        ],
        check=False,
    )
    assert killed.returncode == -9
    assert path.read_text() == "old"
    files.write_whole(path, "new")  # what the killed process left is not in the way, nor kept
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["record.json"]


def test_concurrent_writers_do_not_touch_each_others_partial_files(tmp_path):
    path = tmp_path / "sweep.json"
    with files.whole_file(path, concurrent=True) as first:
        first.write_text("first")
        files.write_whole(path, "second", concurrent=True)
        assert first.read_text() == "first"
    assert path.read_text() == "first"  # the last one to finish


# ---- durability


def recorded(monkeypatch) -> list[str]:
    """Returns the list in which fsync and rename are noted from here on, with the name."""
    events = []
    fsync = os.fsync

    def noted_fsync(descriptor):
        events.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    cls = type(epath.Path("/"))

    def noted(method):
        def move(self, target):
            events.append(f"{self.name} -> {epath.Path(target).name}")
            return method(self, target)

        return move

    monkeypatch.setattr(cls, "replace", noted(cls.replace))
    monkeypatch.setattr(cls, "rename", noted(cls.rename))
    return events


def test_the_bytes_reach_the_disk_before_the_name_and_the_name_before_the_call_returns(
    tmp_path, monkeypatch
):
    events = recorded(monkeypatch)
    files.write_whole(tmp_path / "a", "text")
    assert events == ["sync a.partial", "a.partial -> a", f"sync {tmp_path.name}"]


def test_a_write_that_need_not_be_durable_waits_for_no_disk(tmp_path, monkeypatch):
    events = recorded(monkeypatch)
    files.write_whole(tmp_path / "a", "text", durable=False)
    with files.whole_directory(tmp_path / "d", durable=False) as partial:
        (partial / "x").write_text("x")
    assert events == ["a.partial -> a", "d.partial -> d"]


def test_every_file_of_a_directory_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    events = recorded(monkeypatch)
    with files.whole_directory(tmp_path / "d") as partial:
        (partial / "x").write_text("x")
        (partial / "below").mkdir()
        (partial / "below" / "y").write_text("y")
    assert set(events[:4]) == {"sync x", "sync y", "sync below", "sync d.partial"}
    assert events[4:] == ["d.partial -> d", f"sync {tmp_path.name}"]


@pytest.mark.parametrize(
    ("number", "is_refused"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)]
)
def test_a_file_system_that_cannot_sync_directories_is_accepted_and_a_broken_one_is_not(
    tmp_path, monkeypatch, number, is_refused
):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if is_refused:
        with pytest.raises(OSError, match="Input/output"):
            files.sync(tmp_path)
    else:
        files.sync(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):  # the bytes of a file are another matter
        files.sync(tmp_path / "file")


# ---- directories


def filled(path, text: str):
    path.mkdir()
    (path / "content").write_text(text)
    return path


def test_a_directory_replaces_the_older_one_whole(tmp_path):
    path = filled(tmp_path / "d", "old")
    (path / "only in the old one").write_text("")
    filled(tmp_path / "d.partial", "of a process that was killed")
    with files.whole_directory(path) as partial:
        assert os.listdir(partial) == []
        (partial / "content").write_text("new")
        assert (path / "content").read_text() == "old"
    assert (path / "content").read_text() == "new"
    assert os.listdir(path) == ["content"]
    assert os.listdir(tmp_path) == ["d"]


def test_a_directory_that_fails_leaves_the_older_one(tmp_path):
    path = filled(tmp_path / "d", "old")

    def interrupted():
        with files.whole_directory(path) as partial:
            (partial / "content").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path / "content").read_text() == "old"
    assert os.listdir(tmp_path) == ["d"]


def test_a_kill_between_the_two_renames_loses_neither_directory(tmp_path, monkeypatch):
    path = filled(tmp_path / "d", "old")
    events = recorded(monkeypatch)
    with files.whole_directory(path, durable=False) as partial:
        (partial / "content").write_text("old")
    assert events == ["d -> d.replaced", "d.partial -> d"]
    path.rename(tmp_path / "d.replaced")  # what take_name has done when it is killed
    with pytest.raises(OSError, match="full"), files.whole_directory(path):
        raise OSError("the disk is full")
    assert (path / "content").read_text() == "old"
    # killed after both renames: the new one stays, the older one is only cleaned up
    shutil.copytree(path, tmp_path / "d.replaced")
    (path / "content").write_text("new")
    files.undo_replacement(path)
    assert (path / "content").read_text() == "new"
    assert os.listdir(tmp_path) == ["d"]


def test_the_sizes_in_a_folder_are_those_of_its_files_alone(tmp_path):
    # fsspec's file system in memory stands in for a bucket
    for folder in (str(tmp_path), f"memory:/{tmp_path}"):
        filesystem, path = library("fsspec.core").url_to_fs(folder)
        filesystem.mkdirs(f"{path}/below", exist_ok=True)
        for name in ("a", "below/b"):
            filesystem.pipe_file(f"{path}/{name}", name.encode())
        assert files.sizes_in(folder) == {"a": 1}
        assert files.sizes_in(f"{folder}/not there") == {}


# ---- refusals


def test_a_folder_whose_files_go_one_after_the_other_is_going_and_one_that_stays_is_not(
    tmp_path, monkeypatch
):
    (tmp_path / "step").mkdir()
    for name in "abcde":
        (tmp_path / "step" / name).write_text(name)
    waits = []

    def wait(_):
        waits.append(1)
        # as a run that removes an old step, with long waits of the disk in between
        if len(waits) % 5 == 0:
            left = sorted((tmp_path / "step").iterdir())
            left[0].unlink() if left else (tmp_path / "step").rmdir()

    clock = lambda: 0.2 * len(waits)  # noqa: E731
    monkeypatch.setattr(files.time, "sleep", wait)
    monkeypatch.setattr(files.time, "monotonic", clock)
    monkeypatch.setattr(files, "QUIET_SECONDS", 1.1)
    assert files.is_going(tmp_path / "step")
    filled(tmp_path / "other", "a")
    monkeypatch.setattr(files.time, "sleep", lambda _: waits.append(1))
    assert not files.is_going(tmp_path / "other")


def test_a_refusal_names_what_was_written_the_reason_and_the_remedy(tmp_path):
    missing = tmp_path / "nowhere" / "file"
    with (
        pytest.raises(UserError) as caught,
        files.writing(f"--output {tmp_path}", remedy="give another"),
    ):
        files.write_whole(missing, "text")
    assert str(caught.value) == (
        f"--output {tmp_path} cannot be written ({missing}.partial: No such file or directory); "
        "give another."
    )


def test_a_full_disk_has_no_file_name_and_is_reported_all_the_same():
    with (
        pytest.raises(UserError) as caught,
        files.writing("/dev/full", remedy="free some space"),
        open("/dev/full", "w") as file,
    ):
        file.write("x")  # refused when it is flushed, as by a full disk
    assert str(caught.value) == (
        "/dev/full cannot be written (No space left on device); free some space."
    )


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (lambda folder: folder.read_bytes(), "Is a directory"),
        (lambda folder: (folder / "absent").read_text(), "No such file or directory"),
        # The clients of buckets raise OSErrors without a number, whose strerror is None.
        (lambda folder: (_ for _ in ()).throw(OSError("the bucket hung up")), "the bucket hung up"),
        (lambda folder: b"\xff".decode(), "'utf-8' codec can't decode byte 0xff in position 0"),
    ],
    ids=["directory", "absent", "bucket", "text"],
)
def test_what_cannot_be_read_is_named_with_the_reason_and_the_remedy(failure, said, tmp_path):
    with pytest.raises(UserError) as caught, files.reading("FILE", remedy="give another"):
        failure(tmp_path)
    assert str(caught.value).startswith(f"FILE cannot be read ({said}")
    assert str(caught.value).endswith("); give another.")


def test_other_errors_pass_through():
    with pytest.raises(KeyError), files.writing("x", remedy="y"):
        raise KeyError
    with pytest.raises(KeyError), files.reading("x", remedy="y"):
        raise KeyError
    with pytest.raises(UserError, match="^mine$"), files.writing("x", remedy="y"):
        raise UserError("mine")
