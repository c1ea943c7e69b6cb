"""Sums that stop a run, and what the sentence says of them."""

import math
import types

import pytest

from llada_jax.errors import NumericsError
from llada_jax.run.numerics import check_finite, check_skipped


class Saves(types.SimpleNamespace):
    """Checkpoints of which the last is still being written."""

    steps, under_way = [20], 30

    def wait(self):
        self.steps = [20, self.under_way]


def sums_of(num_steps: int, num_skipped: int = 0, **metrics) -> dict:
    finite = dict.fromkeys(("loss", "grad_norm", "param_norm"), (1.0, num_steps))
    return {"skipped": (num_skipped, num_steps), **finite, **metrics}


def test_the_interval_begins_where_the_sums_do_also_after_a_restart():
    with pytest.raises(NumericsError, match="steps 28 to 33; the last good checkpoint is step 30"):
        check_finite(sums_of(6, loss=(math.nan, 6)), step=33, saved=Saves(), rate="the rate")
    with pytest.raises(
        NumericsError, match="3 updates in steps 28 to 33 were .* is step 30: lower"
    ):
        check_skipped(sums_of(6, 3), 2, step=33, saved=Saves(), rate="the rate")


@pytest.mark.parametrize("name", ["loss", "grad_norm", "param_norm"])
@pytest.mark.parametrize("total", [math.nan, math.inf])
def test_each_sum_that_is_not_finite_stops_the_run_and_is_named(name, total):
    check_finite(sums_of(6), step=33, saved=Saves(), rate="the rate")
    with pytest.raises(NumericsError, match=f"{name} is {total} somewhere in steps 28 to 33"):
        check_finite(sums_of(6, **{name: (total, 6)}), step=33, saved=Saves(), rate="the rate")


def test_what_an_earlier_start_was_allowed_to_skip_does_not_stop_one_without_a_limit():
    check_skipped(sums_of(6, 3), 3, step=33, saved=Saves(), rate="the rate")
    check_skipped(sums_of(6, 3), 0, step=33, saved=Saves(), rate="the rate")
