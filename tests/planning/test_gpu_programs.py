"""What XLA makes of the shipped configs for GPUs that are not there."""

import json
import re

import pytest
from support.paths import ROOT
from support.plans import GIB, MATRICES, VOCAB_SIZE, compile_in_a_process

from llada_jax.planning.check import bytes_by_purpose

# {config: (topology, further words, layers, bounds of the peak in GiB)}
PROGRAMS = {
    "llada_160m": ("1xh100", ("--vocab-size", "50000"), 12, (24, 27)),
    "llada_1b": ("8xh100", (), 22, (36, 48)),
    "llada_8b": ("64xh100", ("--config.data.batch_size=256",), 32, (11.5, 14.5)),
    "llada_8b_128k": ("32xh100", ("--config.data.sequence_length=65536",), 32, (46, 54)),
    "lora_llada_8b": ("1xh100", ("--config.lora.frozen_dtype=int8",), 32, (14, 16.5)),
}
# of llada_1b: attention, feed-forward and head
MATRICES_1B = 22 * (2048 * 64 * 2 * (32 + 4) + 3 * 2048 * 5634) + 2048 * VOCAB_SIZE


@pytest.fixture(scope="module")
def report_of(tmp_path_factory):
    """Returns report_of(config) -> the JSON of `plan --compile`; each is compiled once."""
    reports = {}

    def report_of(name: str) -> dict:
        if name not in reports:
            topology, more, _, _ = PROGRAMS[name]
            words = ("--config", str(ROOT / f"configs/{name}.py"), "--topology", topology, *more)
            directory = tmp_path_factory.mktemp("plan")
            done = compile_in_a_process(directory, *words, platform="gpu")
            assert done.returncode == 0, done.stderr
            reports[name] = json.loads(done.stdout)
        return reports[name]

    return report_of


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_config_fits_in_the_memory_that_was_measured(report_of, name):
    report = report_of(name)
    least, most = PROGRAMS[name][-1]
    peak = report["compiled"]["peak_bytes"]
    assert least * GIB < peak < most * GIB < report["usable_bytes"]
    # the estimate that `plan` makes without --compile
    assert report["memory"]["peak"] == pytest.approx(peak, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llada_160m", "llada_1b", "llada_8b"])
def test_attention_runs_once_forward_and_once_backward(report_of, name):
    report, layers = report_of(name), PROGRAMS[name][2]
    calls = layers * report["microbatches"]
    assert report["compiled"]["kernels"] == {
        "__cudnn$fmhaSoftmax": calls,
        "__cudnn$fmhaSoftmaxBackward": calls,
    }


@pytest.mark.slow
def test_devices_that_share_long_rows_exchange_heads_as_the_estimate_says(report_of):
    """Packed rows of 65,536 tokens, for which Triton has one kernel forward and two backward."""
    report = report_of("llada_8b_128k")
    assert report["compiled"]["kernels"] == {"__gpu$xla.gpu.triton": 3 * 32}
    assert [check for check in report["compiled"]["checks"] if not check["ok"]] == []
    found = bytes_by_purpose(report["compiled"]["collectives"])
    assert found["sequence"] == pytest.approx(report["traffic"]["sequence"], rel=0.02)


@pytest.mark.slow
def test_one_gpu_exchanges_nothing(report_of):
    assert report_of("llada_160m")["compiled"]["collectives"] == []


@pytest.mark.slow
def test_weights_are_gathered_twice_and_gradients_scattered_once(report_of):
    for name, matrices in (("llada_8b", MATRICES), ("llada_1b", MATRICES_1B)):
        report = report_of(name)
        found = report["compiled"]["collectives"]
        once = 2 * matrices * report["microbatches"]
        # the embedding is exchanged besides, by the 1B model as a whole and in float32
        narrow = [c for c in found if c["dtype"] == "bf16"]
        totals = bytes_by_purpose(narrow)
        assert 0.9 * 2 * once < totals["gather"] < 1.15 * 2 * once
        everything = bytes_by_purpose(found)
        assert 0.9 * once < everything["scatter"] < 1.8 * once
        assert {c["axes"] for c in found} == {"fsdp"}


@pytest.mark.slow
def test_the_8b_program_passes_every_check_and_waits_for_the_gradients_of_its_layers(report_of):
    compiled = report_of("llada_8b")["compiled"]
    assert [check for check in compiled["checks"] if not check["ok"]] == []
    assert all(c["is_asynchronous"] for c in compiled["collectives"])
    scattered = [
        c for c in compiled["collectives"] if c["kind"] == "reduce-scatter" and c["dtype"] == "bf16"
    ]
    # in as many pieces as the vocabulary has
    (head,) = (c for c in scattered if c["times"] == 16)
    layers = [c for c in scattered if c is not head]
    assert sum(c["total_bytes"] for c in layers) > 12 * GIB
    # without flags the scatter of a layer's gradients has nothing between start and done
    assert not any(c["is_overlapped"] for c in layers)
    assert head["is_overlapped"]
    assert head["total_bytes"] == pytest.approx(2 * 4096 * VOCAB_SIZE, rel=0.01)


@pytest.mark.slow
def test_layers_whose_products_are_shared_gather_no_activations(tmp_path):
    """What the head splits over `tensor` is not split in the layers, which would gather it and copy
    it to the layout of the gather and back: 10 GiB of copies in this program.
    """
    shape = {"mesh.fsdp": 2, "mesh.tensor": 4, "model.num_layers": 4, "data.batch_size": 16}
    words = [f"--config.{name}={value}" for name, value in shape.items()]
    config = ("--config", str(ROOT / "configs/llada_8b.py"), "--config.model.remat=attention")
    done = compile_in_a_process(tmp_path, *config, "--topology", "8xh100", *words, platform="gpu")
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)["compiled"]
    of_tensor = [c for c in compiled["collectives"] if c["axes"] == "tensor"]
    in_layers = [c for c in of_tensor if re.search("attention|feed_forward", c["where"])]
    assert {c["kind"] for c in in_layers} == {"all-reduce"}
    # forward twice, backward twice, and once where attention's half is computed again
    assert sum(c["times"] for c in in_layers) == 5 * 4
    assert compiled["layout_copies"]["total_bytes"] < 4 * GIB
