"""Checkpoints in a workdir: arrays that are read one by one, and records that are not ours."""

import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp
from support.errors import error_of
from support.exports import LLADA, write_checkpoint
from support.hf_directories import random_params
from support.processes import run_python
from support.records import small_record
from support.states import abstract_of, assert_same, mesh_of, state_at

from llada_jax.checkpoints.workdir import Checkpoints, find_checkpoint
from llada_jax.cluster.sharding import make_mesh, one_device_mesh
from llada_jax.errors import UserError
from llada_jax.models.model import abstract_parameters, make_model
from llada_jax.storage.arrays import read_chunks
from llada_jax.training.state import TrainState


@pytest.mark.parametrize("read_bytes", [1, 3_000, 10**9])
def test_an_array_in_many_chunks_is_read_as_it_was_written(read_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("llada_jax.storage.arrays.READ_BYTES", read_bytes)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_parameters(make_model(LLADA), mesh))
    params = random_params(LLADA)
    run = write_checkpoint(tmp_path / "run", LLADA, jax.device_put(params, places))
    saved, _ = find_checkpoint(str(run))
    for name in ("q", "ff_out", "attn_norm"):
        expected = params["blocks"][name]
        np.testing.assert_array_equal(
            saved.read_array(7, f"params/blocks/{name}", expected.shape), expected
        )
    np.testing.assert_array_equal(
        saved.read_array(7, "params/lm_head", (32, 320)), params["lm_head"]
    )


def test_an_array_of_one_device_is_saved_in_chunks_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("llada_jax.checkpoints.workdir.CHUNK_BYTES", 2_000)
    seen = []
    real = read_chunks
    monkeypatch.setattr(
        "llada_jax.checkpoints.workdir.read_chunks",
        lambda store: seen.append(store.chunk_layout.read_chunk.shape) or real(store),
    )
    params = random_params(LLADA)
    run = write_checkpoint(tmp_path / "run", LLADA, params)
    saved, _ = find_checkpoint(str(run))
    np.testing.assert_array_equal(
        saved.read_array(7, "params/lm_head", (32, 320)), params["lm_head"]
    )
    assert 4 * np.prod(seen) <= 2_000 < params["lm_head"].nbytes
    seen.clear()
    assert saved.restore_params(
        7,
        abstract_parameters(make_model(LLADA), make_mesh({"fsdp": -1})),
        ema=False,
    )


def test_a_moment_in_bfloat16_comes_back_in_bfloat16(tmp_path):
    place = lambda array: jax.device_put(array, NamedSharding(one_device_mesh(), P()))  # noqa: E731
    moment = place(jnp.linspace(0, 1, 7).astype(jnp.bfloat16))
    state = TrainState(place(jnp.int32(3)), {"w": place(jnp.ones(4))}, {"mu": moment}, {}, {}, {})
    saved = Checkpoints(tmp_path)
    saved.save(state, small_record())
    saved.close()
    found, step = find_checkpoint(str(tmp_path))
    assert_same(found.restore(step, abstract_of(state)), state)


def test_parameters_that_are_not_trained_come_back_too_and_nothing_is_saved_of_what_is_empty(
    tmp_path,
):
    mesh = one_device_mesh()
    place = lambda array: jax.device_put(array, NamedSharding(mesh, P()))  # noqa: E731
    frozen = {"base": place(jnp.arange(6.0))}
    state = TrainState(place(jnp.int32(3)), {"w": place(jnp.ones(4))}, (), {}, {}, frozen)
    saved = Checkpoints(tmp_path)
    saved.save(state, small_record())
    saved.close()
    assert (tmp_path / "checkpoints" / "3" / "frozen").exists()
    assert not (tmp_path / "checkpoints" / "3" / "ema").exists()
    found, step = find_checkpoint(str(tmp_path))
    assert_same(found.restore(step, abstract_of(state)), state)
    assert found.record(step).checksums.keys() == {"params", "train", "frozen"}


@pytest.mark.parametrize(
    "name", ["lr=1e-3,me@home (2)", "run@7", "~", "$HOME", "#1 100%d", "é", "{step}", "-x", "a\nb"]
)
def test_a_checkpoint_below_a_directory_of_any_name_is_read_again(name, tmp_path):
    params = {"w": jnp.arange(6.0)}
    state = TrainState(jnp.int32(3), params, (), {}, {})
    workdir = tmp_path / name / "run"
    saved = Checkpoints(workdir)
    saved.save(state, small_record())
    saved.close()
    for words in (workdir, f"{workdir}@3"):
        found, step = find_checkpoint(str(words))
        np.testing.assert_array_equal(found.read_array(step, "params/w", (6,)), params["w"])


REFUSED_SAVE = """
import os, sys
sys.path[:] = {path}
import jax.numpy as jnp
from support.records import small_record
from llada_jax.checkpoints.orbax_patches import drop_echoes
from llada_jax.checkpoints.workdir import Checkpoints
from llada_jax.errors import UserError
from llada_jax.training.state import TrainState

drop_echoes()
saved = Checkpoints({workdir!r})
# There is no folder of this name, and there can be none.
os.symlink("nowhere", saved.directory / "3.orbax-checkpoint-tmp")
try:
    saved.save(TrainState(jnp.int32(3), {{"w": jnp.ones(4)}}, (), {{}}, {{}}), small_record())
    saved.wait()
except UserError as error:
    print(error)
"""


def test_a_process_to_which_the_folder_of_a_step_is_refused_ends_at_once(tmp_path):
    ended = run_python(REFUSED_SAVE.format(path=sys.path, workdir=str(tmp_path)), timeout=100)
    assert ended.stdout.startswith("Step 3 could not be saved in "), ended.stderr
    assert ended.returncode == 0


def test_a_half_written_step_is_removed_by_the_run_and_by_no_reader(tmp_path):
    run = write_checkpoint(tmp_path / "run", LLADA, random_params(LLADA))
    # what Orbax writes into before it renames the folder to "8"
    half = run / "checkpoints" / "8.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)

    def removed_within(seconds: float) -> bool:  # Orbax does it in a thread
        deadline = time.monotonic() + seconds
        while half.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return not half.exists()

    found, step = find_checkpoint(str(run))
    assert (found.steps, step) == ([7], 7)
    assert not removed_within(0.3)
    owner = Checkpoints(run)
    assert owner.steps == [7]
    assert removed_within(30)
    owner.close()


def test_a_checkpoint_of_something_else_is_refused_with_the_folder_to_move_away(tmp_path):
    folder = tmp_path / "checkpoints"
    other = ocp.training.Checkpointer(folder)
    other.save_checkpointables(3, {"params": {"w": jnp.ones(4)}}, custom_metadata={"name": "x"})
    other.close()
    found, step = find_checkpoint(str(tmp_path))
    message = error_of(found.record, step)
    assert message == (
        f"The record of the checkpoint {folder / '3'} has no field 'config'; move that folder away "
        "to train again."
    )


def test_a_flipped_bit_never_changes_what_the_record_of_a_checkpoint_says(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(TrainState(jnp.int32(3), {"w": jnp.ones(4)}, (), {}, {}), small_record())
    saved.close()
    found, step = find_checkpoint(str(tmp_path))
    expected = found.record(step)
    assert expected == small_record(checksums=expected.checksums, checksum_scheme=2)
    file = tmp_path / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
    content = file.read_bytes()
    # the first digit of a number, and one byte of every 61, which are all kinds of places
    digit = content.index(b'"rope_theta": ') + len('"rope_theta": ')
    refused = {}
    for place in (digit, *range(0, len(content), 61)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        try:
            assert found.record(step) == expected, place
        except UserError as error:
            refused[place] = str(error)
    assert all("move that folder away" in message for message in refused.values())
    assert digit in refused
    # the others are in what Orbax writes next to the record
    assert len(refused) > 0.7 * len(content) / 61


def test_a_restored_state_is_never_held_twice(tmp_path, monkeypatch):
    mesh = one_device_mesh()
    place = lambda array: jax.device_put(array, NamedSharding(mesh, P()))  # noqa: E731
    params = {f"w{i}": place(jnp.full((256, 1024), float(i))) for i in range(8)}
    state = TrainState(place(jnp.int32(3)), params, (), {}, {})
    abstract, expected = abstract_of(state), jax.device_get(params)
    saved = Checkpoints(tmp_path)
    saved.save(state, small_record())
    saved.close()
    jax.tree.map(lambda leaf: leaf.delete(), state)
    live = lambda: sum(array.nbytes for array in jax.live_arrays())  # noqa: E731
    before, seen, real = live(), [], jax.jit

    def watched(*args, **kwargs):
        compiled = real(*args, **kwargs)

        def call(*operands):
            held = live() - before  # asked first: a donated operand counts as gone afterwards
            result = jax.block_until_ready(compiled(*operands))
            seen.append(held + sum(leaf.nbytes for leaf in jax.tree.leaves(result)))
            return result

        return call

    found, step = find_checkpoint(str(tmp_path))
    monkeypatch.setattr(jax, "jit", watched)
    restored = found.restore(step, abstract)
    monkeypatch.undo()
    total, largest = 8 * 2**20, 2**20
    assert total < max(seen) < total + 2 * largest
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored.params), expected)


def test_a_state_with_other_parameters_than_the_network_has_is_refused_by_their_names(tmp_path):
    """Orbax refuses it too, but as trees that do not match, and the folder would look damaged."""
    state = state_at(3, mesh_of(fsdp=2, tensor=2))
    saved = Checkpoints(tmp_path)
    saved.save(state, small_record())
    saved.close()
    found, step = find_checkpoint(str(tmp_path))
    for change, says in (
        (lambda params: params.pop("half"), "holds half, which the network .* does not have"),
        (lambda params: params.update(gate=params["rows"]), "lacks gate, which the network .* has"),
    ):
        params = dict(state.params)
        change(params)
        with pytest.raises(UserError, match=says):
            found.restore(step, abstract_of(state._replace(params=params)))


@pytest.mark.parametrize("what_is_left", ["nothing", "the record", "an array"])
def test_a_step_that_its_run_removes_while_it_is_read_is_not_called_damaged(
    what_is_left, tmp_path, monkeypatch
):
    state = state_at(3, mesh_of(fsdp=2, tensor=2))
    saved = Checkpoints(tmp_path)
    saved.save(state, small_record())
    saved.close()
    found, step = find_checkpoint(str(tmp_path))
    folder = tmp_path / "checkpoints" / "3"
    if what_is_left == "nothing":
        shutil.rmtree(folder)
    elif what_is_left == "the record":
        shutil.rmtree(folder / "params")
    else:
        (folder / "_CHECKPOINT_METADATA").unlink()
    monkeypatch.setattr("time.sleep", lambda _: shutil.rmtree(folder, ignore_errors=True))
    with pytest.raises(UserError, match="its run has removed it since") as error:
        found.restore(step, abstract_of(state))
    assert "move that folder away" not in str(error.value)


def test_a_sound_step_for_which_the_memory_is_not_enough_is_not_called_damaged(
    tmp_path, monkeypatch
):
    state = state_at(3, mesh_of(fsdp=2, tensor=2))
    saved = Checkpoints(tmp_path)
    saved.save(state, small_record())
    saved.close()
    found, step = find_checkpoint(str(tmp_path))
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes.")

    def place(*_, **__):
        raise full

    monkeypatch.setattr(jax, "device_put", place)
    monkeypatch.setattr(jax, "make_array_from_callback", place)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        found.restore(step, abstract_of(state))
