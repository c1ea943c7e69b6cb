"""The ranking of runs, and the effects of knobs."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_jax.sweeps.comparison import effects, rank_correlation, ranked
from llada_jax.sweeps.results import read_result


def result(index, bits, state="complete"):
    curve = [(1, bits + 1), (2, bits)]
    return read_result("nowhere", index=index, knobs={}, num_steps=2)._replace(
        bits_per_byte=bits, state=state, curve=curve, train_curve=curve
    )


def test_effects_are_means_by_value_with_the_strongest_first():
    grid = list(itertools.product((0.9, 0.95), (1, 2, 3)))
    results = [result(i, 10 * b2 + 0.1 * seed) for i, (b2, seed) in enumerate(grid)]
    found = effects(results, [{"b2": b2, "seed": seed, "constant": 1} for b2, seed in grid])
    assert [effect["knob"] for effect in found] == ["b2", "seed"]
    for effect, column in zip(found, zip(*grid)):
        for value in effect["values"]:
            chosen = [r.bits_per_byte for r, v in zip(results, column) if v == value["value"]]
            assert value["mean"] == pytest.approx(np.mean(chosen))
            assert value["best"] == min(chosen)
            assert value["num_runs"] == len(chosen)
        assert effect["is_balanced"]
        assert effect["moves_with"] == []
    assert found[0]["spread"] == pytest.approx(0.5)
    assert found[1]["spread"] == pytest.approx(0.2)


def test_effects_name_knobs_that_move_together_and_unbalanced_comparisons():
    results = [result(i, bits) for i, bits in enumerate((1.0, 2.0, 3.0))]
    together = effects(
        results, [{"layers": n, "width": 32 * n, "name": "abc"[n - 1]} for n in (1, 2, 3)]
    )
    assert {effect["knob"]: set(effect["moves_with"]) for effect in together} == {
        "layers": {"width", "name"},
        "width": {"layers", "name"},
        "name": {"layers", "width"},
    }
    assert [e["rank_correlation"] for e in together if e["knob"] == "name"] == [None]
    switched = effects(results[:2], [{"tied": False}, {"tied": True}])
    assert switched[0]["rank_correlation"] is None
    lopsided = effects(results, [{"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 2}])
    assert [effect["is_balanced"] for effect in lopsided] == [False, False]


def test_only_complete_runs_are_compared():
    results = [
        result(0, 3.0),
        result(1, 1.0, "partial"),
        result(2, 2.0),
        result(3, 0.5, "diverged"),
        result(4, math.nan),
    ]
    assert [r.index for r in ranked(results)] == [2, 0, 4, 3, 1]
    (effect,) = effects(results, [{"seed": i} for i in range(5)])
    assert [value["value"] for value in effect["values"]] == [0, 2]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-9, 9)), min_size=2, max_size=20))
def test_rank_correlation_is_that_of_spearman(pairs):
    from scipy.stats import spearmanr

    x, y = zip(*pairs)
    ours = rank_correlation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(spearmanr(x, y).statistic, abs=1e-9)
