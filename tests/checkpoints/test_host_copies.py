"""Copies on the disks of the hosts: what one gives back, and when it is not used."""

import json
import os
import shutil

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.records import small_record
from support.states import abstract_of, assert_same, mesh_of, saved_copies, state_at

from llada_jax.checkpoints import host_copies
from llada_jax.checkpoints.host_copies import LocalCheckpoints
from llada_jax.errors import UserError


@pytest.fixture
def mesh():
    return mesh_of(fsdp=4, tensor=2)


def test_the_newest_copy_comes_back_bit_for_bit_and_may_be_donated(tmp_path, mesh):
    saved_copies(tmp_path, mesh, 10, 20)
    state, record, note = LocalCheckpoints(tmp_path, "runs/a").restore(
        abstract_of(state_at(0, mesh)), newer_than=0
    )
    assert_same(state, state_at(20, mesh))
    assert (record, note) == (small_record(step=20), "")
    doubled = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf + leaf, s), donate_argnums=0)(state)
    assert int(doubled.step) == 40
    again, _, _ = LocalCheckpoints(tmp_path, "runs/a").restore(
        abstract_of(state_at(0, mesh)), newer_than=0
    )
    assert_same(again, state_at(20, mesh))


def test_a_slice_that_several_devices_hold_is_written_once(tmp_path, mesh):
    copies = saved_copies(tmp_path, mesh, 10)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state_at(10, mesh)))
    assert (copies.directory / "10.0-of-1" / "data").stat().st_size == size


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path, mesh):
    copies = LocalCheckpoints(tmp_path, "runs/a")
    state = state_at(10, mesh)
    copies.save(state, small_record())
    jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0, s), donate_argnums=0)(state)
    copies.close()
    state, _, _ = LocalCheckpoints(tmp_path, "runs/a").restore(
        abstract_of(state_at(0, mesh)), newer_than=0
    )
    assert_same(state, state_at(10, mesh))


def test_two_copies_are_kept_next_to_the_one_written_and_later_ones_can_be_given_up(tmp_path, mesh):
    copies = saved_copies(tmp_path, mesh, 10, 20, 30, 40)
    assert sorted(path.name for path in copies.directory.iterdir()) == [
        "20.0-of-1",
        "30.0-of-1",
        "40.0-of-1",
    ]
    copies.drop_after(20)
    assert [path.name for path in copies.directory.iterdir()] == ["20.0-of-1"]


def test_each_process_of_a_host_keeps_its_own_copies(tmp_path, mesh):
    copies = saved_copies(tmp_path, mesh, 10, 20)
    for step in (10, 20):
        (copies.directory / f"{step}.1-of-2").mkdir()
    saved_copies(tmp_path, mesh, 30)
    assert {path.name for path in copies.directory.glob("*-of-1")} == {
        "10.0-of-1",
        "20.0-of-1",
        "30.0-of-1",
    }


def test_the_newest_of_many_copies_is_used(tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(host_copies, "MAX_FOUND", 1)
    copies = saved_copies(tmp_path, mesh, 10, 20)
    state, _, _ = copies.restore(abstract_of(state_at(0, mesh)), newer_than=0)
    assert_same(state, state_at(20, mesh))


def test_runs_with_workdirs_of_the_same_name_do_not_share_copies(tmp_path, mesh):
    saved_copies(tmp_path, mesh, 10, workdir="gs://one/run")
    other = LocalCheckpoints(tmp_path, "gs://two/run")
    assert other.restore(abstract_of(state_at(0, mesh)), newer_than=0) == (None, None, "")


def test_a_copy_that_is_not_newer_than_the_checkpoint_is_not_used(tmp_path, mesh):
    copies = saved_copies(tmp_path, mesh, 10, 20)
    assert copies.restore(abstract_of(state_at(0, mesh)), newer_than=20) == (None, None, "")


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2}, {"tensor": 2}])
def test_another_mesh_cannot_use_the_copies_and_says_so(tmp_path, mesh, sizes):
    copies = saved_copies(tmp_path, mesh, 10)
    state, _, note = copies.restore(abstract_of(state_at(0, mesh_of(**sizes))), newer_than=0)
    assert state is None
    assert note == (
        "not the local copy of step 10: process 0 does not have all of its slices, undamaged and "
        "for this mesh"
    )


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_makes_the_older_copy_the_newest(tmp_path, mesh, place, bit):
    shutil.rmtree(tmp_path)
    copies = saved_copies(tmp_path, mesh, 10, 20)
    data = copies.directory / "20.0-of-1" / "data"
    content = bytearray(data.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    data.write_bytes(content)
    state, _, note = copies.restore(abstract_of(state_at(0, mesh)), newer_than=0)
    assert_same(state, state_at(10, mesh))
    assert "not the local copy of step 20" in note


def test_a_record_of_a_copy_that_a_flipped_bit_has_changed_is_not_used(tmp_path, mesh):
    copies = saved_copies(tmp_path, mesh, 10, 20)
    index = copies.directory / "20.0-of-1" / "index.json"
    before = index.read_text()
    index.write_text(before.replace('"rope_theta": 500000.0', '"rope_theta": 100000.0'))
    assert index.read_text() != before
    state, record, note = copies.restore(abstract_of(state_at(0, mesh)), newer_than=0)
    assert_same(state, state_at(10, mesh))
    assert record == small_record(step=10)
    assert "not the local copy of step 20" in note


@pytest.mark.parametrize("attempt", [2**32, -1, "x", None, [1]])
def test_a_copy_whose_attempt_is_not_a_number_of_32_bits_is_not_used(attempt, tmp_path, mesh):
    copies = saved_copies(tmp_path, mesh, 10, 20)
    index = copies.directory / "20.0-of-1" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"attempt": attempt}))
    state, _, _ = copies.restore(abstract_of(state_at(0, mesh)), newer_than=0)
    assert_same(state, state_at(10, mesh))


@pytest.mark.parametrize("file", ["data", "index.json"])
def test_a_truncated_copy_makes_the_older_one_the_newest(tmp_path, mesh, file):
    copies = saved_copies(tmp_path, mesh, 10, 20)
    torn = copies.directory / "20.0-of-1" / file
    os.truncate(torn, torn.stat().st_size // 2)
    state, _, _ = copies.restore(abstract_of(state_at(0, mesh)), newer_than=0)
    assert_same(state, state_at(10, mesh))


def test_what_a_killed_save_left_is_not_used_and_removed(tmp_path, mesh):
    copies = saved_copies(tmp_path, mesh, 10, 20)
    (copies.directory / "20.0-of-1").rename(copies.directory / "20.0-of-1.partial")
    copies = LocalCheckpoints(tmp_path, "runs/a")
    state, _, _ = copies.restore(abstract_of(state_at(0, mesh)), newer_than=0)
    assert_same(state, state_at(10, mesh))
    assert [path.name for path in copies.directory.iterdir()] == ["10.0-of-1"]


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"local_directory"):
        LocalCheckpoints(tmp_path / "file", "runs/a")


def test_the_next_save_reports_the_one_that_failed(tmp_path, mesh, monkeypatch):
    copies = LocalCheckpoints(tmp_path, "runs/a")

    def full(content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host_copies.zlib, "crc32", full)
    copies.save(state_at(10, mesh), small_record())
    with pytest.raises(UserError, match="No space left on device"):
        copies.save(state_at(20, mesh), small_record())
    copies.close()  # which does not report it again
