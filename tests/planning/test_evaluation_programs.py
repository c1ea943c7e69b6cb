"""The programs of evaluation: traced without devices, and compiled for LLaDA-8B on devices that are
not there.
"""

from types import SimpleNamespace

import jax
import pytest
from support.datasets import lines_dataset
from support.exports import LLADA, write_checkpoint
from support.hf_directories import random_params
from support.jaxprs import equations
from support.plans import GIB, PARAMETERS, memory_in_a_process

import llada_jax
from llada_jax.cluster.sharding import make_mesh
from llada_jax.evaluation import breakdown, conditional, likelihood
from llada_jax.planning.evaluation_program import traced_answers, traced_bound
from llada_jax.verbs.evaluate import evaluate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    home = tmp_path_factory.mktemp("checkpoint")
    return write_checkpoint(home / "run", LLADA, random_params(LLADA))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Rows for which CPUs have an attention of their own."""
    return lines_dataset(tmp_path_factory.mktemp("lines"), num_lines=400, sequence_length=256)


def small_mesh(**sizes: int):
    num_devices = 1
    for size in sizes.values():
        num_devices *= size
    return make_mesh(sizes, devices=jax.devices()[:num_devices])


class Seen(Exception):
    """Raised instead of compiling a program: the program, traced, and its static arguments."""


def tracer(program):
    def seen(*arguments, **static):
        raise Seen(program.trace(*arguments, **static), static)

    return seen


MESHES = [{"fsdp": 1}, {"fsdp": 2, "tensor": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_traced_bound_is_the_program_that_evaluate_runs(
    checkpoint, records, monkeypatch, sizes
):
    mesh = small_mesh(**sizes)
    real = likelihood.batch_sums
    monkeypatch.setattr(likelihood, "batch_sums", SimpleNamespace(lower=tracer(real)))
    with pytest.raises(Seen) as found:
        evaluate(checkpoint, records, batch_size=4, mesh=mesh)
    expected, static = found.value.args
    network = static["nll_fn"].__self__
    names = {equation.primitive.name for equation in equations(expected.jaxpr.jaxpr)}
    assert "shard_map" in names, "each device attends to its own rows and heads"
    traced = traced_bound(
        network,
        network.abstract,
        static["objective"],
        num_rows=static["num_rows"],
        sequence_length=256,
        mesh=mesh,
    )
    assert str(traced.jaxpr) == str(expected.jaxpr)


def test_the_breakdown_splits_attention_over_a_mesh_too(checkpoint, records, monkeypatch):
    monkeypatch.setattr(breakdown, "_sums", tracer(breakdown._sums))
    with pytest.raises(Seen) as found:
        evaluate(
            checkpoint, records, batch_size=4, mesh=small_mesh(fsdp=2, tensor=2), breakdown=True
        )
    names = {equation.primitive.name for equation in equations(found.value.args[0].jaxpr.jaxpr)}
    assert "shard_map" in names


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_traced_answers_are_the_program_that_scoring_runs(checkpoint, monkeypatch, sizes):
    mesh = small_mesh(**sizes)
    model = llada_jax.load(checkpoint, mesh=mesh)
    monkeypatch.setattr(conditional, "nll_of_answers", tracer(conditional.nll_of_answers))
    with pytest.raises(Seen) as found:
        model.score([("a" * 16, "b" * 8)], batch_size=4)
    expected, _ = found.value.args
    traced = traced_answers(
        model.model, model.model.abstract, num_rows=4, before=16, answer=8, mesh=mesh
    )
    assert str(traced.jaxpr) == str(expected.jaxpr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "kernel", "most"),
    [
        ("1xh100", "__cudnn$fmhaSoftmax", 34),
        ("8xh100", "__cudnn$fmhaSoftmax", 5),
        ("v5e-8", "splash_mha_fwd_segmented_no_residuals", 6.5),
    ],
)
def test_llada_8b_scores_a_default_batch_of_records_on(tmp_path, topology, kernel, most):
    """The figures of docs/evaluation.md come from the same command."""
    words = ("--topology", topology, "--program", "records")
    platform = "tpu" if topology.startswith("v") else "gpu"
    found = memory_in_a_process(tmp_path, *words, platform=platform)
    assert (found["batch_size"], found["width"]) == (64, 4096)
    assert found["kernels"] == {kernel: 32}, "one call for each layer"
    # two bytes for each parameter, besides a few norms and the batch
    shards = 2 * PARAMETERS / found["devices"]
    assert shards < found["argument_bytes"] < shards + GIB // 64
    assert found["argument_bytes"] < found["peak_bytes"] < most * GIB < found["usable_bytes"]


@pytest.mark.slow
def test_llada_8b_scores_a_default_batch_of_long_answers_on_one_h100(tmp_path):
    words = ("--topology", "1xh100", "--program", "answers")
    found = memory_in_a_process(tmp_path, *words, platform="gpu")
    assert (found["batch_size"], found["width"], found["gen_length"]) == (64, 4096, 512)
    assert found["kernels"] == {"__cudnn$fmhaSoftmax": 32}
    assert found["argument_bytes"] < found["peak_bytes"] < 34 * GIB < found["usable_bytes"]
