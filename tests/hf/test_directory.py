"""The directory of an export: whole or not at all, whatever was there before, and of one process or
of several.
"""

import contextlib

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from support.errors import error_of
from support.exports import ARCHITECTURES, export, write_checkpoint

from llada_jax.checkpoints.huggingface import HuggingFace
from llada_jax.cluster.sharding import one_device_mesh
from llada_jax.errors import UserError
from llada_jax.hf import read
from llada_jax.hf.directory import becoming, check_output
from llada_jax.hf.peft import ADAPTER_FILES
from llada_jax.models.model import abstract_parameters, make_model
from llada_jax.storage import files


def write(output, *names: str, ends_with: type[BaseException] | None = None) -> None:
    with becoming(output, force=True) as partial:
        for name in names:
            (partial / name).write_text(name)
        if ends_with:
            raise ends_with


def names_in(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_a_killed_export_has_left_is_not_part_of_the_next_one(tmp_path):
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    (partial / "custom_generate").mkdir(parents=True)
    for name in ("model.safetensors", "custom_generate/generate.py"):
        (partial / name).write_text("old")
    write(output, "config.json")
    assert names_in(output) == ["config.json"]
    assert names_in(tmp_path) == ["out"]


def test_an_export_that_fails_leaves_nothing_of_itself_and_what_was_there(tmp_path):
    output = tmp_path / "out"
    write(output, *ADAPTER_FILES)
    for failure in (UserError, KeyboardInterrupt):
        with pytest.raises(failure):
            write(output, "half", ends_with=failure)
        assert names_in(output) == sorted(ADAPTER_FILES)
        assert names_in(tmp_path) == ["out"]


def test_a_second_export_neither_writes_into_the_first_nor_removes_it(tmp_path):
    output = tmp_path / "out"
    with becoming(output, force=True) as partial:
        (partial / "config.json").write_text("")
        message = error_of(write, output, "other")
        assert f"Another export is writing into {partial}" in message
        assert names_in(partial) == ["config.json"]
    assert names_in(output) == ["config.json"]


def test_an_export_that_was_killed_between_two_renames_gives_the_old_one_back(tmp_path):
    output = tmp_path / "out"
    write(output, "old")
    output.rename(tmp_path / "out.replaced")
    with pytest.raises(UserError):
        write(output, ends_with=UserError)
    assert names_in(output) == ["old"]
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("index", [0, 1])
def test_a_failure_of_one_process_is_that_of_all(tmp_path, monkeypatch, index):
    """Two processes, of which the second fails while it is made or while it is filled."""
    asked = []

    def process_allgather(has_failed):
        asked.append(bool(has_failed))
        return np.array([has_failed, len(asked) == fails])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(multihost_utils, "process_allgather", process_allgather)
    for fails, done in ((1, 1), (2, 2), (None, 3)):
        asked.clear()
        output = tmp_path / f"out-{fails}"
        # that of the first process is on a disk that both share
        (tmp_path / f"{output.name}.partial").mkdir()
        if fails is None:
            write(output, "config.json")
        else:
            message = error_of(write, output, "config.json")
            assert f"{output} was not written, because process 1 failed" in message
        assert asked == [False] * done
        # the first process alone makes, renames and removes
        assert output.exists() == (index == 0 and fails is None)
        assert (tmp_path / f"{output.name}.partial").exists() == (index == 1)


def test_a_bucket_is_not_a_directory(tmp_path):
    message = error_of(check_output, "gs://bucket/out", force=True)
    assert "gs://bucket/out must be a local or mounted directory" in message


# ---- two exports, of which one ends where the other begins


def write_whole(output, text: str, *, force: bool) -> None:
    with becoming(output, force=force) as partial:
        for name in ADAPTER_FILES:
            (partial / name).write_text(text)


def test_an_export_that_another_has_finished_in_the_meantime_is_not_replaced(tmp_path):
    output = tmp_path / "out"
    check_output(str(output), force=False)
    write_whole(output, "first", force=False)
    with pytest.raises(UserError, match="holds an export already"):
        write_whole(output, "second", force=False)
    assert {(output / name).read_text() for name in ADAPTER_FILES} == {"first"}
    assert list(tmp_path.iterdir()) == [output]
    write_whole(output, "second", force=True)
    assert {(output / name).read_text() for name in ADAPTER_FILES} == {"second"}


def test_an_export_that_ends_leaves_what_the_next_one_has_begun(tmp_path, monkeypatch):
    output, until_end = tmp_path / "out", contextlib.ExitStack()
    take_name = files.take_name

    def taken(partial, path):
        take_name(partial, path)
        monkeypatch.undo()
        begun = until_end.enter_context(becoming(output, force=True))
        for name in ADAPTER_FILES:
            (begun / name).write_text("second")

    monkeypatch.setattr(files, "take_name", taken)
    write_whole(output, "first", force=False)
    until_end.close()
    assert {(output / name).read_text() for name in ADAPTER_FILES} == {"second"}


def test_a_directory_that_has_its_final_name_is_not_written_into(tmp_path, monkeypatch):
    """The next export may have opened it before, and gets the lock when the first lets it go."""
    output, partial = tmp_path / "out", tmp_path / "out.partial"

    def lock(descriptor, how):
        partial.rename(output)
        (output / "model.safetensors").write_text("first")
        return True

    monkeypatch.setattr("llada_jax.hf.directory.try_lock", lock)
    with pytest.raises(UserError, match="Another export is writing into"):
        write_whole(output, "second", force=True)
    assert (output / "model.safetensors").read_text() == "first"


def test_an_export_that_is_replaced_while_it_is_read_is_refused(tmp_path, monkeypatch):
    a, output = ARCHITECTURES["llada"], tmp_path / "out"
    abstract = abstract_parameters(make_model(a), one_device_mesh())
    for seed in (0, 1):
        params = jax.tree.map(lambda x, seed=seed: np.full(x.shape, seed, np.float32), abstract)
        export(write_checkpoint(tmp_path / f"run{seed}", a, params), tmp_path / f"out{seed}")
    files.take_name(tmp_path / "out0", output)
    found, read_one = HuggingFace(output, causal=False), read._read_parameter

    def read_and_replace(*args):
        if (tmp_path / "out1").exists():
            files.take_name(tmp_path / "out1", output)
        return read_one(*args)

    monkeypatch.setattr(read, "_read_parameter", read_and_replace)
    message = error_of(found.restore_params, 0, abstract)
    assert f"{output} was replaced while it was read" in message
    # as a second try finds it
    HuggingFace(output, causal=False).restore_params(0, abstract)
