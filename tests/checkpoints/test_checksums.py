"""The checksum of an array sees every change and every change of order, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from support.errors import error_of
from support.records import small_record
from support.states import SPECS, abstract_of, assert_same, mesh_of, state_at

from llada_jax.checkpoints import checksums as module
from llada_jax.checkpoints.checksums import checksum_of_array, checksums
from llada_jax.checkpoints.workdir import Checkpoints, find_checkpoint


def checksum(array, **options) -> int:
    return checksums({"params": {"w": jnp.asarray(array)}}, **options)["params"]["w"]


def scrambled(x: int) -> int:
    """MurmurHash3's fmix32 in Python's own integers."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def reference(array: np.ndarray) -> int:
    """The checksum as its docstring defines it, element by element."""
    total = 0
    bits = array.view(f"u{array.dtype.itemsize}")
    for index, number in np.ndenumerate(bits):
        position = sum(
            scrambled((i + (dim + 1) * 0x9E3779B9) % 2**32) for dim, i in enumerate(index)
        )
        total += scrambled(int(number) ^ (position % 2**32))
    return total % 2**32


def array_of(seed: int, shape, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@settings(max_examples=40)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_arrays_of_a_host_and_of_devices_have_the_checksum_that_is_defined(shape, seed):
    array = array_of(seed, shape)
    assert checksum_of_array(array) == reference(array)
    assert checksum_of_array(array, scheme=1) == int(array.view(np.uint32).sum(dtype="u8")) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "float16"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_arrays_of_every_dtype_have_the_checksum_that_is_defined(dtype, shape):
    array = np.asarray(jnp.asarray(10 * array_of(0, shape)).astype(dtype))
    assert checksum(array) == reference(array)
    if dtype in ("float32", "bfloat16"):
        assert checksum_of_array(array) == reference(array)


def test_the_numbers_of_a_fixed_array_never_change():
    """They are a format: checkpoints hold them."""
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert (checksum(array, scheme=1), checksum(array)) == (3642753024, 2803648620)
    assert checksum_of_array(array, scheme=1) == 3642753024
    assert checksum_of_array(array) == 2803648620


@pytest.mark.slow
@settings(max_examples=100)
@given(shape=SHAPES, seed=st.integers(0, 99), data=st.data())
def test_every_permutation_along_a_dim_is_seen(shape, seed, data):
    """Swapped layers, reversed columns and all the others, of weights whose lower 16 bits are zero,
    as in bfloat16: a weight per position that only multiplies is blind to many of those.
    """
    array = np.asarray(jnp.asarray(array_of(seed, shape)).astype(jnp.bfloat16)).astype(np.float32)
    dim = data.draw(st.integers(0, len(shape) - 1))
    order = data.draw(st.permutations(range(shape[dim])))
    permuted = np.ascontiguousarray(np.take(array, order, axis=dim))
    assume(not np.array_equal(array, permuted))
    assert checksum_of_array(permuted) != checksum_of_array(array)
    assert checksum_of_array(permuted, scheme=1) == checksum_of_array(array, scheme=1)


@settings(max_examples=25)
@given(seed=st.integers(0, 99), where=st.integers(0, 2**20 - 1), far=st.integers(0, 19))
def test_two_elements_that_trade_places_are_seen_however_far_they_are_apart(seed, where, far):
    array = np.zeros((4, 2**18), np.float32)
    array[:, ::7] = array_of(seed, (4, -(-(2**18) // 7)))
    flat = array.reshape(-1)
    other = where ^ (1 << far)
    assume(flat[where] != flat[other])
    before = checksum_of_array(array)
    flat[[where, other]] = flat[[other, where]]
    assert checksum_of_array(array) != before


@settings(max_examples=100)
@given(where=st.integers(0, 119), bit=st.integers(0, 31))
def test_every_flipped_bit_is_seen(where, bit):
    array = array_of(0, (2, 3, 20))
    before = checksum_of_array(array)
    array.view(np.uint32).reshape(-1)[where] ^= np.uint32(1 << bit)
    assert checksum_of_array(array) != before


def test_the_blocks_in_which_a_host_sums_do_not_matter(monkeypatch):
    array = array_of(0, (3, 5, 7))
    whole = checksum_of_array(array)
    for size in (1, 10, 14, 10**6):
        monkeypatch.setattr(module, "BLOCK", size)
        assert checksum_of_array(array) == whole


@pytest.mark.parametrize("scheme", module.SCHEMES)
@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 3), (6, 1, 2, 4)])
def test_the_checksums_of_parts_add_up_to_that_of_the_whole(shape, scheme):
    array = array_of(1, shape)
    parts = [(0, 1), (1, 2), (2, 6)]
    sums = [checksum_of_array(array[i:j], scheme=scheme, first=i) for i, j in parts]
    assert sum(sums) % 2**32 == checksum_of_array(array, scheme=scheme)


@pytest.mark.parametrize("scheme", module.SCHEMES)
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"tensor": 4}])
def test_every_mesh_gives_the_same_checksum_and_gathers_nothing(sizes, scheme):
    mesh = mesh_of(**sizes)
    array = array_of(3, (8, 4))
    placed = {name: jax.device_put(array, NamedSharding(mesh, s)) for name, s in SPECS.items()}
    numbers = checksums({"params": placed}, scheme=scheme)["params"]
    assert set(numbers.values()) == {checksum_of_array(array, scheme=scheme)}
    compiled = module._sums.lower({"params": placed}, scheme=scheme).compile().as_text()
    assert not [
        word for word in ("all-gather", "all-to-all", "collective-permute") if word in compiled
    ]


def saved_state(tmp_path, change=lambda record: record):
    """A saved step whose record has been changed, and the state."""
    state = state_at(3, mesh_of(fsdp=4, tensor=2))
    saved = Checkpoints(tmp_path)
    saved.save(state, small_record())
    saved.close()
    found, step = find_checkpoint(str(tmp_path))
    record = change(found.record(step))
    found.record = lambda _: record
    return state, found, step


def test_a_checkpoint_with_plain_sums_is_still_read_and_still_checked(tmp_path):
    def older(record):
        items = {"params": state_at(3, mesh_of(fsdp=4, tensor=2)).params}
        plain = checksums(items, scheme=1)["params"]
        return dataclasses.replace(record, checksums={"params": plain}, checksum_scheme=1)

    state, found, step = saved_state(tmp_path, older)
    restored = found.restore_params(step, abstract_of(state).params, ema=False)
    assert_same(state._replace(params=restored), state)
    np.testing.assert_array_equal(
        found.read_array(step, "params/rows", (8, 4)), np.asarray(state.params["rows"])
    )
    found.record(step).checksums["params"]["rows"] += 1
    assert "params/rows does not match" in error_of(
        found.restore_params, step, abstract_of(state).params, ema=False
    )


def test_swapped_rows_in_a_checkpoint_are_refused(tmp_path, monkeypatch):
    state, found, step = saved_state(tmp_path)
    assert found.record(step).checksum_scheme == module.SCHEME
    real = found._checkpointer.load_checkpointables

    def swapped(step, items):
        loaded = real(step, items)
        rows = loaded["params"]["both"]
        loaded["params"]["both"] = jax.device_put(rows[::-1], rows.sharding)
        return loaded

    monkeypatch.setattr(found._checkpointer, "load_checkpointables", swapped)
    assert "params/both does not match its saved checksum" in error_of(
        found.restore, step, abstract_of(state)
    )
