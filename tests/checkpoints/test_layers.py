"""A network read one layer at a time: what is read for it, and damage in any layer."""

import types

import jax
import numpy as np
import pytest
from support.errors import error_of
from support.exports import LLADA, write_checkpoint
from support.hf_directories import random_params

from llada_jax.checkpoints import layers as module
from llada_jax.checkpoints.layers import LayerReader
from llada_jax.checkpoints.workdir import find_checkpoint
from llada_jax.cluster.sharding import make_mesh
from llada_jax.hf.convert import tensors
from llada_jax.hf.write import plan_shards, write_weights
from llada_jax.models.model import abstract_parameters, make_model
from llada_jax.storage.arrays import read_chunks

STACKED = ("attn_norm", "q", "attn_out", "ff_gate", "ff_out")
CHUNK_BYTES = 2_000


@pytest.fixture
def sizes_read(monkeypatch):
    """The number of elements of each piece that is read."""
    sizes, real = [], module.read_chunks

    def read_chunks(store):
        sizes.append(int(np.prod(store.shape)))
        return real(store)

    monkeypatch.setattr(module, "read_chunks", read_chunks)
    return sizes


def saved(workdir, params, *, mesh=None):
    if mesh is not None:
        places = abstract_parameters(make_model(LLADA), mesh)
        params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, places))
    found, step = find_checkpoint(str(write_checkpoint(workdir, LLADA, params)))
    return LayerReader(found, step, ema=False)


def read_all(reader, params) -> None:
    """Reads all of a network and compares it."""
    for name, array in params["blocks"].items():
        for layer in range(LLADA.num_layers):
            found = reader.read(f"blocks/{name}", array.shape, layer)
            np.testing.assert_array_equal(found, array[layer])
    for name in ("embed", "lm_head", "final_norm"):
        found = reader.read(name, params[name].shape, None)
        np.testing.assert_array_equal(found, params[name])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"fsdp": 4, "tensor": 2}])
def test_a_layer_is_read_without_any_other(sizes, tmp_path, monkeypatch, sizes_read):
    monkeypatch.setattr("llada_jax.checkpoints.workdir.CHUNK_BYTES", CHUNK_BYTES)
    params = random_params(LLADA)
    mesh = make_mesh(sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    reader = saved(tmp_path, params, mesh=mesh)
    for name in STACKED:
        array = params["blocks"][name]
        sizes_read.clear()
        np.testing.assert_array_equal(reader.read(f"blocks/{name}", array.shape, 1), array[1])
        # what is smaller than a chunk is not cut
        assert sizes_read == [array[1].size if array.nbytes > CHUNK_BYTES else array.size], name


def test_every_number_is_read_once_and_checked(tmp_path, monkeypatch, sizes_read):
    monkeypatch.setattr("llada_jax.checkpoints.workdir.CHUNK_BYTES", CHUNK_BYTES)
    params = random_params(LLADA)
    reader = saved(tmp_path, params)
    read_all(reader, params)
    reader.check()
    assert sum(sizes_read) == sum(array.size for array in params["blocks"].values())
    largest = max(array[0].size for array in params["blocks"].values())
    assert max(sizes_read) == largest


def test_an_older_checkpoint_whose_layers_share_their_chunks_is_read_once_too(
    tmp_path, monkeypatch, sizes_read
):
    monkeypatch.setattr("llada_jax.checkpoints.workdir._storage_of", lambda path, leaf: None)
    params = random_params(LLADA)
    reader = saved(tmp_path, params)
    read_all(reader, params)
    reader.check()
    assert sizes_read == [array.size for array in params["blocks"].values()]


def test_of_two_hosts_each_reads_the_layers_that_it_exports_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr("llada_jax.checkpoints.workdir.CHUNK_BYTES", CHUNK_BYTES)
    sizes = []
    for place in ("layers", "workdir"):
        monkeypatch.setattr(
            f"llada_jax.checkpoints.{place}.read_chunks",
            lambda store: sizes.append(int(np.prod(store.shape))) or read_chunks(store),
        )
    params = random_params(LLADA)
    saved(tmp_path, params)
    found, step = find_checkpoint(str(tmp_path))
    listed = tensors("llada", LLADA)
    shards = plan_shards(listed, dtype="float32", shard_size=20_000)
    numbers = {tensor.name: int(np.prod(tensor.hf_shape)) for tensor in listed}
    # norms share a chunk, and are read whole
    norms = sum(params["blocks"][name].size for name in ("attn_norm", "ff_norm"))
    written = []
    for host in range(2):
        of_two = types.SimpleNamespace(process_index=lambda: host, process_count=lambda: 2)  # noqa: B023
        monkeypatch.setattr("llada_jax.hf.write.jax", of_two)
        sizes.clear()
        (tmp_path / str(host)).mkdir()
        read = LayerReader(found, step, ema=False).read
        write_weights(
            tmp_path / str(host), listed, shards, read=read, num_layers=3, dtype="float32"
        )
        files = {file.name for file in (tmp_path / str(host)).iterdir()}
        ours = sum(numbers[name] for s in shards if s.name in files for name in s.start)
        assert ours <= sum(sizes) <= ours + norms
        written.append(ours)
    assert sum(written) == sum(numbers.values())
    assert max(written) < 0.7 * sum(written)


def damaged(array, how: str):
    """Returns how(store) -> the numbers of one store, changed in all its layers."""
    if how == "a flipped bit":
        array.view(np.uint32).reshape(-1)[3] ^= 1 << 5
        return array
    return np.ascontiguousarray(array[..., ::-1])


@pytest.mark.parametrize("how", ["a flipped bit", "reversed columns"])
def test_damage_in_one_layer_is_found_when_all_are_read(how, tmp_path, monkeypatch):
    params = random_params(LLADA)
    monkeypatch.setattr("llada_jax.checkpoints.workdir.CHUNK_BYTES", CHUNK_BYTES)
    reader = saved(tmp_path, params)
    real, count = module.read_chunks, []

    def read_chunks(store):
        count.append(0)
        return damaged(real(store), how) if len(count) == 2 else real(store)

    monkeypatch.setattr(module, "read_chunks", read_chunks)
    for layer in range(LLADA.num_layers):
        reader.read("blocks/ff_up", params["blocks"]["ff_up"].shape, layer)
    assert "params/blocks/ff_up does not match its saved checksum" in error_of(reader.check)


def test_swapped_layers_are_found(tmp_path):
    params = random_params(LLADA)
    swapped = params["blocks"]["q"][[1, 0, 2]]
    reader = saved(tmp_path, params)
    reader._held["params/blocks/q"] = 0, swapped
    reader._path = "blocks/q"
    for layer in range(3):
        reader.read("blocks/q", swapped.shape, layer)
    assert "params/blocks/q does not match" in error_of(reader.check)


def test_the_layers_that_two_hosts_have_read_are_checked_together(tmp_path, monkeypatch):
    params = random_params(LLADA)
    saved(tmp_path, params)
    found, step = find_checkpoint(str(tmp_path))
    readers = [LayerReader(found, step, ema=False) for _ in range(2)]
    shape = params["blocks"]["ff_up"].shape
    for layer in range(LLADA.num_layers):
        readers[layer % 2].read("blocks/ff_up", shape, layer)
    readers[0].read("blocks/attn_norm", params["blocks"]["attn_norm"].shape, 0)

    gathered = []
    monkeypatch.setattr(module.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        module.multihost_utils,
        "process_allgather",
        lambda ours: gathered.append(ours) or np.stack([ours, *gathered[:-1]]),
    )
    # alone, the first host lacks layers of both
    assert "does not match" in error_of(readers[0].check)
    for layer in range(1, LLADA.num_layers):
        readers[1].read("blocks/attn_norm", params["blocks"]["attn_norm"].shape, layer)
    readers[1].check()
