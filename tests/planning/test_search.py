"""The search over meshes, remat policies and microbatches."""

import dataclasses
import math
import re
import types

import pytest
from support.plans import LLADA_8B, VOCAB_SIZE
from support.records import SMALL

from llada_jax.cluster import hardware
from llada_jax.config import load_config
from llada_jax.errors import UserError
from llada_jax.planning import search
from llada_jax.training.memory import Workload
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


def test_a_choice_leaves_a_margin_of_memory_and_no_other_beats_it(monkeypatch):
    # (bytes of 100 that are usable, seconds in the fast and in the slow case)
    estimates = {
        ("none", 1): (96, 1, 1),
        ("dots", 1): (90, 2, 3),
        ("dots", 2): (90, 2, 4),
        ("attention", 1): (91, 3, 3),
        ("full", 1): (50, 1, 9),
        ("full", 2): (40, 5, 4),
    }

    def estimate_run(recipe, workload, *_, **__):
        asked = (workload.remat, workload.num_microbatches)
        peak, fast, slow = estimates.get(asked, (200, 0, 0))
        seconds = {"fast": fast, "slow": slow}
        return {"memory": {"peak": peak}, "usable_bytes": 100, "seconds_per_step": seconds}

    monkeypatch.setattr(search, "estimate_run", estimate_run)
    found = search.find_choices(
        types.SimpleNamespace(architecture=SMALL),
        Workload(8, 32, 1, "full", 32),
        dict.fromkeys(("data", "fsdp", "sequence", "expert", "tensor"), 1),
        types.SimpleNamespace(num_devices=1, name="one"),
        1,
    )
    assert [(c["remat"], c["microbatches"]) for c in found] == [("dots", 1), ("full", 2)]


@pytest.mark.parametrize("size", ["num_heads", "num_kv_heads", "d_ff", "vocab_size"])
def test_what_the_tensor_axis_splits_must_be_divisible(size):
    mesh = {**dict.fromkeys(("data", "fsdp", "sequence", "expert"), 1), "tensor": 2}
    for architecture in (SMALL, dataclasses.replace(SMALL, **{size: 3})):
        recipe = types.SimpleNamespace(architecture=architecture)
        assert search.is_divisible(recipe, 8, 4, mesh) == (architecture == SMALL)


def test_a_search_without_a_result_says_so():
    asked = plan.Asked(load_config(LLADA_8B), hardware.machines_named("v5e-4"), 1, VOCAB_SIZE)
    with pytest.raises(
        UserError, match=r"No combination of mesh, .* is estimated to fit v5litepod-4"
    ):
        plan.search(asked)
    assert plan.knobs_that_fit(asked) == []


def test_slices_are_not_told_to_be_split_less_than_they_are():
    config = load_config(LLADA_8B, ["model.remat=full", "data.batch_size=16", "mesh.data=2"])
    asked = plan.Asked(config, hardware.machines_named("v6e-8"), 2, VOCAB_SIZE)
    compiled = {"needed_bytes": 2**40, "usable_bytes": 2**36}
    sentence = plan.does_not_fit({**plan.estimate(asked), "compiled": compiled}, asked)
    assert "try --config.mesh.tensor=2, then a larger --topology" in sentence


def test_a_slower_network_slows_what_is_found():
    config, machines = load_config(LLADA_8B), hardware.machines_named("16xh100")
    asked = plan.Asked(config, machines, 1, VOCAB_SIZE)
    usual, slower = plan.search(asked)[0], plan.search(asked._replace(network_gbps=50))[0]
    assert slower["seconds_per_step"]["slow"] > usual["seconds_per_step"]["slow"]


@pytest.mark.parametrize("words", [["model.remat=none"], ["mesh.data=64", "mesh.fsdp=1"]])
def test_a_config_that_does_not_fit_is_answered_with_the_fastest_knobs_that_do(words):
    config = load_config(LLADA_8B, words)
    asked = plan.Asked(config, hardware.machines_named("v5p-128"), 1, VOCAB_SIZE)
    assert plan.estimate(asked)["memory"]["peak"] > 95 * 2**30
    flags = plan.knobs_that_fit(asked)
    assert flags
    overrides = [flag.removeprefix("--config.") for flag in flags]
    changed = load_config(LLADA_8B, [*words, *overrides])
    found = plan.estimate(asked._replace(config=changed))
    assert found["memory"]["peak"] < 0.95 * found["usable_bytes"]
    fastest = min(plan.search(asked), key=lambda choice: sum(choice["seconds_per_step"].values()))
    assert {key: found[key] for key in ("mesh", "remat", "microbatches", "seconds_per_step")} == {
        key: fastest[key] for key in ("mesh", "remat", "microbatches", "seconds_per_step")
    }


@pytest.mark.parametrize(
    ("words", "advised"),
    [
        # 24 rows on 8 devices: 2 microbatches of 12 rows cannot be split
        (
            ["data.batch_size=24", "model.remat=none"],
            ["model.remat=full", "optimizer.gradient_accumulation=3", "mesh.tensor=2"],
        ),
        (["data.batch_size=32", "model.num_kv_heads=1"], ["optimizer.gradient_accumulation=2"]),
        (
            ["data.batch_size=64", "model.num_kv_heads=1", "optimizer.gradient_accumulation=2"],
            ["optimizer.gradient_accumulation=4"],
        ),
        (["data.batch_size=4", "mesh.tensor=2"], ["mesh.tensor=4"]),
        (["data.batch_size=8", "mesh.data=2"], ["mesh.data=1"]),
        # without fsdp=-1 the mesh would be one of 4 devices
        (["data.batch_size=8", "mesh.data=2", "mesh.fsdp=4"], []),
    ],
)
def test_a_program_that_is_too_large_is_answered_with_what_the_machines_can_split(words, advised):
    config = load_config(LLADA_8B, ["model.remat=full", *words])
    asked = plan.Asked(config, hardware.machines_named("8xh100"), 1, VOCAB_SIZE)
    compiled = {"needed_bytes": 2**40, "usable_bytes": 2**36}
    sentence = plan.does_not_fit({**plan.estimate(asked), "compiled": compiled}, asked)
    assert re.findall(r"--config\.(\S+?)(?=,| )", sentence) == advised
    assert sentence.endswith("a larger --topology.")
    for flag in advised:
        plan.estimate(asked._replace(config=load_config(LLADA_8B, [*words, flag])))
