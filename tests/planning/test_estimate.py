"""Estimates of a training step against closed forms, written out for LLaDA-8B."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval as pe
from support.plans import LLADA_8B, MATRICES, PARAMETERS, VOCAB_SIZE, estimated

from llada_jax.cluster import hardware
from llada_jax.config import load_config
from llada_jax.errors import UserError
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture
from llada_jax.planning.absent_devices import stand_in_mesh
from llada_jax.planning.search import REMATS
from llada_jax.training.memory import sharded_bytes
from llada_jax.verbs import plan


def test_parameters_flops_and_tokens_are_those_of_llada_8b():
    p = estimated()
    assert (p["parameters"], p["matmul_parameters"]) == (PARAMETERS, MATRICES)
    assert p["flops_per_token"] == 6 * MATRICES + 12 * 32 * 4096 * 4096
    assert p["tokens_per_step"] == 1280 * 4096 == 5_242_880
    assert p["num_steps"] == 2_300_000_000_000 // 5_242_880
    assert (p["chips"], p["hosts"], p["devices"]) == (64, 16, 64)


def test_a_causal_objective_takes_half_the_flops_of_attention():
    both, past = estimated(), estimated("v5p-128", "objective.name=autoregressive")
    assert (both["causal"], past["causal"]) == (False, True)
    assert past["flops_per_token"] == 6 * MATRICES + 6 * 32 * 4096 * 4096


def test_a_causal_network_repeats_half_of_the_attention():
    def repeated(*words: str) -> float:
        remats = ("model.remat=full", "model.remat=none")
        full, none = (estimated("v5p-128", *words, remat)["executed_flops"] for remat in remats)
        return (full - none) / (5_242_880 / 64)

    projections = 2 * (MATRICES - 126_464 * 4096)
    assert repeated() == pytest.approx(projections + 4 * 32 * 4096 * 4096)
    assert repeated("objective.name=autoregressive") == pytest.approx(
        projections + 2 * 32 * 4096 * 4096
    )


ADAPTERS = ("lora.rank=16", "checkpoint.init_from=base")


@pytest.mark.parametrize("words", [(), ("objective.t_sampling=mirrored",), ("model.remat=full",)])
def test_frozen_matrices_have_no_gradients(words):
    """Those of the head are left out at the positions that are scored, half of them and a few more
    with mirrored times."""
    whole, adapted = estimated("v5p-128", *words), estimated("v5p-128", *words, *ADAPTERS)
    assert adapted["flops_per_token"] == whole["flops_per_token"]
    head = 126_464 * 4096
    saved = 2 * (MATRICES - head + whole["scored_share"] * head)
    assert whole["executed_flops"] - adapted["executed_flops"] == pytest.approx(
        5_242_880 / 64 * saved
    )
    assert adapted["traffic"] == {**whole["traffic"], "scatter": 0}
    # without them, a layer takes 4 P FLOPs per token and moves 4 P bytes
    wide = estimated("v5p-128", *words, *ADAPTERS, "optimizer.gradient_dtype=float32")
    for key in ("needed_on_all_links", "needed_on_one_axis"):
        assert wide["intensity"][key] == pytest.approx(whole["intensity"][key])


def test_a_frozen_network_sends_no_gradients_between_slices():
    pods = ("v5e-256", "mesh.data=4", "data.batch_size=512")
    whole, adapted = estimated(*pods, slices=2), estimated(*pods, *ADAPTERS, slices=2)
    assert min(whole["traffic"]["data"], whole["traffic"]["dcn"]) > 0
    assert (adapted["traffic"]["data"], adapted["traffic"]["dcn"]) == (0, 0)
    assert adapted["intensity"]["needed_between_slices"] == 0


@pytest.mark.parametrize(
    ("topology", "mesh", "ways"),
    [("v5p-128", {}, 64), ("v6e-256", {}, 256), ("v5p-128", {"data": 4, "tensor": 2}, 16)],
)
def test_state_is_three_float32_copies_split_over_fsdp_and_tensor(topology, mesh, ways):
    p = estimated(topology, *(f"mesh.{axis}={n}" for axis, n in mesh.items()))
    norms = 4096 * 65
    assert p["memory"]["state"] == pytest.approx(
        12 * ((PARAMETERS - norms) / ways + norms), abs=1000
    )  # and counters


def test_a_first_moment_in_bfloat16_takes_two_bytes_less_per_parameter():
    narrow = estimated("v5p-128", "optimizer.first_moment_dtype=bfloat16")["memory"]
    assert narrow["state"] == pytest.approx(10 / 12 * estimated()["memory"]["state"], rel=1e-5)


def test_a_reference_and_its_passes_are_counted():
    p = estimated("v5p-128", "objective.name=vrpo", "objective.num_times=4")
    norms = 4096 * 65
    # parameters, two moments and the reference
    assert p["memory"]["state"] == pytest.approx(16 * ((PARAMETERS - norms) / 64 + norms), abs=1000)
    # 4 passes of the policy, and 4 of the reference, which are forward alone
    assert p["flops_per_token"] == pytest.approx((4 + 4 / 3) * estimated()["flops_per_token"])
    assert p["memory"]["gradients"] == 2 * estimated()["memory"]["gradients"]


def test_state_on_another_mesh_equals_the_state_estimated_for_it():
    config = load_config(LLADA_8B)
    mesh = stand_in_mesh(config.mesh, hardware.machines_named("v5p-128"), 1)
    recipe = plan.recipe_of_shapes(config, mesh, VOCAB_SIZE)
    shape = {"data": 2, "fsdp": 8, "sequence": 1, "tensor": 4, "expert": 1}
    other = estimated("v5p-128", *(f"mesh.{axis}={n}" for axis, n in shape.items()))
    assert sharded_bytes(recipe.abstract, shape) == other["memory"]["state"]


def test_more_recomputation_takes_less_memory_and_more_flops():
    estimates = [estimated("v5p-128", f"model.remat={remat}") for remat in REMATS]
    assert [p["memory"]["peak"] for p in estimates] == sorted(
        (p["memory"]["peak"] for p in estimates), reverse=True
    )
    none, dots, attention, full = (p["executed_flops"] for p in estimates)
    # kernels are not run again: their outputs are kept
    assert none == dots < attention < full
    model = 5_242_880 * estimates[0]["flops_per_token"] / 64
    head, layers = 2 * 126_464 * 4096, 2 * (MATRICES - 126_464 * 4096)
    tokens = 5_242_880 / 64
    assert none == pytest.approx(model + tokens * head)  # the head is cut in pieces
    assert full - none == pytest.approx(tokens * (layers + 4 * 32 * 4096 * 4096))


def test_the_head_is_counted_at_the_positions_that_are_scored():
    """Half of the 4 rows of 4096 tokens that a device has in each microbatch, and their spread."""
    words = ("objective.t_sampling=mirrored", "optimizer.gradient_accumulation=5")
    some, every = estimated("v5p-128", *words), estimated("v5p-128", words[1])
    share = 66 * 128 / (4 * 4096)  # 8192 and 4 deviations of 64, in tiles of 128
    assert (some["scored_share"], every["scored_share"]) == (share, 1)
    # forward, backward twice, and recomputed
    head = 8 * 126_464 * 4096
    tokens = 5_242_880 / 64
    skipped = every["executed_flops"] - some["executed_flops"]
    assert skipped == pytest.approx(tokens * head * (1 - share))
    assert some["flops_per_token"] == every["flops_per_token"]
    # where half of the positions need one piece and all need two, one piece is not recomputed
    chunk = "model.nll_chunk=2048"
    once, twice = estimated("v5p-128", *words, chunk), estimated("v5p-128", words[1], chunk)
    skipped = twice["executed_flops"] - once["executed_flops"]
    assert skipped == pytest.approx(tokens * 126_464 * 4096 * (8 - 6 * share))


def test_saved_activations_follow_the_remat_policy():
    tokens = 20 * 4096
    for remat, width in (("full", 4096), ("attention", 2 * 4096), ("dots", 7 * 4096 + 2 * 12_288)):
        p = estimated("v5p-128", f"model.remat={remat}")
        assert p["memory"]["saved_activations"] == tokens * 32 * width * 2, remat


def test_microbatches_divide_the_activations_and_multiply_the_traffic():
    one, four = estimated(), estimated("v5p-128", "optimizer.gradient_accumulation=4")
    assert four["memory"]["saved_activations"] * 4 == one["memory"]["saved_activations"]
    assert four["traffic"]["gather"] == 4 * one["traffic"]["gather"] == 4 * 2 * 2 * MATRICES
    assert four["traffic"]["scatter"] == 4 * 2 * MATRICES
    assert four["tokens_per_device"] * 4 == one["tokens_per_device"] == 20 * 4096


def test_traffic_is_what_the_axes_exchange():
    alone = estimated("v6e-1", "data.batch_size=8")
    assert not any(alone["traffic"].values())
    replicas = estimated("v5p-128", "mesh.data=64", "mesh.fsdp=1")
    assert {k: v for k, v in replicas["traffic"].items() if v} == {"data": 2 * MATRICES}
    # the tensor axis splits the positions of the head, which is whole on every device
    both, head = estimated("v5p-128", "mesh.tensor=2"), VOCAB_SIZE * 4096
    assert both["traffic"]["gather"] == 2 * (MATRICES + head)
    assert both["traffic"]["scatter"] == MATRICES + head
    activations = 5 * 32 * (40 * 4096) * 4096 * 2
    assert both["traffic"]["tensor"] == activations + 3 * 2 * head // 32
    pods = estimated("v5e-256", "mesh.data=2", "data.batch_size=512", slices=2)
    assert (pods["traffic"]["data"], pods["traffic"]["dcn"]) == (0, 2 * MATRICES // 256)


@pytest.mark.parametrize(("words", "layers"), [((), 1), (("mesh.data=8", "mesh.fsdp=8"), 4)])
def test_devices_exchange_whole_layers_for_muon(words, layers):
    """Momenta, directions and updates, of which there are fewer than devices where those are 64."""
    p, adam = (estimated("v5p-128", f"optimizer.name={n}", *words) for n in ("muon", "adamw"))
    matrices = (MATRICES - VOCAB_SIZE * 4096) // 32
    assert p["traffic"] == {**adam["traffic"], "optimizer": 3 * 4 * matrices * layers}
    assert p["seconds_per_step"]["slow"] > adam["seconds_per_step"]["slow"]


@pytest.mark.parametrize(
    ("words", "heads"),
    [
        # queries, keys, values and outputs of the tokens of a device
        (("mesh.sequence=8",), 4 * 32),
        (("mesh.sequence=8", "mesh.tensor=2"), 4 * 16),
        # keys and values of four devices
        (("mesh.sequence=4", "model.num_kv_heads=4"), 2 * 4 * 4),
    ],
)
def test_devices_that_share_a_row_exchange_keys_or_heads(words, heads):
    p, whole = estimated("v5p-128", *words), estimated()
    tokens = 5_242_880 // (64 // p["mesh"]["tensor"])
    assert p["tokens_per_device"] == tokens
    # forward, recomputed and backward
    assert p["traffic"]["sequence"] == 3 * 32 * tokens * heads * 128 * 2
    once = estimated("v5p-128", *words, "model.remat=none")
    assert once["traffic"]["sequence"] == 2 * 32 * tokens * heads * 128 * 2
    if p["mesh"]["tensor"] == 1:
        # matrices are split over all devices, as without the axis
        for name in ("gather", "scatter", "data"):
            same = p["matmul_parameters"] / whole["matmul_parameters"]
            assert p["traffic"][name] == pytest.approx(same * whole["traffic"][name])


def test_parts_of_rows_that_are_too_short_for_a_kernel_take_the_reference():
    short = "data.sequence_length=512"
    assert estimated("v5p-128", short)["attention"] == "splash"
    assert estimated("v5p-128", short, "mesh.sequence=8")["attention"] == "xla"


@pytest.mark.parametrize(("rows", "remat"), [(1280, "attention"), (256, "dots")])
def test_auto_is_the_fastest_policy_that_leaves_a_fifth_of_the_memory(rows, remat):
    batch = f"data.batch_size={rows}"
    auto = estimated("v5p-128", batch, "model.remat=auto")
    peaks = {
        one: estimated("v5p-128", batch, f"model.remat={one}")["memory"]["peak"]
        for one in ("dots", "attention", "full")
    }
    fitting = [one for one, peak in peaks.items() if peak < 0.8 * auto["usable_bytes"]]
    assert auto["remat"] == fitting[0] == remat
    assert auto["memory"]["peak"] == peaks[remat]


def test_rows_that_no_kernel_can_attend_to_in_so_many_parts_are_refused():
    words = ("mesh.sequence=8", "model.num_kv_heads=4", "data.attend_across_documents=False")
    with pytest.raises(UserError, match="'triton' needs whole rows here, and 4 key/value heads"):
        estimated("64xh100", *words)


def test_a_plan_refuses_rows_that_the_kernel_does_not_take():
    narrow, shared = "data.sequence_length=4104", ("data.sequence_length=4224", "mesh.sequence=4")
    for topology, name, words, sentence in (
        ("64xh100", "cudnn", ("model.dtype=float32",), "'cudnn' needs numbers of 16 bits"),
        ("64xh100", "triton", (narrow,), "'triton' needs a sequence length .* not 4104"),
        ("v5p-128", "splash", (narrow,), "'splash' needs a sequence length .* not 4104"),
        ("64xh100", "triton", ("data.length_buckets=(192,)",), "'triton' needs .* not 192"),
        ("64xh100", "auto", ("data.length_buckets=(192,)",), "does not take 192; choose multiples"),
        # devices that attend from their own positions
        ("v5p-128", "splash", (*shared, "model.num_kv_heads=2"), "128, not 1056"),
    ):
        with pytest.raises(UserError, match=sentence):
            estimated(topology, f"model.attention={name}", *words)
    # devices that exchange heads attend from whole rows
    assert estimated("v5p-128", *shared, "model.attention=splash")["attention"] == "splash"


def test_parts_of_split_rows_are_kept_apart_by_a_kernel_that_can():
    split = "data.split_probability=0.3"
    assert estimated("8xh100", split)["attention"] == "triton"
    with pytest.raises(UserError, match="cannot keep .* config.data.split_probability above 0 ask"):
        estimated("8xh100", split, "model.attention=cudnn")


def test_gradients_summed_in_float32_double_their_traffic_and_no_other():
    wide = "optimizer.gradient_dtype=float32"
    for words, name in (
        (("v5p-128",), "scatter"),
        (("v5p-128", "mesh.data=64", "mesh.fsdp=1"), "data"),
    ):
        narrow, doubled = estimated(*words), estimated(*words, wide)
        assert doubled["traffic"] == {
            **narrow["traffic"],
            name: 2 * narrow["traffic"][name],
        }
        assert (narrow["gradient_dtype"], doubled["gradient_dtype"]) == ("bfloat16", "float32")
    # of gathers and scatters, a third doubles
    narrow, doubled = estimated("v5p-128"), estimated("v5p-128", wide)
    for key in ("needed_on_all_links", "needed_on_one_axis"):
        assert doubled["intensity"][key] == pytest.approx(4 / 3 * narrow["intensity"][key])
    pods = ("v5e-256", "mesh.data=2", "data.batch_size=512")
    narrow, doubled = estimated(*pods, slices=2), estimated(*pods, wide, slices=2)
    assert doubled["traffic"]["dcn"] == 4 * MATRICES // 256 == 2 * narrow["traffic"]["dcn"]
    assert (
        doubled["intensity"]["needed_between_slices"]
        == 2 * narrow["intensity"]["needed_between_slices"]
    )


def test_limits_are_those_of_the_scaling_book():
    """2550 and 850 tokens per chip on one and three axes of v5p, 76,000 per slice; the code counts
    90 GB/s per link, Google 100.
    """
    limits = estimated("v5p-128", "mesh.data=2", slices=2)["intensity"]
    assert limits["needed_on_one_axis"] == pytest.approx(2550, rel=0.12)
    assert limits["needed_on_all_links"] == pytest.approx(850, rel=0.12)
    assert limits["needed_between_slices"] == pytest.approx(76_000, rel=0.05)


def test_everything_kept_is_slower_than_its_flops_say():
    none, dots = (
        estimated("v5p-128", f"model.remat={remat}")["seconds_per_step"]["fast"]
        for remat in ("none", "dots")
    )
    assert none == pytest.approx(dots / 0.86)


def test_the_reference_multiplies_queries_and_keys_again_unless_everything_is_kept():
    reference = "model.attention=xla"
    none, dots, attention = (
        estimated("v5p-128", f"model.remat={remat}", reference)["executed_flops"]
        for remat in ("none", "dots", "attention")
    )
    tokens = 5_242_880 / 64
    assert dots - none == pytest.approx(tokens * 2 * 32 * 4096 * 4096)
    assert attention - dots == pytest.approx(tokens * 2 * (MATRICES - 126_464 * 4096))


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "forward_calls"), [("full", 2), ("attention", 1), ("dots", 1)])
@pytest.mark.parametrize(("attention", "chips"), [("splash", "v5p-8"), ("triton", "8xh100")])
def test_a_kernel_runs_again_in_the_backward_pass_only_where_its_outputs_are_not_kept(
    remat, forward_calls, attention, chips
):
    a = Architecture(
        vocab_size=512,
        num_layers=2,
        d_model=256,
        num_heads=2,
        num_kv_heads=2,
        head_dim=128,
        d_ff=512,
    )
    model = make_model(a, dtype=jnp.bfloat16, attention=attention, remat=remat, nll_chunk=128)
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    sizes = {"fsdp": -1}
    with jax.set_mesh(stand_in_mesh(sizes, hardware.machines_named(chips), 1)):
        gradient = jax.make_jaxpr(
            jax.grad(lambda p, t: model.nll_fn(p, t, t, t > 0, t, t).nll_BT.sum())
        )
        jaxpr = gradient(model.abstract, tokens).jaxpr
    needed, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    name = {"splash": "splash_mha_fwd", "triton": "mha_forward"}[attention]
    assert len(re.findall(rf"name={name}", str(needed))) == forward_calls
