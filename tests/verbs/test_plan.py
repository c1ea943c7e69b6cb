"""`llada-jax plan` against closed forms, and the programs that libtpu compiles for slices that are
not here.
"""

import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval as pe
from support.paths import ROOT
from support.required import libtpu_environment

from llada_jax.__main__ import main
from llada_jax.cluster import hardware
from llada_jax.config import load_config
from llada_jax.errors import UserError
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture
from llada_jax.planning import absent_devices
from llada_jax.planning.check import totals_by_purpose
from llada_jax.planning.estimate import recipe_of_shapes
from llada_jax.planning.search import REMATS, search_choices, with_choice
from llada_jax.verbs import plan

LLADA_8B = str(ROOT / "configs/llada_8b.py")
PARAMETERS, MATRICES = 8_015_581_184, 8_015_581_184 - 126_464 * 4096 - 4096 * 65
GIB = 2**30


def planned(topology="v5p-128", *overrides: str, slices: int = 1, config: str = LLADA_8B) -> dict:
    return plan.plan(
        load_config(config, list(overrides)), hardware.machines_named(topology), slices, 126_464
    )


# ---- arithmetic


def test_parameters_flops_and_tokens_are_those_of_llada_8b():
    p = planned()
    assert (p["parameters"], p["matmul_parameters"]) == (PARAMETERS, MATRICES)
    assert p["flops_per_token"] == 6 * MATRICES + 12 * 32 * 4096 * 4096
    assert p["tokens_per_step"] == 1280 * 4096 == 5_242_880
    assert p["num_steps"] == 2_300_000_000_000 // 5_242_880
    assert (p["chips"], p["hosts"], p["devices"]) == (64, 16, 64)


@pytest.mark.parametrize(
    ("topology", "mesh", "ways"),
    [("v5p-128", {}, 64), ("v6e-256", {}, 256), ("v5p-128", {"data": 4, "tensor": 2}, 16)],
)
def test_state_is_three_float32_copies_split_over_fsdp_and_tensor(topology, mesh, ways):
    p = planned(topology, *(f"mesh.{axis}={n}" for axis, n in mesh.items()))
    norms = 4096 * 65
    assert p["memory"]["state"] == pytest.approx(
        12 * ((PARAMETERS - norms) / ways + norms), abs=1000
    )  # and counters


def test_state_on_another_mesh_equals_the_state_planned_for_it():
    config = load_config(LLADA_8B)
    machines = hardware.machines_named("v5p-128")
    one = recipe_of_shapes(config, absent_devices.stand_in_mesh(config.mesh, machines, 1), 126_464)
    shape = {"data": 2, "fsdp": 8, "sequence": 1, "tensor": 4, "expert": 1}
    other = planned("v5p-128", *(f"mesh.{axis}={n}" for axis, n in shape.items()))
    assert absent_devices.sharded_bytes(one.abstract, shape) == other["memory"]["state"]


def test_more_recomputation_takes_less_memory_and_more_flops():
    plans = [planned("v5p-128", f"model.remat={remat}") for remat in REMATS]
    assert [p["memory"]["peak"] for p in plans] == sorted(
        (p["memory"]["peak"] for p in plans), reverse=True
    )
    none, dots, attention, full = (p["executed_flops"] for p in plans)
    assert none < dots < attention < full
    model = 5_242_880 * plans[0]["flops_per_token"] / 64
    head, layers = 2 * 126_464 * 4096, 2 * (MATRICES - 126_464 * 4096)
    tokens = 5_242_880 / 64
    assert none == pytest.approx(model + tokens * head)  # the head is cut in pieces
    assert full - none == pytest.approx(tokens * (layers + 4 * 32 * 4096 * 4096))


def test_saved_activations_follow_the_remat_policy():
    tokens = 20 * 4096
    for remat, width in (("full", 4096), ("attention", 2 * 4096), ("dots", 6 * 4096 + 2 * 12_288)):
        p = planned("v5p-128", f"model.remat={remat}")
        assert p["memory"]["saved_activations"] == tokens * 32 * width * 2, remat


def test_microbatches_divide_the_activations_and_multiply_the_traffic():
    one, four = planned(), planned("v5p-128", "optimizer.gradient_accumulation=4")
    assert four["memory"]["saved_activations"] * 4 == one["memory"]["saved_activations"]
    assert four["traffic"]["gather"] == 4 * one["traffic"]["gather"] == 4 * 2 * 2 * MATRICES
    assert four["traffic"]["scatter"] == 4 * 2 * MATRICES
    assert four["tokens_per_device"] * 4 == one["tokens_per_device"] == 20 * 4096


def test_traffic_is_what_the_axes_exchange():
    alone = planned("v6e-1", "data.batch_size=8")
    assert not any(alone["traffic"].values())
    replicas = planned("v5p-128", "mesh.data=64", "mesh.fsdp=1")
    assert {k: v for k, v in replicas["traffic"].items() if v} == {"data": 2 * MATRICES}
    both = planned("v5p-128", "mesh.tensor=2")
    assert both["traffic"]["gather"] == 2 * MATRICES
    assert both["traffic"]["tensor"] == 5 * 32 * (40 * 4096) * 4096 * 2
    pods = planned("v5e-256", "mesh.data=2", "data.batch_size=512", slices=2)
    assert (pods["traffic"]["data"], pods["traffic"]["dcn"]) == (0, 2 * MATRICES // 256)


def test_time_lies_between_its_assumptions_and_money_follows_from_it():
    p = planned("v5p-128", "data.batch_size=256")
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
    p = planned("v5p-1024", "data.sequence_length=128", "data.batch_size=512")
    exchanged = (p["traffic"]["gather"] + p["traffic"]["scatter"]) / 600e9
    assert p["seconds_per_step"]["fast"] == pytest.approx(exchanged)
    assert p["intensity"]["tokens_per_device"] < p["intensity"]["needed_on_all_links"]


def test_limits_are_those_of_the_scaling_book():
    """2550 and 850 tokens a chip on one and three axes of v5p, 76,000 a slice; it counts 90 GB/s a
    link, Google 100.
    """
    limits = planned("v5p-128", "mesh.data=2", slices=2)["intensity"]
    assert limits["needed_on_one_axis"] == pytest.approx(2550, rel=0.12)
    assert limits["needed_on_all_links"] == pytest.approx(850, rel=0.12)
    assert limits["needed_between_slices"] == pytest.approx(76_000, rel=0.05)


def test_gpus_are_planned_too_without_a_guess_about_their_network():
    one, many = planned("8xh100"), planned("64xh100")
    assert (one["hosts"], many["hosts"], many["chips"]) == (1, 8, 64)
    assert (one["attention"], one["network_counted"], many["network_counted"]) == (
        "cudnn",
        True,
        False,
    )
    assert many["seconds_per_step"]["slow"] == pytest.approx(
        many["executed_flops"] / (0.45 * 989e12)
    )
    assert any("not in the time" in line for line in plan.describe(many))


def test_the_search_returns_what_nothing_else_beats_in_both_time_and_memory():
    config = load_config(LLADA_8B, ["data.batch_size=256"])
    machines = hardware.machines_named("v6e-256")
    found = search_choices(config, machines, 1, 126_464)
    assert len(found) > 1
    middles = [sum(choice["seconds_per_step"].values()) for choice in found]
    assert middles == sorted(middles)
    assert [c["peak"] for c in found] == sorted((c["peak"] for c in found), reverse=True)
    for choice in found:
        assert math.prod(choice["mesh"].values()) == 256
        again = plan.plan(
            with_choice(config, choice), machines, 1, 126_464
        )  # raises where it cannot be split
        assert again["memory"]["peak"] == choice["peak"] < machines.accelerator.usable_hbm_bytes


def test_a_search_without_a_result_says_so():
    with pytest.raises(
        UserError, match=r"No mesh, remat policy or microbatch .* is estimated to fit v5litepod-4"
    ):
        search_choices(load_config(LLADA_8B), hardware.machines_named("v5e-4"), 1, 126_464)


@pytest.mark.parametrize(("remat", "forward_calls"), [("full", 2), ("attention", 1)])
def test_splash_runs_again_in_the_backward_pass_only_where_its_output_is_not_kept(
    remat, forward_calls
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
    model = make_model(a, dtype=jnp.bfloat16, attention="splash", remat=remat, nll_chunk=128)
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    sizes = {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1, "expert": 1}
    with jax.set_mesh(absent_devices.stand_in_mesh(sizes, hardware.machines_named("v5p-8"), 1)):
        gradient = jax.make_jaxpr(
            jax.grad(lambda p, t: model.nll_fn(p, t, t, t > 0, t, t).nll_BT.sum())
        )
        jaxpr = gradient(model.abstract, tokens).jaxpr
    needed, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    assert len(re.findall(r"name=splash_mha_fwd", str(needed))) == forward_calls


# ---- the command


def test_json_is_one_object_and_the_text_says_the_same(capsys):
    words = ["plan", "--config", LLADA_8B, "--topology", "v5p-128", "--config.data.batch_size=256"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "8.02B parameters" in out
    assert (
        f"{report['memory']['state'] / GIB:.2f} GiB parameters and optimizer state (exact)" in out
    )
    assert (
        "256 rows * 4096 = 1,048,576 tokens in 1 microbatch: 4 rows, 16,384 tokens a device" in out
    )
    assert "compiled" not in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--topology", "v5p-127"], "There is no slice 'v5p-127': choose one of v5p-8, "),
        (
            ["--topology", "12xh100"],
            "12xh100 is no whole number of hosts: a host has 8 h100; choose a multiple of 8.",
        ),
        (["--topology", "8xh1000"], "Unknown GPU 'h1000'. Did you mean 'h100'?"),
        (
            ["--topology", "v5p-128", "--slices", "0"],
            "--slices 0 is no number of slices; give 1 or more.",
        ),
        (
            ["--topology", "v5p-128", "--slices", "2"],
            "config.mesh.data=1 is no multiple of the 2 slices",
        ),
        (
            ["--topology", "v5p-128", "--config.model.vocab_size=0"],
            "and no data is read; give --vocab-size.",
        ),
        (["--topology", "v5p-128", "--config.mesh.fsdp=63"], "needs 63 devices, and there are 64"),
        (["--topology", "v5p-128", "--config.data.batch_size=65"], "=65 cannot be split 64 ways"),
        (["--topology", "8xh100", "--compile"], "--compile is for TPUs"),
        (
            ["--topology", "v5p-128", "--flags", "v5"],
            "Unknown preset of compiler flags 'v5'. Did you mean 'v5p'?",
        ),
    ],
)
def test_mistakes_end_with_one_sentence(words, sentence, capsys):
    assert main(["plan", "--config", LLADA_8B, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_a_missing_libtpu_is_answered_by_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs libtpu, which is not installed: pip install 'llada_jax\[tpu\]'"
    ):
        absent_devices.load_libtpu({})


def test_the_compilers_words_about_memory_are_read():
    message = "Ran out of memory on HBM, the total memory required (74.58G) exceeds available HBM (15.75G)."
    assert absent_devices.out_of_memory(message) == (int(74.58 * GIB), int(15.75 * GIB))
    assert absent_devices.out_of_memory("INTERNAL: something else") == (0, 0)


# ---- compiled for slices that are not here


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Returns compiled(name, *words) -> the finished `llada-jax plan --compile --json`; each name
    is compiled once.
    """
    finished = {}

    def compiled(name: str, *words: str) -> subprocess.CompletedProcess:
        if name not in finished:
            environment = {
                **libtpu_environment(),
                "JAX_PLATFORMS": "cpu",
                "JAX_OPTIMIZATION_LEVEL": LEVELS.get(name, "UNKNOWN"),
            }
            command = [sys.executable, "-m", "llada_jax", "plan", "--compile", "--json", *words]
            finished[name] = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                cwd=tmp_path_factory.mktemp("plan"),
            )
        return finished[name]

    return compiled


SLICES = {
    "v5p-128": ("--topology", "v5p-128", "--config.data.batch_size=256"),
    "v6e-256": ("--topology", "v6e-256", "--config.data.batch_size=512"),
    "2 x v5e-256": (
        "--topology",
        "v5e-256",
        "--slices",
        "2",
        "--config.data.batch_size=512",
        "--config.mesh.data=2",
    ),
}


# The slices are compiled as a run would compile them, but for one, in a third of the time
# (docs/plan.md).
LEVELS = {"2 x v5e-256": "O0"}


def report_of(compiled, name: str) -> dict:
    done = compiled(name, "--config", LLADA_8B, *SLICES[name])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least", "most"), [("v5p-128", 12, 15), ("v6e-256", 5, 7.5), ("2 x v5e-256", 2.8, 4.2)]
)
def test_llada_8b_fits_in_the_memory_that_was_measured(compiled, name, least, most):
    report = report_of(compiled, name)
    peak = report["compiled"]["peak_bytes"]
    assert report["compiled"]["fits"]
    assert least * GIB < peak < most * GIB < report["usable_bytes"]
    assert report["memory"]["peak"] == pytest.approx(
        peak, rel=0.25
    )  # the estimate of plan without --compile


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
def test_weights_are_gathered_twice_and_gradients_reduced_once_a_step(compiled, name):
    report = report_of(compiled, name)
    assert {
        check["what"]: check["words"] for check in report["compiled"]["checks"] if not check["ok"]
    } == {}
    totals = totals_by_purpose(report["compiled"]["collectives"])
    assert 2 * 2 * MATRICES * 0.95 < totals["gather"] < 2 * 2 * MATRICES * 1.3
    embedding = (
        2 * 126_464 * 4096
    )  # its gradient is reduced between replicas too, and the head's is float32 there
    most = 2 * MATRICES + (2 * embedding if name == "2 x v5e-256" else 0)
    assert 2 * MATRICES * 0.95 < totals["scatter"] + totals["reduce"] < 1.05 * most


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
def test_the_attention_kernel_runs_once_a_layer_and_direction(compiled, name):
    kernels = report_of(compiled, name)["compiled"]["kernels"]
    assert sorted(kernels.values()) == [32, 32, 32]
    assert all("splash" in kernel for kernel in kernels)


@pytest.mark.slow
def test_between_slices_only_shards_of_gradients_travel(compiled):
    report = report_of(compiled, "2 x v5e-256")
    between = [c for c in report["compiled"]["collectives"] if c["spans_slices"]]
    assert between
    sent = sum(c["total_bytes"] for c in between)
    assert report["traffic"]["dcn"] < sent < 1.5 * report["traffic"]["dcn"]


TOO_LARGE = """
from llada_jax.config import default_config
def get_config():
    config = default_config()
    config.num_steps = 10
    config.data.batch_size, config.data.sequence_length = 8192, 256
    config.model.vocab_size, config.model.num_layers, config.model.d_model = 512, 2, 512
    config.model.num_heads = config.model.num_kv_heads = 4
    config.model.attention = "xla"
    config.model.head_dim, config.model.d_ff = 128, 2048
    return config
"""


@pytest.mark.slow
def test_a_program_that_does_not_fit_is_answered_with_the_compilers_number_and_remedies(
    compiled, tmp_path
):
    (tmp_path / "large.py").write_text(TOO_LARGE)
    done = compiled("too large", "--config", str(tmp_path / "large.py"), "--topology", "v5e-4")
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["compiled"]["fits"] is False
    sentence = done.stderr.splitlines()[-1]
    needed = re.search(
        r"The train step needs ([\d.]+) GiB and a v5e device has 15.8 GiB: try ", sentence
    )
    assert float(needed.group(1)) > 15.8
    assert (
        "--config.model.remat=full, then --config.optimizer.gradient_accumulation=2, then "
        in sentence
    )
