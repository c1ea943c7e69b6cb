"""Checks of compiled programs: of reports written by hand, and of programs compiled by libtpu."""

import json

import pytest
from support.plans import GIB, LLADA_8B, MATRICES, VOCAB_SIZE, compile_in_a_process, estimated

from llada_jax.planning.check import bytes_by_purpose, check_program, parse_out_of_memory


def test_the_compilers_message_about_memory_is_parsed():
    message = (
        "Ran out of memory on HBM, the total memory required (74.58G) exceeds available HBM "
        "(15.75G)."
    )
    assert parse_out_of_memory(message) == (int(74.58 * GIB), int(15.75 * GIB))
    assert parse_out_of_memory("INTERNAL: something else") == (0, 0)


MEANT = {
    "traffic": {
        "gather": 200,
        "scatter": 100,
        "data": 0,
        "dcn": 0,
        "tensor": 0,
        "sequence": 0,
        "optimizer": 0,
    },
    "other_gradients": 0,
    "dtype": "bfloat16",
    "gradient_dtype": "bfloat16",
    "attention": "splash",
    "replicated": [],
    "mesh": {"fsdp": 8, "sequence": 1},
}


def failed(*collectives: tuple, kernels=("splash_mha_fwd",), **meant) -> set[str]:
    """Returns what a program with these collectives fails.

    Each is (kind, bytes, dtype, whether it spans slices, axes, where); axes is fsdp and where is
    "" where they are left out.
    """
    names = ("kind", "total_bytes", "dtype", "spans_slices", "axes", "where")
    report = {
        "collectives": [
            {"axes": "fsdp", "where": ""} | dict(zip(names, one)) for one in collectives
        ],
        "kernels": dict.fromkeys(kernels, 32),
    }
    results = check_program(report, {**MEANT, **meant})
    return {result["what"] for result in results if not result["ok"]}


AS_MEANT = (
    ("all-gather", 200, "bf16", False),
    ("reduce-scatter (as all-reduce)", 100, "f32", False),
)


def test_a_program_that_does_what_the_mesh_means_passes_every_check():
    assert failed(*AS_MEANT) == set()


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (("all-gather (in pieces)", 100, "bf16", False), "weights gathered"),
        (("reduce-scatter", 100, "bf16", False), "gradients scattered"),
        (("all-reduce", 100, "f32", False), "gradients scattered"),
        (("all-to-all", 100, "bf16", False), "resharded"),
        (("collective-permute", 100, "bf16", False), "resharded"),
    ],
)
def test_a_collective_that_was_not_meant_fails_the_check_that_names_it(more, what):
    assert failed(*AS_MEANT, more) == {what}


def test_a_gather_in_float32_a_whole_parameter_and_a_missing_kernel_are_found():
    many = {**MEANT["traffic"], "gather": 2**24, "scatter": 2**23}
    program = (("all-gather", 2**24, "f32", False), ("reduce-scatter", 2**23, "f32", False))
    assert failed(*program, traffic=many) == {"gathered in"}
    assert failed(*program, traffic=many, dtype="float32") == set()
    # norms are gathered in float32 on purpose
    norms = [("all-gather", 2**19, "f32", False)]
    assert failed(("all-gather", 2**24, "bf16", False), *program[1:], *norms, traffic=many) == set()
    # no weight is gathered over tensor alone, but a small model's gradient of the embedding may be
    rows = ("all-gather", 2**21, "f32", False, "tensor")
    assert failed(("all-gather", 2**24, "bf16", False), *program[1:], rows, traffic=many) == set()
    assert failed(*AS_MEANT, replicated=["embedding (512, 4096)"]) == {"replicated"}
    assert failed(*AS_MEANT, kernels=()) == {"attention kernel"}
    assert failed(*AS_MEANT, attention="xla") == {"attention kernel"}


def test_what_muon_exchanges_is_not_taken_for_weights_in_another_layout():
    name = "jit(step)/optimizer/mul"
    exchanged = ("all-to-all", 2**24, "f32", False, "fsdp", name)
    gathered = ("all-gather", 2**24, "f32", False, "fsdp", name)
    muon = {**MEANT["traffic"], "optimizer": 3 * 2**24}
    assert failed(*AS_MEANT, exchanged, gathered, traffic=muon) == set()
    # other optimizers have nothing to exchange
    unmeant = {"weights gathered", "gathered in", "resharded"}
    assert failed(*AS_MEANT, exchanged, gathered) == unmeant


def test_a_gradient_summed_in_bfloat16_is_found_where_float32_was_asked_for():
    narrow, wide = ("reduce-scatter", 100, "bf16", False), ("reduce-scatter", 100, "f32", False)
    weights = ("all-gather", 200, "bf16", False)
    assert failed(weights, narrow) == failed(weights, wide) == set()
    assert failed(weights, wide, gradient_dtype="float32") == set()
    assert failed(weights, narrow, gradient_dtype="float32") == {"gradients summed in"}


def test_gradients_of_replicas_and_between_slices_have_their_own_checks():
    traffic = {**MEANT["traffic"], "gather": 0, "scatter": 0, "data": 100, "dcn": 100}
    reduced, sent = ("all-reduce", 100, "bf16", False), ("all-reduce", 100, "bf16", True)
    assert failed(reduced, sent, traffic=traffic) == set()
    assert failed(reduced, reduced, sent, traffic=traffic) == {"gradients reduced"}
    # the embedding's gradient, next to those of the matrices
    others = {"traffic": traffic, "other_gradients": 100}
    assert failed(reduced, reduced, sent, **others) == set()
    assert failed(reduced, reduced, reduced, sent, **others) == {"gradients reduced"}
    assert failed(reduced, sent, sent, sent, traffic=traffic) == {"between slices"}
    gathered = ("all-gather", 200, "bf16", True)
    assert failed(reduced, sent, gathered, traffic=traffic) == {"between slices"}


def test_gradients_of_embedding_norms_and_adapters_are_counted_apart():
    embedding, norms = 4 * VOCAB_SIZE * 4096, 4 * 65 * 4096
    alike = ("v5p-128", "mesh.data=64", "mesh.fsdp=1", "data.batch_size=256")
    assert estimated(*alike)["other_gradients"] == embedding + norms
    halved = estimated("v5p-128", "data.batch_size=256", "mesh.fsdp=32", "mesh.tensor=2")
    assert halved["other_gradients"] == embedding // 64 + norms
    twice = estimated(*alike, "optimizer.gradient_accumulation=2")
    assert twice["other_gradients"] == 2 * (embedding + norms)
    adapters = estimated(*alike, "lora.rank=8", "lora.targets=blocks/q")
    assert adapters["other_gradients"] == 4 * 32 * 8 * (4096 + 4096)


def test_what_the_devices_of_a_row_exchange_has_its_own_check():
    traffic = {**MEANT["traffic"], "sequence": 100}
    exchanged = ("all-to-all", 120, "bf16", False, "sequence")
    assert failed(*AS_MEANT, exchanged, traffic=traffic) == set()
    assert failed(*AS_MEANT, exchanged, exchanged, traffic=traffic) == {"rows exchanged"}
    # with fsdp=1 the matrices travel over the same axis
    moved = [(*one, "sequence") for one in AS_MEANT]
    alone = {"fsdp": 1, "sequence": 8}
    assert failed(*moved, exchanged, traffic=traffic, mesh=alone) == set()
    assert failed(*moved, *moved, exchanged, traffic=traffic, mesh=alone) == {"rows exchanged"}


def test_what_the_tensor_axis_exchanges_is_neither_weights_nor_their_gradients():
    traffic = {**MEANT["traffic"], "tensor": 100}
    exchanged = [
        (kind, 200, "bf16", False, "tensor") for kind in ("all-gather", "all-reduce", "all-to-all")
    ]
    assert failed(*AS_MEANT, *exchanged, traffic=traffic) == set()
    replicas = {**traffic, "gather": 0, "scatter": 0, "data": 100}
    reduced = ("all-reduce", 100, "bf16", False, "data")
    assert failed(reduced, *exchanged, traffic=replicas) == set()
    # what is summed twice is found next to it
    assert failed(reduced, reduced, *exchanged, traffic=replicas) == {"gradients reduced"}
    twice = (*AS_MEANT, ("all-reduce", 100, "bf16", False))
    assert failed(*twice, *exchanged, traffic=traffic) == {"gradients scattered"}


# ---- compiled for slices that are not here

SLICES = {
    "v5p-128": ("--topology", "v5p-128", "--config.data.batch_size=256"),
    "2 x v5e-256": (
        "--topology",
        "v5e-256",
        "--slices",
        "2",
        "--config.data.batch_size=512",
        "--config.mesh.data=2",
    ),
}


# In a half and in a third of the time that a run's program takes (docs/plan.md).
LEVELS = {"v5p-128": "O1", "2 x v5e-256": "O0"}


@pytest.fixture(scope="module")
def report_of(tmp_path_factory):
    """Returns report_of(name of SLICES) -> the JSON of `plan --compile`; each is compiled once."""
    reports = {}

    def report_of(name: str) -> dict:
        if name not in reports:
            words = ("--config", LLADA_8B, *SLICES[name])
            directory, level = tmp_path_factory.mktemp("plan"), LEVELS[name]
            done = compile_in_a_process(directory, *words, level=level)
            assert done.returncode == 0, done.stderr
            reports[name] = json.loads(done.stdout)
        return reports[name]

    return report_of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least", "most"), [("v5p-128", 12, 15), ("2 x v5e-256", 2.8, 4.4)]
)
def test_llada_8b_fits_in_the_memory_that_was_measured(report_of, name, least, most):
    report = report_of(name)
    peak = report["compiled"]["peak_bytes"]
    assert report["compiled"]["fits"]
    assert least * GIB < peak < most * GIB < report["usable_bytes"]
    # the estimate that `plan` makes without --compile
    assert report["memory"]["peak"] == pytest.approx(peak, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
def test_weights_are_gathered_twice_and_gradients_reduced_once_a_step(report_of, name):
    report = report_of(name)
    assert {
        check["what"]: check["words"] for check in report["compiled"]["checks"] if not check["ok"]
    } == {}
    totals = bytes_by_purpose(report["compiled"]["collectives"])
    # at O0 some of it is gathered a third time
    most_gathered = 1.02 if name == "v5p-128" else 1.3
    assert 2 * 2 * MATRICES * 0.95 < totals["gather"] < 2 * 2 * MATRICES * most_gathered
    # In multiples of the bfloat16 embedding, what is reduced on top of the matrices. Below a run's
    # level the gradient of the embedding stays float32, as it is summed; between replicas it is
    # reduced once more, and the head's is float32 there.
    more = {"v5p-128": 1, "2 x v5e-256": 3}[name]
    most = 2 * MATRICES + more * 2 * VOCAB_SIZE * 4096
    assert 2 * MATRICES * 0.95 < totals["scatter"] + totals["reduce"] < 1.05 * most


@pytest.mark.slow
def test_a_layer_copies_next_to_nothing_to_another_layout(report_of):
    """One copy per layer, of its input; merged dims needed 21, 77.6 GiB per step in total."""
    copies = report_of("v5p-128")["compiled"]["layout_copies"]
    assert copies["times"] < 5 * 32
    assert copies["total_bytes"] < 8 * GIB


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
def test_the_attention_kernel_runs_once_a_layer_and_direction(report_of, name):
    kernels = report_of(name)["compiled"]["kernels"]
    assert sorted(kernels.values()) == [32, 32]
    assert all("splash" in kernel for kernel in kernels)


@pytest.mark.slow
def test_between_slices_only_shards_of_gradients_travel(report_of):
    report = report_of("2 x v5e-256")
    between = [c for c in report["compiled"]["collectives"] if c["spans_slices"]]
    assert between
    sent = sum(c["total_bytes"] for c in between)
    assert report["traffic"]["dcn"] < sent < 1.5 * report["traffic"]["dcn"]
