"""The time of a step against its exchanges, written out for a few slices and hosts, and what the
passes of an objective, microbatches and slices multiply in them.
"""

import pytest
from support.plans import LLADA_8B, MATRICES, VOCAB_SIZE, estimated

from llada_jax.cluster import hardware
from llada_jax.config import load_config
from llada_jax.planning.estimate import bandwidth, between_slices, step_seconds
from llada_jax.verbs import plan

# bytes by purpose
TRAFFIC = {
    "gather": 3e9,
    "scatter": 5e9,
    "sequence": 7e9,
    "data": 11e9,
    "tensor": 13e9,
    "optimizer": 19e9,
}
HEAD = 126_464 * 4096
TOKENS = 5_242_880 / 64  # of one of 64 devices, in a step


def seconds_of(name: str, shape: dict[str, int], num_slices: int, dcn: float) -> dict[str, float]:
    """Returns the time of a step that computes nothing."""
    return step_seconds(
        0.0,
        {**TRAFFIC, "dcn": dcn},
        {**shape, "expert": 1},
        hardware.machines_named(name),
        num_slices,
        efficiency={"slow": 0.5, "fast": 0.5},
        network=50e9,
    )


def test_tpus_exchange_over_all_links_or_over_those_of_one_axis():
    """v5e has 200 GB/s of links in one direction, on two axes, and 3.125 GB/s to other slices."""
    shape = {"data": 4, "fsdp": 64, "sequence": 2, "tensor": 2}
    found = seconds_of("v5e-256", shape, 4, 17e9)
    # a ring of four: three quarters of the gradients go around, twice
    between = 2 * 3 / 4 * 17 / 3.125
    assert found["fast"] == pytest.approx((3 + 5 + 7 + 19 + 2 * (11 + 13)) / 200 + between)
    assert found["slow"] == pytest.approx(2 * (3 + 5 + 7 + 11 + 13 + 19) / 100 + between)


def test_gpus_exchange_over_nvlink_or_over_the_adapters_of_a_group():
    """H100s have 450 GB/s of NVLink in one direction, and 50 GB/s each to other hosts."""
    shape = {"data": 4, "fsdp": 2, "sequence": 2, "tensor": 4}
    found = seconds_of("64xh100", shape, 1, 0.0)
    # fsdp and sequence: two of their four devices share a host; data: each is in another one
    fast = (3 + 5 + 19) / (2 * 50) + 7 / 450 + 2 * 11 / 50 + 2 * 13 / 450
    assert found == pytest.approx({"fast": fast, "slow": fast / 0.7})


def test_the_two_devices_of_a_chip_share_its_links_and_its_price():
    p, chips = estimated("tpu7x-128"), hardware.machines_named("tpu7x-128")
    assert (p["chips"], p["devices"]) == (64, 128)
    # 600 GB/s of links in one direction, and 12.5 GB/s to other slices, for both
    assert bandwidth(chips, p["mesh"], "fsdp", network=0.0)["fast"] == 300e9
    assert between_slices(chips.accelerator) == 6.25e9
    for case, seconds in p["seconds_per_step"].items():
        assert p["chip_hours"][case] == pytest.approx(64 * seconds * p["num_steps"] / 3600)


def test_microbatches_multiply_what_goes_between_slices_and_divide_their_tokens():
    words = ("mesh.data=4", "data.batch_size=1024", "optimizer.gradient_accumulation=2")
    p = estimated("v5e-256", *words, slices=2)
    assert (p["chips"], p["hosts"], p["devices"]) == (512, 128, 512)
    # two bytes per gradient, in shards of 128 devices
    assert p["traffic"]["data"] == p["traffic"]["dcn"] == 2 * 2 * MATRICES // 128
    assert p["intensity"]["tokens_per_slice"] == 1024 * 4096 // 2 // 2
    assert p["num_tokens"] == p["num_steps"] * 1024 * 4096
    # neither activations nor rows are more in two parts than in one
    split = ("mesh.tensor=2", "mesh.sequence=2")
    one, two = estimated("v5p-128", *split), estimated("v5p-128", *split, words[-1])
    # the head, which is exchanged in every microbatch, is split by 32 and has two bytes per number
    head = (2 + 1) * 2 * HEAD // 32
    assert two["traffic"]["tensor"] == one["traffic"]["tensor"] + head > head
    assert one["traffic"]["sequence"] == two["traffic"]["sequence"] > 0


def test_devices_of_the_expert_axis_sum_their_gradients():
    assert estimated("v5p-128", "mesh.expert=2")["traffic"]["data"] == 2 * MATRICES // 32


def test_a_tensor_axis_halves_the_matrices_of_the_layers_of_a_device():
    one, two = estimated(), estimated("v5p-128", "mesh.tensor=2")
    assert one["traffic"]["scatter"] == 2 * MATRICES
    assert two["traffic"]["scatter"] == MATRICES - HEAD + 2 * HEAD
    for key in ("needed_on_all_links", "needed_on_one_axis"):
        assert two["intensity"][key] == pytest.approx(one["intensity"][key] / 2)


def test_a_sequence_axis_alone_gathers_and_scatters():
    p = estimated("v5p-64", "mesh.fsdp=1", "mesh.sequence=32")
    assert (p["traffic"]["gather"], p["traffic"]["scatter"]) == (4 * MATRICES, 2 * MATRICES)


def test_the_head_of_tied_embeddings_has_gradients():
    tied = estimated("v5p-128", "model.tie_embeddings=True")
    assert tied["traffic"]["scatter"] == 2 * MATRICES
    assert tied["executed_flops"] == estimated()["executed_flops"]


def test_float32_doubles_all_that_hides_behind_computing():
    wide = estimated("v5p-128", "model.dtype=float32")["intensity"]
    for key in ("needed_on_all_links", "needed_on_one_axis"):
        assert wide[key] == pytest.approx(2 * estimated()["intensity"][key])


def test_each_pass_that_is_trained_runs_forward_again():
    """Four passes of the policy, and four of the reference, which run forward alone."""
    words = ("objective.name=vrpo", "objective.num_times=4")
    one, p = estimated(), estimated("v5p-128", *words)
    # forward, forward again and backward
    assert p["traffic"]["gather"] == (4 * 3 + 4) * 2 * MATRICES
    assert p["traffic"]["scatter"] == 4 * 2 * MATRICES
    model = TOKENS * one["flops_per_token"]
    repeated = one["executed_flops"] - model
    forward = TOKENS * (2 * MATRICES + 4 * 32 * 4096 * 4096)
    assert p["executed_flops"] == pytest.approx((4 + 4 / 3) * model + 4 * (repeated + forward))
    adapted = estimated("v5p-128", *words, "lora.rank=16", "checkpoint.init_from=base")
    assert p["executed_flops"] - adapted["executed_flops"] == pytest.approx(
        TOKENS * 4 * 2 * MATRICES
    )


def test_time_lies_between_its_assumptions_and_money_follows_from_it():
    p = estimated("v5p-128", "data.batch_size=256")
    peak, executed, exchanged = 459e12, p["executed_flops"], 3 * 2 * MATRICES
    assert p["seconds_per_step"]["fast"] == pytest.approx(executed / (0.75 * peak))
    assert p["seconds_per_step"]["slow"] == pytest.approx(
        executed / (0.45 * peak) + 2 * exchanged / 200e9
    )
    for case, seconds in p["seconds_per_step"].items():
        assert p["mfu"][case] == pytest.approx(
            1_048_576 * p["flops_per_token"] / (64 * peak * seconds)
        )
        assert p["days"][case] == pytest.approx(seconds * p["num_steps"] / 86_400)
        assert p["chip_hours"][case] == pytest.approx(64 * 24 * p["days"][case])
    assert 0.2 < p["mfu"]["slow"] < p["mfu"]["fast"] < 0.7


def test_a_small_batch_on_a_large_slice_waits_for_its_weights():
    p = estimated("v5p-1024", "data.sequence_length=128", "data.batch_size=512")
    exchanged = (p["traffic"]["gather"] + p["traffic"]["scatter"]) / 600e9
    assert p["seconds_per_step"]["fast"] == pytest.approx(exchanged)
    assert p["intensity"]["tokens_per_device"] < p["intensity"]["needed_on_all_links"]


def test_gpus_of_one_host_exchange_over_nvlink():
    p = estimated("8xh100")
    assert (p["hosts"], p["attention"], p["network_gbps"]) == (1, "cudnn", None)
    exchanged = (p["traffic"]["gather"] + p["traffic"]["scatter"]) / (0.7 * 450e9)
    assert p["seconds_per_step"]["slow"] == pytest.approx(
        p["executed_flops"] / (0.35 * 989e12) + exchanged
    )


@pytest.mark.parametrize(
    ("words", "purpose", "rate"),
    [
        # eight adapters of a host bring in an array together: 400 GB/s, less than NVLink's 450
        (("64xh100",), "gather", 8 * 50e9),
        # NVLink is the slower one
        (("64xa100-80gb",), "gather", 300e9),
        # a group of fsdp has one GPU in each host, and so one adapter
        (("64xh100", "mesh.fsdp=8", "mesh.tensor=8"), "gather", 50e9),
        # tensor stays within the host
        (("64xh100", "mesh.fsdp=8", "mesh.tensor=8"), "tensor", 450e9),
        (("64xh100", "mesh.fsdp=32", "mesh.tensor=2"), "gather", 4 * 50e9),
        (("64xh100", "mesh.fsdp=8", "mesh.data=8"), "data", 50e9),
    ],
)
def test_an_axis_between_hosts_has_the_adapters_of_its_gpus(words, purpose, rate):
    p = estimated(*words)
    assert p["network_gbps"] == 400
    axis = {"gather": "fsdp"}.get(purpose, purpose)
    machines = hardware.machines_named(words[0])
    found = bandwidth(machines, p["mesh"], axis, network=50e9)
    assert found == pytest.approx({"fast": rate, "slow": 0.7 * rate})


def test_a_slower_network_takes_longer_between_hosts_alone():
    config = load_config(LLADA_8B)

    def slow(topology: str, gbps: float) -> float:
        machines = hardware.machines_named(topology)
        asked = plan.Asked(config, machines, 1, VOCAB_SIZE, gbps)
        return plan.estimate(asked)["seconds_per_step"]["slow"]

    assert slow("64xh100", 100) > 1.02 * slow("64xh100", 400)
    assert slow("8xh100", 100) == slow("8xh100", 400)
    assert slow("v5p-128", 100) == slow("v5p-128", 400)


def test_microbatches_cost_time_between_hosts_of_gpus():
    """Each of them gathers the weights again; a plan that leaves that out recommends many."""
    times = [
        estimated("64xh100", f"optimizer.gradient_accumulation={n}")["seconds_per_step"]["slow"]
        for n in (1, 4, 20)
    ]
    assert times == sorted(times)
    assert times[2] > 1.15 * times[0]
