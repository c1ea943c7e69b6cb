"""Keys: another purpose, seed, index or row is another stream of numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.rng import key_for, keys_for_rows


def words(key) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_keys_differ_by_purpose_seed_and_indices():
    purposes = ("init", "split", "corruption", "likelihood", "sampling")
    indices = ((), (0,), (1,), (0, 0), (0, 1), (1, 0))
    keys = [
        words(key_for(purpose, seed, *index))
        for purpose, seed, index in itertools.product(purposes, (0, 1), indices)
    ]
    assert len(set(keys)) == len(keys) == 60
    assert words(key_for("init", 0, 1)) == words(key_for("init", 0, 1))


def test_each_row_has_a_key_that_depends_on_its_number_alone():
    key = key_for("corruption", 0, 7)
    together = keys_for_rows(key, jnp.arange(8))
    alone = keys_for_rows(key, jnp.array([5]))
    assert len({words(row) for row in together}) == 8
    assert words(together[5]) == words(alone[0])


def test_noise_depends_on_no_default_of_jax():
    expected = words(key_for("corruption", 3, 7))
    with jax.default_prng_impl("rbg"):
        assert words(key_for("corruption", 3, 7)) == expected
