"""The search over meshes, remat policies and microbatches."""

import math

import pytest
from support.plans import LLADA_8B, VOCAB_SIZE

from llada_jax.cluster import hardware
from llada_jax.config import load_config
from llada_jax.errors import UserError
from llada_jax.verbs import plan


@pytest.mark.slow
def test_the_search_returns_what_nothing_else_beats_in_both_time_and_memory():
    config = load_config(LLADA_8B, ["data.batch_size=256"])
    machines = hardware.machines_named("v6e-256")
    asked = plan.Asked(config, machines, 1, VOCAB_SIZE)
    found = plan.search(asked)
    assert len(found) > 1
    middles = [sum(choice["seconds_per_step"].values()) for choice in found]
    assert middles == sorted(middles)
    assert [c["peak"] for c in found] == sorted((c["peak"] for c in found), reverse=True)
    for choice in found:
        assert math.prod(choice["mesh"].values()) == 256
        # raises where the run cannot be split like that
        again = plan.estimate(asked._replace(config=plan.with_choice(config, choice)))
        assert again["memory"]["peak"] == choice["peak"] < machines.accelerator.usable_hbm_bytes


@pytest.mark.slow
def test_hosts_of_gpus_are_not_told_to_gather_the_weights_for_dozens_of_microbatches():
    """Communication that costs nothing would let the search take 32 of them."""
    asked = plan.Asked(load_config(LLADA_8B), hardware.machines_named("64xh100"), 1, VOCAB_SIZE)
    assert plan.search(asked)[0]["microbatches"] <= 8


def test_a_search_without_a_result_says_so():
    asked = plan.Asked(load_config(LLADA_8B), hardware.machines_named("v5e-4"), 1, VOCAB_SIZE)
    with pytest.raises(
        UserError, match=r"No combination of mesh, .* is estimated to fit v5litepod-4"
    ):
        plan.search(asked)
    assert plan.knobs_that_fit(asked) == []


def test_a_config_that_does_not_fit_is_answered_with_knobs_that_do():
    config = load_config(LLADA_8B, ["model.remat=none"])
    asked = plan.Asked(config, hardware.machines_named("v5p-128"), 1, VOCAB_SIZE)
    assert plan.estimate(asked)["memory"]["peak"] > 95 * 2**30
    flags = plan.knobs_that_fit(asked)
    assert flags
    overrides = [flag.removeprefix("--config.") for flag in flags]
    changed = load_config(LLADA_8B, ["model.remat=none", *overrides])
    found = plan.estimate(asked._replace(config=changed))
    assert found["memory"]["peak"] < 0.95 * found["usable_bytes"]
