"""Lists of knobs: product, zip, chain and add."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_jax.errors import UserError
from llada_jax.sweeps import grid

values = st.lists(st.integers(0, 9), min_size=1, max_size=3)


@given(a=values, b=values, c=values)
def test_product_is_every_combination_with_the_last_part_fastest(a, b, c):
    expected = [dict(zip("abc", combination)) for combination in itertools.product(a, b, c)]
    assert grid.product({"a": a, "b": b, "c": c}) == expected
    assert grid.product({"a": a}, {"b": b}, {"c": c}) == expected
    assert grid.product({"a": a}, grid.product({"b": b}, {"c": c})) == expected


@given(pairs=st.lists(st.tuples(st.integers(), st.integers()), min_size=1, max_size=4))
def test_zip_pairs_values_and_chain_appends_lists(pairs):
    a, b = [list(column) for column in zip(*pairs)]
    expected = [{"a": x, "b": y} for x, y in pairs]
    assert grid.zip({"a": a, "b": b}) == expected
    assert grid.zip({"a": a}, [{"b": y} for y in b]) == expected
    assert grid.chain({"a": a}, expected) == [{"a": x} for x in a] + expected


def test_helpers_nest():
    sizes = grid.zip({"model.num_layers": [2, 4], "model.d_model": [64, 128]})
    runs = grid.chain(grid.product(sizes, {"seed": [0, 1]}), [{"seed": 7}])
    assert [run["seed"] for run in runs] == [0, 1, 0, 1, 7]
    assert [run.get("model.d_model") for run in runs] == [64, 64, 128, 128, None]


def test_add_takes_a_dict_keywords_or_both_and_values_become_those_of_json():
    def sweep(add):
        add()
        add({"data.path": Path("data") / "books"})
        add(seed=1)
        add({"optimizer.b2": np.float32(0.5)}, seed=np.int64(2))

    runs = grid.added_by(sweep)
    assert runs == [
        {},
        {"data.path": "data/books"},
        {"seed": 1},
        {"optimizer.b2": 0.5, "seed": 2},
    ]
    assert type(runs[3]["seed"]) is int
    assert type(runs[3]["optimizer.b2"]) is float


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: grid.zip({"a": [1, 2], "b": [1]}), r"sweeps.zip got lists of \[2, 1\] values"),
        (lambda: grid.product({"a": 3}), r"'a' the values 3; write a list, as in \[3\]"),
        (lambda: grid.product({"a": "adamw"}), r"'a' the values 'adamw'"),
        (lambda: grid.product({"a": [1]}, {"a": [2]}), r"sets 'a' twice in one run \(1 and 2\)"),
        (lambda: grid.added_by(lambda add: add({"seed": 1}, seed=2)), "sets 'seed' twice"),
        (lambda: grid.added_by(lambda add: add([{"seed": 1}])), "must be given a dict"),
    ],
)
def test_a_list_of_knobs_that_makes_no_sense_is_refused_in_one_sentence(make, words):
    with pytest.raises(UserError, match=words):
        make()
