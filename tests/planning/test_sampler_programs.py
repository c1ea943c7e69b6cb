"""The program that denoises a block: traced without devices, what a cache adds to its memory, and
LLaDA-8B compiled for devices that are not there.
"""

import jax
import pytest
from support.plans import GIB, PARAMETERS, memory_in_a_process

from llada_jax.cluster.sharding import one_device_mesh
from llada_jax.models.model import make_model, parameter_shardings
from llada_jax.models.transformer import Architecture
from llada_jax.planning.sampler_program import traced_block
from llada_jax.samplers import denoise
from llada_jax.samplers.text import generate_tokens


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_the_traced_program_is_the_one_that_a_request_runs(monkeypatch, cache):
    shape = dict(vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8)
    model = make_model(Architecture(**shape, d_ff=64))
    mesh = one_device_mesh()
    # as a checkpoint is loaded
    params = jax.device_put(model.init(jax.random.key(0)), parameter_shardings(model, mesh))
    run = denoise.denoise_block

    class Seen(Exception):
        pass

    def seen(*arguments, program):
        raise Seen(run.trace(*arguments, program=program), arguments[1].canvas_BT.shape)

    monkeypatch.setattr(denoise, "denoise_block", seen)
    schedule = {"gen_length": 16, "block_length": 8, "cache": cache}
    with pytest.raises(Seen) as found:
        generate_tokens(
            model.logits_fn,
            params,
            [[1, 2, 3], [4]],
            mask_id=63,
            pad_id=0,
            cached_fn=model.cached_fn,
            temperature=1.0,
            **schedule,
        )
    expected, (num_rows, width) = found.value.args
    traced = traced_block(
        model, params, num_rows=num_rows, width=width, is_stochastic=True, mesh=mesh, **schedule
    )
    assert str(traced.jaxpr) == str(expected.jaxpr)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_takes_its_own_size_and_no_second_copy_of_the_parameters(cache):
    shape = dict(vocab_size=64, num_layers=2, d_model=256, num_heads=4, num_kv_heads=2, head_dim=64)
    model = make_model(Architecture(**shape, d_ff=1024))
    num_rows, width = 2, 48
    of_parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.abstract))
    of_cache = 2 * 2 * num_rows * width * 2 * 64 * 4  # keys and values of two layers in float32

    def memory(cache):
        traced = traced_block(
            model,
            model.abstract,
            num_rows=num_rows,
            width=width,
            gen_length=16,
            block_length=8,
            cache=cache,
        )
        return traced.lower().compile().memory_analysis()

    plain, cached = memory("none"), memory(cache)
    # one number, the interval of refreshing: the cache of a block begins and ends inside
    assert cached.argument_size_in_bytes == plain.argument_size_in_bytes + 4
    assert cached.output_size_in_bytes == plain.output_size_in_bytes
    # The loop over steps has one; the scan over layers reads it and writes another.
    grown = cached.temp_size_in_bytes - plain.temp_size_in_bytes
    assert of_cache <= grown < 2 * of_cache < of_parameters / 2


@pytest.mark.slow
def test_llada_8b_samples_on_one_h100(tmp_path):
    """The figures of docs/sampling.md come from the same command."""
    found = memory_in_a_process(tmp_path, "--topology", "1xh100", platform="gpu")
    # two bytes for each parameter, besides a few norms
    assert 2 * PARAMETERS < found["argument_bytes"] < 2 * PARAMETERS + GIB // 64
    # Logits of the whole canvas would not fit in this.
    assert found["temporary_bytes"] < 4 * 1024 * 126_464 * 4 / 2
    assert found["argument_bytes"] < found["peak_bytes"] < 16 * GIB < found["usable_bytes"]
    assert found["kernels"] == {"__cudnn$fmhaSoftmax": 32}, "one call for each layer"


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_pass_on_one_h100_copies_neither_weights_nor_cache(tmp_path, cache):
    """A pass with a cache moves little else: copies of both would take most of its time."""
    words = ("--topology", "1xh100", "--cache", cache)
    found = memory_in_a_process(tmp_path, *words, platform="gpu")
    # the logits of a block and their noise
    assert found["copied_in_loops_bytes"] < 0.2 * GIB
    of_cache = 2 * 32 * 4 * 1024 * 4096 * 2 if cache == "dual" else 0
    assert found["peak_bytes"] < found["argument_bytes"] + of_cache + GIB


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "most", "moved"), [("fsdp=8", 4.5, 80), ("tensor=8", 3, 2.2)])
def test_llada_8b_samples_with_a_cache_on_a_v5e_8(tmp_path, mesh, most, moved):
    """A cache of 2 GiB and parameters of 15, each split by 8.

    fsdp gathers the parameters in every pass; tensor exchanges what they are multiplied by.
    """
    words = ("--topology", "v5e-8", "--cache", "dual", "--mesh", mesh)
    found = memory_in_a_process(tmp_path, *words, platform="tpu")
    assert 2 * PARAMETERS < 8 * found["argument_bytes"] < 2 * PARAMETERS + GIB // 64
    assert found["argument_bytes"] < found["peak_bytes"] < most * GIB < found["usable_bytes"]
    assert 0 < found["collective_bytes"] < moved * GIB


@pytest.mark.slow
def test_tensor_parallel_gpus_copy_neither_weights_nor_cache(tmp_path):
    words = ("--topology", "8xh100", "--cache", "dual", "--mesh", "tensor=8")
    found = memory_in_a_process(tmp_path, *words, platform="gpu")
    assert found["copied_in_loops_bytes"] < 0.1 * GIB
    assert 0 < found["collective_bytes"] < 2.2 * GIB
