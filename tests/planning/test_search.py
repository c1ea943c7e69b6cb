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
    found = plan.search(config, machines, 1, VOCAB_SIZE)
    assert len(found) > 1
    middles = [sum(choice["seconds_per_step"].values()) for choice in found]
    assert middles == sorted(middles)
    assert [c["peak"] for c in found] == sorted((c["peak"] for c in found), reverse=True)
    for choice in found:
        assert math.prod(choice["mesh"].values()) == 256
        # raises where the run cannot be split like that
        again = plan.estimate(plan.with_choice(config, choice), machines, 1, VOCAB_SIZE)
        assert again["memory"]["peak"] == choice["peak"] < machines.accelerator.usable_hbm_bytes


def test_a_search_without_a_result_says_so():
    with pytest.raises(
        UserError, match=r"No mesh, remat policy or microbatch .* is estimated to fit v5litepod-4"
    ):
        plan.search(load_config(LLADA_8B), hardware.machines_named("v5e-4"), 1, VOCAB_SIZE)
